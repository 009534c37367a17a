"""The attentions' Triton kernels without a GPU: compiled ahead of time, and interpreted with the guard."""

from pathlib import Path

import pytest
import torch
from backends import results
from gpuless import on_ptx
from gpuless.interpreted import passed, run_interpreted

from spikecore.ops.lif import LIFParams
from spikecore.testing.cases import CASES, Sample

pytest.importorskip("triton", reason="triton is not installed")


# Registers a thread: of 65,536 on a multiprocessor.
MOST = {"qk_sum_kernel": 128, "qk_gate_kernel": 64, "qk_attn_bwd_kernel": 64, "qk_operand_bwd_kernel": 255}


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "archs"), [(torch.float32, (90, 100)), (torch.float16, (80,))], ids=str)
def test_compiled(dtype, archs):
    """As launched for a block that is wide enough for vectors: no spills, 16-byte accesses, no contraction."""
    operands = {arg: torch.rand(8, 1, 2, 64, 256).to(dtype) for arg in "qk"}
    neurons = {n: LIFParams(decay=torch.tensor([0.5, 0.25]), gain=torch.tensor(0.75)) for n in ("attn", "qkv")}
    launches = {}
    keep = lambda launch: launches.setdefault(launch.fn.__name__, launch)  # noqa: E731
    with on_ptx.of_triton("qk_attention", keep) as (function, _):
        results(CASES["qk_attention"], function, Sample("wide", {**operands, **neurons, "mode": "channel"}))
    assert set(launches) == set(MOST)
    for name, launch in launches.items():
        for arch in archs:
            f = launch.facts(arch)
            assert (f.spills, f.stack, f.local) == (0, 0, 0), (name, arch)
            assert f.registers <= MOST[name], (name, arch, f.registers)
            assert "fma.rn" not in f.ptx, (name, arch)
            assert f.ldg128 or name == "qk_attn_bwd_kernel", (name, arch)
            assert f.stg128 or name in ("qk_sum_kernel", "qk_attn_bwd_kernel"), (name, arch)


@pytest.mark.slow
def test_interpreted():
    assert passed(run_interpreted(Path(__file__).with_name("interpreted_qk_attention.py"))) >= 12
