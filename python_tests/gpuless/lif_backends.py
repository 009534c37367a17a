"""lif for the backends' checks: samples that cross their blocks and segments, its Triton kernels as compiled."""

from __future__ import annotations

from typing import Any

import torch
from gpuless import aot

from spikecore.testing.cases import CASES, Sample, values


def lif_samples(dtype: torch.dtype, lengths: tuple[int, ...] = (1, 4, 9, 50, 100)) -> list[Sample]:
    """Those of the sweep, off the grid, and sequences that cross the kernels' segments, blocks and vectors."""
    out = list(CASES["lif"].samples(dtype, False))
    for T in lengths:
        for N in (520, 517):
            every = {"return_h": True, "return_v": True, "v_init": torch.randn(N), "detach_reset": False}
            channels = {"decay": torch.rand(N), "gain": torch.rand(N), "channel_dim": 1}
            scalars = {"decay": torch.tensor(0.9), "gain": torch.tensor(0.7)}
            for name, changes in (
                ("hard", {**every, **channels}),
                ("soft", {**every, **scalars, "v_reset": None}),
                ("packed", {"packed": True, "v_init": torch.randn(N), **scalars}),
            ):
                out.append(Sample(f"T={T} N={N} {name}", {"x": values((T, N), dtype, False, T), **changes}))
    return out


def triton_facts(direction: str, dtype: torch.dtype, arch: int, *, aligned: bool = True, **changes: Any) -> Any:
    """`gpuless.aot.Facts` of lif_fwd_kernel or lif_bwd_kernel as the launchers call them: decay and gain per channel,
    all gradients wanted. `aligned`: N and x's step divisible by 16; `changes`: of the constants.
    """
    from spikecore.triton import lif as module

    kernel = getattr(module, f"lif_{direction}_kernel")
    x = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}[dtype]
    flags = {"HARD": True, "DECAY": True, "GAIN": True, "PER_CHANNEL": True, "V_INIT": True}
    flags["BN"] = module.BLOCK_BYTES // dtype.itemsize
    if direction == "fwd":
        flags |= {"H": False, "V": False, "PACKED": False}
    else:
        flags |= {
            "DETACH": True,
            "KIND": 0,
            "NEED_DECAY": True,
            "NEED_GAIN": True,
            "NEED_V_INIT": True,
            "SEG": module.SEGMENT,
        }
        flags |= {"G_S": True, "G_V_LAST": True, "G_H": False, "G_V": False}
    flags |= changes
    absent = {"p_h": "H", "p_v": "V", "p_g_h": "G_H", "p_g_v": "G_V"}
    constants = flags | {p: None for p, flag in absent.items() if p in kernel.arg_names and not flags[flag]}
    signature = {}
    for name in kernel.arg_names:
        if name in ("p_x", "p_s", "p_g_s", "p_g_x"):
            signature[name] = "*u8" if name == "p_s" and flags["PACKED"] else x
        else:
            signature[name] = "*fp32" if name.startswith("p_") else "fp32"
    signature |= dict.fromkeys(("T", "N", "x_step", "C", "inner"), "i32")
    divisible = [n for n in signature if n.startswith("p_") and n not in constants] + ["N", "x_step"] * aligned
    options = {"enable_fp_fusion": False}  # as _launch in spikecore/triton/lif.py
    return aot.triton_aot(kernel, signature, constants, arch, align16=divisible, options=options)
