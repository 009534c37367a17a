"""SEW-ResNet and Spiking ResNet for images, and the nets for event frames of the same paper.

Paper: Fang et al., "Deep Residual Learning in Spiking Neural Networks", NeurIPS 2021.
Origin: the copies in github.com/Intelligent-Computing-Research-Group/BKDSNN (MPL-2.0); written anew, with their
state-dict keys (with and without the ``.module`` of old SpikingJelly releases).

Deviations: residual sums are out of place; the event nets' head is built for the image size it is told.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from spikecore.models._base import Chain, Folded, SpikingModel, fire
from spikecore.models._registry import register_model
from spikecore.neurons import IF, PLIF

__all__ = ["SEWDVS", "SEWResNet"]

CONNECT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # of a block's spikes s with its shortcut i
    "ADD": lambda s, i: s + i,
    "AND": lambda s, i: s * i,
    "IAND": lambda s, i: i * (1 - s),
}


def conv_bn(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> Folded:
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False)
    return Folded(conv, nn.BatchNorm2d(out_channels))


class Block(nn.Module):
    """Basic (two 3x3 convolutions) or bottleneck (1x1, 3x3, 1x1) block.

    SEW: ``connect(IF(BN(conv)), IF(BN(conv(x))) or x)``; `connect` None, Spiking ResNet: ``IF(BN(conv) + shortcut)``.
    """

    def __init__(self, in_channels: int, width: int, stride: int, connect: str | None, bottleneck: bool) -> None:
        super().__init__()
        out_channels = width * (4 if bottleneck else 1)
        plan = (
            [(1, width, 1), (3, width, stride), (1, out_channels, 1)]
            if bottleneck
            else [(3, width, stride), (3, width, 1)]
        )
        channels = in_channels
        for n, (kernel, to, step) in enumerate(plan, 1):
            setattr(self, f"conv{n}", conv_bn(channels, to, kernel, step))
            setattr(self, f"sn{n}", IF())
            channels = to
        self.depth, self.connect = len(plan), connect
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            shortcut = conv_bn(in_channels, out_channels, 1, stride)
            self.downsample = Chain(shortcut, IF()) if connect else shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for n in range(1, self.depth):
            y = fire(y, getattr(self, f"conv{n}"), getattr(self, f"sn{n}"))
        last = getattr(self, f"conv{self.depth}"), getattr(self, f"sn{self.depth}")
        shortcut = x if self.downsample is None else self.downsample(x)
        return CONNECT[self.connect](fire(y, *last), shortcut) if self.connect else fire(y, *last, shortcut)


class SEWResNet(SpikingModel):
    """Spike-element-wise ResNet; with ``connect=None`` the Spiking ResNet it is compared with.

    An image's stem convolution is computed once; its current then enters the first neuron at each of the T steps.

    Args:
        layers: blocks of the four stages.
        connect: "ADD", "AND", "IAND", or None (Spiking ResNet).
        bottleneck: 1x1-3x3-1x1 blocks, four times as wide.
        zero_init_residual: the last batch norm of each block starts at weight 0 (and with AND at bias 1), so that
            every block starts as identity.
        T, in_chans, num_classes, and shapes: see `SpikingModel`.
    """

    classifier_name = "fc"

    def __init__(
        self, layers: Sequence[int], *, connect: str | None = "ADD", bottleneck: bool = False,
        zero_init_residual: bool = False, T: int = 4, in_chans: int = 3, num_classes: int = 1000,
    ) -> None:  # fmt: skip
        super().__init__(T, in_chans, num_classes)
        if connect is not None and connect not in CONNECT:
            raise ValueError(f"SEWResNet: connect must be ADD, AND, IAND or None, got {connect!r}")
        self.conv1 = nn.Conv2d(in_chans, 64, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.sn1 = IF()
        self.maxpool = Folded(nn.MaxPool2d(3, 2, padding=1))
        self.stages = tuple(f"layer{stage + 1}" for stage in range(len(layers)))
        channels = 64
        for stage, blocks in enumerate(layers):
            sequence = nn.Sequential()
            for i in range(blocks):
                stride = 2 if stage > 0 and i == 0 else 1
                sequence.append(Block(channels, 64 << stage, stride, connect, bottleneck))
                channels = (64 << stage) * (4 if bottleneck else 1)
            setattr(self, self.stages[stage], sequence)
        self.num_features = channels
        self.fc = nn.Linear(channels, num_classes) if num_classes else nn.Identity()
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            elif zero_init_residual and isinstance(m, Block):
                norm = getattr(m, f"conv{m.depth}")[1]
                nn.init.zeros_(norm.weight)
                if connect == "AND":
                    nn.init.ones_(norm.bias)

    def sequence_features(self, x: Tensor) -> Tensor:
        x = self.maxpool(fire(x, (self.conv1, self.bn1), self.sn1))
        for stage in self.stages:
            x = getattr(self, stage)(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = x.mean((3, 4)).mean(0)
        return x if pre_logits else self.fc(x)


class EventBlock(nn.Module):
    """Two 3x3 convolutions by way of `mid` channels: "sew" joins them with the input, "plain" does not, "basic" adds it
    before the last neuron."""

    def __init__(self, channels: int, mid: int, kind: str, connect: str | None) -> None:
        super().__init__()
        first, second = conv_bn(channels, mid, 3), conv_bn(mid, channels, 3)
        self.kind, self.connect = kind, connect
        if kind == "basic":
            self.conv = nn.Sequential(Chain(first, PLIF()), second)
            self.sn = PLIF()
        else:
            self.conv = nn.Sequential(Chain(first, PLIF()), Chain(second, PLIF()))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "basic":
            second: Any = self.conv[1]
            return fire(self.conv[0](x), second, self.sn, x)
        y = self.conv(x)
        return y if self.kind == "plain" else CONNECT[self.connect or "ADD"](y, x)


class SEWDVS(SpikingModel):
    """The paper's nets for event frames: stages of [1x1 convolution,] blocks, max pool; then one linear layer.

    Args:
        stages: one dictionary each: ``channels``, ``mid_channels``, ``num_blocks``, ``block_type`` ("sew", "plain",
            "basic"), ``k_pool``, ``up_kernel_size`` (1 or 3: the convolution where the width changes).
        connect: "ADD", "AND" or "IAND" for SEW blocks.
        img_size: height = width of the frames, or both.
        T, in_chans, num_classes, and shapes: see `SpikingModel`.
    """

    classifier_name = "out"

    def __init__(
        self, stages: Sequence[dict[str, Any]], *, connect: str | None = "ADD", img_size: int | tuple[int, int] = 128,
        T: int | None = None, in_chans: int = 2, num_classes: int = 10,
    ) -> None:  # fmt: skip
        super().__init__(T, in_chans, num_classes)
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.conv = nn.Sequential()
        channels, ends = in_chans, []
        for stage in stages:
            if channels != stage["channels"]:
                up = conv_bn(channels, stage["channels"], stage["up_kernel_size"])
                self.conv.append(Chain(up, PLIF()))
                channels = stage["channels"]
            for _ in range(stage["num_blocks"]):
                self.conv.append(EventBlock(channels, stage["mid_channels"], stage["block_type"], connect))
            self.conv.append(Folded(nn.MaxPool2d(stage["k_pool"])))
            ends.append(f"conv.{len(self.conv) - 1}")
            height, width = height // stage["k_pool"], width // stage["k_pool"]
        if not height or not width:
            raise ValueError(f"SEWDVS: img_size {img_size} is too small for the {len(ends)} pools")
        self.stages = tuple(ends)
        self.num_features = channels * height * width
        self.out = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def sequence_features(self, x: Tensor) -> Tensor:
        return self.conv(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = x.flatten(2)
        if x.shape[2] != self.num_features:
            raise ValueError(
                f"SEWDVS: the head was built for {self.num_features} features, the frames give {x.shape[2]}"
            )
        x = x.mean(0)
        return x if pre_logits else self.out(x)


def checkpoint_filter(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Keys of old SpikingJelly releases (``conv1.module.0.weight``), time constants of shape [1]."""
    state = {k.replace(".module.", "."): v for k, v in state.items()}
    return {k: v.reshape(()) if k.endswith(".w") else v for k, v in state.items()}


DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def _variant(name: str, **settings: Any) -> None:
    def build(**kwargs: Any) -> SEWResNet:
        return SEWResNet(**{**settings, **kwargs})

    register_model(build, name=name, checkpoint_filter=checkpoint_filter)


for depth, layers in DEPTHS.items():
    _variant(f"sew_resnet{depth}", layers=layers, bottleneck=depth >= 50)
    _variant(f"spiking_resnet{depth}", layers=layers, bottleneck=depth >= 50, connect=None)
_variant("sew_resnet_test", layers=(1, 1), num_classes=10)  # not of the paper: for tests


def _stages(widths: Sequence[int], kind: str) -> list[dict[str, Any]]:
    common = {"up_kernel_size": 1, "num_blocks": 1, "block_type": kind, "k_pool": 2}
    return [{"channels": c, "mid_channels": c, **common} for c in widths]


@register_model(checkpoint_filter=checkpoint_filter)
def sew_dvs_wide(kind: str = "sew", **kwargs: Any) -> SEWDVS:
    """The paper's net for CIFAR10-DVS: widths 64 (four stages) and 128 (three)."""
    return SEWDVS(_stages([64] * 4 + [128] * 3, kind), **kwargs)


@register_model(checkpoint_filter=checkpoint_filter)
def sew_dvs_7b(kind: str = "sew", **kwargs: Any) -> SEWDVS:
    """The paper's net for DVS128 Gesture: seven stages of width 32; `kind`: "sew", "plain" or "basic"."""
    return SEWDVS(_stages([32] * 7, kind), **{"num_classes": 11, **kwargs})
