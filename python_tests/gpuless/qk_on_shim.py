"""The attentions for the backends' checks: launch parameters for ctypes, packed calls."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import torch
from gpuless import shim
from gpuless.lif_on_shim import _fields

from spikecore.ops import pack_spikes

SOURCE = shim.CSRC / "qk_attention/qk_attention_cuda.cu"

# ---- the structs of csrc/qk_attention/qk_attention.h


class QkNeuron(ctypes.Structure):
    _fields_ = _fields(
        f64="decay gain", ptr="decay_h gain_h", i64="decay_step gain_step", f64_="threshold rest reset_by a b",
        i32="surrogate", flag="hard strict detach",
    )  # fmt: skip


class QkRows(ctypes.Structure):
    _fields_ = _fields(ptr="data", i64="t b h r")


class QkShape(ctypes.Structure):
    _fields_ = _fields(i64="T B H R L", flag="columns currents", i32="dtype")


class QkFwd(ctypes.Structure):
    _fields_ = [
        ("shape", QkShape), ("attn", QkNeuron), ("qkv", QkNeuron), *_fields(flag="packed"),
        *[(name, QkRows) for name in ("y", "s", "w", "out")], *_fields(ptr="potentials"),
    ]  # fmt: skip


class QkBwd(ctypes.Structure):
    _fields_ = [
        ("shape", QkShape), ("attn", QkNeuron), ("qkv", QkNeuron),
        *[(name, QkRows) for name in ("y", "s", "w", "g_out", "g_y", "g_s", "g_w")],
        *_fields(ptr="sums potentials g_attn"),
    ]  # fmt: skip


def parameters(
    kind: type[ctypes.Structure], tensors: dict[str, torch.Tensor], columns: bool, currents: bool = False
) -> Any:
    """A QkFwd or QkBwd for float32 operands [T, B, H, R, L], contiguous; what is not named stays null."""
    neuron = QkNeuron(0.5, 0.5, None, None, 0, 0, 0.5, 0.0, 0.5, 2.0, 0.0, 0, True, False, True)
    p = kind(shape=QkShape(*tensors["y"].shape, columns, currents, 0), attn=neuron, qkv=neuron)
    for name, t in tensors.items():
        rows = t.dim() == 5
        setattr(p, name, QkRows(t.data_ptr(), *t.stride()[:4]) if rows else t.data_ptr())
    return p


# ---- packed


def packed_calls() -> Iterator[tuple[str, dict[str, Any]]]:
    """(operator, arguments) over modes, lengths and layouts."""
    g = torch.Generator().manual_seed(0)
    for T in (1, 8, 11):
        for shape in ((2, 3, 5, 7), (1, 2, 300, 9), (1, 2, 9, 300)):
            q, k, v = (pack_spikes((torch.rand((T, *shape), generator=g) < 0.3).float()) for _ in range(3))
            for turned in (False, True):
                if turned:
                    q, k, v = (x.permute(0, 1, 4, 2, 3).contiguous().permute(0, 1, 3, 4, 2) for x in (q, k, v))
                yield "qk_attention", {"q": q, "k": k, "mode": "token", "T": T}
                yield "qk_attention", {"q": q, "k": k, "mode": "channel", "T": T}
                yield "spike_driven_attention", {"q": q, "k": k, "v": v, "T": T}
