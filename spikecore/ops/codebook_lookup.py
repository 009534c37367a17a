"""The nearest code of a book, and its vector, in one pass; the ``[n, K]`` matrix of scores is never stored.

With ``z: [n, D]`` and ``codebook: [K, D]``

    score[i, k] = <z[i], c[k]>                  metric "dot"
                  -|z[i] - c[k]|^2              "l2"
                  <z[i], c[k]> / |c[k]|         "cosine" (0 for a code of length 0); |z| changes no order
    index[i] = the smallest k of the greatest score,  value[i] = c[index[i]]

What is compared are scores in **float64**, summed in one fixed order, for inputs of every dtype: products of float32
numbers are exact there. So the answer depends on no backend, instruction set or number of threads, and only codes
whose scores lie within about 1e-15 of the best (relative to ``|z| |c|``) are told apart by rounding. Kernels get it by
screening all codes in float32, bfloat16 or on tensor cores, and scoring in float64 those that the proven error of the
screening (Cauchy-Schwarz over the rounded parts, and the usual bound for sums; Higham 2002, sec. 3.1) leaves in the
race.

Gradients: straight through to z (``g_z = g_value``; van den Oord et al. 2017), and the sum of ``g_value`` over its rows
to each code, in the order of the rows. Product groups split the last dimension (Jegou et al. 2011); residual stages
look up what the stages before left over (Zeghidour et al. 2021).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spikecore import _backend  # noqa: F401  (defines torch.ops.spikecore.codebook_lookup_*)
from spikecore.ops._autograd import register

__all__ = [
    "METRICS", "codebook_decode", "codebook_lookup", "codebook_lookup_ref", "residual_codebook_lookup",
]  # fmt: skip

METRICS = ("dot", "l2", "cosine")  # numbered as csrc/codebook_lookup/codebook_lookup.h's Metric

_HALVES = (torch.bfloat16, torch.float16)
_FLOATS = (torch.float32, *_HALVES, torch.float64)


def codebook_lookup(
    z: Tensor, codebook: Tensor, metric: str = "dot", groups: int = 1, *, check_nan: bool = True
) -> tuple[Tensor, Tensor]:
    """The nearest code of each vector (formulas in the module's docstring).

    Args:
        z: ``[..., groups * D]``, float32, bfloat16, float16 or (CPU only) float64.
        codebook: ``[K, D]``, or ``[groups, K, D]``: a book for each group. In the dtype of z, or float32 beside half
            precision. 1 to 2^31 - 1 codes.
        metric: "dot", "l2" or "cosine".
        groups: parts of the last dimension of z that are looked up apart.
        check_nan: raise where z or the codebook holds NaN or infinity. With False (on a GPU that saves waiting for the
            answer) such rows get index -1 and NaN, and such codes are never chosen.

    Returns:
        ``(indices, values)``: int64 ``[...]``, or ``[..., groups]`` where groups > 1; and the codes there,
        ``[..., groups * D]`` in the dtype of z.

    Raises:
        TypeError, ValueError: an argument that can be judged without looking at the tensors.
        RuntimeError: a tensor of wrong dtype, shape or device; NaN or infinity; a second backward through this op.
    """
    for name, t in (("z", z), ("codebook", codebook)):
        if not isinstance(t, Tensor):
            raise TypeError(f"codebook_lookup: {name} must be a tensor, got {type(t).__name__}")
    return torch.ops.spikecore.codebook_lookup_fwd(z, codebook, _kind(metric), groups, check_nan)


def codebook_lookup_ref(
    z: Tensor, codebook: Tensor, metric: str = "dot", groups: int = 1, *, check_nan: bool = True
) -> tuple[Tensor, Tensor]:
    """The reference of `codebook_lookup`: the matrix of all scores, in float64; gradients by autograd."""
    D = z.shape[-1] // groups
    parts = z.unflatten(-1, (groups, D))
    books = codebook.expand(groups, *codebook.shape[-2:])
    n = parts.shape[:-2].numel()
    a, b = parts.detach().reshape(n, groups, D).transpose(0, 1).double(), books.detach().double()
    if metric == "l2":
        score = -torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
    else:
        score = a.new_empty(groups, n, b.shape[1])
        for i in range(n):  # no matrix product: in it equal codes may round differently
            score[:, i] = (a[:, i : i + 1] * b).sum(-1)
        if metric == "cosine":
            length = b.norm(dim=-1).unsqueeze(1)
            score = torch.where(length == 0, 0.0, score / length)
    indices = score.nan_to_num(-torch.inf, posinf=-torch.inf).argmax(-1).T.reshape(*parts.shape[:-1])
    bad = ~parts.detach().isfinite().all(-1)
    if check_nan and bool(bad.any()):
        raise RuntimeError("codebook_lookup: z must be finite, got NaN or infinity")
    chosen = books[torch.arange(groups, device=z.device), indices]
    values = torch.where(bad.unsqueeze(-1), torch.nan, chosen).flatten(-2).to(z.dtype)
    indices = torch.where(bad, -1, indices)
    straight = torch.where(z.isfinite(), z - z.detach(), 0)  # a zero that carries the gradient
    return indices if groups > 1 else indices.squeeze(-1), values + straight


def codebook_decode(indices: Tensor, codebook: Tensor) -> Tensor:
    """The vectors of `codebook_lookup`'s indices; gradients to the codebook.

    Args:
        indices: int64, ``[...]`` for a book ``[K, D]``, ``[..., G]`` for books ``[G, K, D]``; -1 gives NaN.
        codebook: ``[K, D]`` or ``[G, K, D]``.

    Returns:
        ``[..., D]`` or ``[..., G * D]``.

    Raises:
        ValueError: wrong shapes or dtypes.
        IndexError: an index below -1 or past the last code (on a GPU: a device-side assertion of torch).
    """
    K = codebook.shape[-2] if codebook.dim() in (2, 3) else 0
    if codebook.dim() not in (2, 3) or K < 1:
        raise ValueError(f"codebook_decode: codebook must be [K, D] or [G, K, D] with K >= 1, got {_name(codebook)}")
    grouped = codebook.dim() == 3
    if indices.dtype != torch.int64 or (grouped and (indices.dim() < 1 or indices.shape[-1] != len(codebook))):
        want = f"[..., {len(codebook)}]" if grouped else "[...]"
        raise ValueError(f"codebook_decode: indices must be int64 {want}, got {_name(indices)}")
    if indices.device.type == "cpu" and indices.numel() and not torch.compiler.is_compiling():
        low, high = indices.aminmax()
        if low < -1 or high >= K:
            raise IndexError(f"codebook_decode: indices must be -1 to {K - 1}, got {int(low)} to {int(high)}")
    flat = torch.where(indices < 0, 0, indices)
    if grouped:
        flat = flat + torch.arange(len(codebook), device=indices.device) * K
    values = torch.nn.functional.embedding(flat, codebook.flatten(0, -2))
    values = torch.where((indices < 0).unsqueeze(-1), torch.nan, values)
    return values.flatten(-2) if grouped else values


def residual_codebook_lookup(
    z: Tensor, codebooks: Tensor | Sequence[Tensor], metric: str = "l2", groups: int = 1, *, check_nan: bool = True
) -> tuple[Tensor, Tensor]:
    """Stage after stage, each looking up what the stages before it left over.

    Args:
        z: ``[..., groups * D]`` as in `codebook_lookup`.
        codebooks: one book a stage, each as `codebook_lookup` takes it; or one tensor of all, stages first.
        metric, groups, check_nan: as in `codebook_lookup`.

    Returns:
        ``(indices, values)``: indices of all stages stacked last, ``[..., S]`` or ``[..., groups, S]``; values the sum
        over the stages. Gradients go straight through to z once, and to every stage's book.
    """
    if not len(codebooks):
        raise ValueError("residual_codebook_lookup: codebooks must hold at least one stage, got none")
    left, total, indices = z.detach(), None, []
    for book in codebooks:
        index, values = codebook_lookup(left, book, metric, groups, check_nan=check_nan)
        left = left - values.detach()
        total = values if total is None else total + values
        indices.append(index)
    assert total is not None
    return torch.stack(indices, -1), total + (z - z.detach())


def _kind(metric: str) -> int:
    if metric not in METRICS:
        raise ValueError(f"codebook_lookup: metric must be one of {', '.join(METRICS)}, got {metric!r}")
    return METRICS.index(metric)


def _name(t: Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)} on {t.device.type}"


def _check(op: str, z: Tensor, codebook: Tensor, metric: int, groups: int) -> None:
    """csrc/codebook_lookup/codebook_lookup.cpp's checks, word for word, for what never reaches it: tracing, Triton."""
    if z.dtype not in _FLOATS:
        raise RuntimeError(f"{op}: z must be float32, bfloat16, float16 or float64, got {_name(z)}")
    if not 0 <= metric < len(METRICS):
        raise RuntimeError(f"{op}: metric must be 0 to {len(METRICS) - 1}, got {metric}")
    if groups < 1:
        raise RuntimeError(f"{op}: groups must be at least 1, got {groups}")
    if z.dim() < 1 or z.shape[-1] % groups:
        raise RuntimeError(f"{op}: z must be [..., groups * D] with groups = {groups}, got {_name(z)}")
    D, half = z.shape[-1] // groups, z.dtype in _HALVES
    typed = codebook.dtype == z.dtype or (half and codebook.dtype == torch.float32)
    shaped = codebook.dim() == 2 or (codebook.dim() == 3 and codebook.shape[0] == groups)
    if not typed or not shaped or codebook.shape[-1] != D or codebook.device != z.device:
        types = str(z.dtype).removeprefix("torch.") + (" or float32" if half else "")
        want = f"{types} [K, {D}] or [{groups}, K, {D}] on {z.device.type}"
        raise RuntimeError(f"{op}: codebook must be {want}, got {_name(codebook)}")
    K = codebook.shape[-2]
    if not 1 <= K < 2**31:
        raise RuntimeError(f"{op}: codebook must hold 1 to 2^31 - 1 codes, got {K}")


# ---- registration --------------------------------------------------------------------------------------------------


@torch.library.register_fake("spikecore::codebook_lookup_fwd")
def _codebook_lookup_fwd_fake(z, codebook, metric, groups, check_nan):
    _check("codebook_lookup", z, codebook, metric, groups)
    shape = [*z.shape[:-1], groups] if groups > 1 else z.shape[:-1]
    return z.new_empty(shape, dtype=torch.int64), z.new_empty(z.shape)


@torch.library.register_fake("spikecore::codebook_lookup_bwd")
def _codebook_lookup_bwd_fake(g_values, indices, codebook, groups):
    _check("codebook_lookup backward", g_values, codebook, 0, groups)
    return codebook.new_empty(codebook.shape)


def _setup_context(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    _, codebook, _, ctx.groups, _ = inputs
    # Of the book backward needs the shape alone; one without gradient may change before (running means).
    ctx.save_for_backward(*((codebook, output[0]) if ctx.needs_input_grad[1] else ()))


def _backward(ctx, g_indices: Any, g_values: Tensor | None):
    if g_values is None:
        return None, None, None, None, None
    g_codebook = None
    if ctx.needs_input_grad[1]:
        codebook, indices = ctx.saved_tensors
        g_codebook = torch.ops.spikecore.codebook_lookup_bwd(g_values, indices, codebook, ctx.groups)
    return g_values, g_codebook, None, None, None


register("codebook_lookup", _setup_context, _backward, "is not defined")
