"""spiking_self_attention where the compiled CUDA kernels cannot run: the neurons by lif's Triton kernels, the products,
which are plain matrix products, by torch. Spikes and ``kv`` do lie in memory here; nothing more is kept for backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spikecore.triton.lif import lif_bwd, lif_fwd

_HEADS = 2  # the dimension of [T, B, H, D, N] that is the neurons' channel


def _start(
    q: Tensor, k: Tensor, v: Tensor, T: int, qkv: list[float], parameters: tuple[Tensor | None, ...]
) -> list[Tensor]:
    """The operands in float32, after the checks."""
    from spikecore.ops.lif import unpack_spikes
    from spikecore.ops.spiking_self_attention import _check, _named

    _check(q, k, v, T, bool(qkv), _named(*parameters))
    if q.dtype == torch.float64:
        raise RuntimeError(
            f"spiking_self_attention: float64 runs on the CPU only, got {list(q.shape)} on {q.device.type}"
        )
    return [unpack_spikes(x, T) if T else x.float() for x in (q, k, v)]


def _spikes(x: Tensor, decay_h: Tensor | None, gain_h: Tensor | None, numbers: list[float], packed: bool) -> Tensor:
    return lif_fwd(x, decay_h, gain_h, None, numbers, _HEADS, False, False, packed)[0]


def _like(x: Tensor, values: Tensor) -> Tensor:
    from spikecore.ops.lif import _empty_slices

    return _empty_slices(x, len(x), x.dtype).copy_(values)


def spiking_self_attention_fwd(q, k, v, decay_h, gain_h, qkv_decay_h, qkv_gain_h, scale, T, attn, qkv):
    operands = _start(q, k, v, T, qkv, (decay_h, gain_h, qkv_decay_h, qkv_gain_h))
    if qkv:
        operands = [_spikes(x, qkv_decay_h, qkv_gain_h, qkv, False) for x in operands]
    b_q, b_k, b_v = operands
    y = scale * ((b_k @ b_v.mT).mT @ b_q)
    return _like(q, _spikes(y, decay_h, gain_h, attn, T > 0))


def spiking_self_attention_bwd(
    g_out, q, k, v, decay_h, gain_h, qkv_decay_h, qkv_gain_h, scale, attn, qkv,
    need_decay, need_gain, need_qkv_decay, need_qkv_gain,
):  # fmt: skip
    inputs = _start(q, k, v, 0, qkv, (decay_h, gain_h, qkv_decay_h, qkv_gain_h))
    operands = [_spikes(x, qkv_decay_h, qkv_gain_h, qkv, False) for x in inputs] if qkv else inputs
    b_q, b_k, b_v = operands
    kv = b_k @ b_v.mT
    g_u, g_decay, g_gain, _ = lif_bwd(
        g_out.float(), None, None, None, scale * (kv.mT @ b_q), decay_h, gain_h, None, attn, _HEADS,
        need_decay, need_gain, False,
    )  # fmt: skip
    g_y = scale * g_u
    g_kv = b_q @ g_y.mT
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
