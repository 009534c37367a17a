"""SVMamba: VMamba's selective scan between spiking neurons; and the attention that its code holds beside it.

Origin: github.com/para133/SNN_Mamba (no licence; no paper, and no result, was published); written anew from its
description, its checkpoints load.

Deviations: the first neuron of a block, and those of the attention's q and k, step over T; the published code runs
them over T * B, which couples the samples of a batch (``published_quirks=True``; the same for a batch of one). A block
adds its branches to the normalised map, as published. The attention's last projection, which is never used, is left
out.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from spikecore.models._base import Folded, SpikingModel, over_time, truncated_normal
from spikecore.models._registry import register_model
from spikecore.models._transformer import neuron
from spikecore.models.vmamba import SS2D, LayerNorm2d, Linear2d, checkpoint_filter
from spikecore.neurons import LIF, Neuron
from spikecore.surrogate import Sigmoid

__all__ = ["SVMamba", "SpikeLinearAttention"]


class ConvBlock(nn.Module):
    """To half the map."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(in_channels, out_channels, 3, 2, 1), LayerNorm2d(out_channels)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return over_time(lambda x: self.act(self.norm(self.conv(x))), x)


class Downsample(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = ConvBlock(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def fire(x: Tensor, neuron: Neuron, coupled: bool) -> Tensor:
    """Spikes; `coupled`: of a neuron that steps over T * B."""
    return neuron(x.flatten(0, 1)).view_as(x) if coupled else neuron(x)


class SpikeMamba(nn.Module):
    """Neuron, convolution, scan, neuron; the spikes gate the input."""

    def __init__(self, channels: int, quirks: bool) -> None:
        super().__init__()
        self.in_proj, self.snn_in, self.quirks = Linear2d(channels, channels), neuron(), quirks
        self.conv, self.act = nn.Conv2d(channels, channels, 3, padding=1), nn.SiLU()
        self.ssm = SS2D(channels, state=1, ratio=1.0, conv_bias=False)
        self.snn2 = neuron()

    def forward(self, x: Tensor) -> Tensor:
        s = fire(over_time(self.in_proj, x), self.snn_in, self.quirks)
        return self.snn2(over_time(lambda s: self.ssm(self.act(self.conv(s))), s)) * x


class SpikeLinearAttention(nn.Module):
    """Softmax attention between spikes, v the map that q and k are made of; the result gates the input.

    Part of the published code, used by none of its models. Despite its name it is quadratic in the tokens. Its neurons
    do not detach their reset.

    Args:
        channels, heads: C, split into the heads.
        published_quirks: the neurons of q and k step over T * B (see above).

    Shapes: ``[T, B, C, H, W] -> [T, B, C, H, W]``.
    """

    def __init__(self, channels: int, heads: int, *, published_quirks: bool = False) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"SpikeLinearAttention: {channels} channels cannot be split into {heads} heads")
        self.heads, self.quirks = heads, published_quirks
        self.in_proj, self.conv, self.act = Linear2d(channels, channels), nn.Conv2d(channels, channels, 1), nn.SiLU()
        self.q_proj, self.k_proj = Linear2d(channels, channels), Linear2d(channels, channels)
        self.snn_in, self.q_snn, self.k_snn = (LIF(detach_reset=False, surrogate=Sigmoid(4.0)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        v = self.snn_in(over_time(lambda x: self.act(self.conv(self.in_proj(x))), x))
        q, k = (
            fire(over_time(project, v), neuron, self.quirks)
            for project, neuron in ((self.q_proj, self.q_snn), (self.k_proj, self.k_snn))
        )
        q, k, v = (s.flatten(3).unflatten(2, (self.heads, -1)).mT for s in (q, k, v))  # [T, B, heads, N, D]
        return nn.functional.scaled_dot_product_attention(q, k, v).mT.reshape(x.shape) * x


class FFN(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = Folded(nn.Conv2d(channels, 4 * channels, 1), nn.SiLU(), nn.Conv2d(4 * channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Block(nn.Module):
    def __init__(self, channels: int, quirks: bool) -> None:
        super().__init__()
        self.norm1, self.spikmamba = LayerNorm2d(channels), SpikeMamba(channels, quirks)
        self.norm2, self.ffn = LayerNorm2d(channels), FFN(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = over_time(self.norm1, x)
        x = over_time(self.norm2, self.spikmamba(x) + x)
        return self.ffn(x) + x


class SVMamba(SpikingModel):
    """Stages of blocks, each of twice the width and half the map of the one before.

    Args:
        depths: blocks of each stage. dims: width of the first stage, or of each.
        published_quirks: the first neuron of a block steps over T * B (see above).
        T, in_chans, num_classes, and shapes: see `SpikingModel`.
    """

    classifier_name = "classifier.head"

    def __init__(
        self, depths: Sequence[int] = (1, 2, 4), dims: int | Sequence[int] = 96, *, published_quirks: bool = False,
        T: int = 4, in_chans: int = 3, num_classes: int = 1000,
    ) -> None:  # fmt: skip
        super().__init__(T, in_chans, num_classes)
        widths = [dims << i for i in range(len(depths))] if isinstance(dims, int) else list(dims)
        self.patch_embed = nn.Sequential()
        self.patch_embed.add_module("conv1", ConvBlock(in_chans, widths[0] // 2))
        self.patch_embed.add_module("conv2", ConvBlock(widths[0] // 2, widths[0]))
        self.layers = nn.Sequential()
        for depth, width, to in zip(depths, widths, [*widths[1:], None], strict=True):
            blocks = nn.Sequential(*(Block(width, published_quirks) for _ in range(depth)))
            if to:
                blocks.append(Downsample(width, to))
            layer = nn.Sequential()
            layer.add_module("blocks", blocks)
            self.layers.append(layer)
        self.stages = tuple(f"layers.{i}" for i in range(len(depths)))
        self.num_features = widths[-1]
        self.classifier = nn.Sequential()
        self.classifier.add_module("head", nn.Linear(widths[-1], num_classes) if num_classes else nn.Identity())
        truncated_normal(self)

    def sequence_features(self, x: Tensor) -> Tensor:
        return self.layers(self.patch_embed(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = x.mean(0).mean((2, 3))
        return x if pre_logits else self.classifier(x)


def _variant(name: str, **settings: Any) -> None:
    def build(**kwargs: Any) -> SVMamba:
        return SVMamba(**{**settings, **kwargs})

    register_model(build, name=name, checkpoint_filter=checkpoint_filter)


_variant("svmamba", num_classes=100)  # for mini-ImageNet
_variant("svmamba_test", depths=(1, 1), dims=16, T=2, num_classes=10)  # for tests
