"""selective_scan_2d's Triton kernels without a GPU: compiled ahead of time, and interpreted with the guard."""

from pathlib import Path

import pytest
import torch
from gpuless import aot
from gpuless.interpreted import passed, run_interpreted

pytest.importorskip("triton", reason="triton is not installed")

POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
MAPS = ("p_x", "p_delta", "p_B", "p_C", "p_y", "p_g_y", "p_g_x", "p_g_delta")
MOST = {"fwd": 128, "bwd": 255}  # registers a thread


def facts(direction, dtype, arch, states=16):
    """Four directions with all options, as `_launch` calls the kernels."""
    from spikecore.triton import selective_scan_2d as module

    kernel = getattr(module, f"selective_scan_2d_{direction}_kernel")
    constants = {
        "K": 4, "POSITIVE": True, "D": True, "BIAS": True, "CONVERT": dtype != torch.float32,
        "BC": module.FWD_CHANNELS if direction == "fwd" else module.BWD_CHANNELS, "BL": module.CHUNK, "BS": states,
    }  # fmt: skip
    signature = {n: POINTERS[dtype] if n in MAPS else "*fp32" for n in kernel.arg_names if n.startswith("p_")}
    # Codes pass 32 bits at the eighth direction.
    signature |= dict.fromkeys(("C", "H", "W", "S"), "i32") | {"codes": "i64"}
    divisible = [n for n in signature if n.startswith("p_")]
    options = {"enable_fp_fusion": False, "num_warps": getattr(module, f"{direction.upper()}_WARPS")}
    return aot.triton_aot(kernel, signature, constants, arch, align16=divisible, options=options)


@pytest.mark.slow
@pytest.mark.parametrize("arch", aot.ARCHS)
@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_compiled(direction, arch):
    for dtype in (torch.float32, torch.float16) if arch == 90 else (torch.float32,):
        f = facts(direction, dtype, arch)
        print(f"{direction} {dtype} sm_{arch}: registers {f.registers}, spills {f.spills}, shared {f.shared}")
        assert f.registers <= MOST[direction]
        assert (f.spills, f.stack, f.local) == (0, 0, 0)


@pytest.mark.slow
def test_interpreted():
    assert passed(run_interpreted(Path(__file__).with_name("interpreted_scan2d.py"))) == 15
