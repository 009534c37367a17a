"""QKFormer: a hierarchical spiking transformer, linear in its tokens.

Paper: Zhou et al., "QKFormer: Hierarchical Spiking Transformer using Q-K Attention", NeurIPS 2024.
Origin: github.com/zhouchenlin2096/QKFormer (no licence); written anew from the description, its checkpoints load.

Deviations: the last neuron of a self attention steps over T; the published code runs it over T * B, which couples the
samples of a batch (``published_quirks=True``; the same for a batch of one). Maps need not be square.
A repeated image's first layer is computed once (see `Folded`).
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from spikecore.models._base import SpikingModel, fire, truncated_normal
from spikecore.models._registry import register_model
from spikecore.models._transformer import Attention, Block, SpikingSelfAttention, conv_bn, neuron, published_keys
from spikecore.ops import qk_attention

__all__ = ["QKFormer"]


class TokenAttention(Attention):
    """Q-K token attention: a token's spikes k pass where a neuron fires on the sum of its q, head by head."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__("qk", channels, heads)
        self.lif = neuron()

    def inside(self, **spikes: Tensor) -> tuple[Tensor, int, int]:
        q = spikes["q"]
        return q.sum(3, keepdim=True), int(q.count_nonzero()), q.numel()

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.currents(x)
        y = qk_attention(q, k, "token", self.attn_lif, self.qkv_lif)
        return fire(y.reshape(x.shape), self.proj, self.lif)


class PatchEmbed(nn.Module):
    """Patch embedding with a deformed shortcut: convolutions, each with its neuron, and a strided 1x1 beside them.

    Args:
        layers: name, output channels and whether it pools (before its neuron), for each.
        shortcut_after: how many layers come before the shortcut leaves.
        stride: of the shortcut.
    """

    def __init__(
        self, in_channels: int, layers: Sequence[tuple[str, int, bool]], shortcut_after: int, stride: int
    ) -> None:
        super().__init__()
        self.names, self.shortcut_after = [name for name, _, _ in layers], shortcut_after
        channels = [in_channels, *(c for _, c, _ in layers)]
        for (name, to, pool), c in zip(layers, channels, strict=False):
            self.add_module(name, conv_bn(c, to, 3, pool=pool))
            self.add_module(f"{name}_lif", neuron())
        self.proj_res = conv_bn(channels[shortcut_after], channels[-1], stride=stride)
        self.proj_res_lif = neuron()

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for name in self.names:
            maps.append(fire(maps[-1], getattr(self, name), getattr(self, f"{name}_lif")))
        return maps[-1] + fire(maps[self.shortcut_after], self.proj_res, self.proj_res_lif)


# Per stem and stage: layers (name, width as a share of embed_dim, pool), where the shortcut leaves, its stride, and the
# number of blocks with token attention (None: the rest of the depth, with self attention).
Stage = tuple[Sequence[tuple[str, int, bool]], int, int, int | None]
STEMS: dict[str, Sequence[Stage]] = {
    "imagenet": (  # 1/4, 1/8, 1/16 of the image
        ([("proj", 8, True), ("proj1", 4, True), ("proj2", 4, False)], 1, 2, 1),
        ([("proj3", 2, True), ("proj4", 2, False)], 0, 2, 2),
        ([("proj3", 1, True), ("proj4", 1, False)], 0, 2, None),
    ),
    "cifar": (  # 1, 1/2, 1/4
        ([("proj", 8, False), ("proj1", 4, False)], 1, 1, 1),
        ([("proj3", 2, False), ("proj4", 2, True)], 0, 2, 1),
        ([("proj3", 1, False), ("proj4", 1, True)], 0, 2, None),
    ),
    "dvs": (  # 1/8, 1/16
        ([("proj", 16, False), ("proj1", 8, True), ("proj2", 4, True), ("proj3", 2, True)], 2, 4, 1),
        ([("proj", 1, False), ("proj4", 1, True)], 0, 2, None),
    ),
}


class QKFormer(SpikingModel):
    """Hierarchical spiking transformer: token attention in the wide stages, self attention in the last.

    Args:
        embed_dim: channels of the last stage.
        heads: of every attention.
        depth: blocks of all stages.
        mlp_ratio: hidden width of an MLP over its channels.
        stem: "imagenet", "cifar" or "dvs": where the map is pooled, and how many stages there are.
        published_quirks: the last neuron of a self attention steps over T * B (see above).
        T, in_chans, num_classes, and shapes: see `SpikingModel`.
    """

    classifier_name = "head"

    def __init__(
        self, embed_dim: int, heads: int, depth: int, *, mlp_ratio: float = 4.0, stem: str = "imagenet",
        published_quirks: bool = False, T: int | None = 4, in_chans: int = 3, num_classes: int = 1000,
    ) -> None:  # fmt: skip
        super().__init__(T, in_chans, num_classes)
        if stem not in STEMS:
            raise ValueError(f"QKFormer: stem must be imagenet, cifar or dvs, got {stem!r}")
        fixed = sum(tokens or 0 for *_, tokens in STEMS[stem])
        if embed_dim % 16 or depth <= fixed:
            raise ValueError(
                f"QKFormer: embed_dim must be a multiple of 16 and depth above {fixed}, got {embed_dim} and {depth}"
            )
        self.stages = tuple(f"stage{i}" for i in range(1, len(STEMS[stem]) + 1))
        channels = in_chans
        for i, (layers, after, stride, tokens) in enumerate(STEMS[stem], 1):
            plan = [(name, embed_dim // share, pool) for name, share, pool in layers]
            self.add_module(f"patch_embed{i}", PatchEmbed(channels, plan, after, stride))
            channels = plan[-1][1]
            blocks = nn.Sequential()
            for _ in range(tokens or depth - fixed):
                attn = (
                    TokenAttention(channels, heads)
                    if tokens
                    else SpikingSelfAttention(channels, heads, coupled=published_quirks)
                )
                blocks.append(Block(attn, channels, mlp_ratio))
            self.add_module(f"stage{i}", blocks)
        self.num_features = embed_dim
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        truncated_normal(self)

    def sequence_features(self, x: Tensor) -> Tensor:
        for i in range(1, len(self.stages) + 1):
            x = getattr(self, f"stage{i}")(getattr(self, f"patch_embed{i}")(x))
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = x.mean((3, 4)).mean(0)
        return x if pre_logits else self.head(x)


def checkpoint_filter(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The names of the four published files."""
    names = {".tssa.": ".attn.", ".ssa.": ".attn.", ".mlp1_": ".fc1_", ".mlp2_": ".fc2_"}
    for published, name in names.items():
        state = {k.replace(published, name): v for k, v in state.items()}
    return published_keys(state)


def _variant(name: str, **settings: Any) -> None:
    def build(**kwargs: Any) -> QKFormer:
        return QKFormer(**{**settings, **kwargs})

    register_model(build, name=name, checkpoint_filter=checkpoint_filter)


_variant("qkformer_10_384", embed_dim=384, heads=6, depth=10)
_variant("qkformer_10_512", embed_dim=512, heads=8, depth=10)
_variant("qkformer_10_768", embed_dim=768, heads=12, depth=10)
_variant("qkformer_4_384", embed_dim=384, heads=8, depth=4, stem="cifar", num_classes=10)
# For CIFAR10-DVS; the published file for DVS128 Gesture has ``mlp_ratio=4``.
_variant(
    "qkformer_dvs_256", embed_dim=256, heads=16, depth=2, stem="dvs", mlp_ratio=1, T=None, in_chans=2, num_classes=10
)
_variant("qkformer_test", embed_dim=64, heads=4, depth=4, T=2, num_classes=10)  # not of the paper: for tests
