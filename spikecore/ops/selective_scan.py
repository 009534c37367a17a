"""Selective state-space scan: a linear recurrence over the sequence whose coefficients depend on the input.

With ``u`` the input, ``dt`` the step, ``h`` the state (S numbers for each channel) and ``B``, ``C`` the matrices that a
step writes and reads it with:

    dt[l] = delta[l] + delta_bias, or its softplus (delta_softplus=True)
    h[l]  = exp(dt[l] A) h[l-1] + dt[l] B[l] u[l]
    y[l]  = <C[l], h[l]> + D u[l],  times silu(z[l]) where z is given

(Gu & Dao 2023, algorithm 2.) The names and the order of the arguments are those of mamba's ``selective_scan_fn``, so
that its import can be swapped. No ``[B, C, L, S]`` tensor exists: backward keeps nothing but the inputs and recomputes
the states a stretch at a time, from one state kept for every few dozen steps.

``exp(dt A)`` saturates at the largest number of its type where it would overflow (dt A > 88 in float32, so A or dt has
the wrong sign). A state that is 0 then stays 0; any other grows to infinity within a few steps, and what is infinite
may turn to NaN afterwards, as the formula has it (infinity times 0, infinity minus infinity).
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spikecore import _backend  # noqa: F401  (defines torch.ops.spikecore.selective_scan_*)
from spikecore.ops._autograd import register

__all__ = ["selective_scan", "selective_scan_ref", "selective_scan_step"]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    h_init: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Fused selective scan (formulas in the module's docstring).

    Args:
        u: ``[B, C, L]``, float32, bfloat16, float16 or (CPU only) float64. Any strides; no copy is made where the
            sequence is dense (stride 1 along L), here and for delta, z, B and C. Of unlike dtypes, as under autocast,
            these are brought to the widest.
        delta: ``[B, C, L]``, the step before bias and softplus.
        A: ``[C, S]``, real; negative for a state that decays.
        B, C: ``[B, S, L]``, or ``[B, G, S, L]`` where channel c of C uses group ``c * G // C``.
        D: ``[C]``: adds ``D u``.
        z: ``[B, C, L]``: gates the output by ``silu(z)``.
        delta_bias: ``[C]``, added to delta.
        delta_softplus: whether the step is ``softplus(delta + delta_bias)``.
        return_last_state: also return ``h[L-1]``.
        h_init: ``h[-1]``, ``[B, C, S]``; default: 0.

    Returns:
        ``y: [B, C, L]`` in the dtype of u, or ``(y, h_last)`` with ``h_last: [B, C, S]``. All float arguments get
        gradients. The state dtype (A, D, delta_bias, h_init, h_last) is float64 where u, delta, z, B or C is, else
        float32; A, D and delta_bias are converted to it.

    Raises:
        TypeError: u is no tensor.
        RuntimeError: a tensor of wrong dtype, shape or device (also B and C that are constant in L, ``[C, S]``, and
            complex ones); a second backward through this op.
    """
    if not isinstance(u, Tensor):
        raise TypeError(f"selective_scan: u must be a tensor, got {type(u).__name__}")
    wide, delta, B, C, z = _to_widest(u, delta, B, C, z)
    A, D, delta_bias = (_parameter(p, wide) for p in (A, D, delta_bias))
    y, h_last = torch.ops.spikecore.selective_scan_fwd(
        wide, delta, A, _grouped(B), _grouped(C), D, z, delta_bias, h_init, delta_softplus
    )
    y = y.to(u.dtype)
    return (y, h_last) if return_last_state else y


def selective_scan_step(
    h: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> tuple[Tensor, Tensor]:
    """One step of `selective_scan`, for recurrent inference: the same kernel on a sequence of length 1.

    Args:
        h: the state before the step, ``[B, C, S]`` in the state dtype.
        u, delta, z: ``[B, C]``.
        B, C: ``[B, S]`` or ``[B, G, S]``.
        A, D, delta_bias, delta_softplus: as `selective_scan` has them.

    Returns:
        ``(y, h)``: the output, ``[B, C]``, and the state after the step.

    Raises:
        TypeError, RuntimeError: as `selective_scan`, whose shapes (with L = 1) messages name.
    """
    if not isinstance(u, Tensor):
        raise TypeError(f"selective_scan: u must be a tensor, got {type(u).__name__}")
    u, delta, B, C = (t.unsqueeze(-1) for t in (u, delta, B, C))
    z = None if z is None else z.unsqueeze(-1)
    y, h = selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, True, h)
    return y.squeeze(-1), h


def selective_scan_ref(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    h_init: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The reference of `selective_scan`: the formulas in a Python loop over L, gradients by autograd."""
    state, channels = _state_dtype(u), u.shape[1]
    dt = delta.to(state)
    if delta_bias is not None:
        dt = dt + delta_bias.to(state).unsqueeze(-1)
    if delta_softplus:
        dt = F.softplus(dt)
    x, A = u.to(state), A.to(state)
    B, C = (m.to(state).repeat_interleave(channels // m.shape[1], 1).mT for m in (_grouped(B), _grouped(C)))
    decay = torch.exp(dt.unsqueeze(-1) * A.unsqueeze(1))  # [B, C, L, S]
    steps = dt.unsqueeze(-1) * B * x.unsqueeze(-1)
    h, hs = u.new_zeros(*u.shape[:2], A.shape[1], dtype=state) if h_init is None else h_init, []
    for l in range(u.shape[2]):
        h = decay[:, :, l] * h + steps[:, :, l]
        hs.append(h)
    y = (C * (torch.stack(hs, 2) if hs else decay * steps)).sum(-1)
    if D is not None:
        y = y + D.to(state).unsqueeze(-1) * x
    if z is not None:
        y = y * F.silu(z.to(state))
    return (y.to(u.dtype), h) if return_last_state else y.to(u.dtype)


def _state_dtype(u: Tensor) -> torch.dtype:
    return torch.float64 if u.dtype == torch.float64 else torch.float32


def _to_widest(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The given of one floating dtype, which holds all of theirs; as they are where one has no such dtype."""
    dtypes = {t.dtype for t in tensors if t is not None}
    if len(dtypes) == 1 or not dtypes.issubset(_FLOATS):
        return tensors
    widest = functools.reduce(torch.promote_types, dtypes)
    return tuple(None if t is None else t.to(widest) for t in tensors)


def _parameter(p: Any, u: Tensor) -> Any:
    return p.to(_state_dtype(u)) if isinstance(p, Tensor) and p.is_floating_point() else p


def _grouped(m: Tensor) -> Tensor:
    """B or C as the op takes it, [B, G, S, L]."""
    return m.unsqueeze(1) if m.dim() == 3 else m


def _check(
    op: str, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Any, z: Any, delta_bias: Any, h_init: Any
) -> None:
    """csrc/selective_scan/selective_scan.cpp's checks, word for word, for what never reaches it: tracing, Triton."""

    def dtype_name(dtype: torch.dtype) -> str:
        return str(dtype).removeprefix("torch.")

    def name(t: Tensor) -> str:
        return f"{dtype_name(t.dtype)} {list(t.shape)} on {t.device.type}"

    def check(arg: str, t: Tensor | None, dtype: torch.dtype, *sizes: int) -> None:
        if t is not None and (t.dtype != dtype or t.shape != sizes or t.device != u.device):
            want = f"{dtype_name(dtype)} {list(sizes)} on {u.device.type}"
            raise RuntimeError(f"{op}: {arg} must be {want}, got {name(t)}")

    if u.dtype not in _FLOATS:
        raise RuntimeError(f"{op}: u must be float32, bfloat16, float16 or float64, got {name(u)}")
    if u.dim() != 3:
        raise RuntimeError(f"{op}: u must be [B, C, L], got {name(u)}")
    batch, channels, L = u.shape
    state = _state_dtype(u)
    check("delta", delta, u.dtype, batch, channels, L)
    if A.dim() != 2 or A.shape[0] != channels or A.dtype != state or A.device != u.device:
        want = f"[{channels}, S], {dtype_name(state)} on {u.device.type}"
        raise RuntimeError(f"{op}: A must be {want} (complex A is not supported), got {name(A)}")
    S = A.shape[1]
    if B.dim() != 4:
        raise RuntimeError(
            f"{op}: B must be [B, S, L] or [B, G, S, L] (constant in L, [C, S], is not supported), got {name(B)}"
        )
    G = B.shape[1]
    if G < 1 or channels % G != 0:
        raise RuntimeError(f"{op}: B must have a number of groups that divides the {channels} channels, got {name(B)}")
    check("B", B, u.dtype, batch, G, S, L)
    if C.dim() != 4:
        raise RuntimeError(
            f"{op}: C must be [B, S, L] or [B, G, S, L] (constant in L, [C, S], is not supported), got {name(C)}"
        )
    check("C", C, u.dtype, batch, G, S, L)
    check("D", D, state, channels)
    check("z", z, u.dtype, batch, channels, L)
    check("delta_bias", delta_bias, state, channels)
    check("h_init", h_init, state, batch, channels, S)


# ---- registration --------------------------------------------------------------------------------------------------


@torch.library.register_fake("spikecore::selective_scan_fwd")
def _selective_scan_fwd_fake(u, delta, A, B, C, D, z, delta_bias, h_init, delta_softplus):
    _check("selective_scan", u, delta, A, B, C, D, z, delta_bias, h_init)
    return u.new_empty(u.shape), A.new_empty((*u.shape[:2], A.shape[1]))


@torch.library.register_fake("spikecore::selective_scan_bwd")
def _selective_scan_bwd_fake(g_y, g_h_last, u, delta, A, B, C, D, z, delta_bias, h_init, delta_softplus):
    inputs = (u, delta, A, B, C, D, z, delta_bias, h_init)
    return tuple(u.new_empty(0) if t is None else t.new_empty(t.shape) for t in inputs)


def _setup_context(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:9])
    ctx.delta_softplus = inputs[9]


def _backward(ctx, g_y, g_h_last):
    inputs = ctx.saved_tensors
    grads = torch.ops.spikecore.selective_scan_bwd(g_y, g_h_last, *inputs, ctx.delta_softplus)
    return (*(None if t is None else g for t, g in zip(inputs, grads, strict=True)), None)


register("selective_scan", _setup_context, _backward, "is not supported")
