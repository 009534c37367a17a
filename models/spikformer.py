"""Spikformer, and Spikingformer with the CML tokenizer: transformers of blocks of one width.

Papers: Zhou et al., "Spikformer: When Spiking Neural Network Meets Transformer", ICLR 2023; Zhou et al.,
"Spikingformer: Spike-driven Residual Learning for Transformer-based Spiking Neural Network", arXiv 2304.11954; Zhou et
al., "Enhancing the Performance of Transformer-based Spiking Neural Networks by SNN-optimized Downsampling" (CML),
arXiv 2305.05954.
Origin: github.com/ZK-Zhou/spikformer (no licence) and the Spikingformer-CML of
github.com/Intelligent-Computing-Research-Group/BKDSNN; written anew from their descriptions, their checkpoints load.

Deviations: layer norms that the published codes hold and never use are left out; maps of any size, square or not.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from spikecore.models._base import Folded, SpikingModel, fire, truncated_normal
from spikecore.models._registry import register_model
from spikecore.models._transformer import Block, SelfAttention, SpikingSelfAttention, conv_bn, neuron, published_keys

__all__ = ["Spikformer", "Spikingformer"]

# Which of the first four convolutions end in a max pool.
IMAGENET = (True, True, True, True)
CIFAR = (False, False, True, True)


class SPS(nn.Module):
    """Spiking patch splitting: convolution, norm, neuron[, pool], four times; then a residual convolution."""

    def __init__(self, in_channels: int, embed_dim: int, pools: Sequence[bool], tau: float) -> None:
        super().__init__()
        channels, self.pools = in_channels, pools
        for i, share in enumerate((8, 4, 2, 1)):
            self.add_module(f"proj{i or ''}", conv_bn(channels, embed_dim // share, 3))
            self.add_module(f"proj_lif{i or ''}", neuron(tau))
            channels = embed_dim // share
        self.pool = Folded(nn.MaxPool2d(3, 2, padding=1))
        self.rpe, self.rpe_lif = conv_bn(channels, channels, 3), neuron(tau)

    def forward(self, x: Tensor) -> Tensor:
        for i, pool in enumerate(self.pools):
            x = fire(x, getattr(self, f"proj{i or ''}"), getattr(self, f"proj_lif{i or ''}"))
            x = self.pool(x) if pool else x
        return x + fire(x, self.rpe, self.rpe_lif)


class CML(nn.Module):
    """Neurons before the convolutions, pools right behind the norms; what leaves is real-valued."""

    def __init__(self, in_channels: int, embed_dim: int, pools: Sequence[bool], tau: float) -> None:
        super().__init__()
        self.proj = conv_bn(in_channels, embed_dim // 8, 3, pool=pools[0])
        channels = embed_dim // 8
        for i, (share, pool) in enumerate(zip((4, 2, 1, 1), (*pools[1:], False), strict=True), 1):
            self.add_module(f"proj{i}_lif", neuron(tau))
            self.add_module(f"proj{i}", conv_bn(channels, embed_dim // share, 3, pool=pool))
            channels = embed_dim // share

    def forward(self, x: Tensor) -> Tensor:
        layer = self.proj
        for i in range(1, 5):
            x, layer = fire(x, layer, getattr(self, f"proj{i}_lif")), getattr(self, f"proj{i}")
        return layer(x)


class AttentionFirst(SelfAttention):
    """Self attention that starts with a neuron and ends in a norm."""

    def __init__(self, channels: int, heads: int, tau: float) -> None:
        super().__init__(channels, heads, tau)
        self.lif = neuron(tau)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.lif(x))


class MLPFirst(nn.Module):
    """Neuron, convolution, norm, twice."""

    def __init__(self, channels: int, hidden: int, tau: float) -> None:
        super().__init__()
        self.fc1_lif, self.fc1 = neuron(tau), conv_bn(channels, hidden, bias=True)
        self.fc2_lif, self.fc2 = neuron(tau), conv_bn(hidden, channels, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(fire(self.fc1_lif(x), self.fc1, self.fc2_lif))


class PreActivationBlock(nn.Module):
    """Neurons stand before the convolutions: every convolution reads spikes, x is real-valued."""

    def __init__(self, channels: int, heads: int, mlp_ratio: float, tau: float) -> None:
        super().__init__()
        self.attn = AttentionFirst(channels, heads, tau)
        self.mlp = MLPFirst(channels, int(channels * mlp_ratio), tau)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.mlp(x)


class Spikformer(SpikingModel):
    """Tokenizer, `depth` blocks of self attention and MLP, and a linear layer on the mean.

    Args:
        embed_dim, heads: width of the blocks, and what their attentions split it into.
        pools: which of the tokenizer's first four convolutions halve the map.
        mlp_ratio: hidden width of an MLP over `embed_dim`.
        tau: of all neurons.
        T, in_chans, num_classes, and shapes: see `SpikingModel`.
    """

    classifier_name = "head"

    def __init__(
        self, embed_dim: int, heads: int, depth: int, *, pools: Sequence[bool] = IMAGENET, mlp_ratio: float = 4.0,
        tau: float = 2.0, T: int | None = 4, in_chans: int = 3, num_classes: int = 1000,
    ) -> None:  # fmt: skip
        super().__init__(T, in_chans, num_classes)
        name = type(self).__name__
        if embed_dim % 8 or depth < 1:
            raise ValueError(
                f"{name}: embed_dim must be a multiple of 8 and depth at least 1, got {embed_dim} and {depth}"
            )
        if len(pools) != 4:
            raise ValueError(f"{name}: pools must be four, got {len(pools)}")
        self.patch_embed = self.tokenizer(in_chans, embed_dim, pools, tau)
        self.block = nn.Sequential(*(self.make_block(embed_dim, heads, mlp_ratio, tau) for _ in range(depth)))
        self.stages = tuple(f"block.{i}" for i in range(depth))
        self.num_features = embed_dim
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        truncated_normal(self)

    tokenizer: type[nn.Module] = SPS

    @staticmethod
    def make_block(channels: int, heads: int, mlp_ratio: float, tau: float) -> nn.Module:
        return Block(SpikingSelfAttention(channels, heads, tau), channels, mlp_ratio, tau)

    def sequence_features(self, x: Tensor) -> Tensor:
        return self.block(self.patch_embed(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = x.mean((3, 4)).mean(0)
        return x if pre_logits else self.head(x)


class Spikingformer(Spikformer):
    """Spikformer with pre-activation residuals and the CML tokenizer; arguments are `Spikformer`'s."""

    tokenizer = CML

    @staticmethod
    def make_block(channels: int, heads: int, mlp_ratio: float, tau: float) -> nn.Module:
        return PreActivationBlock(channels, heads, mlp_ratio, tau)


def checkpoint_filter(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The names of the published files; biases in front of a norm, which some have in q, k and v, go into its mean."""
    state = published_keys(
        {
            k.replace(".mlp.mlp", ".mlp.fc").replace("mlp1_", "fc1_").replace("mlp2_", "fc2_"): v
            for k, v in state.items()
        }
    )
    own = model.state_dict().keys()
    for key in [k for k in state if k.endswith(".0.bias") and k not in own]:
        mean = key.replace(".0.bias", ".1.running_mean")
        if mean in state:
            state[mean] = state[mean] - state.pop(key)
    return state


def _variant(name: str, model: type[Spikformer], **settings: Any) -> None:
    def build(**kwargs: Any) -> Spikformer:
        return model(**{**settings, **kwargs})

    register_model(build, name=name, checkpoint_filter=checkpoint_filter)


for _name, _model in (("spikformer", Spikformer), ("spikingformer", Spikingformer)):
    for _width in (384, 512, 768):
        _variant(f"{_name}_8_{_width}", _model, embed_dim=_width, heads=8, depth=8)
    for _depth, _width in ((4, 256), (2, 384), (4, 384)):
        _heads = 16 if _width == 256 else 12
        _variant(
            f"{_name}_{_depth}_{_width}",
            _model,
            embed_dim=_width,
            heads=_heads,
            depth=_depth,
            pools=CIFAR,
            num_classes=10,
        )
    _variant(f"{_name}_test", _model, embed_dim=64, heads=2, depth=2, T=2, num_classes=10)  # not of the papers
_variant(
    "spikingformer_dvs_2_256", Spikingformer, embed_dim=256, heads=16, depth=2, tau=1.75, T=None, in_chans=2,
    num_classes=10,
)  # fmt: skip
