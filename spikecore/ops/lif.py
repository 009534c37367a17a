"""Multi-step leaky integrate-and-fire: one call for the whole sequence, nothing saved for backward but its input.

With ``x[t]`` the input current, ``h`` the potential before and ``v`` after the reset, ``s`` the spikes:

    h[t] = v_rest + decay * (v[t-1] - v_rest) + gain * x[t]         charge
    s[t] = 1 where h[t] >= v_threshold (strict=True: >), else 0      fire; NaN never does
    v[t] = v_reset where s[t], else h[t]                             hard reset (v_rest = v_reset)
    v[t] = h[t] - reset_by * s[t]                                    soft reset (v_reset=None, v_rest = 0)

Which ``decay`` and ``gain`` make which neuron of the literature is told in `spikecore.neurons`. Backward replaces
``ds/dh`` by a surrogate of ``u = h - v_threshold``, and recomputes ``h`` from ``x`` (Fang et al. 2021 for the formulas;
Neftci et al. 2019 for surrogate gradients).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from spikecore import _backend  # noqa: F401  (defines torch.ops.spikecore.lif_*)
from spikecore.ops._autograd import register
from spikecore.surrogate import ATan, Surrogate

__all__ = ["LIFParams", "check_reset", "lif", "lif_ref", "pack_spikes", "unpack_spikes"]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def lif(
    x: Tensor,
    decay: float | Tensor = 0.5,
    gain: float | Tensor = 0.5,
    *,
    v_threshold: float = 1.0,
    v_reset: float | None = 0.0,
    reset_by: float | None = None,
    strict: bool = False,
    detach_reset: bool = True,
    surrogate: Callable[[Tensor], Tensor] = ATan(2.0),
    v_init: Tensor | None = None,
    channel_dim: int = 2,
    return_h: bool = False,
    return_v: bool = False,
    packed: bool = False,
) -> tuple[Tensor, ...]:
    """Fused multi-step LIF (formulas in the module's docstring).

    Args:
        x: ``[T, ...]``, T >= 1, float32, bfloat16, float16 or (CPU only) float64. Any strides; no copy is made where
            each time slice is dense (contiguous, channels-last, a slice of T, an expanded T).
        decay, gain: numbers, 0-d tensors or ``[x.shape[channel_dim]]``; tensors get gradients.
        v_threshold: firing threshold, at or above the resting potential (``v_reset``, or 0 with soft reset).
        v_reset: potential after a spike (hard reset); None for soft reset by ``reset_by`` (default: ``v_threshold``).
        strict: fire only above the threshold, not at it.
        detach_reset: cut the gradient that would flow through the spike in the reset.
        surrogate: an object of `spikecore.surrogate`, or any callable ``u -> ds/du`` on tensors. The callable runs
            through the plain PyTorch reference: the same spikes, but slower and with memory that grows with T.
        v_init: ``v[-1]``, of shape ``x.shape[1:]`` in the state dtype; default: resting potential.
        return_h, return_v: also return the sequences ``h``, ``v`` (``[T, ...]``, state dtype).
        packed: return the spikes as bits, ``uint8 [ceil(T / 8), ...]`` (see `pack_spikes`); they carry no gradient.

    Returns:
        ``(s, v_last[, h][, v])``: spikes in the dtype of ``x``, and the last potential. The state dtype (``v_init``,
        ``v_last``, ``h``, ``v``) is float32 for half-precision ``x``, else that of ``x``.

    Raises:
        TypeError, ValueError: an argument that can be judged without looking at the tensors.
        RuntimeError: a tensor of wrong dtype, shape or device; a second backward through this op.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"lif: x must be a tensor, got {type(x).__name__}")
    if not callable(surrogate):
        raise TypeError(f"lif: surrogate must be a spikecore.surrogate object or a callable, got {surrogate!r}")
    check_reset("lif", v_threshold, v_reset, reset_by)
    if not isinstance(surrogate, Surrogate):
        _check("lif", x, decay, gain, v_init, channel_dim)
        s, v_last, *extra = lif_ref(
            x, decay, gain, v_threshold=v_threshold, v_reset=v_reset, reset_by=reset_by, strict=strict,
            detach_reset=detach_reset, surrogate=surrogate, v_init=v_init, channel_dim=channel_dim,
            return_h=return_h, return_v=return_v,
        )  # fmt: skip
        return (pack_spikes(s) if packed else s, v_last, *extra)
    decay_c, gain_c, neuron = encode(x, decay, gain, v_threshold, v_reset, reset_by, strict, detach_reset, surrogate)
    s, v_last, h, v = torch.ops.spikecore.lif_fwd(
        x, decay_c, gain_c, v_init, neuron, channel_dim, return_h, return_v, packed
    )
    return (s, v_last, *([h] if return_h else []), *([v] if return_v else []))


@dataclass(frozen=True)
class LIFParams:
    """The neuron inside another operator: `lif`'s arguments of the same names and defaults.

    ``decay`` and ``gain``: numbers, 0-d tensors, or one per head, ``[H]``.
    """

    decay: float | Tensor = 0.5
    gain: float | Tensor = 0.5
    v_threshold: float = 1.0
    v_reset: float | None = 0.0
    reset_by: float | None = None
    strict: bool = False
    detach_reset: bool = True
    surrogate: Surrogate = ATan(2.0)

    def __post_init__(self) -> None:
        check_reset("LIFParams", self.v_threshold, self.v_reset, self.reset_by)

    def encode(self, x: Tensor) -> tuple[Tensor | None, Tensor | None, list[float]]:
        """The neuron as an op on `x` takes it (see `encode`)."""
        return encode(
            x, self.decay, self.gain, self.v_threshold, self.v_reset, self.reset_by, self.strict, self.detach_reset,
            self.surrogate,
        )  # fmt: skip


# The tensors in it are seen by torch's transforms.
pytree.register_dataclass(LIFParams)


def encode(
    x: Tensor,
    decay: float | Tensor,
    gain: float | Tensor,
    v_threshold: float,
    v_reset: float | None,
    reset_by: float | None,
    strict: bool,
    detach_reset: bool,
    surrogate: Surrogate,
) -> tuple[Tensor | None, Tensor | None, list[float]]:
    """A neuron as every op takes it: decay and gain where they are tensors (state dtype), and ten numbers.

    One list instead of ten arguments, because torch's Python side of autograd works through the square of their number
    on each call. v_reset is NaN for soft reset; csrc/torch/neuron.h reads the list.
    """
    decay_c, decay = _split(decay, x)
    gain_c, gain = _split(gain, x)
    v_reset = math.nan if v_reset is None else v_reset
    reset_by = v_threshold if reset_by is None else reset_by
    rest = (v_threshold, v_reset, reset_by, strict, detach_reset, surrogate.kind, *surrogate.parameters)
    return decay_c, gain_c, [decay, gain, *map(float, rest)]


def lif_ref(
    x: Tensor,
    decay: float | Tensor = 0.5,
    gain: float | Tensor = 0.5,
    *,
    v_threshold: float = 1.0,
    v_reset: float | None = 0.0,
    reset_by: float | None = None,
    strict: bool = False,
    detach_reset: bool = True,
    surrogate: Callable[[Tensor], Tensor] = ATan(2.0),
    v_init: Tensor | None = None,
    channel_dim: int = 2,
    return_h: bool = False,
    return_v: bool = False,
    packed: bool = False,
    smooth: bool = False,
) -> tuple[Tensor, ...]:
    """The reference of `lif`: the formulas in a Python loop, gradients by autograd.

    With ``smooth=True`` the spike is ``surrogate.primitive(u)`` itself: a differentiable function whose true gradient
    is the surrogate gradient's formula, for `torch.autograd.gradcheck`.
    """
    state = _state_dtype(x)
    rest = 0.0 if v_reset is None else v_reset
    reset_by = v_threshold if reset_by is None else reset_by
    decay, gain = _over_channels(decay, x, channel_dim), _over_channels(gain, x, channel_dim)
    v = torch.full(x.shape[1:], rest, dtype=state, device=x.device) if v_init is None else v_init
    ss, hs, vs = [], [], []
    for x_t in x.to(state):
        h = rest + decay * (v - rest) + gain * x_t
        if smooth:
            s = surrogate.primitive(h - v_threshold)  # type: ignore[attr-defined]
            r = s.detach() if detach_reset else s
            v = h - reset_by * r if v_reset is None else h + r * (rest - h)
        else:
            fired = h > v_threshold if strict else h >= v_threshold
            s = _Spike.apply(h, fired, v_threshold, surrogate)
            r = s.detach() if detach_reset else s
            if v_reset is None:
                v = h - reset_by * r
            else:
                v = torch.where(fired, rest, h)
                if not detach_reset:  # adds nothing but the gradient of the selection with respect to the spike
                    v = v + (s - s.detach()) * torch.nan_to_num(rest - h)
        ss.append(s.to(x.dtype))
        hs.append(h)
        vs.append(v)
    out = torch.stack(ss)
    return (
        pack_spikes(out) if packed else out,
        v,
        *([torch.stack(hs)] if return_h else []),
        *([torch.stack(vs)] if return_v else []),
    )


class _Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, fired: Tensor, v_threshold: float, surrogate: Callable) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(h)
        ctx.v_threshold, ctx.surrogate = v_threshold, surrogate
        return fired.to(h.dtype)

    @staticmethod
    def backward(ctx: Any, g_s: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (h,) = ctx.saved_tensors
        return g_s * ctx.surrogate(h - ctx.v_threshold), None, None, None


def pack_spikes(s: Tensor) -> Tensor:
    """Spikes ``[T, ...]`` (non-zero = 1) to bits ``uint8 [ceil(T / 8), ...]``: step t is bit ``t % 8``."""
    bits = (s != 0).to(torch.uint8)
    bits = torch.cat([bits, bits.new_zeros(-len(s) % 8, *s.shape[1:])]).unflatten(0, (-1, 8))
    shifts = torch.arange(8, dtype=torch.uint8, device=s.device).view(1, 8, *[1] * (s.dim() - 1))
    return (bits << shifts).sum(1, dtype=torch.uint8)


def unpack_spikes(p: Tensor, T: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The inverse of `pack_spikes`: bits ``uint8 [ceil(T / 8), ...]`` to spikes ``[T, ...]`` of `dtype`."""
    if p.dtype != torch.uint8 or not 8 * (len(p) - 1) < T <= 8 * len(p):
        raise ValueError(
            f"unpack_spikes: p must be uint8 [ceil(T / 8), ...] with T = {T}, got {p.dtype} {list(p.shape)}"
        )
    shifts = torch.arange(8, dtype=torch.uint8, device=p.device).view(1, 8, *[1] * (p.dim() - 1))
    return ((p.unsqueeze(1) >> shifts) & 1).flatten(0, 1)[:T].to(dtype)


def check_reset(name: str, v_threshold: float, v_reset: float | None, reset_by: float | None) -> None:
    """Raise ValueError where threshold and reset make no neuron; `name` opens the message."""
    if v_reset is not None and not abs(v_reset) < float("inf"):
        raise ValueError(f"{name}: v_reset must be a finite number or None (soft reset), got {v_reset}")
    rest = 0.0 if v_reset is None else v_reset
    if not v_threshold >= rest:  # `not >=` refuses NaN too
        raise ValueError(
            f"{name}: v_threshold must be at or above the resting potential {rest} (a neuron below it would fire "
            f"without input), got {v_threshold}"
        )
    if reset_by is not None and not 0 <= reset_by < float("inf"):
        raise ValueError(f"{name}: reset_by must be a finite number >= 0, got {reset_by}")


def _state_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _split(p: float | Tensor, x: Tensor) -> tuple[Tensor | None, float]:
    """A number or tensor as the op takes it: (tensor in the state dtype or None, number)."""
    if not isinstance(p, Tensor):
        return None, float(p)
    return (p.to(_state_dtype(x)) if p.is_floating_point() else p), 0.0


def _over_channels(p: float | Tensor, x: Tensor, channel_dim: int) -> float | Tensor:
    if not isinstance(p, Tensor):
        return p
    p = p.to(_state_dtype(x))
    return p.view(-1, *[1] * (x.dim() - 1 - channel_dim % x.dim())) if p.dim() else p


def _check(op: str, x: Tensor, decay: Any, gain: Any, v_init: Tensor | None, channel_dim: int) -> None:
    """csrc/lif/lif.cpp's checks, word for word, for what never reaches it: tracing, Triton, own surrogates."""

    def name(t: Tensor) -> str:
        return f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)} on {t.device.type}"

    if x.dtype not in _FLOATS:
        raise RuntimeError(f"{op}: x must be float32, bfloat16, float16 or float64, got {name(x)}")
    if x.dim() < 1 or x.shape[0] < 1:
        raise RuntimeError(f"{op}: x must be [T, ...] with T >= 1, got {name(x)}")
    state = str(_state_dtype(x)).removeprefix("torch.")
    for arg, p in (("decay", decay), ("gain", gain)):
        if not isinstance(p, Tensor):
            continue
        if p.dim() == 0:
            ok, want = p.device == x.device, "a scalar"
        else:
            if not -x.dim() < channel_dim < x.dim() or channel_dim % x.dim() == 0:
                raise RuntimeError(
                    f"{op}: channel_dim must name a dimension of x after the first (x has {x.dim()}), got {channel_dim}"
                )
            C = x.shape[channel_dim]
            ok, want = p.dim() == 1 and p.shape[0] == C and p.device == x.device, f"a scalar or [{C}]"
        if not ok or not p.is_floating_point():
            raise RuntimeError(f"{op}: {arg} must be {want}, {state} on {x.device.type}, got {name(p)}")
    if v_init is not None and (
        v_init.shape != x.shape[1:] or v_init.dtype != _state_dtype(x) or v_init.device != x.device
    ):
        want = f"{state} {list(x.shape[1:])} on {x.device.type}"
        raise RuntimeError(f"{op}: v_init must be {want}, got {name(v_init)}")


# ---- registration --------------------------------------------------------------------------------------------------


def _slice_strides(x: Tensor) -> tuple[int, ...]:
    """Strides of one time slice of every output: those of x where its slices are dense, else contiguous."""
    expected = 1
    for stride, size in sorted((st, n) for st, n in zip(x.stride()[1:], x.shape[1:], strict=True) if n != 1):
        if stride != expected:
            return torch.empty(x.shape[1:], device="meta").stride()
        expected *= size
    return x.stride()[1:]


def _empty_slices(x: Tensor, steps: int | None, dtype: torch.dtype) -> Tensor:
    """An output laid out like x: ``[steps, ...]``, or one slice where steps is None."""
    shape, strides = tuple(x.shape[1:]), _slice_strides(x)
    if steps is not None:
        shape, strides = (steps, *shape), (max(x[0].numel(), 1), *strides)
    return torch.empty_strided(shape, strides, dtype=dtype, device=x.device)


@torch.library.register_fake("spikecore::lif_fwd")
def _lif_fwd_fake(x, decay_c, gain_c, v_init, neuron, channel_dim, return_h, return_v, packed):
    _check("lif", x, decay_c, gain_c, v_init, channel_dim)
    T, state = x.shape[0], _state_dtype(x)
    s = _empty_slices(x, (T + 7) // 8, torch.uint8) if packed else _empty_slices(x, T, x.dtype)
    h = _empty_slices(x, T, state) if return_h else x.new_empty(0, dtype=state)
    v = _empty_slices(x, T, state) if return_v else x.new_empty(0, dtype=state)
    return s, _empty_slices(x, None, state), h, v


@torch.library.register_fake("spikecore::lif_bwd")
def _lif_bwd_fake(
    g_s, g_v_last, g_h, g_v, x, decay_c, gain_c, v_init, neuron, channel_dim, need_decay, need_gain, need_v_init
):
    none = x.new_empty(0, dtype=_state_dtype(x))
    return (
        _empty_slices(x, x.shape[0], x.dtype),
        torch.empty_like(decay_c) if need_decay else none,
        torch.empty_like(gain_c) if need_gain else none.clone(),
        _empty_slices(x, None, _state_dtype(x)) if need_v_init else none.clone(),
    )


def _setup_context(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:4])
    ctx.constants = inputs[4:6]
    ctx.return_h, ctx.return_v, ctx.packed = inputs[6:]


def _backward(ctx, g_s, g_v_last, g_h, g_v):
    x, decay_c, gain_c, v_init = ctx.saved_tensors
    _, need_decay, need_gain, need_v_init = ctx.needs_input_grad[:4]
    g_x, g_decay, g_gain, g_v_init = torch.ops.spikecore.lif_bwd(
        None if ctx.packed else g_s, g_v_last, g_h if ctx.return_h else None, g_v if ctx.return_v else None,
        x, decay_c, gain_c, v_init, *ctx.constants,
        need_decay, need_gain, need_v_init,
    )  # fmt: skip
    return (
        g_x, g_decay if need_decay else None, g_gain if need_gain else None, g_v_init if need_v_init else None,
        *[None] * 5,
    )  # fmt: skip


register("lif", _setup_context, _backward, "is not defined for surrogate gradients")
