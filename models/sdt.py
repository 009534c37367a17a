"""Spike-driven transformer, and the caption encoder built on it: additions and masks, no product of matrices in its
attention.

Paper: Yao et al., "Spike-driven Transformer", NeurIPS 2023 (github.com/BICLab/Spike-Driven-Transformer, Apache-2.0).
Caption encoder: github.com/WenhuiHua-com/Dual-Efficient-Spiking-Neural-Network-Vision-Encoder-for-Partitioned-VLM-Edge-
Cloud-Co-Inference (no licence). Written anew from their descriptions, their checkpoints load.

Deviations: the encoder's forward gives logits, `codes` their argmax. What the published codes hold and never use
(talking_heads, cls_token) is held as they do, for checkpoints and counts, but takes no gradient. The mode for events,
with max pools inside the attention, is not here.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spikecore.models._base import Folded, SpikingModel, fire
from spikecore.models._registry import register_model
from spikecore.models._transformer import Attention, conv_bn, neuron, published_keys
from spikecore.ops import spike_driven_attention

__all__ = ["SDT", "SDTCaption"]


class Tokenizer(nn.Module):
    """Convolution, norm, neuron[, pool], three times; convolution, norm[, pool]; then a residual convolution of its
    spikes. What leaves is real-valued."""

    proj3: nn.Module
    proj_lif3: nn.Module

    def __init__(self, in_channels: int, embed_dim: int, pools: Sequence[bool]) -> None:
        super().__init__()
        channels, self.pools = in_channels, pools
        for i, share in enumerate((8, 4, 2, 1)):
            self.add_module(f"proj{i or ''}", conv_bn(channels, embed_dim // share, 3, pool=i == 3 and pools[i]))
            self.add_module(f"proj_lif{i or ''}", neuron())
            channels = embed_dim // share
        self.pool = Folded(nn.MaxPool2d(3, 2, padding=1))
        self.rpe = conv_bn(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        for i in range(3):
            x = fire(x, getattr(self, f"proj{i or ''}"), getattr(self, f"proj_lif{i or ''}"))
            x = self.pool(x) if self.pools[i] else x
        x = self.proj3(x)
        return x + self.rpe(self.proj_lif3(x))


class SpikeDrivenAttention(Attention):
    """``BN(W_p (q * LIF(sum over tokens of k * v)))`` with q, k, v = LIF(BN(W LIF(x)))."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__("qkv", channels, heads)
        self.shortcut_lif = neuron()
        self.talking_heads = nn.Conv1d(heads, heads, 1, bias=False).requires_grad_(False)  # never used

    def inside(self, **spikes: Tensor) -> tuple[Tensor, int, int]:
        both = spikes["k"] * spikes["v"]
        return both.sum(4, keepdim=True), int(both.count_nonzero()), both.numel()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.currents(self.shortcut_lif(x))
        y = spike_driven_attention(q, k, v, self.attn_lif, self.qkv_lif)
        return self.proj(y.reshape(x.shape))


class MLP(nn.Module):
    """With its shortcut, which leaves behind the first convolution where that keeps the width."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1_lif, self.fc1 = neuron(), conv_bn(channels, hidden, bias=True)
        self.fc2_lif, self.fc2 = neuron(), conv_bn(hidden, channels, bias=True)
        self.same_width = hidden == channels

    def forward(self, x: Tensor) -> Tensor:
        s = self.fc1_lif(x)
        if self.same_width:
            x = self.fc1(s) + x
            s = self.fc2_lif(x)
        else:
            s = fire(s, self.fc1, self.fc2_lif)
        return x + self.fc2(s)


class Block(nn.Module):
    """Shortcuts between membranes: x is real-valued, every convolution reads spikes."""

    def __init__(self, channels: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.attn = SpikeDrivenAttention(channels, heads)
        self.mlp = MLP(channels, int(channels * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x + self.attn(x))


class SDT(SpikingModel):
    """Spike-driven transformer: the classifier reads the spikes of the mean token.

    Args:
        embed_dim, heads, depth: width of the blocks, heads of their attentions, number of blocks.
        pools: which of the tokenizer's four convolutions halve the map.
        mlp_ratio: hidden width of an MLP over `embed_dim`.
        T, in_chans, num_classes, and shapes: see `SpikingModel`.
    """

    classifier_name = "head"

    def __init__(
        self, embed_dim: int, heads: int, depth: int, *, pools: Sequence[bool] = (True,) * 4, mlp_ratio: float = 4.0,
        T: int | None = 4, in_chans: int = 3, num_classes: int = 1000,
    ) -> None:  # fmt: skip
        super().__init__(T, in_chans, num_classes)
        name = type(self).__name__
        if embed_dim % 8 or depth < 1:
            raise ValueError(
                f"{name}: embed_dim must be a multiple of 8 and depth at least 1, got {embed_dim} and {depth}"
            )
        if len(pools) != 4:
            raise ValueError(f"{name}: pools must be four, got {len(pools)}")
        self.patch_embed = Tokenizer(in_chans, embed_dim, pools)
        self.block = nn.Sequential(*(Block(embed_dim, heads, mlp_ratio) for _ in range(depth)))
        self.stages = tuple(f"block.{i}" for i in range(depth))
        self.num_features = embed_dim
        self.head_lif = neuron()
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        for m in self.modules():
            if isinstance(m, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.02)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)

    def sequence_features(self, x: Tensor) -> Tensor:
        return self.block(self.patch_embed(x))

    def tokens(self, x: Tensor) -> Tensor:
        """What the head's neuron reads."""
        return x.mean((3, 4))

    def steps(self, x: Tensor) -> Tensor:
        return self.head(self.head_lif(self.tokens(self.forward_features(x))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.head_lif(self.tokens(x))
        return x.mean(0) if pre_logits else self.head(x).mean(0)


class SDTCaption(SDT):
    """Caption encoder: for every token a code of a book, the mean token in front.

    Arguments are `SDT`'s; `num_classes` is the number of codes.

    Shapes: image ``[B, C, H, W]`` or frames ``[B, T, C, H, W]`` -> logits ``[B, N + 1, num_classes]``, N tokens.
    """

    def __init__(self, embed_dim: int, heads: int, depth: int, *, num_classes: int = 5000, **kwargs: Any) -> None:
        super().__init__(embed_dim, heads, depth, num_classes=num_classes, **kwargs)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim), requires_grad=False)  # never used

    def tokens(self, x: Tensor) -> Tensor:
        x = x.flatten(3).transpose(2, 3)
        return torch.cat([x.mean(2, keepdim=True), x], 2)

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """Indices of the likeliest codes, ``[B, N + 1]``; those behind the first go to a decoder."""
        return self(x).argmax(2)


def checkpoint_filter(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The names of the published files; the encoder's cls_token where another model has none."""
    own = model.state_dict()
    return {k: v for k, v in published_keys(state).items() if k != "cls_token" or k in own}


def _variant(name: str, model: type[SDT], **settings: Any) -> None:
    def build(**kwargs: Any) -> SDT:
        return model(**{**settings, **kwargs})

    register_model(build, name=name, checkpoint_filter=checkpoint_filter)


for _depth, _width in ((8, 384), (6, 512), (8, 512), (10, 512), (8, 768)):
    _variant(f"sdt_{_depth}_{_width}", SDT, embed_dim=_width, heads=8, depth=_depth)
_variant("sdt_caption_6_512", SDTCaption, embed_dim=512, heads=8, depth=6)
# Not of the papers: for tests.
_variant("sdt_test", SDT, embed_dim=64, heads=2, depth=2, T=2, num_classes=10)
_variant("sdt_caption_test", SDTCaption, embed_dim=64, heads=2, depth=1, mlp_ratio=1, T=2, num_classes=12)
