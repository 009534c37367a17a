"""codebook_lookup's Triton kernels as compiled, the way their launchers call them."""

from __future__ import annotations

from typing import Any

import torch
from gpuless import aot

NAMES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}


def triton_facts(
    kernel: str, dtype: torch.dtype, arch: int, *, metric: int = 0, aligned: bool = True, **changes: Any
) -> Any:
    """`gpuless.aot.Facts` of codebook_<kernel>_kernel. `aligned`: D and steps divisible by 16."""
    from spikecore.triton import codebook_lookup as module

    fn = getattr(module, f"codebook_{kernel}_kernel")
    constants: dict[str, Any] = {
        "norm": {"INVERSE": False, "BD": 256},
        "screen": {"METRIC": metric, "BM": module.BM, "BN": module.BN, "BK": module.BK[dtype]},
        "settle": {"METRIC": metric, "BN": module.SETTLE, "BD": 256},
        "bwd": {"BD": 256},
    }[kernel] | changes
    types = {
        **dict.fromkeys(("p_x", "p_z", "p_codes", "p_values", "p_g", "p_g_codes"), NAMES[dtype]),
        **dict.fromkeys(("p_norm", "p_z_norm", "p_c_norm", "p_found"), "*fp32"),
        **dict.fromkeys(("p_indices", "p_order", "p_starts"), "*i64"),
        "p_index": "*i32",
        "gamma": "fp32",
    }
    signature = {name: types.get(name, "i32") for name in fn.arg_names}
    divisible = [n for n in signature if n.startswith("p_")] + ["D", "step", "z_step", "v_step", "g_step"] * aligned
    divisible = [n for n in divisible if n in signature]
    options = {} if kernel == "bwd" else {"enable_fp_fusion": False}
    warps = module.WARPS[dtype] if kernel == "screen" else 4
    return aot.triton_aot(fn, signature, constants, arch, num_warps=warps, align16=divisible, options=options)
