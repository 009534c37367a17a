"""The selective scan of a map in several directions at once, read and written in place of its permuted copies.

Direction k walks the map ``x: [C, H, W]`` in its own order (`spikecore.ops.cross_scan` lists the orders); with l the
place visited and l' the one before it:

    dt[l] = softplus?(delta[k, :, l] + delta_bias[k])
    h[l]  = exp(dt[l] A[k]) h[l'] + dt[l] B[k, :, l] x[l]       h before the first place: 0
    y[l] += <C[k, :, l], h[l]> + D[k] x[l]

The scan is Gu & Dao's (2023, algorithm 2), the four directions VMamba's (Liu et al. 2024). Whatever makes delta, B and
C of x place by place may run on the map itself, so neither `cross_scan` nor `cross_merge` is needed. Backward saves
nothing but the inputs and recomputes the states stretch by stretch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from spikecore import _backend  # noqa: F401  (defines torch.ops.spikecore.selective_scan_2d_*)
from spikecore.ops._autograd import register
from spikecore.ops.cross_scan import cross_merge, cross_scan, direction_codes
from spikecore.ops.selective_scan import _FLOATS, _state_dtype, _to_widest

__all__ = ["selective_scan_2d", "selective_scan_2d_ref"]

_GROUPS = {"cpu": 64, "cuda": 16}  # channels whose part in the gradients of B and C one task adds up


def selective_scan_2d(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    directions: int | Sequence[int] = 4,
) -> Tensor:
    """The sum of the selective scans of a map in K directions (formulas in the module's docstring).

    Args:
        x: ``[B, C, H, W]``, float32, bfloat16, float16 or (CPU only) float64.
        delta: ``[B, K, C, H, W]``, step sizes, each direction's on the map.
        A: ``[K * C, S]`` or ``[K, C, S]``, S from 1 to 64.
        B, C: ``[B, K, S, H, W]``.
        D, delta_bias: ``[K * C]`` or ``[K, C]``.
        delta_softplus: pass delta (and its bias) through softplus.
        directions: 1 (rows), 2 (rows and back), 4 (rows, columns, and both back), or up to 8 numbers of directions
            (`spikecore.ops.cross_scan`); K of them.

    The state, A, D and delta_bias are float32 (float64 where x is); x, delta, B and C of unlike dtypes, as under
    autocast, are brought to the widest.

    Returns:
        ``y: [B, C, H, W]`` in the dtype of `x`.

    Raises:
        TypeError, ValueError: an argument that can be judged without looking at the tensors.
        RuntimeError: a tensor of wrong dtype, shape or device; a second backward through this op.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"selective_scan_2d: x must be a tensor, got {type(x).__name__}")
    codes = direction_codes("selective_scan_2d", directions)
    wide, delta, B, C, A, D, delta_bias = _brought_together(x, delta, A, B, C, D, delta_bias, len(codes))
    y = torch.ops.spikecore.selective_scan_2d_fwd(wide, delta, A, B, C, D, delta_bias, delta_softplus, list(codes))
    return y.to(x.dtype)


def selective_scan_2d_ref(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    directions: int | Sequence[int] = 4,
) -> Tensor:
    """The reference of `selective_scan_2d`: permuted copies, a Python loop over L, and their sum, by autograd."""
    codes = direction_codes("selective_scan_2d", directions)
    _, delta, B, C, A, D, delta_bias = _brought_together(x, delta, A, B, C, D, delta_bias, len(codes))
    H, W = x.shape[2:]

    def walked(t: Tensor) -> Tensor:  # [B, K, ., H, W] -> [B, K, ., L]
        return torch.cat([cross_scan(t[:, k].to(A.dtype), (code,)) for k, code in enumerate(codes)], 1)

    u = cross_scan(x.to(A.dtype), codes)
    dt = walked(delta)
    if delta_bias is not None:
        dt = dt + delta_bias.unsqueeze(-1)
    if delta_softplus:
        dt = torch.nn.functional.softplus(dt)
    # [B, K, C, L, S], which the kernels never make.
    into, out_of = (walked(t).transpose(2, 3).unsqueeze(2) for t in (B, C))
    decays = torch.exp(dt.unsqueeze(-1) * A.unsqueeze(2))
    steps = (dt * u).unsqueeze(-1) * into
    h, hs = torch.zeros_like(steps[:, :, :, :1].sum(3)), []
    for decay, step in zip(decays.unbind(3), steps.unbind(3), strict=True):
        h = decay * h + step
        hs.append(h)
    y = ((torch.stack(hs, 3) if hs else decays * steps) * out_of).sum(-1)
    if D is not None:
        y = y + D.unsqueeze(-1) * u
    return cross_merge(y, H, W, codes).unflatten(2, (H, W)).to(x.dtype)


def _brought_together(x, delta, A, B, C, D, delta_bias, K):
    """x, delta, B, C of one dtype; A: [K, C, S] and D, delta_bias: [K, C] of the state's; the unfit as they are."""
    x, delta, B, C = _to_widest(x, delta, B, C)
    state, channels = _state_dtype(x), x.shape[1] if x.dim() == 4 else -1

    def parameter(p: Tensor | None, dims: int) -> Tensor | None:
        if p is None:
            return None
        if p.dim() == dims - 1 and p.shape[0] == K * channels:
            p = p.reshape(K, channels, *p.shape[1:])
        return p.to(state) if p.is_floating_point() else p

    return x, delta, B, C, parameter(A, 3), parameter(D, 2), parameter(delta_bias, 2)


def _check(op, x, delta, A, B, C, D, delta_bias, directions) -> None:
    """csrc/selective_scan_2d/selective_scan_2d.cpp's checks, word for word, for what never reaches it."""

    def name(t: Tensor) -> str:
        return f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)} on {t.device.type}"

    def check(arg: str, t: Tensor | None, dtype: torch.dtype, sizes: list[int]) -> None:
        if t is not None and (list(t.shape) != sizes or t.dtype != dtype or t.device != x.device):
            want = f"{str(dtype).removeprefix('torch.')} {sizes} on {x.device.type}"
            raise RuntimeError(f"{op}: {arg} must be {want}, got {name(t)}")

    if x.dtype not in _FLOATS:
        raise RuntimeError(f"{op}: x must be float32, bfloat16, float16 or float64, got {name(x)}")
    if x.dim() != 4:
        raise RuntimeError(f"{op}: x must be [B, C, H, W], got {name(x)}")
    b, c, H, W = x.shape
    K, state = len(directions), _state_dtype(x)
    if H * W >= 1 << 31:
        raise RuntimeError(f"{op}: x must have less than 2^31 places on its map, got {name(x)}")
    if not 1 <= K <= 8 or not all(0 <= d <= 5 for d in directions):
        raise RuntimeError(f"{op}: directions must be 1 to 8 numbers from 0 to 5, got {list(directions)}")
    if A.dim() != 3 or not 1 <= A.shape[2] <= 64:
        raise RuntimeError(f"{op}: A must be [K, C, S] with S from 1 to 64, got {name(A)}")
    S = A.shape[2]
    check("A", A, state, [K, c, S])
    check("delta", delta, x.dtype, [b, K, c, H, W])
    check("B", B, x.dtype, [b, K, S, H, W])
    check("C", C, x.dtype, [b, K, S, H, W])
    check("D", D, state, [K, c])
    check("delta_bias", delta_bias, state, [K, c])


# ---- registration --------------------------------------------------------------------------------------------------


@torch.library.register_fake("spikecore::selective_scan_2d_fwd")
def _selective_scan_2d_fwd_fake(x, delta, A, B, C, D, delta_bias, delta_softplus, directions):
    _check("selective_scan_2d", x, delta, A, B, C, D, delta_bias, directions)
    return x.new_empty(x.shape)


@torch.library.register_fake("spikecore::selective_scan_2d_bwd")
def _selective_scan_2d_bwd_fake(
    g_y, x, delta, A, B, C, D, delta_bias, delta_softplus, directions, group: int | None = None
):
    _check("selective_scan_2d backward", x, delta, A, B, C, D, delta_bias, directions)
    b, c, H, W = x.shape
    K, S, state = len(directions), A.shape[2], _state_dtype(x)
    group = group or _GROUPS.get(x.device.type, _GROUPS["cpu"])
    partial = (b, (c + group - 1) // group, K, S, H, W)
    return (
        x.new_empty(x.shape),
        x.new_empty(delta.shape),
        x.new_empty((b, K, c, S), dtype=state),
        x.new_empty(partial, dtype=state),
        x.new_empty(partial, dtype=state),
        x.new_empty((b, K, c) if D is not None else (0,), dtype=state),
        x.new_empty((b, K, c) if delta_bias is not None else (0,), dtype=state),
    )


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.constants = inputs[7:]


def _backward(ctx, g_y):
    inputs = ctx.saved_tensors
    g_x, g_delta, *partial = torch.ops.spikecore.selective_scan_2d_bwd(g_y, *inputs, *ctx.constants)
    # The kernels leave the sums over batch (A, D, delta_bias) and over groups of channels (B, C).
    grads = [g_x, g_delta]
    for g, dim, t in zip(partial, (0, 1, 1, 0, 0), inputs[2:], strict=True):
        grads.append(None if t is None else g.sum(dim).to(t.dtype))
    needed = (g if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=False))
    return *needed, None, None


register("selective_scan_2d", _setup_context, _backward, "is not implemented")
