"""spiking_self_attention's launch parameters for ctypes."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from gpuless import shim
from gpuless.lif_on_shim import LifNeuron, _fields

SOURCE = shim.CSRC / "spiking_self_attention/spiking_self_attention_cuda.cu"

# ---- the structs of csrc/spiking_self_attention/spiking_self_attention.h


class Sequence(ctypes.Structure):
    _fields_ = _fields(ptr="data", i64="step batch head row column")


class AttentionNeuron(ctypes.Structure):
    _fields_ = [("lif", LifNeuron), *_fields(flag="detach", i32="surrogate", f64="a b")]


class AttentionShape(ctypes.Structure):
    _fields_ = _fields(i32="dtype", flag="packed currents", i64="T B H D N", f64="scale")


class SpikingSelfAttentionFwd(ctypes.Structure):
    _fields_ = [
        ("shape", AttentionShape), ("attn", AttentionNeuron), ("qkv", AttentionNeuron),
        *[(name, Sequence) for name in ("q", "k", "v", "out")], *_fields(ptr="scratch"),
    ]  # fmt: skip


class SpikingSelfAttentionBwd(ctypes.Structure):
    _fields_ = [
        ("shape", AttentionShape), ("attn", AttentionNeuron), ("qkv", AttentionNeuron),
        *[(name, Sequence) for name in ("q", "k", "v", "g_out", "g_q", "g_k", "g_v")],
        *_fields(ptr="g_decay g_gain g_qkv_decay g_qkv_gain scratch"),
    ]  # fmt: skip


def parameters(kind: type[ctypes.Structure], tensors: dict[str, torch.Tensor]) -> Any:
    """Either struct for float32 operands [T, B, H, D, N] of spikes; what is not named stays null."""
    neuron = AttentionNeuron(LifNeuron(0.5, 0.5, None, None, 1, 1, 0.5, 0.0, 0.5, True, False), True, 0, 2.0, 0.0)
    p = kind(shape=AttentionShape(0, False, False, *tensors["q"].shape, 0.125), attn=neuron, qkv=neuron)
    for name, t in tensors.items():
        setattr(p, name, Sequence(t.data_ptr(), *t.stride()) if t.dim() == 5 else t.data_ptr())
    return p
