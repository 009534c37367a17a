"""Spiking attention that is linear in its tokens, each form one fused call: Q-K attention and spike-driven attention.

With q, k, v: ``[T, B, H, D, N]`` (H heads of D channels, N tokens) and a neuron `lif` over T:

    token         a = lif(sum over D of q) : [T, B, H, 1, N]       out = a * k     (QKTA, Zhou et al. 2024, QKFormer)
    channel       a = lif(sum over N of q) : [T, B, H, D, 1]       out = a * k     (QKCA, in the paper only)
    spike-driven  a = lif(sum over N of k * v) : [T, B, H, D, 1]   out = a * q     (SDSA, Yao et al. 2023)

q, k and v hold spikes, or any numbers: the formulas are the same. Given ``qkv=LIFParams(...)`` they are currents, and
`lif` turns each into spikes first. Nothing but the output is written, and nothing but the inputs is kept for backward,
which recomputes spikes and potentials from them.
"""

from typing import Any

import torch
from torch import Tensor

from spikecore import _backend  # noqa: F401  (defines torch.ops.spikecore.qk_attention_*)
from spikecore.ops._autograd import register
from spikecore.ops.lif import LIFParams, _state_dtype, lif_ref, pack_spikes, unpack_spikes
from spikecore.surrogate import Surrogate

__all__ = ["qk_attention", "qk_attention_ref", "spike_driven_attention", "spike_driven_attention_ref"]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_MODES = {"token": 0, "channel": 1}
_SPIKE_DRIVEN = 2


def qk_attention(
    q: Tensor,
    k: Tensor,
    mode: str = "token",
    attn: LIFParams = LIFParams(v_threshold=0.5),  # noqa: B008  (frozen)
    qkv: LIFParams | None = None,
    *,
    T: int | None = None,
) -> Tensor:
    """Fused Q-K attention (formulas in the module's docstring).

    Args:
        q, k: ``[T, B, H, D, N]``, T >= 1, both float32, bfloat16, float16 or (CPU only) float64. Any strides; no copy
            is made where the tokens, or the channels of a head, lie side by side (a model's ``[T, B, C, N]`` passes
            ``.unflatten(2, (H, D))``; ``[T, B, N, C]`` passes ``.unflatten(3, (H, D)).permute(0, 1, 3, 4, 2)``).
            Packed spikes (uint8, see `pack_spikes`) are taken with `T`; then the result is packed, without gradient.
        mode: "token" or "channel".
        attn: the neuron of the attention; decay and gain are numbers, 0-d tensors or ``[H]``; tensors get gradients.
        qkv: the neuron of q and k, which then are currents; None: they are taken as they are.
        T: time steps of packed q and k, which their shape does not tell; None otherwise.

    Returns:
        ``[T, B, H, D, N]`` in the dtype of q, the innermost dimension in memory that of k. Sums and potentials are
        float32 for half precision, else in the dtype of q.

    Raises:
        TypeError, ValueError: an argument that can be judged without looking at the tensors.
        RuntimeError: a tensor of wrong dtype, shape or device; a second backward through this op.
    """
    if mode not in _MODES:
        raise ValueError(f'qk_attention: mode must be "token" or "channel", got {mode!r}')
    return _attention("qk_attention", q, k, None, _MODES[mode], attn, qkv, T)


def spike_driven_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn: LIFParams = LIFParams(v_threshold=0.5),  # noqa: B008  (frozen)
    qkv: LIFParams | None = None,
    *,
    T: int | None = None,
) -> Tensor:
    """Fused spike-driven self attention (formulas in the module's docstring).

    Args:
        q, k, v: ``[T, B, H, D, N]``, as q and k of `qk_attention`.
        attn, qkv, T: as in `qk_attention`.

    Returns:
        ``[T, B, H, D, N]`` in the dtype of q, the innermost dimension in memory that of q.

    Raises:
        TypeError, ValueError: an argument that can be judged without looking at the tensors.
        RuntimeError: a tensor of wrong dtype, shape or device; a second backward through this op.
    """
    return _attention("spike_driven_attention", q, k, v, _SPIKE_DRIVEN, attn, qkv, T)


def _attention(
    op: str, q: Tensor, k: Tensor, v: Tensor | None, mode: int, attn: LIFParams, qkv: LIFParams | None, T: int | None
) -> Tensor:
    for arg, t in (("q", q), ("k", k), *([("v", v)] if mode == _SPIKE_DRIVEN else [])):
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {arg} must be a tensor, got {type(t).__name__}")
    for arg, neuron in (("attn", attn), *([("qkv", qkv)] if qkv is not None else [])):
        if not isinstance(neuron, LIFParams):
            raise TypeError(f"{op}: {arg} must be LIFParams, got {type(neuron).__name__}")
        if not isinstance(neuron.surrogate, Surrogate):
            raise TypeError(f"{op}: {arg}.surrogate must be a spikecore.surrogate object, got {neuron.surrogate!r}")
    if T is not None and T < 1:
        raise ValueError(f"{op}: T must be None or at least 1, got {T}")
    attn_decay, attn_gain, attn_constants = attn.encode(q)
    qkv_decay, qkv_gain, qkv_constants = qkv.encode(q) if qkv is not None else (None, None, [])
    return torch.ops.spikecore.qk_attention_fwd(
        q, k, v, attn_decay, attn_gain, qkv_decay, qkv_gain, attn_constants, qkv_constants, mode, T or 0
    )


# ---- references ------------------------------------------------------------------------------------------------------


def qk_attention_ref(
    q: Tensor,
    k: Tensor,
    mode: str = "token",
    attn: LIFParams = LIFParams(v_threshold=0.5),  # noqa: B008
    qkv: LIFParams | None = None,
    *,
    T: int | None = None,
    smooth: bool = False,
) -> Tensor:
    """The reference of `qk_attention`: the formulas in plain PyTorch; ``smooth=True`` as in `lif_ref`."""
    if T is not None:
        return pack_spikes(qk_attention_ref(unpack_spikes(q, T), unpack_spikes(k, T), mode, attn, qkv))
    sq, sk = (_spikes(t, qkv, smooth) for t in (q, k))
    a = _lif(sq.sum(3 if mode == "token" else 4, keepdim=True), attn, smooth)
    return (a * sk).to(q.dtype)


def spike_driven_attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn: LIFParams = LIFParams(v_threshold=0.5),  # noqa: B008
    qkv: LIFParams | None = None,
    *,
    T: int | None = None,
    smooth: bool = False,
) -> Tensor:
    """The reference of `spike_driven_attention`: the formulas in plain PyTorch; ``smooth=True`` as in `lif_ref`."""
    if T is not None:
        q, k, v = (unpack_spikes(t, T) for t in (q, k, v))
        return pack_spikes(spike_driven_attention_ref(q, k, v, attn, qkv))
    sq, sk, sv = (_spikes(t, qkv, smooth) for t in (q, k, v))
    a = _lif((sk * sv).sum(4, keepdim=True), attn, smooth)
    return (a * sq).to(q.dtype)


def _spikes(x: Tensor, qkv: LIFParams | None, smooth: bool) -> Tensor:
    """In the state dtype."""
    x = x.to(_state_dtype(x))
    return x if qkv is None else _lif(x, qkv, smooth)


def _lif(x: Tensor, p: LIFParams, smooth: bool) -> Tensor:
    return lif_ref(
        x, p.decay, p.gain, v_threshold=p.v_threshold, v_reset=p.v_reset, reset_by=p.reset_by, strict=p.strict,
        detach_reset=p.detach_reset, surrogate=p.surrogate, smooth=smooth,
    )[0]  # fmt: skip


# ---- registration ----------------------------------------------------------------------------------------------------


def _check(op: str, q: Tensor, k: Tensor, v: Tensor | None, parameters: Any, mode: int, T: int) -> None:
    """csrc/qk_attention/qk_attention.cpp's checks, word for word, for what never reaches it: tracing and Triton.

    `parameters`: decay and gain of attn, then of qkv.
    """

    def name(t: Tensor) -> str:
        return f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)} on {t.device.type}"

    if q.dtype not in ((torch.uint8,) if T else _FLOATS):
        want = "uint8 (T was given)" if T else "float32, bfloat16, float16 or float64"
        raise RuntimeError(f"{op}: q must be {want}, got {name(q)}")
    if q.dim() != 5 or q.shape[0] < 1:
        raise RuntimeError(f"{op}: q must be [T, B, H, D, N] with T >= 1, got {name(q)}")
    if T and not 8 * (q.shape[0] - 1) < T <= 8 * q.shape[0]:
        least, most = 8 * (q.shape[0] - 1) + 1, 8 * q.shape[0]
        raise RuntimeError(f"{op}: T must be in {least} to {most} for packed {name(q)}, got {T}")
    if mode not in (0, 1, 2) or (v is not None) != (mode == _SPIKE_DRIVEN):
        raise RuntimeError(f"{op}: mode must be 0 or 1, or 2 with v, got {mode}")
    for arg, t in (("k", k), *([("v", v)] if v is not None else [])):
        if t.dtype != q.dtype or t.shape != q.shape or t.device != q.device:
            raise RuntimeError(f"{op}: {arg} must be {name(q)}, got {name(t)}")
    state = str(_state_dtype(q)).removeprefix("torch.")
    for arg, p in zip(("attn.decay", "attn.gain", "qkv.decay", "qkv.gain"), parameters, strict=True):
        if p is None:
            continue
        ok = p.dim() == 0 or (p.dim() == 1 and p.shape[0] == q.shape[2])
        if not ok or p.dtype != _state_dtype(q) or p.device != q.device:
            raise RuntimeError(
                f"{op}: {arg} must be a scalar or [{q.shape[2]}], {state} on {q.device.type}, got {name(p)}"
            )


def _channels_last(like: Tensor) -> bool:
    """Whether outputs have a head's channels innermost, as `like` has (the operand that the attention gates)."""
    return like.shape[4] > 1 and like.stride(4) != 1 and like.shape[3] > 1 and like.stride(3) == 1


def _empty(q: Tensor, like: Tensor) -> Tensor:
    """An output: dense, T outermost, and either N or D innermost."""
    T, B, H, D, N = q.shape
    if not _channels_last(like):
        return q.new_empty(q.shape)
    return q.new_empty(T, B, N, H, D).permute(0, 1, 3, 4, 2)


@torch.library.register_fake("spikecore::qk_attention_fwd")
def _qk_attention_fwd_fake(q, k, v, attn_decay, attn_gain, qkv_decay, qkv_gain, attn, qkv, mode, T):
    _check("qk_attention", q, k, v, (attn_decay, attn_gain, qkv_decay, qkv_gain), mode, T)
    if T and qkv:
        raise RuntimeError("qk_attention: qkv must be None for packed spikes")
    return _empty(q, q if mode == _SPIKE_DRIVEN else k)


@torch.library.register_fake("spikecore::qk_attention_bwd")
def _qk_attention_bwd_fake(
    g_out, q, k, v, attn_decay, attn_gain, qkv_decay, qkv_gain, attn, qkv, mode,
    need_attn_decay, need_attn_gain, need_qkv_decay, need_qkv_gain,
):  # fmt: skip
    like = q if mode == _SPIKE_DRIVEN else k
    none = q.new_empty(0, dtype=_state_dtype(q))
    parameters = (
        (need_attn_decay, attn_decay), (need_attn_gain, attn_gain),
        (need_qkv_decay, qkv_decay), (need_qkv_gain, qkv_gain),
    )  # fmt: skip
    return (
        _empty(q, like),
        _empty(q, like),
        _empty(q, like) if mode == _SPIKE_DRIVEN else q.new_empty(0),
        *(p.new_empty(p.shape) if need else none.clone() for need, p in parameters),
    )


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.constants = inputs[7:10]


def _backward(ctx, g_out):
    tensors = ctx.saved_tensors
    needs = ctx.needs_input_grad[3:7]
    g_q, g_k, g_v, *g_p = torch.ops.spikecore.qk_attention_bwd(g_out, *tensors, *ctx.constants, *needs)
    g_v = g_v if tensors[2] is not None else None
    return (g_q, g_k, g_v, *(g if need else None for g, need in zip(g_p, needs, strict=True)), *[None] * 4)


register("qk_attention", _setup_context, _backward, "is not defined for surrogate gradients")
