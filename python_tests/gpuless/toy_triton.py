"""Small Triton kernels on which the tools of this folder are tested; MASK, RACY ... plant one defect each."""

import triton
import triton.language as tl


@triton.jit
def scale(p_x, p_y, N, factor, BN: tl.constexpr, MASK: tl.constexpr):
    i = tl.program_id(0) * BN + tl.arange(0, BN)
    if MASK:  # noqa: SIM108
        b_x = tl.load(p_x + i, mask=i < N)
    else:
        b_x = tl.load(p_x + i)
    tl.store(p_y + i, (b_x.to(tl.float32) * factor).to(p_y.dtype.element_ty), mask=i < N)


@triton.jit
def total(p_x, p_sum, N, BN: tl.constexpr, RACY: tl.constexpr):
    i = tl.program_id(0) * BN + tl.arange(0, BN)
    b_sum = tl.sum(tl.load(p_x + i, mask=i < N, other=0.0).to(tl.float32))
    if RACY:
        tl.store(p_sum, tl.load(p_sum) + b_sum)
    else:
        tl.atomic_add(p_sum, b_sum)


@triton.jit
def product(p_a, p_b, p_c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    b_a = tl.load(p_a + m[:, None] * K + k[None, :])
    b_b = tl.load(p_b + k[:, None] * N + n[None, :])
    tl.store(p_c + m[:, None] * N + n[None, :], tl.dot(b_a, b_b))


@triton.jit
def cumulative(p_x, p_y, L, N, BL: tl.constexpr, BN: tl.constexpr):
    """Running sums over the rows of x: [L, N]."""
    n, l = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BL)
    mask = (l[:, None] < L) & (n[None, :] < N)
    at = l[:, None] * N + n[None, :]
    tl.store(p_y + at, tl.cumsum(tl.load(p_x + at, mask=mask, other=0.0), 0), mask=mask)
