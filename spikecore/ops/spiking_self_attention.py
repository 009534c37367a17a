"""Spiking self-attention (SSA): attention without softmax between spikes, linear in the number of tokens.

Per time step, batch entry and head, with ``q, k, v: [D, N]``:

    kv[d, e] = sum over n of k[d, n] * v[e, n]                 k^T v first: no [N, N] anywhere
    y[e, n]  = scale * sum over d of q[d, n] * kv[d, e]
    out      = lif over t of y                                  the neuron ``attn``

With ``qkv`` the three operands are currents and pass through neurons of their own first (`lif` with these parameters),
inside the kernel; nothing but the currents is kept for backward, which recomputes the rest. Zhou et al. 2023,
"Spikformer: When Spiking Neural Network Meets Transformer", equations 5 to 8.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spikecore import _backend  # noqa: F401  (defines torch.ops.spikecore.spiking_self_attention_*)
from spikecore.ops._autograd import register
from spikecore.ops.lif import (
    _FLOATS,
    LIFParams,
    _empty_slices,
    _state_dtype,
    lif_ref,
    pack_spikes,
    unpack_spikes,
)
from spikecore.surrogate import Surrogate

__all__ = ["spiking_self_attention", "spiking_self_attention_ref"]

_ATTN = LIFParams(v_threshold=0.5)


def spiking_self_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float = 0.125,
    attn: LIFParams = _ATTN,
    qkv: LIFParams | None = None,
    *,
    T: int | None = None,
) -> Tensor:
    """Fused spiking self-attention (formulas in the module's docstring).

    Args:
        q, k, v: ``[T, B, H, D, N]``, float32, bfloat16, float16 or (CPU only) float64; any strides, fastest where N is
            dense: a model's ``[T, B, C, N]`` passes ``.unflatten(2, (H, D))``. Spikes; the formula holds for any
            numbers. Or packed spikes, ``uint8 [ceil(T / 8), B, H, D, N]`` (see `pack_spikes`), which need ``T`` and
            carry no gradient. With `qkv`: currents.
        scale: factor of the sums.
        attn: the neuron at the end (default: that of `lif`, at threshold 0.5).
        qkv: the neuron of q, of k and of v, where these are currents. ``decay`` and ``gain`` of both are numbers, 0-d
            tensors or ``[H]``; tensors get gradients.
        T: time steps of packed spikes; None for floats.

    Returns:
        Spikes of the shape, dtype and layout of q (packed where q is).

    Raises:
        TypeError: an argument of a wrong type.
        RuntimeError: a tensor of wrong dtype, shape or device; a second backward through this op.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"spiking_self_attention: {name} must be a tensor, got {type(x).__name__}")
    for name, p in (("attn", attn), ("qkv", qkv)):
        if not isinstance(p, LIFParams) and not (name == "qkv" and p is None):
            raise TypeError(f"spiking_self_attention: {name} must be LIFParams, got {p!r}")
        if p is not None and not isinstance(p.surrogate, Surrogate):
            raise TypeError(
                f"spiking_self_attention: {name}.surrogate must be a spikecore.surrogate object, got {p.surrogate!r}"
            )
    if T is not None and T < 1:
        raise ValueError(f"spiking_self_attention: T must be at least 1, got {T}")
    decay_h, gain_h, numbers = attn.encode(q)
    qkv_decay_h, qkv_gain_h, qkv_numbers = (None, None, []) if qkv is None else qkv.encode(q)
    return torch.ops.spikecore.spiking_self_attention_fwd(
        q, k, v, decay_h, gain_h, qkv_decay_h, qkv_gain_h, scale, T or 0, numbers, qkv_numbers
    )


def spiking_self_attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float = 0.125,
    attn: LIFParams = _ATTN,
    qkv: LIFParams | None = None,
    *,
    T: int | None = None,
    smooth: bool = False,
) -> Tensor:
    """The reference of `spiking_self_attention`: matrix products and `lif_ref`; ``smooth`` as there."""
    dtype = q.dtype
    operands = [x.to(_state_dtype(x)) if T is None else unpack_spikes(x, T) for x in (q, k, v)]
    if qkv is not None:
        operands = [_neuron(x, qkv, smooth) for x in operands]
    q, k, v = operands
    kv = k @ v.transpose(-1, -2)  # [T, B, H, D, D]
    y = kv.transpose(-1, -2) @ q
    s = _neuron(scale * y, attn, smooth)
    return s.to(dtype) if T is None else pack_spikes(s)


def _neuron(x: Tensor, p: LIFParams, smooth: bool) -> Tensor:
    return lif_ref(
        x, p.decay, p.gain, v_threshold=p.v_threshold, v_reset=p.v_reset, reset_by=p.reset_by, strict=p.strict,
        detach_reset=p.detach_reset, surrogate=p.surrogate, smooth=smooth,
    )[0]  # fmt: skip


def _check(q: Tensor, k: Tensor, v: Tensor, T: int, currents: bool, parameters: dict[str, Tensor | None]) -> None:
    """csrc/spiking_self_attention's checks, word for word, for what never reaches it: tracing and Triton."""
    op = "spiking_self_attention"

    def name(t: Tensor) -> str:
        return f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)} on {t.device.type}"

    if T == 0:
        if q.dtype not in _FLOATS:
            raise RuntimeError(
                f"{op}: q must be float32, bfloat16, float16 or float64 (packed spikes need T), got {name(q)}"
            )
        if q.dim() != 5 or q.shape[0] < 1:
            raise RuntimeError(f"{op}: q must be [T, B, H, D, N] with T >= 1, got {name(q)}")
    else:
        if q.dtype != torch.uint8 or q.dim() != 5 or q.shape[0] != (T + 7) // 8:
            raise RuntimeError(f"{op}: q must be uint8 [ceil(T / 8), B, H, D, N] with T = {T}, got {name(q)}")
        if currents:
            raise RuntimeError(f"{op}: qkv needs currents, got packed spikes")
    for arg, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype or x.shape != q.shape or x.device != q.device:
            raise RuntimeError(f"{op}: {arg} must be {name(q)}, got {name(x)}")
    H, state = q.shape[2], _state_dtype(q)
    for arg, p in parameters.items():
        if p is not None and (
            p.dim() > 1 or (p.dim() == 1 and p.shape[0] != H) or p.dtype != state or p.device != q.device
        ):
            want = f"a scalar or [{H}], {str(state).removeprefix('torch.')} on {q.device.type}"
            raise RuntimeError(f"{op}: {arg} must be {want}, got {name(p)}")


def _named(*parameters: Tensor | None) -> dict[str, Tensor | None]:
    return dict(zip(("attn.decay", "attn.gain", "qkv.decay", "qkv.gain"), parameters, strict=True))


# ---- registration --------------------------------------------------------------------------------------------------


@torch.library.register_fake("spikecore::spiking_self_attention_fwd")
def _fwd_fake(q, k, v, decay_h, gain_h, qkv_decay_h, qkv_gain_h, scale, T, attn, qkv):
    _check(q, k, v, T, bool(qkv), _named(decay_h, gain_h, qkv_decay_h, qkv_gain_h))
    return _empty_slices(q, q.shape[0], q.dtype)


@torch.library.register_fake("spikecore::spiking_self_attention_bwd")
def _bwd_fake(g_out, q, k, v, decay_h, gain_h, qkv_decay_h, qkv_gain_h, scale, attn, qkv, *need):
    parameters = (decay_h, gain_h, qkv_decay_h, qkv_gain_h)
    return (
        *(_empty_slices(x, x.shape[0], x.dtype) for x in (q, k, v)),
        *(
            torch.empty_like(p) if wanted else q.new_empty(0, dtype=_state_dtype(q))
            for p, wanted in zip(parameters, need, strict=True)
        ),
    )


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:7])
    ctx.scale, _, ctx.attn, ctx.qkv = inputs[7:]


def _backward(ctx: Any, g_out: Tensor | None) -> tuple[Tensor | None, ...]:
    if g_out is None:
        return (None,) * 11
    need = ctx.needs_input_grad[3:7]
    g_q, g_k, g_v, *g = torch.ops.spikecore.spiking_self_attention_bwd(
        g_out, *ctx.saved_tensors, ctx.scale, ctx.attn, ctx.qkv, *need
    )
    return g_q, g_k, g_v, *(x if wanted else None for x, wanted in zip(g, need, strict=True)), *[None] * 4


register("spiking_self_attention", _setup_context, _backward, "is not defined for surrogate gradients")
