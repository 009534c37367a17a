"""The attentions in Triton: the GPU backend where the compiled CUDA kernels cannot run.

Formulas: spikecore/ops/qk_attention.py; what y, s, w, rows and columns are: csrc/qk_attention/qk_attention.h. Same
launchers' signatures as the registered ops. Compiled without fused multiply-add, as spikecore/triton/lif.py. Packed
spikes are unpacked first.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikecore.triton.lif import NeuronNumbers, _charge, _reset, _surrogate

SEGMENT = 4  # time steps whose potentials backward holds in registers
SUM_BLOCKS = {True: (32, 64), False: (8, 256)}  # rows and columns of a tile: a sum over rows, or along them
BLOCK = (8, 128)  # of a tile without a sum
NEURONS = 128  # attention neurons of a program


@triton.jit
def _of_head(p_param, number, h, step, GIVEN: tl.constexpr):
    if GIVEN:
        value = tl.load(p_param + h * step)
    else:
        value = number
    return value


@triton.jit
def qk_sum_kernel(
    p_x, p_w, p_decay, p_gain, p_out, T, B, H, R, L, x_t, x_b, x_h, x_r, w_t, w_b, w_h, w_r,
    decay, gain, decay_step, gain_step, rest, fire_at, reset_by,
    COLUMNS: tl.constexpr, CURRENTS: tl.constexpr, W: tl.constexpr, W_CURRENTS: tl.constexpr, HARD: tl.constexpr,
    DECAY: tl.constexpr, GAIN: tl.constexpr, BR: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    # A program owns BL columns (or BR rows) of a block (b, h) and walks its rows (columns) by chunks, each through time
    # with its potentials in registers; the sums of chunks before are read back.
    if COLUMNS:
        J = L
        tiles = (L + BL - 1) // BL
        chunks = (R + BR - 1) // BR
    else:
        J = R
        tiles = (R + BR - 1) // BR
        chunks = (L + BL - 1) // BL
    program = tl.program_id(0).to(tl.int64)
    tile, bh = program % tiles, program // tiles
    h, b = bh % H, bh // H
    b_decay = _of_head(p_decay, decay, h, decay_step, DECAY)
    b_gain = _of_head(p_gain, gain, h, gain_step, GAIN)
    for chunk in range(chunks):
        if COLUMNS:
            r = chunk * BR + tl.arange(0, BR)
            l = tile * BL + tl.arange(0, BL)
            j = l
        else:
            r = tile * BR + tl.arange(0, BR)
            l = chunk * BL + tl.arange(0, BL)
            j = r
        mask = (r[:, None] < R) & (l[None, :] < L)
        at_x = p_x + b * x_b + h * x_h + r[:, None].to(tl.int64) * x_r + l[None, :]
        b_v = tl.zeros([BR, BL], tl.float32) + rest
        if W:
            at_w = p_w + b * w_b + h * w_h + r[:, None].to(tl.int64) * w_r + l[None, :]
            b_u = tl.zeros([BR, BL], tl.float32) + rest
        for step in range(T):
            t = tl.cast(step, tl.int64)
            b_x = tl.load(at_x + t * x_t, mask=mask, other=0.0).to(tl.float32)
            if CURRENTS:
                b_h = _charge(b_v, b_x, b_decay, b_gain, rest)
                b_v = _reset(b_h, rest, fire_at, reset_by, HARD)
                b_x = (mask & (b_h >= fire_at)).to(tl.float32)
            if W:
                b_w = tl.load(at_w + t * w_t, mask=mask, other=0.0).to(tl.float32)
                if W_CURRENTS:
                    b_h = _charge(b_u, b_w, b_decay, b_gain, rest)
                    b_u = _reset(b_h, rest, fire_at, reset_by, HARD)
                    b_w = (mask & (b_h >= fire_at)).to(tl.float32)
                b_x = b_x * b_w
            at = p_out + (t * B * H + bh) * J + j
            b_sum = tl.sum(b_x, 0 if COLUMNS else 1)
            if chunk > 0:
                b_sum += tl.load(at, mask=j < J, other=0.0)
            tl.store(at, b_sum, mask=j < J)
        tl.debug_barrier()


@triton.jit
def _tile(R, L, H, BR: tl.constexpr, BL: tl.constexpr):
    # (index of b and h, rows, columns) of a program that owns a tile.
    across = (L + BL - 1) // BL
    tiles = (R + BR - 1) // BR * across
    program = tl.program_id(0).to(tl.int64)
    tile = program % tiles
    r = tile // across * BR + tl.arange(0, BR)
    l = tile % across * BL + tl.arange(0, BL)
    return program // tiles, r, l


@triton.jit
def _neurons(p_in, t, bh, r, l, B, H, R, L, COLUMNS: tl.constexpr):
    # [T, B, H, J] of step t for a tile: one for each of its columns, or rows.
    if COLUMNS:
        value = tl.load(p_in + (t * B * H + bh) * L + l, mask=l < L, other=0.0)[None, :]
    else:
        value = tl.load(p_in + (t * B * H + bh) * R + r, mask=r < R, other=0.0)[:, None]
    return value


@triton.jit
def qk_gate_kernel(
    p_in, p_y, p_attn_decay, p_attn_gain, p_decay, p_gain, p_out, T, B, H, R, L, y_t, y_b, y_h, y_r, o_t, o_b, o_h, o_r,
    attn_decay, attn_gain, attn_decay_step, attn_gain_step, attn_rest, attn_fire_at, attn_reset_by,
    decay, gain, decay_step, gain_step, rest, fire_at, reset_by,
    COLUMNS: tl.constexpr, CURRENTS: tl.constexpr, ATTN_HARD: tl.constexpr, ATTN_DECAY: tl.constexpr,
    ATTN_GAIN: tl.constexpr, HARD: tl.constexpr, DECAY: tl.constexpr, GAIN: tl.constexpr,
    BR: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    # A program owns a tile and walks through time, potentials of attention neurons and of its own in registers.
    bh, r, l = _tile(R, L, H, BR, BL)
    h, b = bh % H, bh // H
    mask = (r[:, None] < R) & (l[None, :] < L)
    a_decay = _of_head(p_attn_decay, attn_decay, h, attn_decay_step, ATTN_DECAY)
    a_gain = _of_head(p_attn_gain, attn_gain, h, attn_gain_step, ATTN_GAIN)
    b_decay = _of_head(p_decay, decay, h, decay_step, DECAY)
    b_gain = _of_head(p_gain, gain, h, gain_step, GAIN)
    at_y = p_y + b * y_b + h * y_h + r[:, None].to(tl.int64) * y_r + l[None, :]
    at_out = p_out + b * o_b + h * o_h + r[:, None].to(tl.int64) * o_r + l[None, :]
    if COLUMNS:
        a_v = tl.zeros([1, BL], tl.float32) + attn_rest
    else:
        a_v = tl.zeros([BR, 1], tl.float32) + attn_rest
    b_v = tl.zeros([BR, BL], tl.float32) + rest
    for step in range(T):
        t = tl.cast(step, tl.int64)
        a_h = _charge(a_v, _neurons(p_in, t, bh, r, l, B, H, R, L, COLUMNS), a_decay, a_gain, attn_rest)
        a_v = _reset(a_h, attn_rest, attn_fire_at, attn_reset_by, ATTN_HARD)
        b_y = tl.load(at_y + t * y_t, mask=mask, other=0.0).to(tl.float32)
        if CURRENTS:
            b_h = _charge(b_v, b_y, b_decay, b_gain, rest)
            b_v = _reset(b_h, rest, fire_at, reset_by, HARD)
            b_y = (b_h >= fire_at).to(tl.float32)
        b_out = (a_h >= attn_fire_at).to(tl.float32) * b_y
        tl.store(at_out + t * o_t, b_out.to(p_out.dtype.element_ty), mask=mask)


@triton.jit
def _back(
    h, g_s, g_v, threshold, rest, fire_at, reset_by, a, b, HARD: tl.constexpr, DETACH: tl.constexpr, KIND: tl.constexpr
):
    # csrc/lif/neuron.h's step_backward.
    sg = _surrogate(h - threshold, a, b, KIND)
    if HARD:
        g = g_s * sg + tl.where(h >= fire_at, 0.0, g_v)
        if not DETACH:
            g += g_v * tl.where(sg == 0, 0.0, (rest - h) * sg)
    else:
        g = g_s * sg + g_v
        if not DETACH:
            g += g_v * tl.where(sg == 0, 0.0, -reset_by * sg)
    return g


@triton.jit
def qk_attn_bwd_kernel(
    p_in, p_h, p_g, p_decay, p_gain, p_sums, T, N, J, H, parts, sum_step,
    decay, gain, decay_step, gain_step, threshold, rest, fire_at, reset_by, a, b,
    HARD: tl.constexpr, DETACH: tl.constexpr, KIND: tl.constexpr, DECAY: tl.constexpr, GAIN: tl.constexpr,
    SUMS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    # A program owns BN attention neurons of a block (b, h): forward from I, leaving the potentials, then back; the
    # gradient of a turns into that of I.
    blocks = (J + BN - 1) // BN
    program = tl.program_id(0).to(tl.int64)
    bh, part = program // blocks, program % blocks
    j = part * BN + tl.arange(0, BN)
    mask = j < J
    i = bh * J + j
    b_decay = _of_head(p_decay, decay, bh % H, decay_step, DECAY)
    b_gain = _of_head(p_gain, gain, bh % H, gain_step, GAIN)
    b_v = tl.zeros([BN], tl.float32) + rest
    for step in range(T):
        t = tl.cast(step, tl.int64)
        b_h = _charge(b_v, tl.load(p_in + t * N + i, mask=mask, other=0.0), b_decay, b_gain, rest)
        b_v = _reset(b_h, rest, fire_at, reset_by, HARD)
        tl.store(p_h + t * N + i, b_h, mask=mask)
    g_v = tl.zeros([BN], tl.float32)
    over_decay = tl.zeros([BN], tl.float32)
    over_gain = tl.zeros([BN], tl.float32)
    for step in range(T):
        t = tl.cast(T - 1 - step, tl.int64)
        b_h = tl.load(p_h + t * N + i, mask=mask, other=0.0)
        g = _back(
            b_h, tl.load(p_g + t * N + i, mask=mask, other=0.0), g_v, threshold, rest, fire_at, reset_by, a, b,
            HARD, DETACH, KIND,
        )  # fmt: skip
        tl.store(p_g + t * N + i, b_gain * g, mask=mask)
        g_v = b_decay * g
        if SUMS:
            over_gain += g * tl.load(p_in + t * N + i, mask=mask, other=0.0)
            earlier = mask & (t > 0)
            before = tl.load(p_h + (t - 1) * N + i, mask=earlier, other=0.0)
            over_decay += tl.where(earlier, g * (_reset(before, rest, fire_at, reset_by, HARD) - rest), 0.0)
    if SUMS:
        at = p_sums + bh * parts + part
        tl.store(at, tl.sum(tl.where(mask, over_decay, 0.0).to(tl.float64)))
        tl.store(at + sum_step, tl.sum(tl.where(mask, over_gain, 0.0).to(tl.float64)))


@triton.jit
def qk_operand_bwd_kernel(
    p_f, p_x, p_o, p_decay, p_gain, p_g_x, p_sums, T, B, H, R, L,
    x_t, x_b, x_h, x_r, o_t, o_b, o_h, o_r, g_t, g_b, g_h, g_r, attn_fire_at,
    decay, gain, decay_step, gain_step, threshold, rest, fire_at, reset_by, a, b, parts, first, sum_step,
    COLUMNS: tl.constexpr, CURRENTS: tl.constexpr, GATED: tl.constexpr, OTHER: tl.constexpr, O_CURRENTS: tl.constexpr,
    HARD: tl.constexpr, DETACH: tl.constexpr, KIND: tl.constexpr, DECAY: tl.constexpr, GAIN: tl.constexpr,
    SUMS: tl.constexpr, SEG: tl.constexpr, BR: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    # The gradient of one operand: the spikes of attention neurons (GATED: from their potentials) or the gradients of I,
    # times the other factor; that of a current goes on through its neurons. A program owns a tile and walks the
    # segments from the last: forward from the start, the segment's potentials in registers, and back.
    bh, r, l = _tile(R, L, H, BR, BL)
    h, bb = bh % H, bh // H
    mask = (r[:, None] < R) & (l[None, :] < L)
    b_decay = _of_head(p_decay, decay, h, decay_step, DECAY)
    b_gain = _of_head(p_gain, gain, h, gain_step, GAIN)
    at_x = p_x + bb * x_b + h * x_h + r[:, None].to(tl.int64) * x_r + l[None, :]
    at_g = p_g_x + bb * g_b + h * g_h + r[:, None].to(tl.int64) * g_r + l[None, :]
    if OTHER:
        at_o = p_o + bb * o_b + h * o_h + r[:, None].to(tl.int64) * o_r + l[None, :]
    g_v = tl.zeros([BR, BL], tl.float32)
    over_decay = tl.zeros([BR, BL], tl.float32)
    over_gain = tl.zeros([BR, BL], tl.float32)
    segments = (T + SEG - 1) // SEG
    for back in range(segments):
        t0 = (segments - 1 - back) * SEG
        hs = ()
        os = ()
        b_start = tl.zeros([BR, BL], tl.float32) + rest
        b_u = b_start
        if CURRENTS:
            for step in range(t0):
                t = tl.cast(step, tl.int64)
                b_x = tl.load(at_x + t * x_t, mask=mask, other=0.0).to(tl.float32)
                b_start = _reset(_charge(b_start, b_x, b_decay, b_gain, rest), rest, fire_at, reset_by, HARD)
                if O_CURRENTS:
                    b_o = tl.load(at_o + t * o_t, mask=mask, other=0.0).to(tl.float32)
                    b_u = _reset(_charge(b_u, b_o, b_decay, b_gain, rest), rest, fire_at, reset_by, HARD)
            b_v = b_start
            for k in tl.static_range(SEG):
                t = tl.cast(t0 + k, tl.int64)
                b_x = tl.load(at_x + t * x_t, mask=mask & (t < T), other=0.0).to(tl.float32)
                b_h = _charge(b_v, b_x, b_decay, b_gain, rest)
                b_v = _reset(b_h, rest, fire_at, reset_by, HARD)
                hs = hs + (b_h,)
                if O_CURRENTS:
                    b_o = tl.load(at_o + t * o_t, mask=mask & (t < T), other=0.0).to(tl.float32)
                    b_h = _charge(b_u, b_o, b_decay, b_gain, rest)
                    b_u = _reset(b_h, rest, fire_at, reset_by, HARD)
                    os = os + ((b_h >= fire_at).to(tl.float32),)
        for k in tl.static_range(SEG - 1, -1, -1):
            t = tl.cast(t0 + k, tl.int64)
            live = mask & (t < T)
            g = _neurons(p_f, tl.minimum(t, T - 1), bh, r, l, B, H, R, L, COLUMNS)
            if GATED:
                g = (g >= attn_fire_at).to(tl.float32)
            if O_CURRENTS:
                g = g * os[k]
            elif OTHER:
                g = g * tl.load(at_o + t * o_t, mask=live, other=0.0).to(tl.float32)
            else:
                g = g + tl.zeros([BR, BL], tl.float32)
            if CURRENTS:
                g = _back(hs[k], g, g_v, threshold, rest, fire_at, reset_by, a, b, HARD, DETACH, KIND)
                if SUMS:
                    b_x = tl.load(at_x + t * x_t, mask=live, other=0.0).to(tl.float32)
                    over_gain += tl.where(live, g * b_x, 0.0)
                    if k > 0:
                        before = _reset(hs[k - 1], rest, fire_at, reset_by, HARD)
                    else:
                        before = b_start
                    over_decay += tl.where(live, g * (before - rest), 0.0)
                g_v = tl.where(live, b_decay * g, g_v)
                g = b_gain * g
            tl.store(at_g + t * g_t, g.to(p_g_x.dtype.element_ty), mask=live)
    if SUMS:
        tiles = (R + BR - 1) // BR * ((L + BL - 1) // BL)
        at = p_sums + bh * parts + first + tl.program_id(0).to(tl.int64) % tiles
        tl.store(at, tl.sum(over_decay.to(tl.float64)))
        tl.store(at + sum_step, tl.sum(over_gain.to(tl.float64)))


class _Neuron(NeuronNumbers):
    """One neuron's arguments as the kernels take them."""

    def __init__(self, decay_h: Tensor | None, gain_h: Tensor | None, numbers: list[float]) -> None:
        super().__init__(numbers or [0.5, 0.5, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 2.0, 0.0])
        self.decay_h, self.gain_h = (p.contiguous() if p is not None else None for p in (decay_h, gain_h))
        self.steps = [int(p is not None and p.dim() > 0) for p in (decay_h, gain_h)]
        self.flags = {"HARD": self.hard, "DECAY": decay_h is not None, "GAIN": gain_h is not None}

    @property
    def numbers(self) -> list[float]:
        return [self.decay, self.gain, *self.steps, self.rest, self.fire_at, self.reset_by]

    @property
    def backward_numbers(self) -> list[float]:
        constants = [self.threshold, self.rest, self.fire_at, self.reset_by, self.a, self.b]
        return [self.decay, self.gain, *self.steps, *constants]

    @property
    def backward_flags(self) -> dict[str, Any]:
        return {**self.flags, "DETACH": self.detach, "KIND": self.kind}


class _Problem:
    """Operands as rows, and how programs share them."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor | None, mode: int, currents: bool) -> None:
        from spikecore.ops.qk_attention import _channels_last

        self.y, self.s, self.w = (q, k, v) if v is not None else (k, q, None)
        self.last = _channels_last(self.y)
        self.y, self.s, self.w = (self.rows(x) for x in (self.y, self.s, self.w))
        self.columns, self.currents = (mode == 0) != self.last, currents
        self.T, self.B, self.H, self.R, self.L = self.y.shape
        self.J = self.L if self.columns else self.R
        self.sizes = [self.T, self.B, self.H, self.R, self.L]
        self.flags = {"COLUMNS": self.columns, "CURRENTS": currents}

    def rows(self, x: Tensor | None) -> Tensor | None:
        """[T, B, H, R, L], the elements of a row side by side: a view where they lie so already."""
        if x is None:
            return None
        x = x.transpose(3, 4) if self.last else x
        return x if x.shape[4] <= 1 or x.stride(4) == 1 else x.contiguous()

    def neurons(self) -> Tensor:
        return self.y.new_empty((self.T, self.B, self.H, self.J), dtype=torch.float32)

    def run(self, kernel: Any, programs: int, *args: Any, warps: int = 4, **constants: Any) -> None:
        with torch.cuda.device_of(self.y):  # nothing for the interpreter's CPU tensors
            kernel[(self.B * self.H * programs,)](*args, **constants, num_warps=warps, enable_fp_fusion=False)

    def block(self, most: tuple[int, int]) -> dict[str, int]:
        sizes = zip(("BR", "BL"), most, (self.R, self.L), strict=True)
        return {name: min(m, triton.next_power_of_2(n)) for name, m, n in sizes}

    def tiles(self) -> int:
        block = self.block(BLOCK)
        return triton.cdiv(self.R, block["BR"]) * triton.cdiv(self.L, block["BL"])

    def sum(self, n: _Neuron, x: Tensor, w: Tensor | None, w_currents: bool) -> Tensor:
        out, block = self.neurons(), self.block(SUM_BLOCKS[self.columns])
        self.run(
            qk_sum_kernel, triton.cdiv(self.J, block["BL" if self.columns else "BR"]), x, w, n.decay_h, n.gain_h, out,
            *self.sizes, *_strides(x), *_strides(w), *n.numbers, **self.flags, W=w is not None, W_CURRENTS=w_currents,
            **n.flags, **block,
        )  # fmt: skip
        return out


def _strides(x: Tensor | None) -> tuple[int, ...]:
    return x.stride()[:4] if x is not None else (0, 0, 0, 0)


def _checked(op: str, q: Tensor, k: Tensor, v: Tensor | None, parameters: Any, mode: int) -> None:
    from spikecore.ops.qk_attention import _check

    _check(op, q, k, v, parameters, mode, 0)
    if q.dtype == torch.float64:
        raise RuntimeError(f"{op}: float64 runs on the CPU only, got {list(q.shape)} on {q.device.type}")


def qk_attention_fwd(q, k, v, attn_decay, attn_gain, qkv_decay, qkv_gain, attn, qkv, mode, T):
    from spikecore.ops.lif import pack_spikes, unpack_spikes
    from spikecore.ops.qk_attention import _empty, _qk_attention_fwd_fake

    if T:
        out = _qk_attention_fwd_fake(q, k, v, attn_decay, attn_gain, qkv_decay, qkv_gain, attn, qkv, mode, T)
        loose = [unpack_spikes(x, T) if x is not None else None for x in (q, k, v)]
        spikes = qk_attention_fwd(*loose, attn_decay, attn_gain, qkv_decay, qkv_gain, attn, qkv, mode, 0)
        return out.copy_(pack_spikes(spikes))
    _checked("qk_attention", q, k, v, (attn_decay, attn_gain, qkv_decay, qkv_gain), mode)
    p = _Problem(q, k, v, mode, bool(qkv))
    out = _empty(q, q if v is not None else k)
    if out.numel() == 0:
        return out
    a, n = _Neuron(attn_decay, attn_gain, attn), _Neuron(qkv_decay, qkv_gain, qkv)
    inputs = p.sum(n, p.s, p.w, p.currents)
    rows = p.rows(out)
    p.run(
        qk_gate_kernel, p.tiles(), inputs, p.y, a.decay_h, a.gain_h, n.decay_h, n.gain_h, rows, *p.sizes,
        *_strides(p.y), *_strides(rows), *a.numbers, *n.numbers,
        **p.flags, **{f"ATTN_{k}": f for k, f in a.flags.items()}, **n.flags,
        **p.block(BLOCK),
    )  # fmt: skip
    return out


def qk_attention_bwd(
    g_out, q, k, v, attn_decay, attn_gain, qkv_decay, qkv_gain, attn, qkv, mode,
    need_attn_decay, need_attn_gain, need_qkv_decay, need_qkv_gain,
):  # fmt: skip
    from spikecore.ops.qk_attention import _qk_attention_bwd_fake

    parameters = (attn_decay, attn_gain, qkv_decay, qkv_gain)
    needs = (need_attn_decay, need_attn_gain, need_qkv_decay, need_qkv_gain)
    _checked("qk_attention backward", q, k, v, parameters, mode)
    g_q, g_k, g_v, *g_p = _qk_attention_bwd_fake(g_out, q, k, v, *parameters, attn, qkv, mode, *needs)
    if q.numel() == 0:
        return g_q, g_k, g_v, *(g.zero_() for g in g_p)
    p = _Problem(q, k, v, mode, bool(qkv))
    a, n = _Neuron(attn_decay, attn_gain, attn), _Neuron(qkv_decay, qkv_gain, qkv)
    g_out = p.rows(g_out)
    inputs, g_attn, potentials = p.sum(n, p.s, p.w, p.currents), p.sum(n, p.y, g_out, False), p.neurons()
    blocks, tiles, sums = triton.cdiv(p.J, NEURONS), p.tiles(), None
    parts = max(blocks, 3 * tiles)
    if any(needs):
        sums = q.new_zeros((4, p.B, p.H, parts), dtype=torch.float64)
    step = p.B * p.H * parts
    p.run(
        qk_attn_bwd_kernel, blocks, inputs, potentials, g_attn, a.decay_h, a.gain_h, sums, p.T, p.B * p.H * p.J, p.J,
        p.H, parts, step, *a.backward_numbers, **a.backward_flags, SUMS=sums is not None, BN=NEURONS,
    )  # fmt: skip
    spread = [(p.s, p.w, g_k if v is not None else g_q), (p.w, p.s, g_v)]
    jobs = [(p.y, g_out, g_q if v is not None else g_k), *spread[: 1 if v is None else 2]]
    for i, (x, other, g_x) in enumerate(jobs):
        g_x = p.rows(g_x)
        factors = potentials if i == 0 else g_attn
        p.run(
            qk_operand_bwd_kernel, tiles, factors, x, other, n.decay_h, n.gain_h, g_x,
            sums[2:] if sums is not None else None, *p.sizes, *_strides(x), *_strides(other), *_strides(g_x), a.fire_at,
            *n.backward_numbers, parts, i * tiles, step, warps=8 if q.dtype == torch.float32 else 4,  # with 4 it spills
            **p.flags, GATED=i == 0, OTHER=other is not None, O_CURRENTS=p.currents and i > 0 and other is not None,
            **n.backward_flags, SUMS=sums is not None and p.currents, SEG=min(SEGMENT, triton.next_power_of_2(p.T)),
            **p.block(BLOCK),
        )  # fmt: skip
    results = [
        (sums[i].sum(dim=(0, 2)) if parameters[i].dim() else sums[i].sum()).float() if need else g
        for i, (need, g) in enumerate(zip(needs, g_p, strict=True))
    ]
    return g_q, g_k, g_v, *results


def register() -> None:
    """Make these the kernels of torch's CUDA dispatch key."""
    for name, launcher in (("qk_attention_fwd", qk_attention_fwd), ("qk_attention_bwd", qk_attention_bwd)):
        _library.impl(name, launcher, "CUDA")


_library = torch.library.Library("spikecore", "IMPL")
