"""Batch norm, an optional residual and multi-step LIF in one call: what follows a convolution in most spiking networks.

With ``x: [T, ...]`` the convolution's output, and mean and var of each channel:

    y[t] = (x[t] - mean) * weight / sqrt(var + eps) + bias  (+ residual[t])
    s = lif(y)                                                                see `spikecore.ops.lif`

Training takes mean and (biased) var over T and all dimensions but the channels', as `torch.nn.BatchNorm2d` does on
``[T*B, C, H, W]``, and moves the running ones as that does (by the unbiased variance); else the running ones are taken
(Ioffe & Szegedy 2015). Backward keeps nothing but x, the residual and two numbers a channel, and recomputes y and the
potentials.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spikecore import _backend  # noqa: F401  (defines torch.ops.spikecore.bn_lif_*)
from spikecore.ops._autograd import register
from spikecore.ops.lif import _FLOATS, _empty_slices, _state_dtype, check_reset, encode, lif_ref
from spikecore.ops.lif import _check as _check_lif
from spikecore.surrogate import ATan, Surrogate

__all__ = ["bn_lif", "bn_lif_ref"]


def bn_lif(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None = None,
    *,
    decay: float | Tensor = 0.5,
    gain: float | Tensor = 0.5,
    v_threshold: float = 1.0,
    v_reset: float | None = 0.0,
    reset_by: float | None = None,
    strict: bool = False,
    detach_reset: bool = True,
    surrogate: Callable[[Tensor], Tensor] = ATan(2.0),
    v_init: Tensor | None = None,
    training: bool,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    channel_dim: int = 2,
    return_sum: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Fused batch norm, residual and multi-step LIF (formulas in the module's docstring).

    Where a batch norm counts its batches, the caller does so: ``momentum=None`` of `torch.nn.BatchNorm2d` is
    ``momentum=1 / num_batches_tracked`` here, as a number or 0-d tensor. Statistics are those of this process, so
    `torch.nn.SyncBatchNorm` is not replaced.

    Args:
        x: ``[T, ...]``, T >= 1, float32, bfloat16, float16 or (CPU only) float64. Any strides; no copy is made where
            each time slice is dense (contiguous, channels-last, an expanded T).
        weight, bias: ``[C]``, C = ``x.shape[channel_dim]``, or None: 1 and 0.
        running_mean, running_var: ``[C]``; changed in place by training. None: not kept (training only).
        residual: added to the normalised x; of the shape and dtype of x.
        decay, gain, v_threshold, v_reset, reset_by, strict, detach_reset, surrogate, v_init: the neuron, as in `lif`;
            decay and gain are numbers, 0-d tensors or ``[C]``.
        training: take the statistics of x, over at least 2 numbers a channel.
        momentum: share of this batch in the running statistics.
        eps: added to the variance.
        channel_dim: dimension of the channels.
        return_sum: also return y, for shortcuts that carry potentials.

    Returns:
        The spikes, or ``(s, y)``: both in the shape, dtype and layout of x. The neuron reads y in the state dtype,
        float32 for half-precision x.

    Raises:
        TypeError, ValueError: an argument that can be judged without looking at the tensors; one number a channel in
            training.
        RuntimeError: a tensor of wrong dtype, shape or device; a second backward through this op.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"bn_lif: x must be a tensor, got {type(x).__name__}")
    if not callable(surrogate):
        raise TypeError(f"bn_lif: surrogate must be a spikecore.surrogate object or a callable, got {surrogate!r}")
    check_reset("bn_lif", v_threshold, v_reset, reset_by)
    if (running_mean is None) != (running_var is None):
        raise ValueError("bn_lif: running_mean and running_var must be given together")
    if not training and running_mean is None:
        raise ValueError("bn_lif: running_mean and running_var must be given where training=False")
    if not eps > 0:
        raise ValueError(f"bn_lif: eps must be above 0, got {eps}")
    state = _state_dtype(x)
    weight, bias, mean, var = (
        p.to(state) if isinstance(p, Tensor) and p.is_floating_point() else p
        for p in (weight, bias, *((None, None) if training else (running_mean, running_var)))
    )
    if not isinstance(surrogate, Surrogate):
        _check("bn_lif", x, residual, weight, bias, mean, var, decay, gain, v_init, channel_dim)
        s, y, mean, var = _reference(
            x, weight, bias, mean, var, residual, eps, channel_dim,
            {"decay": decay, "gain": gain, "v_threshold": v_threshold, "v_reset": v_reset, "reset_by": reset_by,
             "strict": strict, "detach_reset": detach_reset, "surrogate": surrogate, "v_init": v_init},
        )  # fmt: skip
    else:
        decay_c, gain_c, neuron = encode(
            x, decay, gain, v_threshold, v_reset, reset_by, strict, detach_reset, surrogate
        )
        s, y, mean, var = torch.ops.spikecore.bn_lif_fwd(
            x, residual, weight, bias, mean, var, decay_c, gain_c, v_init, neuron, channel_dim, eps, return_sum
        )
    if training:
        _move(x, running_mean, running_var, mean, var, momentum, channel_dim)
    return (s, y) if return_sum else s


@torch.no_grad()
def _move(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, mean: Tensor, var: Tensor,
    momentum: float | Tensor, channel_dim: int,
) -> None:  # fmt: skip
    """The running statistics by those of x."""
    n = x.numel() // max(x.shape[channel_dim], 1)
    if n == 1:
        raise ValueError(f"bn_lif: training needs more than 1 number a channel, got x {list(x.shape)}")
    if running_mean is None or running_var is None or n == 0:
        return
    running_mean.lerp_(mean.to(running_mean.dtype), momentum)
    running_var.lerp_((var * (n / (n - 1))).to(running_var.dtype), momentum)


def bn_lif_ref(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None = None,
    *,
    decay: float | Tensor = 0.5,
    gain: float | Tensor = 0.5,
    v_threshold: float = 1.0,
    v_reset: float | None = 0.0,
    reset_by: float | None = None,
    strict: bool = False,
    detach_reset: bool = True,
    surrogate: Callable[[Tensor], Tensor] = ATan(2.0),
    v_init: Tensor | None = None,
    training: bool,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    channel_dim: int = 2,
    return_sum: bool = False,
    smooth: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The reference of `bn_lif`: the formulas in plain PyTorch; ``smooth=True`` as in `lif_ref`."""
    s, y, mean, var = _reference(
        x, weight, bias, *((None, None) if training else (running_mean, running_var)), residual, eps, channel_dim,
        {"decay": decay, "gain": gain, "v_threshold": v_threshold, "v_reset": v_reset, "reset_by": reset_by,
         "strict": strict, "detach_reset": detach_reset, "surrogate": surrogate, "v_init": v_init, "smooth": smooth},
    )  # fmt: skip
    if training:
        _move(x, running_mean, running_var, mean, var, momentum, channel_dim)
    return (s, y) if return_sum else s


def _reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, var: Tensor | None,
    residual: Tensor | None, eps: float, channel_dim: int, neuron: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    state = _state_dtype(x)
    others = [d for d in range(x.dim()) if d != channel_dim % x.dim()]
    over = [-1, *[1] * (x.dim() - 1 - channel_dim % x.dim())]
    y = x.to(state)
    if mean is None or var is None:
        n = max(x.numel() // max(x.shape[channel_dim], 1), 1)
        mean = y.sum(others) / n
        var = (y - mean.view(over)).square().sum(others) / n
    mean, var = mean.to(state), var.to(state)
    scale = 1 / torch.sqrt(var + eps)
    if weight is not None:
        scale = weight.to(state) * scale
    y = (y - mean.view(over)) * scale.view(over)
    if bias is not None:
        y = y + bias.to(state).view(over)
    if residual is not None:
        y = y + residual.to(state)
    s = lif_ref(y, channel_dim=channel_dim, **neuron)[0]
    return s.to(x.dtype), y.to(x.dtype), mean, var


# ---- registration --------------------------------------------------------------------------------------------------


def _check(
    op: str, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None,
    var: Tensor | None, decay: Any, gain: Any, v_init: Tensor | None, channel_dim: int,
) -> None:  # fmt: skip
    """csrc/bn_lif/bn_lif.cpp's checks, word for word, for what never reaches it: tracing, Triton, own surrogates."""

    def name(t: Tensor) -> str:
        return f"{dtype_name(t.dtype)} {list(t.shape)} on {t.device.type}"

    def dtype_name(dtype: torch.dtype) -> str:
        return str(dtype).removeprefix("torch.")

    fits = x.dtype in _FLOATS and x.dim() >= 1 and x.shape[0] >= 1  # else lif's check says what is wrong
    if fits and (not -x.dim() < channel_dim < x.dim() or channel_dim % x.dim() == 0):
        raise RuntimeError(
            f"{op}: channel_dim must name a dimension of x after the first (x has {x.dim()}), got {channel_dim}"
        )
    _check_lif(op, x, decay, gain, v_init, channel_dim)
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype or residual.device != x.device):
        want = f"{dtype_name(x.dtype)} {list(x.shape)} on {x.device.type}"
        raise RuntimeError(f"{op}: residual must be {want}, got {name(residual)}")
    C, state = x.shape[channel_dim], _state_dtype(x)
    for arg, p in (("weight", weight), ("bias", bias), ("running_mean", mean), ("running_var", var)):
        if p is not None and (p.shape != (C,) or p.dtype != state or p.device != x.device):
            raise RuntimeError(f"{op}: {arg} must be [{C}], {dtype_name(state)} on {x.device.type}, got {name(p)}")
    if (mean is None) != (var is None):
        raise RuntimeError(f"{op}: running_mean and running_var must be given together")


@torch.library.register_fake("spikecore::bn_lif_fwd")
def _bn_lif_fwd_fake(
    x, residual, weight, bias, running_mean, running_var, decay_c, gain_c, v_init, neuron, channel_dim, eps, return_sum
):
    _check(
        "bn_lif", x, residual, weight, bias, running_mean, running_var, decay_c, gain_c, v_init, channel_dim
    )  # fmt: skip
    stats = x.shape[channel_dim] if running_mean is None else 0
    return (
        _empty_slices(x, x.shape[0], x.dtype),
        _empty_slices(x, x.shape[0], x.dtype) if return_sum else x.new_empty(0),
        x.new_empty(stats, dtype=_state_dtype(x)),
        x.new_empty(stats, dtype=_state_dtype(x)),
    )


@torch.library.register_fake("spikecore::bn_lif_bwd")
def _bn_lif_bwd_fake(
    g_s, g_y, x, residual, weight, bias, mean, var, decay_c, gain_c, v_init, neuron, channel_dim, eps, training,
    need_residual, need_decay, need_gain, need_v_init,
):  # fmt: skip
    state, C = _state_dtype(x), x.shape[channel_dim]
    return (
        _empty_slices(x, x.shape[0], x.dtype),
        _empty_slices(x, x.shape[0], x.dtype) if need_residual else x.new_empty(0),
        x.new_empty(C, dtype=state),
        x.new_empty(C, dtype=state),
        x.new_empty(decay_c.shape if need_decay else 0, dtype=state),
        x.new_empty(gain_c.shape if need_gain else 0, dtype=state),
        _empty_slices(x, None, state) if need_v_init else x.new_empty(0, dtype=state),
    )


def _setup_context(ctx, inputs, output) -> None:
    x, residual, weight, bias, mean, var, *neuron = inputs[:9]
    ctx.training = mean is None
    if ctx.training:
        mean, var = output[2:]
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, residual, weight, bias, mean, var, *neuron)
    ctx.constants = inputs[9:12]
    ctx.return_sum = inputs[12]


def _backward(ctx, g_s, g_y, g_mean, g_var):
    tensors = ctx.saved_tensors
    needs = ctx.needs_input_grad[:9]
    if g_s is None and (g_y is None or not ctx.return_sum):
        return (None,) * 13
    of = (1, 6, 7, 8)  # residual, decay, gain, v_init
    g_x, g_residual, g_weight, g_bias, *rest = torch.ops.spikecore.bn_lif_bwd(
        g_s, g_y if ctx.return_sum else None, *tensors, *ctx.constants, ctx.training, *(needs[i] for i in of)
    )
    gradients = (g_x, g_residual, g_weight, g_bias, None, None, *rest)
    return (*(g if need else None for g, need in zip(gradients, needs, strict=True)), *[None] * 4)


register("bn_lif", _setup_context, _backward, "is not defined for surrogate gradients")
