"""selective_scan's launch parameters for ctypes: the structs of csrc/selective_scan/selective_scan.h."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from gpuless import shim

SOURCE = shim.CSRC / "selective_scan/selective_scan_cuda.cu"
PARTS = 2  # of a group, in backward

_i64, _i32, _ptr, _bool = ctypes.c_int64, ctypes.c_int32, ctypes.c_void_p, ctypes.c_bool


class ScanRows(ctypes.Structure):
    _fields_ = [("data", _ptr), ("batch", _i64), ("row", _i64)]


class ScanMatrix(ctypes.Structure):
    _fields_ = [("data", _ptr), ("batch", _i64), ("group", _i64), ("row", _i64)]


class SelectiveScan(ctypes.Structure):
    _fields_ = [
        ("dtype", _i32), *((n, _i64) for n in "BCLGS"), ("softplus", _bool), ("u", ScanRows), ("delta", ScanRows),
        ("z", ScanRows), ("Bs", ScanMatrix), ("Cs", ScanMatrix), *((n, _ptr) for n in ("A", "D", "bias", "h_init")),
    ]  # fmt: skip


class SelectiveScanFwd(ctypes.Structure):
    _fields_ = [("in_", SelectiveScan), ("y", _ptr), ("h_last", _ptr)]


class SelectiveScanBwd(ctypes.Structure):
    _fields_ = [
        ("in_", SelectiveScan), ("g_y", ScanRows),
        *((n, _ptr) for n in ("g_h_last", "g_u", "g_delta", "g_z", "g_h_init", "g_A", "g_D", "g_bias", "g_Bs", "g_Cs")),
        ("parts", _i64), ("starts", _ptr),
    ]  # fmt: skip


def problem(C: int = 20, S: int = 2, L: int = 140) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], Any]:
    """(inputs, outputs of both directions, SelectiveScan) in float32 with B = G = 1; every option but h_init."""
    inputs = {n: torch.randn(1, C, L) for n in ("u", "delta", "z", "g_y")}
    inputs |= {"A": -torch.rand(C, S), "D": torch.randn(C), "bias": torch.randn(C)}
    inputs |= {n: torch.randn(1, 1, S, L) for n in ("Bs", "Cs")}
    stretches = -(-L // 128)
    sizes = {
        "y": (1, C, L), "h_last": (1, C, S), "g_u": (1, C, L), "g_delta": (1, C, L), "g_z": (1, C, L),
        "g_Bs": (PARTS, S, L), "g_Cs": (PARTS, S, L), "starts": (PARTS, 8, stretches, S),
    }  # fmt: skip
    outputs = {n: torch.full(size, torch.nan) for n, size in sizes.items()}
    outputs |= {n: torch.full(size, torch.nan, dtype=torch.float64) for n, size in
                {"g_A": (1, C, S), "g_D": (1, C), "g_bias": (1, C)}.items()}  # fmt: skip
    inputs, outputs = shim.apart(inputs), shim.apart(outputs)
    at = {n: t.data_ptr() for n, t in inputs.items()}
    rows = [ScanRows(at[n], C * L, L) for n in ("u", "delta", "z")]
    matrices = [ScanMatrix(at[n], S * L, S * L, L) for n in ("Bs", "Cs")]
    p = SelectiveScan(0, 1, C, L, 1, S, True, *rows, *matrices, at["A"], at["D"], at["bias"], None)
    return inputs, outputs, p


def run(library: shim.Shim, coalescing: bool = False, **sizes: int) -> None:
    """Forward, and where that had no fault backward, with every buffer registered."""
    inputs, outputs, p = problem(**sizes)
    C, L = p.C, p.L
    to = {n: t.data_ptr() for n, t in outputs.items()}
    buffers = {f"ro_{n}": t for n, t in inputs.items()} | outputs
    library.reset(0, coalescing, **buffers)
    fwd = SelectiveScanFwd(p, to["y"], to["h_last"])
    library.call("spk::selective_scan_fwd_cuda", ctypes.byref(fwd), None)
    if library.error:
        return
    bwd = SelectiveScanBwd(in_=p, g_y=ScanRows(inputs["g_y"].data_ptr(), C * L, L), parts=PARTS)
    for name in ("g_u", "g_delta", "g_z", "g_A", "g_D", "g_bias", "g_Bs", "g_Cs", "starts"):
        setattr(bwd, name, to[name])
    library.call("spk::selective_scan_bwd_cuda", ctypes.byref(bwd), None)


def source(edit: tuple[str, str]) -> str:
    """The kernels for float alone, with one text replaced."""
    text = SOURCE.read_text()
    for half in ("__half", "__nv_bfloat16"):
        text = text.replace(f"return forward<{half}>", "return forward<float>")
        text = text.replace(f"return backward<{half}>", "return backward<float>")
    assert edit[0] in text, f"{SOURCE.name} no longer contains {edit[0]!r}"
    return text.replace(*edit, 1)
