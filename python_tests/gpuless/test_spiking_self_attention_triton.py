"""spiking_self_attention's second GPU backend without a GPU: interpreted with the guard in another process, and what it
launches compiled ahead of time. That is lif's kernels alone, over [T, B H D N] neurons with a parameter a head; the
products are torch's.
"""

from pathlib import Path

import pytest
import torch
from gpuless import aot
from gpuless.interpreted import passed, run_interpreted
from gpuless.lif_backends import triton_facts

triton = pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.slow
def test_interpreted():
    assert passed(run_interpreted(Path(__file__).with_name("interpreted_spiking_self_attention.py"))) == 11


def test_it_has_no_kernel_of_its_own():
    """Else what stands above is no longer so, and that kernel needs the checks that lif's have."""
    from spikecore.triton import spiking_self_attention as module

    assert not [name for name, f in vars(module).items() if isinstance(f, triton.runtime.KernelInterface)]


@pytest.mark.parametrize("arch", aot.ARCHS)
@pytest.mark.parametrize(
    ("direction", "changes"),
    [("fwd", {}), ("fwd", {"PACKED": True}), ("bwd", {"KIND": 1}), ("bwd", {"KIND": 1, "HARD": False})],
    ids=str,
)
def test_what_it_launches(direction, changes, arch):
    """float32, decay and gain of a head; nothing spills, 16-byte accesses, as many registers as leave lif's blocks."""
    facts = triton_facts(direction, torch.float32, arch, **{"PER_CHANNEL": True, **changes})
    assert (facts.spills, facts.stack, facts.local) == (0, 0, 0)
    assert facts.registers <= {"fwd": 64, "bwd": 168}[direction]
    assert facts.ldg128
    assert facts.stg128
