"""lif in Triton: the GPU backend where the compiled CUDA kernels cannot run. Formulas: spikecore/ops/lif.py.

Same launchers' signatures as the registered ops. Compiled without fused multiply-add, so that spikes are those of the
C++ kernels and backward's recomputation meets forward's spikes.
"""

import math
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRET = triton.knobs.runtime.interpret
SEGMENT = 4  # time steps whose potentials backward holds in registers; with 8 they spill
BLOCK_BYTES = 2048  # of a row of x that a program of 128 threads owns: 16 a thread


@triton.jit
def _exp(x):
    # csrc/core/surrogate.h's exp_: the same bits on every backend.
    m = x * 1.44269504 + 12582912.0
    n = m - 12582912.0
    r = (x - n * 0.693359375) - n * -2.12194440e-4
    p = tl.full(x.shape, 1.9875691500e-4, tl.float32)
    p = p * r + 1.3981999507e-3
    p = p * r + 8.3334519073e-3
    p = p * r + 4.1665795894e-2
    p = p * r + 1.6666665459e-1
    p = p * r + 5.0000001201e-1
    p = (p * (r * r) + r) + 1.0
    e = m.to(tl.int32, bitcast=True) - 0x4B400000
    half = e >> 1
    y = p * ((half + 127) << 23).to(tl.float32, bitcast=True) * ((e - half + 127) << 23).to(tl.float32, bitcast=True)
    y = tl.where(x < -87.3365, 0.0, y)
    y = tl.where(x > 88.7228, float("inf"), y)
    return tl.where(x != x, x, y)


@triton.jit
def _surrogate(u, a, b, KIND: tl.constexpr):
    if KIND == 0:  # ATan
        t = (1.5707963267948966 * a) * u
        d = (a / 2) / (1 + t * t)
    elif KIND == 1:  # Sigmoid
        s = 1 / (1 + _exp(-(a * u)))
        d = a * s * (1 - s)
    elif KIND == 2:  # Rectangle
        d = tl.where(tl.abs(u) < a / 2, 1 / a, 0.0)
    elif KIND == 3:  # Triangle
        y = 1 - tl.abs(u) / a
        d = tl.where(y < 0, 0.0, y) / a
    elif KIND == 4:  # FastSigmoid
        t = 1 + a * tl.abs(u)
        d = 1 / (t * t)
    elif KIND == 5:  # Erf
        t = a * u
        d = a * 0.5641895835477563 * _exp(-(t * t))
    else:  # LeakyReLU
        d = tl.where(u >= 0, a, b)
    return d


@triton.jit
def _charge(v, x, decay, gain, rest):
    # csrc/lif/neuron.h's charge: at rest 0 the same numbers (up to the sign of a zero) by fewer operations.
    return tl.where(rest == 0, decay * v, rest + decay * (v - rest)) + gain * x


@triton.jit
def _reset(h, rest, fire_at, reset_by, HARD: tl.constexpr):
    if HARD:
        v = tl.where(h >= fire_at, rest, h)
    else:
        v = h - tl.where(h >= fire_at, reset_by, 0.0)
    return v


@triton.jit
def _parameter(p_param, number, i, mask, C, inner, GIVEN: tl.constexpr, PER_CHANNEL: tl.constexpr, BN: tl.constexpr):
    # A parameter for the neurons i: a number, one tensor element, or one per channel.
    if GIVEN:
        if PER_CHANNEL:
            d = tl.load(p_param + (i // inner) % C, mask=mask, other=0.0)
        else:
            d = tl.zeros([BN], tl.float32) + tl.load(p_param)
    else:
        d = tl.zeros([BN], tl.float32) + number
    return d


@triton.jit
def lif_fwd_kernel(
    p_x, p_decay, p_gain, p_v_init, p_s, p_v_last, p_h, p_v,
    T, N, x_step, C, inner, decay, gain, rest, fire_at, reset_by,
    HARD: tl.constexpr, DECAY: tl.constexpr, GAIN: tl.constexpr, PER_CHANNEL: tl.constexpr, V_INIT: tl.constexpr,
    H: tl.constexpr, V: tl.constexpr, PACKED: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    # A program owns BN neurons, walks t = 0 ... T-1 and keeps their potentials in registers.
    i = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    mask = i < N
    b_decay = _parameter(p_decay, decay, i, mask, C, inner, DECAY, PER_CHANNEL, BN)
    b_gain = _parameter(p_gain, gain, i, mask, C, inner, GAIN, PER_CHANNEL, BN)
    if V_INIT:
        b_v = tl.load(p_v_init + i, mask=mask, other=0.0)
    else:
        b_v = tl.zeros([BN], tl.float32) + rest
    bits = tl.zeros([BN], tl.int32)
    for step in range(T):
        t = tl.cast(step, tl.int64)
        b_x = tl.load(p_x + t * x_step + i, mask=mask, other=0.0).to(tl.float32)
        b_h = _charge(b_v, b_x, b_decay, b_gain, rest)
        fired = b_h >= fire_at
        b_v = _reset(b_h, rest, fire_at, reset_by, HARD)
        if PACKED:
            bits = bits | (fired.to(tl.int32) << (step % 8))
            if (step % 8 == 7) | (step == T - 1):
                tl.store(p_s + (t // 8) * N + i, bits.to(tl.uint8), mask=mask)
                bits = tl.zeros([BN], tl.int32)
        else:
            tl.store(p_s + t * N + i, fired.to(tl.float32).to(p_s.dtype.element_ty), mask=mask)
        if H:
            tl.store(p_h + t * N + i, b_h, mask=mask)
        if V:
            tl.store(p_v + t * N + i, b_v, mask=mask)
    tl.store(p_v_last + i, b_v, mask=mask)


@triton.jit
def lif_bwd_kernel(
    p_g_s, p_g_v_last, p_g_h, p_g_v, p_x, p_decay, p_gain, p_v_init, p_g_x, p_g_decay, p_g_gain, p_g_v_init, p_starts,
    T, N, x_step, C, inner, decay, gain, threshold, rest, fire_at, reset_by, a, b,
    HARD: tl.constexpr, DETACH: tl.constexpr, KIND: tl.constexpr, DECAY: tl.constexpr, GAIN: tl.constexpr,
    PER_CHANNEL: tl.constexpr, V_INIT: tl.constexpr, G_S: tl.constexpr, G_V_LAST: tl.constexpr, G_H: tl.constexpr,
    G_V: tl.constexpr, NEED_DECAY: tl.constexpr, NEED_GAIN: tl.constexpr, NEED_V_INIT: tl.constexpr,
    SEG: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    # A program owns BN neurons. It walks all segments but the last forward and leaves the potentials at the starts of
    # the later ones; then each segment from the last: forward, its h in registers, and back.
    i = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    mask = i < N
    b_decay = _parameter(p_decay, decay, i, mask, C, inner, DECAY, PER_CHANNEL, BN)
    b_gain = _parameter(p_gain, gain, i, mask, C, inner, GAIN, PER_CHANNEL, BN)
    if V_INIT:
        b_first = tl.load(p_v_init + i, mask=mask, other=0.0)
    else:
        b_first = tl.zeros([BN], tl.float32) + rest
    segments = (T + SEG - 1) // SEG
    b_v = b_first
    for step in range((segments - 1) * SEG):
        t = tl.cast(step, tl.int64)
        b_x = tl.load(p_x + t * x_step + i, mask=mask, other=0.0).to(tl.float32)
        b_v = _reset(_charge(b_v, b_x, b_decay, b_gain, rest), rest, fire_at, reset_by, HARD)
        if step % SEG == SEG - 1:
            tl.store(p_starts + (t // SEG) * N + i, b_v, mask=mask)
    if G_V_LAST:
        b_g_v = tl.load(p_g_v_last + i, mask=mask, other=0.0)
    else:
        b_g_v = tl.zeros([BN], tl.float32)
    sum_decay = tl.zeros([BN], tl.float32)
    sum_gain = tl.zeros([BN], tl.float32)
    for back in range(segments):
        k = tl.cast(segments - 1 - back, tl.int64)
        b_start = b_first
        if k > 0:
            b_start = tl.load(p_starts + (k - 1) * N + i, mask=mask, other=0.0)
        hs = ()
        b_v = b_start
        for j in tl.static_range(SEG):
            t = k * SEG + j
            b_x = tl.load(p_x + t * x_step + i, mask=mask & (t < T), other=0.0).to(tl.float32)
            b_h = _charge(b_v, b_x, b_decay, b_gain, rest)
            b_v = _reset(b_h, rest, fire_at, reset_by, HARD)
            hs = hs + (b_h,)
        for j in tl.static_range(SEG - 1, -1, -1):
            t = k * SEG + j
            live = mask & (t < T)
            b_h = hs[j]
            if G_V:
                b_g_v += tl.load(p_g_v + t * N + i, mask=live, other=0.0)
            b_sg = _surrogate(b_h - threshold, a, b, KIND)
            if HARD:
                b_g = tl.where(b_h >= fire_at, 0.0, b_g_v)
                through_s = rest - b_h
            else:
                b_g = b_g_v
                through_s = tl.zeros([BN], tl.float32) - reset_by
            if G_S:
                b_g = tl.load(p_g_s + t * N + i, mask=live, other=0.0).to(tl.float32) * b_sg + b_g
            if G_H:
                b_g += tl.load(p_g_h + t * N + i, mask=live, other=0.0)
            if not DETACH:
                b_g += b_g_v * tl.where(b_sg == 0, 0.0, through_s * b_sg)
            tl.store(p_g_x + t * N + i, (b_gain * b_g).to(p_g_x.dtype.element_ty), mask=live)
            if NEED_GAIN:
                b_x = tl.load(p_x + t * x_step + i, mask=live, other=0.0).to(tl.float32)
                sum_gain += tl.where(live, b_g * b_x, 0.0)
            if NEED_DECAY:
                if j > 0:
                    b_prev = _reset(hs[j - 1], rest, fire_at, reset_by, HARD)
                else:
                    b_prev = b_start
                sum_decay += tl.where(live, b_g * (b_prev - rest), 0.0)
            b_g_v = tl.where(live, b_decay * b_g, b_g_v)
    if NEED_DECAY:
        tl.store(p_g_decay + i, sum_decay, mask=mask)
    if NEED_GAIN:
        tl.store(p_g_gain + i, sum_gain, mask=mask)
    if NEED_V_INIT:
        tl.store(p_g_v_init + i, b_g_v, mask=mask)


class NeuronNumbers:
    """The list of `spikecore.ops.lif.encode`, and the smallest potential that fires."""

    def __init__(self, numbers: list[float]) -> None:
        self.decay, self.gain, self.threshold, v_reset, self.reset_by, strict, detach, kind, self.a, self.b = numbers
        self.hard, self.detach, self.kind = not math.isnan(v_reset), bool(detach), int(kind)
        self.rest = v_reset if self.hard else 0.0
        threshold = np.float32(self.threshold)
        above = np.nextafter(threshold, np.float32(np.inf))
        # Nothing lies above infinity, and no potential is >= NaN.
        self.fire_at = float(threshold if not strict else above if above > threshold else np.nan)


class _Neuron(NeuronNumbers):
    """What both launchers derive from the neuron's arguments."""

    def __init__(self, x, decay_c, gain_c, neuron, channel_dim):
        super().__init__(neuron)
        self.N = x[0].numel()
        self.per_channel = any(p is not None and p.dim() == 1 and len(p) > 1 for p in (decay_c, gain_c))
        self.C, self.inner = (x.shape[channel_dim], x.stride(channel_dim)) if self.per_channel else (1, 1)
        self.decay_c, self.gain_c = (self._dense(p) for p in (decay_c, gain_c))

    def _dense(self, p: Tensor | None) -> Tensor | None:
        return p.expand(self.C).contiguous() if p is not None and self.per_channel else p

    def channel_sums(self, per_neuron: Tensor, parameter: Tensor, channel_dim: int) -> Tensor:
        if parameter.dim() == 0:
            return per_neuron.double().sum().float()
        channel = channel_dim % (per_neuron.dim() + 1) - 1
        others = [d for d in range(per_neuron.dim()) if d != channel]
        return (per_neuron.double().sum(others) if others else per_neuron.double()).float()


def _launch(kernel: Any, x: Tensor, N: int, *args: Any, **constants: Any) -> None:
    if N == 0:
        return
    with torch.cuda.device_of(x):  # nothing for the interpreter's CPU tensors
        block = min(BLOCK_BYTES // x.element_size(), triton.next_power_of_2(N))
        kernel[(triton.cdiv(N, block),)](*args, **constants, BN=block, num_warps=4, enable_fp_fusion=False)


def _check_x(op: str, x: Tensor, decay_c: Any, gain_c: Any, v_init: Tensor | None, channel_dim: int) -> Tensor:
    from spikecore.ops.lif import _check, _slice_strides

    _check(op, x, decay_c, gain_c, v_init, channel_dim)
    if x.dtype == torch.float64:
        raise RuntimeError(f"{op}: float64 runs on the CPU only, got {list(x.shape)} on {x.device.type}")
    return x if x.stride()[1:] == _slice_strides(x) else x.contiguous()


def _laid_out(t: Tensor | None, x: Tensor, sequence: bool) -> Tensor | None:
    """`t` with the strides of x's outputs: itself where it has them, else a copy."""
    from spikecore.ops.lif import _empty_slices

    if t is None:
        return None
    like = _empty_slices(x, len(t) if sequence else None, t.dtype)
    return t if t.stride() == like.stride() else like.copy_(t)


def lif_fwd(x, decay_c, gain_c, v_init, neuron, channel_dim, return_h, return_v, packed):
    from spikecore.ops.lif import _lif_fwd_fake

    x = _check_x("lif", x, decay_c, gain_c, v_init, channel_dim)
    s, v_last, h, v = _lif_fwd_fake(x, decay_c, gain_c, v_init, neuron, channel_dim, return_h, return_v, packed)
    n = _Neuron(x, decay_c, gain_c, neuron, channel_dim)
    v_init = _laid_out(v_init, x, sequence=False)
    _launch(
        lif_fwd_kernel, x, n.N, x, n.decay_c, n.gain_c, v_init, s, v_last, h, v,
        len(x), n.N, x.stride(0), n.C, n.inner, n.decay, n.gain, n.rest, n.fire_at, n.reset_by,
        HARD=n.hard, DECAY=decay_c is not None, GAIN=gain_c is not None, PER_CHANNEL=n.per_channel,
        V_INIT=v_init is not None, H=return_h, V=return_v, PACKED=packed,
    )  # fmt: skip
    return s, v_last, h, v


def lif_bwd(
    g_s, g_v_last, g_h, g_v, x, decay_c, gain_c, v_init, neuron, channel_dim, need_decay, need_gain, need_v_init
):
    from spikecore.ops.lif import _empty_slices, _lif_bwd_fake

    x = _check_x("lif backward", x, decay_c, gain_c, v_init, channel_dim)
    g_x, g_decay, g_gain, g_v_init = _lif_bwd_fake(
        g_s, g_v_last, g_h, g_v, x, decay_c, gain_c, v_init, neuron, channel_dim, need_decay, need_gain, need_v_init
    )
    n = _Neuron(x, decay_c, gain_c, neuron, channel_dim)
    v_init, g_v_last = (_laid_out(t, x, sequence=False) for t in (v_init, g_v_last))
    g_s, g_h, g_v = (_laid_out(t, x, sequence=True) for t in (g_s, g_h, g_v))
    per_decay = _empty_slices(x, None, torch.float32) if need_decay else None
    per_gain = _empty_slices(x, None, torch.float32) if need_gain else None
    starts = x.new_empty(((len(x) - 1) // SEGMENT, n.N), dtype=torch.float32)
    _launch(
        lif_bwd_kernel, x, n.N, g_s, g_v_last, g_h, g_v, x, n.decay_c, n.gain_c, v_init,
        g_x, per_decay, per_gain, g_v_init, starts,
        len(x), n.N, x.stride(0), n.C, n.inner, n.decay, n.gain, n.threshold, n.rest, n.fire_at, n.reset_by, n.a, n.b,
        HARD=n.hard, DETACH=n.detach, KIND=n.kind, DECAY=decay_c is not None, GAIN=gain_c is not None,
        PER_CHANNEL=n.per_channel, V_INIT=v_init is not None, G_S=g_s is not None, G_V_LAST=g_v_last is not None,
        G_H=g_h is not None, G_V=g_v is not None, NEED_DECAY=need_decay, NEED_GAIN=need_gain, NEED_V_INIT=need_v_init,
        SEG=min(SEGMENT, triton.next_power_of_2(len(x))),
    )  # fmt: skip
    if need_decay:
        g_decay = n.channel_sums(per_decay, decay_c, channel_dim)
    if need_gain:
        g_gain = n.channel_sums(per_gain, gain_c, channel_dim)
    return g_x, g_decay, g_gain, g_v_init


def register() -> None:
    """Make these the kernels of torch's CUDA dispatch key."""
    for name, launcher in (("lif_fwd", lif_fwd), ("lif_bwd", lif_bwd)):
        _library.impl(name, launcher, "CUDA")


_library = torch.library.Library("spikecore", "IMPL")
