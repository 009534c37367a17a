"""spiking_self_attention in Triton: the GPU backend where the compiled CUDA kernels cannot run.

Formulas: spikecore/ops/spiking_self_attention.py. Forward puts ``k^T v`` of every step into scratch memory, then one
kernel takes q through it and its neurons through time: neither sums nor potentials lie in memory. Currents pass through
lif's kernel first and come back as bits. Backward is put together of lif's kernels and torch's matrix products; like
forward it keeps nothing but the inputs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikecore.triton.lif import NeuronNumbers, _charge, _reset, lif_bwd, lif_fwd

_HEADS = 2  # the dimension of [T, B, H, D, N] that is the neurons' channel
TILE = 64  # rows and columns that a program owns
DEPTH = 16  # of a sum, at once
PART = 64  # tokens of a sum in backward, at once


@triton.jit
def _numbers(p, bit, mask, PACKED: tl.constexpr):
    # A tile in float32: floats, or a bit of bytes.
    x = tl.load(p, mask=mask, other=0)
    if PACKED:
        x = (x.to(tl.int32) >> bit) & 1
    return x.to(tl.float32)


@triton.jit
def ssa_dots_kernel(
    p_k, p_v, p_kv, T, H, D, N, k_t, k_b, k_h, k_d, k_n, v_t, v_b, v_h, v_d, v_n,
    PACKED: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    # A program owns BD x BD of kv[t, b, h]: the sum over n of k[d, n] v[e, n].
    across = (D + BD - 1) // BD
    program = tl.program_id(0).to(tl.int64)
    tile, matrix = program % (across * across), program // (across * across)
    bh, t = matrix // T, matrix % T
    h, b = bh % H, bh // H
    d = tile // across * BD + tl.arange(0, BD)
    e = tile % across * BD + tl.arange(0, BD)
    step = t // 8 if PACKED else t
    bit = (t % 8).to(tl.int32)
    at_k = p_k + step * k_t + b * k_b + h * k_h + d[:, None].to(tl.int64) * k_d
    at_v = p_v + step * v_t + b * v_b + h * v_h + e[:, None].to(tl.int64) * v_d
    kv = tl.zeros([BD, BD], tl.float32)
    for chunk in range((N + BN - 1) // BN):
        n = (chunk * BN + tl.arange(0, BN))[None, :]
        b_k = _numbers(at_k + n.to(tl.int64) * k_n, bit, (d[:, None] < D) & (n < N), PACKED)
        b_v = _numbers(at_v + n.to(tl.int64) * v_n, bit, (e[:, None] < D) & (n < N), PACKED)
        kv += tl.dot(b_k, tl.trans(b_v), input_precision="ieee")
    tl.store(p_kv + matrix * D * D + d[:, None] * D + e[None, :], kv, mask=(d[:, None] < D) & (e[None, :] < D))


@triton.jit
def ssa_fwd_kernel(
    p_q, p_kv, p_decay, p_gain, p_out, T, H, D, N, q_t, q_b, q_h, q_d, q_n, o_t, o_b, o_h, o_d, o_n,
    scale, decay, gain, decay_step, gain_step, rest, fire_at, reset_by,
    PACKED: tl.constexpr, PACKED_OUT: tl.constexpr, HARD: tl.constexpr, DECAY: tl.constexpr, GAIN: tl.constexpr,
    BD: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    # A program owns BD x BN neurons of a head and walks through time, their potentials in registers.
    across = (N + BN - 1) // BN
    tiles = (D + BD - 1) // BD * across
    program = tl.program_id(0).to(tl.int64)
    tile, bh = program % tiles, program // tiles
    h, b = bh % H, bh // H
    e = tile // across * BD + tl.arange(0, BD)
    n = (tile % across * BN + tl.arange(0, BN))[None, :]
    b_decay, b_gain = decay, gain
    if DECAY:
        b_decay = tl.load(p_decay + h * decay_step)
    if GAIN:
        b_gain = tl.load(p_gain + h * gain_step)
    mask = (e[:, None] < D) & (n < N)
    at_out = p_out + b * o_b + h * o_h + e[:, None].to(tl.int64) * o_d + n.to(tl.int64) * o_n
    at_q = p_q + b * q_b + h * q_h + n.to(tl.int64) * q_n
    b_v = tl.zeros([BD, BN], tl.float32) + rest
    out = tl.zeros([BD, BN], tl.int32)
    for i in range(T):
        t = tl.cast(i, tl.int64)
        step = t // 8 if PACKED else t
        at_kv = p_kv + (bh * T + t) * D * D + e[None, :]
        y = tl.zeros([BD, BN], tl.float32)
        for chunk in range((D + BK - 1) // BK):
            d = (chunk * BK + tl.arange(0, BK))[:, None]
            b_q = _numbers(at_q + step * q_t + d.to(tl.int64) * q_d, i % 8, (d < D) & (n < N), PACKED)
            b_kv = tl.load(at_kv + d * D, mask=(d < D) & (e[None, :] < D), other=0.0)
            y += tl.dot(tl.trans(b_kv), b_q, input_precision="ieee")
        b_h = _charge(b_v, scale * y, b_decay, b_gain, rest)
        b_v = _reset(b_h, rest, fire_at, reset_by, HARD)
        fired = b_h >= fire_at
        if PACKED_OUT:
            out = out | (fired.to(tl.int32) << (i % 8))
            if (i % 8 == 7) | (i == T - 1):
                tl.store(at_out + t // 8 * o_t, out.to(tl.uint8), mask=mask)
                out = tl.zeros([BD, BN], tl.int32)
        else:
            tl.store(at_out + t * o_t, fired.to(tl.float32).to(p_out.dtype.element_ty), mask=mask)


def _checked(q: Tensor, k: Tensor, v: Tensor, T: int, qkv: list[float], parameters: tuple[Tensor | None, ...]) -> None:
    from spikecore.ops.spiking_self_attention import _check, _named

    _check(q, k, v, T, bool(qkv), _named(*parameters))
    if q.dtype == torch.float64:
        raise RuntimeError(
            f"spiking_self_attention: float64 runs on the CPU only, got {list(q.shape)} on {q.device.type}"
        )


def _spikes(x: Tensor, decay_h: Tensor | None, gain_h: Tensor | None, numbers: list[float], packed: bool) -> Tensor:
    return lif_fwd(x, decay_h, gain_h, None, numbers, _HEADS, False, False, packed)[0]


def _over_tokens(a: Tensor, b: Tensor) -> Tensor:
    """``a b^T``, summed by PART tokens: one long sum in float32 would err more than those of other backends."""
    whole = a.shape[-1] // PART * PART
    left, right = (x[..., :whole].unflatten(-1, (-1, PART)).transpose(-3, -2) for x in (a, b))
    return (left @ right.mT).sum(-3) + a[..., whole:] @ b[..., whole:].mT


def _like(x: Tensor, values: Tensor) -> Tensor:
    from spikecore.ops.lif import _empty_slices

    return _empty_slices(x, len(x), x.dtype).copy_(values)


def _run(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
    with torch.cuda.device_of(args[0]):  # nothing for the interpreter's CPU tensors
        kernel[(programs,)](*args, **constants, num_warps=8, enable_fp_fusion=False)


def spiking_self_attention_fwd(q, k, v, decay_h, gain_h, qkv_decay_h, qkv_gain_h, scale, T, attn, qkv):
    from spikecore.ops.lif import _empty_slices

    _checked(q, k, v, T, qkv, (decay_h, gain_h, qkv_decay_h, qkv_gain_h))
    out = _empty_slices(q, len(q), q.dtype)
    if out.numel() == 0:
        return out
    steps, (B, H, D, N) = T or len(q), q.shape[1:]
    if qkv:
        q, k, v = (_spikes(x, qkv_decay_h, qkv_gain_h, qkv, True) for x in (q, k, v))
    neuron = NeuronNumbers(attn)
    bits, side, columns = q.dtype == torch.uint8, _side(D), _side(N)
    kv = q.new_empty((B, H, steps, D, D), dtype=torch.float32)
    sizes, tiles = (steps, H, D, N), triton.cdiv(D, side)
    _run(
        ssa_dots_kernel, B * H * steps * tiles * tiles, k, v, kv, *sizes, *k.stride(), *v.stride(),
        PACKED=bits, BD=side, BN=DEPTH,
    )  # fmt: skip
    parameters = [p.contiguous() if p is not None else None for p in (decay_h, gain_h)]
    _run(
        ssa_fwd_kernel, B * H * tiles * triton.cdiv(N, columns), q, kv, *parameters, out, *sizes, *q.stride(),
        *out.stride(), scale, neuron.decay, neuron.gain, *(int(p is not None and p.dim() > 0) for p in parameters),
        neuron.rest, neuron.fire_at, neuron.reset_by, PACKED=bits, PACKED_OUT=T > 0, HARD=neuron.hard,
        DECAY=decay_h is not None, GAIN=gain_h is not None, BD=side, BK=DEPTH, BN=columns,
        num_stages=1,  # tiles on their way would spill
    )  # fmt: skip
    return out


def _side(n: int) -> int:
    return min(TILE, max(16, triton.next_power_of_2(n)))  # tl.dot takes no less than 16


def spiking_self_attention_bwd(
    g_out, q, k, v, decay_h, gain_h, qkv_decay_h, qkv_gain_h, scale, attn, qkv,
    need_decay, need_gain, need_qkv_decay, need_qkv_gain,
):  # fmt: skip
    _checked(q, k, v, 0, qkv, (decay_h, gain_h, qkv_decay_h, qkv_gain_h))
    inputs = [x.float() for x in (q, k, v)]
    operands = [_spikes(x, qkv_decay_h, qkv_gain_h, qkv, False) for x in inputs] if qkv else inputs
    b_q, b_k, b_v = operands
    kv = _over_tokens(b_k, b_v)
    g_u, g_decay, g_gain, _ = lif_bwd(
        g_out.float(), None, None, None, scale * (kv.mT @ b_q), decay_h, gain_h, None, attn, _HEADS,
        need_decay, need_gain, False,
    )  # fmt: skip
    g_y = scale * g_u
    g_kv = _over_tokens(b_q, g_y)
    grads = [kv @ g_y, g_kv @ b_v, g_kv.mT @ b_k]
    g_qkv_decay, g_qkv_gain = (q.new_empty(0, dtype=torch.float32) for _ in range(2))
    if qkv:
        results = [
            lif_bwd(
                g, None, None, None, x, qkv_decay_h, qkv_gain_h, None, qkv, _HEADS,
                need_qkv_decay, need_qkv_gain, False,
            )
            for g, x in zip(grads, inputs, strict=True)
        ]  # fmt: skip
        grads = [r[0] for r in results]
        if need_qkv_decay:
            g_qkv_decay = sum(r[1] for r in results)
        if need_qkv_gain:
            g_qkv_gain = sum(r[2] for r in results)
    g_q, g_k, g_v = (_like(x, g) for x, g in zip((q, k, v), grads, strict=True))
    return g_q, g_k, g_v, g_decay, g_gain, g_qkv_decay, g_qkv_gain


def register() -> None:
    """Make these the kernels of torch's CUDA dispatch key."""
    _library.impl("spiking_self_attention_fwd", spiking_self_attention_fwd, "CUDA")
    _library.impl("spiking_self_attention_bwd", spiking_self_attention_bwd, "CUDA")


_library = torch.library.Library("spikecore", "IMPL")
