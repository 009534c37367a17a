"""What the spiking transformers share: convolution with batch norm, their LIF, self attention, blocks that add spikes.

Published state dicts call a convolution NAME_conv and its norm NAME_bn, and 1x1 convolutions are one-dimensional in the
attentions; here both stand in one `Folded`, NAME, over maps (`published_keys`).
"""

import re

from torch import Tensor, nn

from spikecore.models._base import Folded, fire
from spikecore.neurons import LIF
from spikecore.ops import LIFParams, lif, spiking_self_attention
from spikecore.surrogate import Sigmoid

__all__ = ["Attention", "Block", "MLP", "SelfAttention", "SpikingSelfAttention", "conv_bn", "neuron", "published_keys"]


def neuron(tau: float = 2.0) -> LIF:
    return LIF(tau, surrogate=Sigmoid(4.0))


def inside(tau: float, v_threshold: float = 1.0) -> LIFParams:
    """`neuron` inside an attention."""
    return LIFParams(1 - 1 / tau, 1 / tau, v_threshold=v_threshold, surrogate=Sigmoid(4.0))


def conv_bn(
    in_channels: int, out_channels: int, kernel: int = 1, stride: int = 1, *, bias: bool = False, pool: bool = False
) -> Folded:
    """Convolution and batch norm; `pool`: and a max pool, which halves the map."""
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=bias)
    return Folded(conv, nn.BatchNorm2d(out_channels), *([nn.MaxPool2d(3, 2, padding=1)] if pool else []))


def spikes(x: Tensor, p: LIFParams) -> Tensor:
    """Of a neuron that lies inside an attention."""
    return lif(
        x, p.decay, p.gain, v_threshold=p.v_threshold, v_reset=p.v_reset, reset_by=p.reset_by, strict=p.strict,
        surrogate=p.surrogate,
    )[0]  # fmt: skip


class Attention(nn.Module):
    """Projections of the attentions over ``[T, B, C, H, W]``: one for each operand, and `proj` (with bias) at the end.

    Args:
        operands: "qk" or "qkv".
        channels, heads: C, split into the heads.
        tau: of all neurons; those of the operands have threshold 1, that of the attention 0.5.
    """

    def __init__(self, operands: str, channels: int, heads: int, tau: float = 2.0) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"{type(self).__name__}: {channels} channels cannot be split into {heads} heads")
        self.operands, self.heads = operands, heads
        for name in operands:
            self.add_module(name, conv_bn(channels, channels))
        self.proj = conv_bn(channels, channels, bias=True)
        self.qkv_lif, self.attn_lif = inside(tau), inside(tau, 0.5)

    def fused_spikes(self, **currents: Tensor) -> tuple[dict[str, Tensor], int, int]:
        """For `estimate_energy`, what happens inside: from the projections' outputs the spikes of every neuron, the
        accumulates between them, and how many there were if all fired."""
        s = {n: spikes(x.flatten(3).unflatten(2, (self.heads, -1)), self.qkv_lif) for n, x in currents.items()}
        current, accumulates, dense = self.inside(**s)
        return {f"{n}_lif": t for n, t in {**s, "attn": spikes(current, self.attn_lif)}.items()}, accumulates, dense

    def inside(self, **spikes: Tensor) -> tuple[Tensor, int, int]:
        """What the attention's neuron reads, the accumulates that takes, and how many if all fired."""
        raise NotImplementedError

    def currents(self, x: Tensor) -> list[Tensor]:
        """What the neurons of the operands read: ``[T, B, heads, D, N]``."""
        return [getattr(self, name)(x).flatten(3).unflatten(2, (self.heads, -1)) for name in self.operands]


class SelfAttention(Attention):
    """Spiking self attention, ``BN(W_p LIF(0.125 q (k^T v)))`` with q, k, v = LIF(BN(W x)); no neuron at the end."""

    def __init__(self, channels: int, heads: int, tau: float = 2.0) -> None:
        super().__init__("qkv", channels, heads, tau)

    def inside(self, **spikes: Tensor) -> tuple[Tensor, int, int]:
        q, k, v = (spikes[n] for n in "qkv")
        width = q.shape[3]
        accumulates = width * int(k.count_nonzero() + q.count_nonzero())
        return 0.125 * (v @ k.mT) @ q, accumulates, 2 * width * q.numel()

    def attend(self, x: Tensor) -> Tensor:
        """What `proj` reads."""
        q, k, v = self.currents(x)
        return spiking_self_attention(q, k, v, 0.125, self.attn_lif, self.qkv_lif).reshape(x.shape)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.attend(x))


class SpikingSelfAttention(SelfAttention):
    """Self attention with a neuron at the end; `coupled`: one that steps over T * B, a fault of published code."""

    def __init__(self, channels: int, heads: int, tau: float = 2.0, coupled: bool = False) -> None:
        super().__init__(channels, heads, tau)
        self.lif, self.coupled = neuron(tau), coupled

    def forward(self, x: Tensor) -> Tensor:
        if self.coupled:
            y = super().forward(x)
            return self.lif(y.flatten(0, 1)).view_as(y)
        return fire(self.attend(x), self.proj, self.lif)


class MLP(nn.Module):
    def __init__(self, channels: int, hidden: int, tau: float = 2.0) -> None:
        super().__init__()
        self.fc1, self.fc1_lif = conv_bn(channels, hidden, bias=True), neuron(tau)
        self.fc2, self.fc2_lif = conv_bn(hidden, channels, bias=True), neuron(tau)

    def forward(self, x: Tensor) -> Tensor:
        return fire(fire(x, self.fc1, self.fc1_lif), self.fc2, self.fc2_lif)


class Block(nn.Module):
    """Attention and MLP, both ending in spikes, each added to its input: x counts spikes."""

    def __init__(self, attn: nn.Module, channels: int, mlp_ratio: float, tau: float = 2.0) -> None:
        super().__init__()
        self.attn, self.mlp = attn, MLP(channels, int(channels * mlp_ratio), tau)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.mlp(x)


def published_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """NAME_conv, NAME_bn to NAME.0, NAME.1; convolutions of one dimension to maps; parameters never read left out."""
    index = {"conv": 0, "linear": 0, "bn": 1}
    renamed = {
        re.sub(r"_(conv|linear|bn)(\d*)\.", lambda m: f"{m[2]}.{index[m[1]]}.", k): v
        for k, v in state.items()
        if not re.search(r"\.norm[12]\.", k)
    }
    return {
        k: v[(...,) + (None,) * (4 - v.dim())] if v.dim() in (2, 3) and k.endswith(".0.weight") else v
        for k, v in renamed.items()
    }
