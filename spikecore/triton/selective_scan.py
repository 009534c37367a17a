"""selective_scan in Triton: the GPU backend where the CUDA kernels cannot run. Formulas: ops/selective_scan.py.

Same launchers' signatures as the registered ops. A program owns a block of a group's channels with all their states and
walks the sequence step by step; it reads dense tensors, so others are copied first.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

SEGMENT = 64  # steps between two states that backward keeps
CHANNELS = 16  # of a program
# Without a bound of ours ptxas chooses a lower one, and spills in half precision.
OPTIONS = {"num_warps": 4, "maxnreg": 128, "enable_fp_fusion": False}


@triton.jit
def _exp(x):
    # csrc/selective_scan/scan.h's saturating_exp.
    x = tl.where(x < -88.029686, -88.029686, x)
    x = tl.where(x > 88.72283, 88.72283, x)
    m = x * 1.44269504 + 12582912.0
    n = m - 12582912.0
    r = (x - n * 0.693359375) - n * -2.12194440e-4
    p = r * 1.381460204e-3 + 8.368715202e-3
    p = p * r + 4.166838788e-2
    p = p * r + 1.666652065e-1
    p = p * r + 4.999999345e-1
    p = p * r + 1.0
    p = p * r + 1.0
    return (p.to(tl.int32, bitcast=True) + (m.to(tl.int32, bitcast=True) << 23)).to(tl.float32, bitcast=True)


@triton.jit
def _softplus(x):
    # log(1 + e) = 2 atanh(e / (2 + e)), as scan.h has it.
    e = _exp(-tl.abs(x))
    s = tl.div_rn(e, 2.0 + e)  # "/" errs by two units, which long sums would show
    t = s * s
    p = t * 2.8011985677e-1 + 2.8001805513e-1
    p = p * t + 4.0021527224e-1
    p = p * t + 6.6666416286e-1
    return tl.where(x > 0, x, 0.0) + (p * (t * s) + 2 * s)


@triton.jit
def _sigmoid(x):
    return tl.div_rn(1.0, 1 + _exp(-x))


@triton.jit
def _channel(p, c, mask, GIVEN: tl.constexpr, BC: tl.constexpr):
    # D or the bias of the channels c, or 0.
    if GIVEN:
        d = tl.load(p + c, mask=mask, other=0.0)
    else:
        d = tl.zeros([BC], tl.float32)
    return d


@triton.jit
def _step(p_delta, row, b_bias, mask, SOFTPLUS: tl.constexpr):
    # delta with its bias, and dt.
    b_delta = tl.load(p_delta + row, mask=mask, other=0.0).to(tl.float32) + b_bias
    if SOFTPLUS:
        b_dt = _softplus(b_delta)
    else:
        b_dt = b_delta
    return b_delta, b_dt


@triton.jit
def _next(b_h, b_dt, b_A, b_u, b_B):
    return _exp(b_dt[:, None] * b_A) * b_h + (b_dt * b_u)[:, None] * b_B[None, :]


@triton.jit
def selective_scan_fwd_kernel(
    p_u, p_delta, p_A, p_B, p_C, p_D, p_z, p_bias, p_init, p_y, p_last, C, L, G, S, blocks,
    SOFTPLUS: tl.constexpr, D: tl.constexpr, Z: tl.constexpr, BIAS: tl.constexpr, INIT: tl.constexpr,
    BC: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    group = pid // blocks  # of [B, G]
    i = (pid % blocks) * BC + tl.arange(0, BC)
    s = tl.arange(0, BS)
    mask, mask_s = i < C // G, s < S
    tile = mask[:, None] & mask_s[None, :]
    c = (group % G) * (C // G) + i
    row = group // G * C + c  # of [B, C]
    b_A = tl.load(p_A + c[:, None] * S + s[None, :], mask=tile, other=0.0)
    b_bias = _channel(p_bias, c, mask, BIAS, BC)
    b_D = _channel(p_D, c, mask, D, BC)
    states = row[:, None] * S + s[None, :]
    if INIT:
        b_h = tl.load(p_init + states, mask=tile, other=0.0)
    else:
        b_h = tl.zeros([BC, BS], tl.float32)
    for l in range(L):
        matrix = (group * S + s) * L + l
        b_u = tl.load(p_u + row * L + l, mask=mask, other=0.0).to(tl.float32)
        _, b_dt = _step(p_delta, row * L + l, b_bias, mask, SOFTPLUS)
        b_B = tl.load(p_B + matrix, mask=mask_s, other=0.0).to(tl.float32)
        b_C = tl.load(p_C + matrix, mask=mask_s, other=0.0).to(tl.float32)
        b_h = _next(b_h, b_dt, b_A, b_u, b_B)
        b_y = tl.sum(b_h * b_C[None, :], 1) + b_D * b_u
        if Z:
            b_z = tl.load(p_z + row * L + l, mask=mask, other=0.0).to(tl.float32)
            b_y = b_y * (b_z * _sigmoid(b_z))
        tl.store(p_y + row * L + l, b_y.to(p_y.dtype.element_ty), mask=mask)
    tl.store(p_last + states, b_h, mask=tile)


@triton.jit
def selective_scan_bwd_kernel(
    p_g_y, p_g_last, p_u, p_delta, p_A, p_B, p_C, p_D, p_z, p_bias, p_init,
    p_g_u, p_g_delta, p_g_A, p_g_B, p_g_C, p_g_D, p_g_z, p_g_bias, p_g_init, p_starts, p_states,
    C, L, G, S, blocks,
    SOFTPLUS: tl.constexpr, D: tl.constexpr, Z: tl.constexpr, BIAS: tl.constexpr, INIT: tl.constexpr,
    G_Y: tl.constexpr, G_LAST: tl.constexpr, SEG: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    # Forward it leaves the states at the starts of segments. Then each segment from the last: forward, its states in
    # the program's own place in memory, and back. p_g_A, p_g_D, p_g_bias: for each b; p_g_B, p_g_C: for each block.
    pid = tl.program_id(0).to(tl.int64)
    group = pid // blocks
    i = (pid % blocks) * BC + tl.arange(0, BC)
    s = tl.arange(0, BS)
    mask, mask_s = i < C // G, s < S
    tile = mask[:, None] & mask_s[None, :]
    c = (group % G) * (C // G) + i
    row = group // G * C + c
    b_A = tl.load(p_A + c[:, None] * S + s[None, :], mask=tile, other=0.0)
    b_bias = _channel(p_bias, c, mask, BIAS, BC)
    b_D = _channel(p_D, c, mask, D, BC)
    states = row[:, None] * S + s[None, :]
    place = tl.arange(0, BC)[:, None] * BS + s[None, :]  # of a state in the program's scratch
    segments = (L + SEG - 1) // SEG
    starts = p_starts + pid * segments * (BC * BS)
    kept = p_states + pid * SEG * (BC * BS)
    if INIT:
        b_h = tl.load(p_init + states, mask=tile, other=0.0)
    else:
        b_h = tl.zeros([BC, BS], tl.float32)
    for l in range(L):
        if l % SEG == 0:
            tl.store(starts + (l // SEG) * (BC * BS) + place, b_h)
        b_u = tl.load(p_u + row * L + l, mask=mask, other=0.0).to(tl.float32)
        _, b_dt = _step(p_delta, row * L + l, b_bias, mask, SOFTPLUS)
        b_B = tl.load(p_B + (group * S + s) * L + l, mask=mask_s, other=0.0).to(tl.float32)
        b_h = _next(b_h, b_dt, b_A, b_u, b_B)
    if G_LAST:
        b_g = tl.load(p_g_last + states, mask=tile, other=0.0)
    else:
        b_g = tl.zeros([BC, BS], tl.float32)
    sum_A = tl.zeros([BC, BS], tl.float32)
    sum_D = tl.zeros([BC], tl.float32)
    sum_bias = tl.zeros([BC], tl.float32)
    for back in range(segments):
        first = (segments - 1 - back) * SEG
        n = tl.minimum(L - first, SEG)
        b_h = tl.load(starts + (first // SEG) * (BC * BS) + place)
        part_A = tl.zeros([BC, BS], tl.float32)  # a segment's sums apart: one long sum in float32 would err more
        part_D = tl.zeros([BC], tl.float32)
        part_bias = tl.zeros([BC], tl.float32)
        for j in range(n):  # kept: the state before each step
            tl.store(kept + j * (BC * BS) + place, b_h)
            l = first + j
            b_u = tl.load(p_u + row * L + l, mask=mask, other=0.0).to(tl.float32)
            _, b_dt = _step(p_delta, row * L + l, b_bias, mask, SOFTPLUS)
            b_B = tl.load(p_B + (group * S + s) * L + l, mask=mask_s, other=0.0).to(tl.float32)
            b_h = _next(b_h, b_dt, b_A, b_u, b_B)
        for k in range(n):
            l = first + n - 1 - k
            matrix = (group * S + s) * L + l
            b_u = tl.load(p_u + row * L + l, mask=mask, other=0.0).to(tl.float32)
            b_delta, b_dt = _step(p_delta, row * L + l, b_bias, mask, SOFTPLUS)
            b_B = tl.load(p_B + matrix, mask=mask_s, other=0.0).to(tl.float32)
            b_C = tl.load(p_C + matrix, mask=mask_s, other=0.0).to(tl.float32)
            b_before = tl.load(kept + (n - 1 - k) * (BC * BS) + place)
            b_h = _next(b_before, b_dt, b_A, b_u, b_B)
            if G_Y:
                b_g_y = tl.load(p_g_y + row * L + l, mask=mask, other=0.0).to(tl.float32)
            else:
                b_g_y = tl.zeros([BC], tl.float32)
            if Z:
                b_z = tl.load(p_z + row * L + l, mask=mask, other=0.0).to(tl.float32)
                b_sig = _sigmoid(b_z)
                b_y = tl.sum(b_h * b_C[None, :], 1) + b_D * b_u
                b_g_z = b_g_y * b_y * (b_sig * (1 + b_z * (1 - b_sig)))
                tl.store(p_g_z + row * L + l, b_g_z.to(p_g_z.dtype.element_ty), mask=mask)
                b_g_y = b_g_y * (b_z * b_sig)
            b_g = b_g + b_g_y[:, None] * b_C[None, :]
            part = (pid * S + s) * L + l
            tl.store(p_g_C + part, tl.sum(b_g_y[:, None] * b_h, 0), mask=mask_s)
            tl.store(p_g_B + part, tl.sum(b_g * (b_dt * b_u)[:, None], 0), mask=mask_s)
            b_g_du = tl.sum(b_g * b_B[None, :], 1)
            b_g = b_g * _exp(b_dt[:, None] * b_A)
            b_exponent = b_g * b_before
            part_A += b_exponent * b_dt[:, None]
            b_g_delta = tl.sum(b_exponent * b_A, 1) + b_g_du * b_u
            if SOFTPLUS:
                b_g_delta = b_g_delta * _sigmoid(b_delta)
            part_bias += b_g_delta
            part_D += b_g_y * b_u
            b_g_u = b_g_du * b_dt + b_g_y * b_D
            tl.store(p_g_u + row * L + l, b_g_u.to(p_g_u.dtype.element_ty), mask=mask)
            tl.store(p_g_delta + row * L + l, b_g_delta.to(p_g_delta.dtype.element_ty), mask=mask)
        sum_A += part_A
        sum_D += part_D
        sum_bias += part_bias
    tl.store(p_g_A + states, sum_A, mask=tile)
    if D:
        tl.store(p_g_D + row, sum_D, mask=mask)
    if BIAS:
        tl.store(p_g_bias + row, sum_bias, mask=mask)
    if INIT:
        tl.store(p_g_init + states, b_g, mask=tile)


class _Scan:
    """What both launchers derive from the arguments."""

    def __init__(self, op: str, u: Tensor, delta, A, B, C, D, z, bias, h_init, softplus) -> None:
        from spikecore.ops.selective_scan import _check

        _check(op, u, delta, A, B, C, D, z, bias, h_init)
        if u.dtype == torch.float64:
            raise RuntimeError(f"{op}: float64 runs on the CPU only, got {list(u.shape)} on {u.device.type}")
        self.inputs = [None if t is None else t.contiguous() for t in (u, delta, A, B, C, D, z, bias, h_init)]
        (self.B, self.C, self.L), (self.G, self.S) = u.shape, B.shape[1:3]
        self.blocks = triton.cdiv(self.C // self.G, CHANNELS)
        self.programs = self.B * self.G * self.blocks
        self.tile = (CHANNELS, max(triton.next_power_of_2(self.S), 1))
        self.flags = {
            "SOFTPLUS": softplus,
            "D": D is not None,
            "Z": z is not None,
            "BIAS": bias is not None,
            "INIT": h_init is not None,
        }

    def launch(self, kernel: Any, *args: Any, **constants: Any) -> None:
        if self.programs == 0:
            return
        with torch.cuda.device_of(self.inputs[0]):  # nothing for the interpreter's CPU tensors
            kernel[(self.programs,)](
                *args, self.C, self.L, self.G, self.S, self.blocks, **self.flags, **constants,
                BC=self.tile[0], BS=self.tile[1], **OPTIONS,
            )  # fmt: skip


def selective_scan_fwd(u, delta, A, B, C, D, z, delta_bias, h_init, delta_softplus):
    scan = _Scan("selective_scan", u, delta, A, B, C, D, z, delta_bias, h_init, delta_softplus)
    y, h_last = u.new_empty(u.shape), A.new_empty((scan.B, scan.C, scan.S))
    scan.launch(selective_scan_fwd_kernel, *scan.inputs, y, h_last)
    return y, h_last


def selective_scan_bwd(g_y, g_h_last, u, delta, A, B, C, D, z, delta_bias, h_init, delta_softplus):
    scan = _Scan("selective_scan backward", u, delta, A, B, C, D, z, delta_bias, h_init, delta_softplus)
    g_y, g_h_last = (None if t is None else t.contiguous() for t in (g_y, g_h_last))

    def partial(*sizes: int, wanted: bool = True) -> Tensor | None:
        return A.new_empty(sizes) if wanted else None

    def like(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.new_empty(t.shape)

    batch, channels = scan.B, scan.C
    g_A = partial(batch, channels, scan.S)
    g_D, g_bias = (partial(batch, channels, wanted=t is not None) for t in (D, delta_bias))
    g_B, g_C = (partial(batch, scan.G, scan.blocks, scan.S, scan.L) for _ in range(2))
    g_u, g_delta, g_z, g_h_init = (like(t) for t in (u, delta, z, h_init))
    segment = min(SEGMENT, max(scan.L, 1))
    starts = partial(scan.programs, triton.cdiv(scan.L, segment), *scan.tile)
    states = partial(scan.programs, segment, *scan.tile)
    scan.launch(
        selective_scan_bwd_kernel, g_y, g_h_last, *scan.inputs, g_u, g_delta, g_A, g_B, g_C, g_D, g_z, g_bias, g_h_init,
        starts, states, G_Y=g_y is not None, G_LAST=g_h_last is not None, SEG=segment,
    )  # fmt: skip

    def total(t: Tensor | None, dim: int, dtype: torch.dtype) -> Tensor:
        return none if t is None else t.double().sum(dim).to(dtype)

    none = u.new_empty(0)
    return (
        g_u, g_delta, total(g_A, 0, A.dtype), total(g_B, 2, u.dtype), total(g_C, 2, u.dtype), total(g_D, 0, A.dtype),
        none if g_z is None else g_z, total(g_bias, 0, A.dtype), none if g_h_init is None else g_h_init,
    )  # fmt: skip


def register() -> None:
    """Make these the kernels of torch's CUDA dispatch key."""
    for name, launcher in (("selective_scan_fwd", selective_scan_fwd), ("selective_scan_bwd", selective_scan_bwd)):
        _library.impl(name, launcher, "CUDA")


_library = torch.library.Library("spikecore", "IMPL")
