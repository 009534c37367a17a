"""selective_scan's Triton kernels without a GPU: compiled ahead of time, and interpreted in another process."""

import re
from pathlib import Path

import pytest
import torch
from gpuless import aot
from gpuless.interpreted import passed, run_interpreted

pytest.importorskip("triton", reason="triton is not installed")


def facts(direction: str, dtype: torch.dtype, arch: int):
    from spikecore.triton import selective_scan as module

    kernel = getattr(module, f"selective_scan_{direction}_kernel")
    sequence = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}[dtype]
    flags = dict.fromkeys(("SOFTPLUS", "D", "Z", "BIAS", "INIT"), True) | {"BC": module.CHANNELS, "BS": 16}
    if direction == "bwd":
        flags |= {"G_Y": True, "G_LAST": True, "SEG": module.SEGMENT}
    halves = ("p_u", "p_delta", "p_B", "p_C", "p_z", "p_y", "p_g_y", "p_g_u", "p_g_delta", "p_g_z")
    signature = {n: (sequence if n in halves else "*fp32") if n.startswith("p_") else "i32" for n in kernel.arg_names}
    pointers = [n for n in kernel.arg_names if n.startswith("p_")]
    return aot.triton_aot(kernel, signature, flags, arch, align16=pointers, options=module.OPTIONS)


@pytest.mark.parametrize("arch", aot.ARCHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_compiled(direction, dtype, arch):
    f = facts(direction, dtype, arch)
    assert (f.spills, f.stack, f.local) == (0, 0, 0)
    assert f.registers <= (64 if direction == "fwd" else 128)
    assert not re.search(r"\bfma\.", f.ptx)


@pytest.mark.slow
def test_interpreted():
    assert passed(run_interpreted(Path(__file__).with_name("interpreted_selective_scan.py"))) >= 8
