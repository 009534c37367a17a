"""MS-ResNet (membrane shortcut), alone, with spiking multiscale attention (SMA), or with multi-dimensional attention
(Attention Res-SNN).

Papers: Hu et al., "Advancing Spiking Neural Networks toward Deep Residual Learning", TNNLS 2024 (arXiv 2112.08954); of
the attentions see `sma` and `attention_snn`.
Origins: the copy in github.com/Ym-Shan/Spiking_Multiscale_Attention_Arxiv (no licence) and, for Attention Res-SNN,
github.com/BICLab/Attention-SNN (MIT); written anew from their descriptions, with their state-dict keys.

Deviations: the number of steps is that of the input, where the published neuron always reads its own constant.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from spikecore.models._base import Chain, Folded, SpikingModel
from spikecore.models._registry import register_model
from spikecore.models.attention_snn import MA
from spikecore.models.attention_snn import checkpoint_filter as ma_filter
from spikecore.models.sma import SMA
from spikecore.models.sma import checkpoint_filter as sma_filter
from spikecore.neurons import Neuron
from spikecore.surrogate import Rectangle

__all__ = ["MSResNet"]


STAGES = ("conv2_x", "conv3_x", "conv4_x", "conv5_x")


class MemUpdate(Neuron):
    """``h = v / 4 + x``, fires strictly above 1/2, rectangular surrogate (Hu et al.)."""

    def __init__(self) -> None:
        super().__init__(v_threshold=0.5, strict=True, surrogate=Rectangle(1.0))

    def decay_and_gain(self) -> tuple[float, float]:
        return 0.25, 1.0


def started(norm: nn.BatchNorm2d, weight: float) -> nn.BatchNorm2d:
    nn.init.constant_(norm.weight, weight)
    return norm


class Block(nn.Module):
    """Neurons before convolutions; the residual branch starts as zero, as its last batch norm has weight 0."""

    def __init__(
        self, in_channels: int, channels: int, stride: int, pooled_shortcut: bool, sma: dict[str, Any] | None,
        attention: dict[str, Any] | None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.residual_function = Chain(
            MemUpdate(), nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False),
            started(nn.BatchNorm2d(channels), 0.5),
            MemUpdate(), nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            started(nn.BatchNorm2d(channels), 0.0),
        )  # fmt: skip
        if sma is not None:
            self.residual_function.insert(2, SMA(channels, spiking=False, **sma))
        if attention is not None:
            self.residual_function.append(MA(channels=channels, **attention))
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            project = nn.Conv2d(in_channels, channels, 1, 1 if pooled_shortcut else stride, bias=False)
            layers = [nn.AvgPool2d(stride)] if pooled_shortcut else []
            self.shortcut = Folded(*layers, project, started(nn.BatchNorm2d(channels), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.residual_function(x) + self.shortcut(x)


class MSResNet(SpikingModel):
    """Residual net whose shortcuts carry membrane potentials.

    Args:
        layers: blocks of the four stages.
        deep_stem: three 3x3 convolutions instead of one 7x7.
        pooled: average pools in the shortcuts instead of strides, dropout 0.2 before the end.
        sma: keyword arguments of `SMA` (without channels), inserted in every block after its first convolution.
        attention: keyword arguments of `MA` (without channels), at the end of every block's branch.
        T, in_chans, num_classes, and shapes: see `SpikingModel`.
    """

    classifier_name = "fc"
    stages = ("conv2_x", "conv3_x", "conv4_x", "mem_update")  # the spikes that conv5_x leads to

    def __init__(
        self, layers: Sequence[int], *, deep_stem: bool = False, pooled: bool = False,
        sma: dict[str, Any] | None = None, attention: dict[str, Any] | None = None, T: int = 6, in_chans: int = 3,
        num_classes: int = 1000,
    ) -> None:  # fmt: skip
        super().__init__(T, in_chans, num_classes)
        if deep_stem:
            plan = [(in_chans, 2), (64, 1), (64, 1)]
            stem: list[nn.Module] = [nn.Conv2d(c, 64, 3, stride, padding=1) for c, stride in plan]
        else:
            stem = [nn.Conv2d(in_chans, 64, 7, 2, padding=3, bias=False)]
        self.conv1 = Folded(*stem, started(nn.BatchNorm2d(64), 0.5))
        channels = 64
        sma, attention = (None if kind is None else {"time": T, **kind} for kind in (sma, attention))
        for stage, (name, blocks) in enumerate(zip(STAGES, layers, strict=True)):
            sequence = nn.Sequential()
            for i in range(blocks):
                sequence.append(Block(channels, 64 << stage, 2 if i == 0 else 1, pooled, sma, attention))
                channels = 64 << stage
            setattr(self, name, sequence)
        self.mem_update = MemUpdate()
        self.dropout = nn.Dropout(0.2 if pooled else 0.0)
        self.num_features = channels
        self.fc = nn.Linear(channels, num_classes) if num_classes else nn.Identity()

    def sequence_features(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for stage in STAGES:
            x = getattr(self, stage)(x)
        return self.mem_update(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.dropout(x.mean((3, 4)).mean(0))
        return x if pre_logits else self.fc(x)


def checkpoint_filter(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The published batch norms are containers of one: ``conv1.1.bn.weight``; of the attentions see there."""
    state = {k if ".S_Convs." in k else k.replace(".bn.", "."): v for k, v in state.items()}
    return ma_filter(sma_filter(state, model), model)


DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 104: (3, 8, 32, 8)}
SMA_SETTINGS = {"channel_reduction": 4, "time_reduction": 1.5, "channel_drop": 4, "time_drop": 2}


def _variant(name: str, **settings: Any) -> None:
    def build(**kwargs: Any) -> MSResNet:
        return MSResNet(**{**settings, **kwargs})

    register_model(build, name=name, checkpoint_filter=checkpoint_filter)


for depth, layers in DEPTHS.items():
    _settings = {"layers": layers, "deep_stem": depth > 34, "pooled": depth > 34}
    _variant(f"ms_resnet{depth}", **_settings)
    _variant(f"ms_resnet{depth}_sma", **_settings, sma=SMA_SETTINGS)
    _variant(f"ms_resnet{depth}_sma_azo", **_settings, sma={**SMA_SETTINGS, "azo": True})
    _variant(
        f"att_resnet{depth}", layers=layers, pooled=True, attention={"dimensions": "CS", "channel_reduction": 8}, T=1
    )
# Not of the papers: for tests.
_variant("ms_resnet_test", layers=(1, 1, 1, 1), num_classes=10, T=2)
_variant(
    "att_resnet_test", layers=(1, 1, 1, 1), pooled=True, attention={"dimensions": "TCS", "time_reduction": 1},
    num_classes=10, T=4,
)  # fmt: skip
