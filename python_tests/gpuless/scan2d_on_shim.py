"""selective_scan_2d's launch parameters for ctypes, and buffers for one launch."""

from __future__ import annotations

import ctypes

import torch
from gpuless import shim

SOURCE = shim.CSRC / "selective_scan_2d/selective_scan_2d_cuda.cu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # in the order of DType
GROUP, CHUNK = 16, 128  # kGpuGroup; places of a chunk

_i64, _i32, _ptr = ctypes.c_int64, ctypes.c_int32, ctypes.c_void_p


class Scan(ctypes.Structure):
    """SelectiveScan2d of csrc/selective_scan_2d/selective_scan_2d.h."""

    _fields_ = [
        ("dtype", _i32),
        *((n, _i64) for n in ("B", "C", "H", "W")),
        *((n, _i32) for n in ("K", "S")),
        ("directions", _i32 * 8),
        ("softplus", ctypes.c_bool),
        *((n, _ptr) for n in ("x", "delta", "A", "into", "out_of", "D", "bias")),
    ]


class Fwd(ctypes.Structure):
    _fields_ = [("scan", Scan), ("y", _ptr), ("sum", _ptr)]


class Bwd(ctypes.Structure):
    _fields_ = [
        ("scan", Scan),
        *((n, _ptr) for n in ("g_y", "g_x", "g_delta", "g_A", "g_into", "g_out", "g_D", "g_bias", "sum", "starts")),
    ]


def launch(
    library: shim.Shim, direction: str, B: int = 1, C: int = 5, H: int = 12, W: int = 16, S: int = 2,
    directions: tuple[int, ...] = (0, 1, 2, 3), dtype: torch.dtype = torch.float32, coalescing: bool = False,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """One launch of "fwd" or "bwd" on random inputs, registered as read-only; returns what it wrote."""
    K, L = len(directions), H * W
    inputs = {
        "x": torch.rand(B, C, L).to(dtype),
        "delta": torch.rand(B, K, C, L).to(dtype),
        "A": -torch.rand(K, C, S),
        "into": torch.rand(B, K, S, L).to(dtype),
        "out_of": torch.rand(B, K, S, L).to(dtype),
        "D": torch.rand(K, C),
        "bias": torch.rand(K, C),
    }
    if direction == "bwd":
        inputs["g_y"] = torch.rand(B, C, L).to(dtype)
    inputs = shim.apart(inputs)
    scan = Scan(DTYPES.index(dtype), B, C, H, W, K, S, (_i32 * 8)(*directions), True)
    for name, t in inputs.items():
        if name != "g_y":
            setattr(scan, name, t.data_ptr())
    if direction == "fwd":
        p, outputs = Fwd(scan), {"y": torch.empty(B, C, L, dtype=dtype)}
    else:
        p, partial = Bwd(scan), (B, (C + GROUP - 1) // GROUP, K, S, L)
        shapes = {"g_A": (B, K, C, S), "g_into": partial, "g_out": partial, "g_D": (B, K, C), "g_bias": (B, K, C)}
        shapes["starts"] = (B, C, (L + CHUNK - 1) // CHUNK, S)
        outputs = {name: torch.empty_like(inputs[of]) for name, of in (("g_x", "x"), ("g_delta", "delta"))}
        outputs |= {name: torch.empty(shape) for name, shape in shapes.items()}
        p.g_y = inputs["g_y"].data_ptr()
    if dtype != torch.float32:
        outputs["sum"] = torch.empty(B, C, L)
    outputs = shim.apart(outputs)
    if dtype == torch.float32:
        p.sum = outputs["y" if direction == "fwd" else "g_x"].data_ptr()
    for name, t in outputs.items():
        setattr(p, name, t.fill_(torch.nan).data_ptr())
    library.reset(0, coalescing, **{f"ro_{name}": t for name, t in inputs.items()}, **outputs)
    assert library.call(f"spk::selective_scan_2d_{direction}_cuda", ctypes.byref(p), None) == 0
    return outputs
