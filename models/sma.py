"""Spiking multiscale attention (SMA), attention zone-out (AZO), the light SMA-L, and the SMA-VGG for event frames.

Paper: Shan et al., "Advancing Spiking Neural Networks towards Multiscale Spatiotemporal Interaction Learning" (SMA,
AZO), AAAI 2025, arXiv 2405.13672.
Origin: github.com/Ym-Shan/Spiking_Multiscale_Attention_Arxiv (no licence); written anew from the description, with its
state-dict keys.

Deviations: AZO follows the module's own mode (``.train()``, ``.eval()``), where the published code follows a global
flag; a step that is replaced takes the earlier step as it was before any replacement; a branch whose chosen steps are
all t = 0, which have no earlier one, is left as it is.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spikecore.models._base import Chain, Folded, SpikingModel, walk
from spikecore.models._registry import register_model
from spikecore.neurons import LIF

__all__ = ["SMA", "SMAVGG"]


class Branch(nn.Module):
    """One scale: a convolution of odd kernel size with batch norm, then LIF (or ReLU, the ResNets' form)."""

    def __init__(self, channels: int, kernel: int, spiking: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)
        self.bn = nn.BatchNorm2d(channels)
        self.lif = LIF() if spiking else nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:  # [T, B, C, H, W]
        return walk((self.conv, self.bn, self.lif), x)


class SMA(nn.Module):
    """Attention over branches of several kernel sizes, by channel and by time step.

    Args:
        channels: C. time: T, fixed by the attention over time.
        kernels: odd kernel sizes, one branch each.
        channel_reduction, time_reduction: how many times narrower the hidden layers of the attentions are.
        azo: in training, in each branch the ``channels // channel_drop`` channels of least attention are replaced at
            the ``time // time_drop`` steps of least attention by what they were one step before.
        spiking: branches end in LIF; False: in ReLU.
        light: SMA-L, channel attention from the mean over time.

    Shapes: ``[T, B, C, H, W] -> [T, B, C, H, W]``.

    Raises:
        ValueError: an even kernel size, a reduction that leaves no channel, a sequence of another length.
    """

    def __init__(
        self, channels: int, time: int, kernels: Sequence[int] = (1, 3, 5, 7), *, channel_reduction: int = 16,
        time_reduction: float = 4, azo: bool = False, channel_drop: int = 4, time_drop: int = 4, spiking: bool = True,
        light: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if not kernels or any(k % 2 == 0 for k in kernels):
            raise ValueError(f"SMA: kernels must be odd, got {list(kernels)}")
        if channels < channel_reduction or time < time_reduction:
            raise ValueError(
                f"SMA: {channels} channels and {time} steps are too few for reductions of {channel_reduction} and "
                f"{time_reduction}"
            )
        self.time, self.light, self.azo = time, light, azo
        self.dropped = time // time_drop, channels // channel_drop
        hidden, hidden_time = channels // channel_reduction, int(time // time_reduction)
        self.S_Convs = nn.ModuleList(Branch(channels, k, spiking) for k in kernels)
        # Published as 1x1 convolutions of single pixels.
        self.C_before_attention_conv = nn.Linear(channels, hidden)
        self.C_after_attention_convs = nn.ModuleList(nn.Linear(hidden, channels) for _ in kernels)
        self.T_before_attention_conv = nn.Linear(time, hidden_time)
        self.T_after_attention_convs = nn.ModuleList(nn.Linear(hidden_time, time) for _ in kernels)

    def forward(self, x: Tensor) -> Tensor:
        T = len(x)
        if self.time != T:
            raise ValueError(f"SMA: the attention over time was built for T = {self.time}, got {list(x.shape)}")
        branches = torch.stack([branch(x) for branch in self.S_Convs])  # [n, T, B, C, H, W]
        f = branches.sum(0).mean((3, 4))  # [T, B, C]
        hidden = self.C_before_attention_conv(f.mean(0, keepdim=True) if self.light else f).relu()
        by_channel = torch.stack([layer(hidden) for layer in self.C_after_attention_convs]).softmax(0)
        by_channel = by_channel.expand(-1, T, -1, -1)  # [n, T, B, C]
        hidden = self.T_before_attention_conv(f.mean(2).T).relu()  # [B, T / reduction]
        by_step = torch.stack([layer(hidden).T for layer in self.T_after_attention_convs]).softmax(0)  # [n, T, B]
        branches = (by_step[..., None] * by_channel)[..., None, None] * branches
        if self.azo and self.training:
            branches = self.zone_out(branches, by_step, by_channel)
        return branches.sum(0)

    def zone_out(self, branches: Tensor, by_step: Tensor, by_channel: Tensor) -> Tensor:
        """AZO: `by_step` ``[n, T, B]`` and `by_channel` ``[n, T, B, C]`` choose what is taken from one step before."""
        steps, channels = self.dropped
        n, T = branches.shape[:2]
        replaced = torch.zeros(n, T, branches.shape[3], dtype=torch.bool, device=branches.device)
        for i in range(n):
            least = by_step[i].sum(1).topk(steps, largest=False).indices
            chosen = by_channel[i, least].sum((0, 1)).topk(channels, largest=False).indices
            replaced[i, least[:, None], chosen] = True
        replaced[:, 0] = False
        before = torch.cat([branches[:, :1], branches[:, :-1]], 1)
        return torch.where(replaced[:, :, None, :, None, None], before, branches)


class SMAVGG(SpikingModel):
    """VGG8 with SMA in its second and third block, for event frames.

    Args:
        T: time steps, fixed by SMA.
        widths: channels of the five blocks.
        hidden: widths of the two spiking linear layers.
        time_reduction, azo, channel_drop, time_drop: see `SMA`.
        dropout: after each spiking linear layer.
        linear_gain: how many times as wide as PyTorch's the first weights of the spiking linear layers are: narrow
            ones get so few spikes that at 1, as published, they are silent for hundreds of updates.
        in_chans, num_classes, and shapes: see `SpikingModel`.
    """

    classifier_name = "others.8"
    stages = ("block1", "block2", "block3", "block4", "block5")

    def __init__(
        self, T: int = 16, *, widths: Sequence[int] = (64, 128, 256, 512, 512), hidden: Sequence[int] = (2048, 1024),
        channel_reduction: int = 4, time_reduction: float = 4, azo: bool = False, channel_drop: int = 10,
        time_drop: int = 4, dropout: float = 0.5, linear_gain: float = 1.0, in_chans: int = 2, num_classes: int = 11,
    ) -> None:  # fmt: skip
        super().__init__(T, in_chans, num_classes)
        channels = in_chans
        for i, width in enumerate(widths):
            block = Chain(Folded(nn.Conv2d(channels, width, 3, padding=1)))
            if i in (1, 2):
                block.append(
                    SMA(width, T, channel_reduction=channel_reduction, time_reduction=time_reduction, azo=azo,
                        channel_drop=channel_drop, time_drop=time_drop)
                )  # fmt: skip
            block.extend([Folded(nn.BatchNorm2d(width)), LIF(), Folded(nn.MaxPool2d(2))])
            setattr(self, self.stages[i], block)
            channels = width
        self.others = nn.Sequential(
            Folded(nn.AdaptiveAvgPool2d(3)), nn.Flatten(2),
            nn.Linear(channels * 9, hidden[0]), LIF(), nn.Dropout(dropout),
            nn.Linear(hidden[0], hidden[1]), LIF(), nn.Dropout(dropout),
            nn.Linear(hidden[1], num_classes) if num_classes else nn.Identity(),
        )  # fmt: skip
        with torch.no_grad():
            for layer in (self.others[2], self.others[5]):
                layer.weight.mul_(linear_gain)  # type: ignore[operator]
        self.num_features = hidden[1]

    def sequence_features(self, x: Tensor) -> Tensor:
        if min(x.shape[-2:]) < 32:
            raise ValueError(f"SMAVGG: frames must be at least 32 x 32 (five pools), got {list(x.shape[-2:])}")
        for stage in self.stages:
            x = getattr(self, stage)(x)
        return x

    def steps(self, x: Tensor) -> Tensor:
        return self.others(self.forward_features(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return (self.others[:-1] if pre_logits else self.others)(x).mean(0)


def checkpoint_filter(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Other containers (one file's block 1, the ResNets' batch norms); 1x1 convolutions as linear layers."""
    state = {k.replace("block1.0.1.", "block1.1.0.").replace(".bn.bn.", ".bn."): v for k, v in state.items()}
    return {k: v.flatten(1) if "_attention_conv" in k and v.dim() > 1 else v for k, v in state.items()}


@register_model(checkpoint_filter=checkpoint_filter)
def sma_vgg8(**kwargs: Any) -> SMAVGG:
    """As for DVS128 Gesture; CIFAR10-DVS: ``T=10, channel_drop=4``; N-Caltech101: ``T=14, channel_drop=24``."""
    return SMAVGG(**kwargs)


@register_model(checkpoint_filter=checkpoint_filter)
def sma_vgg8_test(**kwargs: Any) -> SMAVGG:
    """Not of the paper: narrow, for tests and short runs."""
    return SMAVGG(**{"T": 8, "widths": (16, 32, 48, 64, 64), "hidden": (128, 64), "num_classes": 10, **kwargs})
