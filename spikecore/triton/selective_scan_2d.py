"""selective_scan_2d in Triton: the GPU backend where the compiled CUDA kernels cannot run. Formulas:
spikecore/ops/selective_scan_2d.py; same launchers' signatures as the registered ops.

A program owns channels of one map and walks it in every direction, a chunk of places at a time: an associative scan
within the chunk, the state carried to the next. What the state is before a place comes of a scan whose elements are
those of the place before.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikecore.triton.selective_scan import _exp, _sigmoid, _softplus

INTERPRET = triton.knobs.runtime.interpret
CHUNK = 64  # places
FWD_CHANNELS, BWD_CHANNELS = 4, 16  # of a program; backward adds up their parts in the gradients of B and C
FWD_WARPS, BWD_WARPS = 4, 8  # with 4, backward spills


@triton.jit
def _join(a1, x1, a2, x2):
    # Two stretches, one after the other: a state h becomes a * h + x.
    a = a1 * a2
    return tl.where(a > 3.402823466e38, 3.402823466e38, a), a2 * x1 + x2


@triton.jit
def _place(code, l, H, W):
    # csrc/selective_scan_2d/selective_scan_2d.h's walk_place.
    back = (code == 2) | (code == 3) | (code == 5)
    l = tl.where(back, H * W - 1 - l, l)
    column = l // H
    w = tl.where(code >= 4, W - 1 - column, column)
    return tl.where((code == 0) | (code == 2), l, (l - column * H) * W + w)


@triton.jit
def _steps(p_delta, bias, at, mask, POSITIVE: tl.constexpr):
    # delta with its bias, and the step sizes: 0 outside the mask, which leaves the state as it is.
    z = tl.load(p_delta + at, mask=mask, other=0.0).to(tl.float32) + bias
    if POSITIVE:
        dt = _softplus(z)
    else:
        dt = z
    return z, tl.where(mask, dt, 0.0)


@triton.jit
def _of_state(values, s, BS: tl.constexpr):
    # Column s of [channels, BS], as [channels, 1].
    return tl.sum(tl.where(tl.arange(0, BS)[None, :] == s, values, 0.0), 1)[:, None]


@triton.jit
def _with_state(values, s, column, BS: tl.constexpr):
    return tl.where(tl.arange(0, BS)[None, :] == s, column, values)


@triton.jit
def _at_lane(values, lane, BL: tl.constexpr):
    # Column `lane` of [channels, BL], as [channels, 1].
    return tl.sum(tl.where(tl.arange(0, BL)[None, :] == lane, values, 0.0), 1)[:, None]


@triton.jit
def selective_scan_2d_fwd_kernel(
    p_x, p_delta, p_A, p_B, p_C, p_D, p_bias, p_y, p_sum, C, H, W, S, codes,
    K: tl.constexpr, POSITIVE: tl.constexpr, D: tl.constexpr, BIAS: tl.constexpr, CONVERT: tl.constexpr,
    BC: tl.constexpr, BL: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(C, BC)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    c = (tl.program_id(0) % blocks) * BC + tl.arange(0, BC)[:, None]
    live = c < C
    L = H * W
    row = (b * C + c) * L
    for k in range(K):
        code = (codes >> (4 * k)) & 15
        kc, bk = k * C + c, b * K + k
        bias = tl.zeros([BC, 1], tl.float32)
        skip = tl.zeros([BC, 1], tl.float32)
        if BIAS:
            bias = tl.load(p_bias + kc, mask=live, other=0.0)
        if D:
            skip = tl.load(p_D + kc, mask=live, other=0.0)
        carried = tl.zeros([BC, BS], tl.float32)
        for l0 in range(0, L, BL):
            l = l0 + tl.arange(0, BL)[None, :]
            within = l < L
            mask = live & within
            at = _place(code, l, H, W)
            _, dt = _steps(p_delta + (bk * C + c) * L, bias, at, mask, POSITIVE)
            u = tl.load(p_x + row + at, mask=mask, other=0.0).to(tl.float32)
            y = skip * u
            for s in range(S):
                A = tl.load(p_A + kc * S + s, mask=live, other=0.0)
                into = tl.load(p_B + (bk * S + s) * L + at, mask=within, other=0.0).to(tl.float32)
                out = tl.load(p_C + (bk * S + s) * L + at, mask=within, other=0.0).to(tl.float32)
                a, x = tl.associative_scan((_exp(dt * A), dt * u * into), 1, _join)
                h = a * _of_state(carried, s, BS) + x
                y += h * out
                carried = _with_state(carried, s, _at_lane(h, BL - 1, BL), BS)
            if k > 0:
                y += tl.load(p_sum + row + at, mask=mask, other=0.0)
            tl.store(p_sum + row + at, y, mask=mask)
        tl.debug_barrier()  # the next direction adds to places of other threads
    if CONVERT:
        for l0 in range(0, L, BL):
            l = l0 + tl.arange(0, BL)[None, :]
            mask = live & (l < L)
            y = tl.load(p_sum + row + l, mask=mask, other=0.0)
            tl.store(p_y + row + l, y.to(p_y.dtype.element_ty), mask=mask)


@triton.jit
def selective_scan_2d_bwd_kernel(
    p_g_y, p_x, p_delta, p_A, p_B, p_C, p_D, p_bias, p_g_x, p_g_delta, p_g_A, p_g_B, p_g_C, p_g_D, p_g_bias, p_sum,
    p_starts, C, H, W, S, codes,
    K: tl.constexpr, POSITIVE: tl.constexpr, D: tl.constexpr, BIAS: tl.constexpr, CONVERT: tl.constexpr,
    BC: tl.constexpr, BL: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    groups = tl.cdiv(C, BC)
    group = tl.program_id(0).to(tl.int64)
    b = group // groups
    c = (tl.program_id(0) % groups) * BC + tl.arange(0, BC)[:, None]
    live = c < C
    L = H * W
    row = (b * C + c) * L
    chunks = tl.cdiv(L, BL)
    states = tl.arange(0, BS)[None, :]
    lane = tl.arange(0, BL)[None, :]
    for k in range(K):
        code = (codes >> (4 * k)) & 15
        kc, bk = k * C + c, b * K + k
        p_own = p_delta + (bk * C + c) * L
        bias = tl.zeros([BC, 1], tl.float32)
        skip = tl.zeros([BC, 1], tl.float32)
        if BIAS:
            bias = tl.load(p_bias + kc, mask=live, other=0.0)
        if D:
            skip = tl.load(p_D + kc, mask=live, other=0.0)
        carried = tl.zeros([BC, BS], tl.float32)
        for chunk in range(chunks):
            start = p_starts + ((b * C + c) * chunks + chunk) * S + states
            tl.store(start, carried, mask=live & (states < S))
            l = chunk * BL + lane
            mask = live & (l < L)
            at = _place(code, l, H, W)
            _, dt = _steps(p_own, bias, at, mask, POSITIVE)
            u = tl.load(p_x + row + at, mask=mask, other=0.0).to(tl.float32)
            for s in range(S):
                A = tl.load(p_A + kc * S + s, mask=live, other=0.0)
                into = tl.load(p_B + (bk * S + s) * L + at, mask=l < L, other=0.0).to(tl.float32)
                a, x = tl.associative_scan((_exp(dt * A), dt * u * into), 1, _join)
                h = a * _of_state(carried, s, BS) + x
                carried = _with_state(carried, s, _at_lane(h, BL - 1, BL), BS)
        tl.debug_barrier()  # starts are read by other threads
        g_carried = tl.zeros([BC, BS], tl.float32)
        g_A = tl.zeros([BC, BS], tl.float32)
        g_bias = tl.zeros([BC, 1], tl.float32)
        g_D = tl.zeros([BC, 1], tl.float32)
        for back in range(chunks):
            chunk = chunks - 1 - back
            l = chunk * BL + lane
            mask = live & (l < L)
            at = _place(code, l, H, W)
            z, dt = _steps(p_own, bias, at, mask, POSITIVE)
            u = tl.load(p_x + row + at, mask=mask, other=0.0).to(tl.float32)
            g = tl.load(p_g_y + row + at, mask=mask, other=0.0).to(tl.float32)
            g_D += tl.sum(g * u, 1)[:, None]
            # The place before and the one after, within the chunk.
            has_before, has_after = (l < L) & (lane > 0), (l + 1 < L) & (lane < BL - 1)
            at_before, at_after = _place(code, l - 1, H, W), _place(code, l + 1, H, W)
            _, dt_before = _steps(p_own, bias, at_before, live & has_before, POSITIVE)
            _, dt_after = _steps(p_own, bias, at_after, live & has_after, POSITIVE)
            u_before = tl.load(p_x + row + at_before, mask=live & has_before, other=0.0).to(tl.float32)
            g_after = tl.load(p_g_y + row + at_after, mask=live & has_after, other=0.0).to(tl.float32)
            start = tl.load(p_starts + ((b * C + c) * chunks + chunk) * S + states, mask=live & (states < S), other=0.0)
            g_decays = tl.zeros([BC, BL], tl.float32)
            g_steps = tl.zeros([BC, BL], tl.float32)
            for s in range(S):
                A = tl.load(p_A + kc * S + s, mask=live, other=0.0)
                p_into, p_out = p_B + (bk * S + s) * L, p_C + (bk * S + s) * L
                into = tl.load(p_into + at, mask=l < L, other=0.0).to(tl.float32)
                out = tl.load(p_out + at, mask=l < L, other=0.0).to(tl.float32)
                into_before = tl.load(p_into + at_before, mask=has_before, other=0.0).to(tl.float32)
                out_after = tl.load(p_out + at_after, mask=has_after, other=0.0).to(tl.float32)
                a = _exp(dt * A)
                step = (_exp(dt_before * A), dt_before * u_before * into_before)
                before_a, before_x = tl.associative_scan(step, 1, _join)
                before = before_a * _of_state(start, s, BS) + before_x
                h = a * before + dt * u * into
                a_after = _exp(dt_after * A)
                step = (a_after, a_after * (out_after * g_after))
                after_a, after_x = tl.associative_scan(step, 1, _join, reverse=True)
                g_h = after_a * _of_state(g_carried, s, BS) + after_x + out * g
                through = a * g_h * before
                g_decays += A * through
                g_steps += g_h * into
                g_A = g_A + tl.where(states == s, tl.sum(dt * through, 1)[:, None], 0.0)
                g_carried = _with_state(g_carried, s, _at_lane(a * g_h, 0, BL), BS)
                part = ((group * K + k) * S + s) * L + at
                total_B = tl.sum(tl.where(mask, g_h * (dt * u), 0.0), 0)[None, :]
                total_C = tl.sum(tl.where(mask, g * h, 0.0), 0)[None, :]
                tl.store(p_g_B + part, total_B, mask=l < L)
                tl.store(p_g_C + part, total_C, mask=l < L)
            g_delta = g_decays + g_steps * u
            if POSITIVE:
                g_delta = g_delta * _sigmoid(z)
            g_delta = tl.where(mask, g_delta, 0.0)
            g_bias += tl.sum(g_delta, 1)[:, None]
            tl.store(p_g_delta + (bk * C + c) * L + at, g_delta.to(p_g_delta.dtype.element_ty), mask=mask)
            g_x = g_steps * dt + skip * g
            if k > 0:
                g_x += tl.load(p_sum + row + at, mask=mask, other=0.0)
            tl.store(p_sum + row + at, g_x, mask=mask)
        tl.store(p_g_A + (bk * C + c) * S + states, g_A, mask=live & (states < S))
        if BIAS:
            tl.store(p_g_bias + bk * C + c, g_bias, mask=live)
        if D:
            tl.store(p_g_D + bk * C + c, g_D, mask=live)
        tl.debug_barrier()  # the next direction adds to places, and writes starts, of other threads
    if CONVERT:
        for l0 in range(0, L, BL):
            l = l0 + lane
            mask = live & (l < L)
            g_x = tl.load(p_sum + row + l, mask=mask, other=0.0)
            tl.store(p_g_x + row + l, g_x.to(p_g_x.dtype.element_ty), mask=mask)


def _launch(kernel: Any, channels: int, warps: int, x: Tensor, S: int, directions: list[int], *rest: Any) -> None:
    tensors, softplus = rest
    b, C, H, W = x.shape
    if x.numel() == 0:
        return
    codes = sum(code << 4 * k for k, code in enumerate(directions))
    D, bias = tensors[-2:]
    with torch.cuda.device_of(x):  # nothing for the interpreter's CPU tensors
        kernel[(b * triton.cdiv(C, channels),)](
            *tensors[:-2], C, H, W, S, codes,
            K=len(directions), POSITIVE=softplus, D=D is not None, BIAS=bias is not None,
            CONVERT=x.dtype != torch.float32, BC=channels, BL=min(CHUNK, triton.next_power_of_2(H * W)),
            BS=triton.next_power_of_2(S), num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip


def _check_all(op: str, x: Tensor, *inputs: Any) -> None:
    from spikecore.ops.selective_scan_2d import _check

    _check(op, x, *inputs)
    if x.dtype == torch.float64:
        raise RuntimeError(f"{op}: float64 runs on the CPU only, got {list(x.shape)} on {x.device.type}")


def _dense(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def selective_scan_2d_fwd(x, delta, A, B, C, D, delta_bias, delta_softplus, directions):
    _check_all("selective_scan_2d", x, delta, A, B, C, D, delta_bias, directions)
    x, delta, A, B, C, D, delta_bias = _dense(x, delta, A, B, C, D, delta_bias)
    y = torch.empty_like(x)
    total = y if x.dtype == torch.float32 else torch.empty_like(x, dtype=torch.float32)
    tensors = (x, delta, A, B, C, D, delta_bias, y, total, D, delta_bias)
    _launch(selective_scan_2d_fwd_kernel, FWD_CHANNELS, FWD_WARPS, x, A.shape[2], directions, tensors, delta_softplus)
    return y


def selective_scan_2d_bwd(g_y, x, delta, A, B, C, D, delta_bias, delta_softplus, directions):
    from spikecore.ops.selective_scan_2d import _selective_scan_2d_bwd_fake

    _check_all("selective_scan_2d backward", x, delta, A, B, C, D, delta_bias, directions)
    g_y, x, delta, A, B, C, D, delta_bias = _dense(g_y, x, delta, A, B, C, D, delta_bias)
    grads = _selective_scan_2d_bwd_fake(
        g_y, x, delta, A, B, C, D, delta_bias, delta_softplus, directions, group=BWD_CHANNELS
    )
    if x.numel() == 0:
        for g in grads[2:]:
            g.zero_()
        return grads
    b, c, H, W = x.shape
    total = grads[0] if x.dtype == torch.float32 else torch.empty_like(x, dtype=torch.float32)
    starts = x.new_empty((b, c, triton.cdiv(H * W, CHUNK), A.shape[2]), dtype=torch.float32)
    tensors = (g_y, x, delta, A, B, C, D, delta_bias, *grads, total, starts, D, delta_bias)
    _launch(selective_scan_2d_bwd_kernel, BWD_CHANNELS, BWD_WARPS, x, A.shape[2], directions, tensors, delta_softplus)
    return grads


def register() -> None:
    """Make these the kernels of torch's CUDA dispatch key."""
    for name, launcher in (
        ("selective_scan_2d_fwd", selective_scan_2d_fwd),
        ("selective_scan_2d_bwd", selective_scan_2d_bwd),
    ):
        _library.impl(name, launcher, "CUDA")


_library = torch.library.Library("spikecore", "IMPL")
