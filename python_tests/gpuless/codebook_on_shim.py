"""codebook_lookup's launch parameters for ctypes, its source reduced or with planted defects, its compiled kernels."""

from __future__ import annotations

import ctypes
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from gpuless import aot, shim

SOURCE = shim.CSRC / "codebook_lookup/codebook_lookup_cuda.cu"
NVCC = ["-fmad=false"]
_i64, _i32, _ptr = ctypes.c_int64, ctypes.c_int32, ctypes.c_void_p


def _fields(**types: str) -> list[tuple[str, Any]]:
    kinds = {"i64": _i64, "i32": _i32, "ptr": _ptr}
    return [(name, kinds[kind.rstrip("_")]) for kind, names in types.items() for name in names.split()]


class CodebookFwd(ctypes.Structure):
    _fields_ = [
        *_fields(i32="dtype c_dtype metric", i64="n K D z_step v_step i_step"),
        *_fields(ptr="z codes indices values z_norm c_norm found", i64="splits", ptr_="bad_z bad_c"),
    ]


class CodebookBwd(ctypes.Structure):
    _fields_ = _fields(i32="dtype c_dtype", i64="n K D g_step i_step", ptr="g indices order starts g_codes")


def forward_buffers(z: torch.Tensor, codes: torch.Tensor, splits: int = 1) -> dict[str, torch.Tensor]:
    n, K = len(z), len(codes)
    buffers = {
        "z": z,
        "codes": codes,
        "indices": torch.full((n,), -7),
        "values": torch.full_like(z, torch.nan),
        "z_norm": torch.full((n,), torch.nan),
        "c_norm": torch.full((K,), torch.nan),
        "found": torch.full((splits * n * 4,), torch.nan),
        "bad_z": torch.zeros(1, dtype=torch.int32),
        "bad_c": torch.zeros(1, dtype=torch.int32),
    }
    return shim.apart(buffers)


def forward_parameters(buffers: dict[str, torch.Tensor], metric: int = 0, splits: int = 1) -> CodebookFwd:
    z, codes = buffers["z"], buffers["codes"]
    types = (torch.float32, torch.bfloat16, torch.float16)
    p = CodebookFwd(types.index(z.dtype), types.index(codes.dtype), metric, *z.shape[:1], *codes.shape)
    p.z_step, p.v_step, p.i_step, p.splits = z.stride(0), buffers["values"].stride(0), 1, splits
    for name, t in buffers.items():
        setattr(p, name, t.data_ptr())
    return p


def backward_buffers(g: torch.Tensor, indices: torch.Tensor, K: int) -> dict[str, torch.Tensor]:
    buffers = {"g": g, "indices": indices, "g_codes": torch.full((K, g.shape[1]), torch.nan)}
    return shim.apart(buffers)


def backward_parameters(buffers: dict[str, torch.Tensor]) -> CodebookBwd:
    g, out = buffers["g"], buffers["g_codes"]
    p = CodebookBwd(0, 0, len(g), *out.shape, g.stride(0), 1)
    for name, t in buffers.items():
        setattr(p, name, t.data_ptr())
    return p


def source(edits: Sequence[tuple[str, str]] = (), types: str = "float") -> str:
    """codebook_lookup_cuda.cu for "float" or "__half" alone (compiling takes time) or "all", given text replaced."""
    text = SOURCE.read_text()
    if types != "all":
        text, n = re.subn(
            r"    case DType::f32: return (\w+)<.*?default: return wide.*?;\n",
            rf"    default: return \1<{types}, {types}>(p, stream);\n",
            text,
            flags=re.S,
        )
        assert n == 2
        text = text.replace("  const bool wide = p.c_dtype == DType::f32;\n", "")
    for old, new in edits:
        assert old in text, f"{SOURCE.name} no longer contains {old!r}"
        text = text.replace(old, new, 1)
    return text


def codebook_facts(archs: Sequence[int], halves: bool = True) -> list[aot.Facts]:
    """Every kernel as compiled for `archs`, warnings as errors; names as in "codebook_screen float float x 4"."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / SOURCE.name
        path.write_text(source(types="all" if halves else "float"))
        facts = aot.nvcc_facts(path, archs, [shim.CSRC], NVCC)
    return [aot.replace(f, name=_plain(f.name)) for f in facts]


def _plain(mangled: str) -> str:
    kernel = re.search(r"(codebook_[a-z]+)_kernelI(\S*?)E(?:E|v)", mangled)
    assert kernel, mangled
    kinds = {"f": "float", "6__half": "half", "13__nv_bfloat16": "bf16", "S2_": "same", "S3_": "same"}
    found = re.findall(r"13__nv_bfloat16|6__half|S\d_|f|Li\d+", kernel[2] + "E")
    return " ".join([kernel[1], *(f"x {k[2:]}" if k.startswith("Li") else kinds[k] for k in found)])
