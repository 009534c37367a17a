"""spiking_self_attention's Triton kernels without a GPU: compiled ahead of time, and interpreted with the guard.

Backward launches lif's kernels alone, over [T, B H D N] neurons with a parameter a head; the products are torch's.
"""

from pathlib import Path

import pytest
import torch
from gpuless import aot, on_ptx
from gpuless.interpreted import passed, run_interpreted

from spikecore.ops.lif import LIFParams, pack_spikes

pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.slow
def test_interpreted():
    assert passed(run_interpreted(Path(__file__).with_name("interpreted_spiking_self_attention.py"))) == 18


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float32", "float16", "packed"])
def test_compiled(kind):
    """As launched for wide rows: no spills, 16-byte accesses (but for a tile of few bytes)."""
    operands = {name: torch.rand(4, 1, 2, 64, 256) < 0.3 for name in "qkv"}
    attn = LIFParams(decay=torch.tensor([0.5, 0.25]), gain=torch.tensor(0.75), v_threshold=0.5)
    if kind == "packed":
        arguments = {name: pack_spikes(x.float()) for name, x in operands.items()} | {"T": 4}
    else:
        arguments = {name: x.to(getattr(torch, kind)) for name, x in operands.items()}
    launches = {}
    keep = lambda launch: launches.setdefault(launch.fn.__name__, launch)  # noqa: E731
    with on_ptx.of_triton("spiking_self_attention", keep) as (function, _):
        function(**arguments, attn=attn)
    assert set(launches) == {"ssa_dots_kernel", "ssa_fwd_kernel"}
    for name, launch in launches.items():
        for arch in aot.ARCHS:
            f = launch.facts(arch)
            assert (f.spills, f.stack, f.local) == (0, 0, 0), (name, arch)
            assert f.registers <= 128, (name, arch, f.registers)  # two programs of 256 threads on a multiprocessor
            assert f.stg128, (name, arch)
            assert f.ldg128 or (kind != "float32" and name == "ssa_dots_kernel"), (name, arch)  # kv is read so
