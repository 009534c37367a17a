"""codebook_lookup in Triton: the GPU backend where the compiled CUDA kernels cannot run. Formulas: spikecore/ops.

Same launchers' signatures as the registered ops, and the same steps as csrc/codebook_lookup/codebook_lookup_cuda.cu;
half-precision books are screened on tensor cores. Scores that decide are float64 sums in the order of the C++ kernels.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BM, BN = 64, 64  # rows and codes of a tile
# Numbers of a vector at once, and warps: without tensor cores operands lie in registers, and more of them would spill.
BK = {torch.float32: 16, torch.bfloat16: 32, torch.float16: 32}
WARPS = {torch.float32: 8, torch.bfloat16: 4, torch.float16: 4}
BLOCKS, SPLIT_CODES = 264, 512  # programs worth having; least codes of a part
SETTLE = 16  # codes scored at once
SUMS: tl.constexpr = tl.constexpr(32)  # partial sums of a score
COSINE: tl.constexpr = tl.constexpr(2)
L2: tl.constexpr = tl.constexpr(1)


@triton.jit
def codebook_norm_kernel(p_x, p_norm, D, step, INVERSE: tl.constexpr, BD: tl.constexpr):
    # A program owns a vector: its norm (or 1 over it), rounded up; NaN where it is not finite.
    i = tl.program_id(0).to(tl.int64)
    sums = tl.zeros([BD], tl.float64)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        x = tl.load(p_x + i * step + d, mask=d < D, other=0.0).to(tl.float64)
        sums += x * x
    square = tl.sum(sums, 0)
    norm = tl.sqrt(square)
    if INVERSE:
        norm = tl.where(square > 0, 1.0 / tl.where(square > 0, norm, 1.0), 0.0)
    rounded = (norm * (1 + 9.5367431640625e-07)).to(tl.float32)
    tl.store(p_norm + i, tl.where(square - square == 0, rounded, float("nan")))


@triton.jit
def _scored(product, norm, weight, gamma, D, METRIC: tl.constexpr):
    # A score in float32, and what it errs by at most: csrc's `scored`.
    numbers = tl.cast(D, tl.float32)  # D itself is a constant without methods where it is 1
    tiny = numbers * 4.701977403289150e-38
    if METRIC == COSINE:
        value = product * weight
        error = gamma * norm + tiny * weight
    elif METRIC == L2:
        value = product - 0.5 * weight * weight
        error = gamma * (norm + weight) * weight + (numbers * 1.7763568394002505e-15 * norm * norm + tiny)
    else:
        value = product
        error = gamma * norm * weight + tiny
    return value, error


@triton.jit
def codebook_screen_kernel(
    p_z, p_codes, p_z_norm, p_c_norm, p_found, p_index, n, K, D, z_step, gamma,
    METRIC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    # Program (x, y) owns BM rows and part y of the codes, walks them by BN, and keeps each row's best and second best.
    i = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    split, splits = tl.program_id(1), tl.num_programs(1)
    tiles = tl.cdiv(K, BN)
    norm = tl.load(p_z_norm + i, mask=i < n, other=0.0)
    b_upper = tl.full([BM], float("-inf"), tl.float32)
    b_second = tl.full([BM], float("-inf"), tl.float32)
    b_error = tl.zeros([BM], tl.float32)
    b_index = tl.full([BM], -1, tl.int32)
    for tile in range(tiles * split // splits, tiles * (split + 1) // splits):
        k = tile * BN + tl.arange(0, BN)
        k64 = k.to(tl.int64)
        acc = tl.zeros([BM, BN], tl.float32)
        for d0 in range(0, D, BK):
            d = d0 + tl.arange(0, BK)
            b_z = tl.load(p_z + i[:, None] * z_step + d[None, :], mask=(i[:, None] < n) & (d[None, :] < D), other=0.0)
            b_c = tl.load(p_codes + k64[None, :] * D + d[:, None], mask=(k[None, :] < K) & (d[:, None] < D), other=0.0)
            acc = tl.dot(b_z.to(b_c.dtype), b_c, acc, input_precision="ieee")
        weight = tl.load(p_c_norm + k, mask=k < K, other=float("nan"))
        value, error = _scored(acc, norm[:, None], weight[None, :], gamma, D, METRIC)
        upper = value + error
        upper = tl.where(upper == upper, upper, float("inf"))
        upper = tl.where((weight == weight)[None, :], upper, float("-inf"))
        t_upper, t_at = tl.max(upper, 1), tl.argmax(upper, 1)
        here = tl.arange(0, BN)[None, :] == t_at[:, None]
        t_second = tl.max(tl.where(here, float("-inf"), upper), 1)
        t_error = tl.sum(tl.where(here, error, 0.0), 1)
        better = t_upper > b_upper
        b_second = tl.maximum(tl.maximum(b_second, t_second), tl.minimum(b_upper, t_upper))
        b_error = tl.where(better, t_error, b_error)
        b_index = tl.where(better, tile * BN + t_at, b_index)
        b_upper = tl.maximum(b_upper, t_upper)
    p_row = p_found + (split.to(tl.int64) * n + i) * 3
    tl.store(p_row, b_upper, mask=i < n)
    tl.store(p_row + 1, b_upper - 2 * b_error, mask=i < n)
    tl.store(p_row + 2, b_second, mask=i < n)
    tl.store(p_index + split.to(tl.int64) * n + i, b_index, mask=i < n)


@triton.jit
def _halve(x, BN: tl.constexpr, W: tl.constexpr):
    low, high = tl.split(tl.permute(tl.reshape(x, [BN, 2, W]), [0, 2, 1]))
    return low + high


@triton.jit
def _halved(x, BN: tl.constexpr):
    # [BN, 32] -> [BN]: lane i meets lane i + 16, then i + 8 and so on, as in csrc.
    x = _halve(_halve(_halve(x, BN, 16), BN, 8), BN, 4)
    return tl.reshape(_halve(_halve(x, BN, 2), BN, 1), [BN])


@triton.jit
def codebook_settle_kernel(
    p_z, p_codes, p_z_norm, p_c_norm, p_found, p_index, p_indices, p_values,
    n, K, D, z_step, v_step, i_step, splits, gamma,
    METRIC: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    # A program owns a row. Where screening left more than one code in the race, it scores in float64 those whose
    # products in float32 reach the bound.
    i = tl.program_id(0).to(tl.int64)
    norm = tl.load(p_z_norm + i)
    upper, lower, second = tl.load(p_found + i * 3), tl.load(p_found + i * 3 + 1), tl.load(p_found + i * 3 + 2)
    chosen = tl.load(p_index + i)
    for s in range(1, splits):
        p_row = p_found + (tl.cast(s, tl.int64) * n + i) * 3
        o_upper = tl.load(p_row)
        better = o_upper > upper
        second = tl.maximum(tl.maximum(second, tl.load(p_row + 2)), tl.minimum(upper, o_upper))
        lower = tl.where(better, tl.load(p_row + 1), lower)
        chosen = tl.where(better, tl.load(p_index + tl.cast(s, tl.int64) * n + i), chosen)
        upper = tl.maximum(upper, o_upper)
    finite = lower - lower == 0
    chosen = tl.where(norm == norm, chosen, -1)
    if (chosen >= 0) & ((lower <= second) | (finite == 0)):
        floor = tl.where(finite, lower - tl.abs(lower) * 2.384185791015625e-07, float("-inf"))
        best = tl.full([], float("-inf"), tl.float64)
        chosen = tl.full([], -1, tl.int32)
        for k0 in range(0, K, BN):
            k = k0 + tl.arange(0, BN)
            p_c = p_codes + k.to(tl.int64)[:, None] * D
            rough = tl.zeros([BN, SUMS], tl.float32)
            for d0 in range(0, D, SUMS):
                d = d0 + tl.arange(0, SUMS)
                b_z = tl.load(p_z + i * z_step + d, mask=d < D, other=0.0).to(tl.float32)
                b_c = tl.load(p_c + d[None, :], mask=(k[:, None] < K) & (d[None, :] < D), other=0.0).to(tl.float32)
                rough += b_z[None, :] * b_c
            weight = tl.load(p_c_norm + k, mask=k < K, other=float("nan"))
            value, error = _scored(tl.sum(rough, 1), norm, weight, gamma, D, METRIC)
            near = (weight == weight) & ((value + error < floor) == 0)
            if tl.max(near.to(tl.int32), 0) > 0:
                sums = tl.zeros([BN, SUMS], tl.float64)
                squares = tl.zeros([BN, SUMS], tl.float64)
                for d0 in range(0, D, SUMS):
                    d = d0 + tl.arange(0, SUMS)
                    a = tl.load(p_z + i * z_step + d, mask=d < D, other=0.0).to(tl.float64)[None, :]
                    c = tl.load(p_c + d[None, :], mask=(k[:, None] < K) & (d[None, :] < D), other=0.0).to(tl.float64)
                    if METRIC == L2:
                        sums += (a - c) * (a - c)
                    else:
                        sums += a * c
                    if METRIC == COSINE:
                        squares += c * c
                exact = _halved(sums, BN)
                if METRIC == L2:
                    exact = -exact
                if METRIC == COSINE:
                    square = _halved(squares, BN)
                    exact = tl.where(square == 0, 0.0, exact / tl.sqrt(tl.where(square == 0, 1.0, square)))
                exact = tl.where(near & (exact - exact == 0), exact, float("-inf"))
                top, at = tl.max(exact, 0), tl.argmax(exact, 0)
                chosen = tl.where(top > best, k0 + at, chosen)
                best = tl.maximum(best, top)
    tl.store(p_indices + i * i_step, chosen.to(tl.int64))
    p_code = p_codes + tl.maximum(chosen, 0).to(tl.int64) * D
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        value = tl.load(p_code + d, mask=d < D, other=0.0)
        value = tl.where(chosen < 0, float("nan"), value.to(tl.float32)).to(p_values.dtype.element_ty)
        tl.store(p_values + i * v_step + d, value, mask=d < D)


@triton.jit
def codebook_bwd_kernel(p_g, p_order, p_starts, p_g_codes, D, g_step, BD: tl.constexpr):
    # Program (k, y) owns BD numbers of code k and adds up the rows that chose it, in their order.
    k = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    acc = tl.zeros([BD], tl.float32)
    for j in range(tl.load(p_starts + k), tl.load(p_starts + k + 1)):
        row = tl.load(p_order + j)
        acc += tl.load(p_g + row * g_step + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(p_g_codes + k * D + d, acc.to(p_g_codes.dtype.element_ty), mask=d < D)


def splits_of(n: int, K: int) -> int:
    return max(1, min(BLOCKS // triton.cdiv(n, BM), K // SPLIT_CODES))


def gamma_of(D: int, dtype: torch.dtype) -> float:
    """Tensor cores may cut what other units round: four times the room."""
    return (2 * D + 16) * 2.0 ** (-24 if dtype == torch.float32 else -22) + 2.0**-17


def _refuse_double(op: str, z: Tensor) -> None:
    from spikecore.ops.codebook_lookup import _name

    if z.dtype == torch.float64:
        raise RuntimeError(f"{op}: float64 runs on the CPU only, got {_name(z)}")


def codebook_lookup_fwd(z, codebook, metric, groups, check_nan):
    from spikecore.ops.codebook_lookup import _codebook_lookup_fwd_fake

    indices, values = _codebook_lookup_fwd_fake(z, codebook, metric, groups, check_nan)
    _refuse_double("codebook_lookup", z)
    D = codebook.shape[-1]
    if not indices.numel():
        return indices, values
    if D == 0:
        return indices.zero_(), values
    rows, codebook = z.reshape(-1, groups, D), codebook.contiguous()
    out_i, out_v = indices.view(-1, groups), values.view(-1, groups, D)
    if codebook.dim() == 2 and rows.is_contiguous():  # one book for rows of all groups alike
        rows, out_i, out_v = rows.view(-1, 1, D), out_i.view(-1, 1), out_v.view(-1, 1, D)
    z_norms, c_norms = [], []
    for g in range(rows.shape[1]):
        book = codebook if codebook.dim() == 2 else codebook[g]
        z_norm, c_norm = _lookup(rows[:, g], book, out_i[:, g], out_v[:, g], metric)
        z_norms.append(z_norm)
        c_norms.append(c_norm)
    if check_nan:
        for name, norms, instead in (
            ("z", z_norms, "gives such rows index -1"), ("codebook", c_norms, "never chooses such codes")
        ):  # fmt: skip
            if torch.cat(norms).isnan().any().item():
                raise RuntimeError(
                    f"codebook_lookup: {name} must be finite, got NaN or infinity (check_nan=False {instead})"
                )
    return indices, values


def _lookup(z: Tensor, codes: Tensor, indices: Tensor, values: Tensor, metric: int) -> tuple[Tensor, Tensor]:
    """One group: z, values ``[n, D]``, indices ``[n]``, all with dense last dimension; returns the norms."""
    z = z if z.stride(-1) == 1 or z.shape[-1] == 1 else z.contiguous()
    (n, D), K, splits = z.shape, len(codes), splits_of(len(z), len(codes))
    z_norm, c_norm = z.new_empty(n, dtype=torch.float32), z.new_empty(K, dtype=torch.float32)
    found = z.new_empty(splits, n, 3, dtype=torch.float32)
    index = z.new_empty(splits, n, dtype=torch.int32)
    BD = min(256, triton.next_power_of_2(D))
    common: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}
    with torch.cuda.device_of(z):
        codebook_norm_kernel[(n,)](z, z_norm, D, z.stride(0), INVERSE=False, BD=BD, **common)
        codebook_norm_kernel[(K,)](codes, c_norm, D, D, INVERSE=metric == 2, BD=BD, **common)
        codebook_screen_kernel[(triton.cdiv(n, BM), splits)](
            z, codes, z_norm, c_norm, found, index, n, K, D, z.stride(0), gamma_of(D, codes.dtype),
            METRIC=metric, BM=BM, BN=BN, BK=BK[codes.dtype], **(common | {"num_warps": WARPS[codes.dtype]}),
        )  # fmt: skip
        codebook_settle_kernel[(n,)](
            z, codes, z_norm, c_norm, found, index, indices, values,
            n, K, D, z.stride(0), values.stride(0), indices.stride(0), splits, gamma_of(D, torch.float32),
            METRIC=metric, BN=SETTLE, BD=BD, **common,
        )  # fmt: skip
    return z_norm, c_norm


def codebook_lookup_bwd(g_values, indices, codebook, groups):
    from spikecore.ops.codebook_lookup import _codebook_lookup_bwd_fake

    out = _codebook_lookup_bwd_fake(g_values, indices, codebook, groups)
    _refuse_double("codebook_lookup backward", g_values)
    K, D = out.shape[-2], out.shape[-1]
    if D == 0:
        return out
    shared = codebook.dim() == 2
    rows = g_values.contiguous().view(-1, 1 if shared else groups, D)
    flat, books = indices.reshape(rows.shape[:2]), out.view(-1, K, D)
    BD = min(256, triton.next_power_of_2(D))
    for g in range(rows.shape[1]):
        ordered, order = flat[:, g].sort(stable=True)
        starts = torch.searchsorted(ordered, torch.arange(K + 1, device=out.device))
        with torch.cuda.device_of(out):
            codebook_bwd_kernel[(K, triton.cdiv(D, BD))](
                rows[:, g], order, starts, books[g], D, rows.stride(0), BD=BD, num_warps=4
            )
    return out


def register() -> None:
    """Make these the kernels of torch's CUDA dispatch key."""
    for name, launcher in (("codebook_lookup_fwd", codebook_lookup_fwd), ("codebook_lookup_bwd", codebook_lookup_bwd)):
        _library.impl(name, launcher, "CUDA")


_library = torch.library.Library("spikecore", "IMPL")
