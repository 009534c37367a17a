"""lif's launch parameters for ctypes, its source reduced or with planted defects, facts of its compiled kernels."""

from __future__ import annotations

import ctypes
import re
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from gpuless import aot, shim

SOURCE = shim.CSRC / "lif/lif_cuda.cu"

# ---- launches without torch: the structs of csrc/lif/lif.h, and Neuron<float> of neuron.h

_i64, _i32, _f64, _f32, _ptr, _bool = (
    ctypes.c_int64, ctypes.c_int32, ctypes.c_double, ctypes.c_float, ctypes.c_void_p, ctypes.c_bool,
)  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # in the order of DType


def _fields(**types: str) -> list[tuple[str, Any]]:
    """[(name, type)] from type="name name ..."."""
    kinds = {"i64": _i64, "i32": _i32, "f64": _f64, "f32": _f32, "ptr": _ptr, "flag": _bool}
    return [(name, kinds[kind.rstrip("_")]) for kind, names in types.items() for name in names.split()]


class LifNeuron(ctypes.Structure):
    _fields_ = _fields(
        f64="decay gain", ptr="decay_c gain_c", i64="C inner", f64_="threshold rest reset_by", flag="hard strict"
    )


class LifFwd(ctypes.Structure):
    _fields_ = [
        ("neuron", LifNeuron),
        *_fields(i32="dtype", i64="T N x_step", ptr="x v_init s v_last h v", flag="packed"),
    ]


class LifBwd(ctypes.Structure):
    _fields_ = [
        ("neuron", LifNeuron),
        *_fields(i32="dtype", i64="T N x_step", ptr="x v_init g_s g_v_last g_h g_v g_x g_decay g_gain g_v_init"),
        *_fields(flag="detach", i32="surrogate", f64="a b", ptr="checkpoints", i32_="steps"),
    ]


class LifReduce(ctypes.Structure):
    _fields_ = _fields(i32="dtype", i64="N C inner", ptr="in_ out partial")


class Constants(ctypes.Structure):
    """What the launchers hand to the kernels beside the params."""

    _fields_ = _fields(f32="rest fire_at threshold reset_by")


def parameters(kind: type[ctypes.Structure], x: torch.Tensor, neuron: LifNeuron | None = None, **values: Any) -> Any:
    """A LifFwd or LifBwd for x: [T, N]; tensors become pointers, what is not named stays null."""
    p = kind(neuron=neuron or LifNeuron(0.5, 0.5, None, None, 1, x.shape[1], 1.0, 0.0, 1.0, True, False))
    p.dtype, p.x_step, (p.T, p.N) = DTYPES.index(x.dtype), x.stride(0), x.shape
    for name, value in {"x": x, **values}.items():
        setattr(p, name, value.data_ptr() if isinstance(value, torch.Tensor) else value)
    return p


# ---- the source


def source(
    types: Iterable[str] = ("float", "__half", "__nv_bfloat16"),
    surrogates: Iterable[str] | None = None,
    edits: Sequence[tuple[str, str]] = (),
) -> str:
    """lif_cuda.cu with fewer instantiations (compiling takes the time) and the given text replaced.

    The surrogates left out run as the first of `surrogates`, the types left out as the first of `types`.
    """
    text = SOURCE.read_text()
    types = list(types)
    for name in {"float", "__half", "__nv_bfloat16"} - set(types):
        text, n = re.subn(rf"(return (?:for|back)ward)<{name}>", rf"\1<{types[0]}>", text)
        assert n == 2, name
    if surrogates is not None:
        kept = list(surrogates)
        pattern = r"(return backward<T, V, Surrogate::)(\w+)>"
        text, n = re.subn(pattern, lambda m: f"{m[1]}{m[2] if m[2] in kept else kept[0]}>", text)
        assert n == 7
    for old, new in edits:
        assert old in text, f"{SOURCE.name} no longer contains {old!r}"
        text = text.replace(old, new, 1)
    return text


# ---- what nvcc makes of it

NVCC = ["-fmad=false"]  # as CMakeLists.txt has it, beside -O3


def lif_facts(archs: Sequence[int] = aot.ARCHS, surrogates: Iterable[str] | None = None) -> list[aot.Facts]:
    """Every lif kernel as compiled for `archs`, warnings as errors; names as in "lif_bwd float x 4 sigmoid".

    surrogates: only these, for speed (all seven: three minutes).
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / SOURCE.name
        path.write_text(source(surrogates=surrogates))
        facts = aot.nvcc_facts(path, archs, [shim.CSRC], NVCC)
    return [aot.replace(f, name=_plain(f.name)) for f in facts]


def _plain(mangled: str) -> str:
    surrogates = re.search(r"enum class Surrogate : int32_t \{ (.*?) \}", (shim.CSRC / "core/surrogate.h").read_text())
    assert surrogates
    names = surrogates[1].split(", ")
    types = r"I(f|6__half|13__nv_bfloat16)Li(\d+)E(?:LNS_9SurrogateE(\d)E)?"
    kernel = re.search(rf"(lif_(?:fwd|bwd|reduce|reduce_parts))_kernel(?:{types})?", mangled)
    assert kernel, mangled
    op, kind, V, surrogate = kernel.groups()
    if not kind:
        return op
    kind = {"f": "float", "6__half": "half", "13__nv_bfloat16": "bf16"}[kind]
    return f"{op} {kind} x {V}" + (f" {names[int(surrogate)]}" if surrogate else "")


def facts_table(facts: Iterable[aot.Facts]) -> str:
    """Lines kernel, architecture, registers, bytes of stack and shared memory, spills, 128-bit loads and stores."""
    head = ["kernel", "sm", "registers", "stack", "shared", "spills", "LDG.128", "STG.128"]
    rows = [
        [f.name, f.arch, f.registers, f.stack, f.shared, f.spills, f.ldg128, f.stg128]
        for f in sorted(facts, key=lambda f: (f.name, f.arch))
    ]
    widths = [max(len(str(cell)) for cell in column) for column in zip(head, *rows, strict=True)]
    return "\n".join(
        "  ".join(
            str(c).ljust(w) if i == 0 else str(c).rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True))
        )
        for r in [head, *rows]
    )
