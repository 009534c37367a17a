"""Multi-dimensional attention (MA) over time steps, channels and places; the ResNets with it are in `ms_resnet`.

Paper: Yao et al., "Attention Spiking Neural Networks", TPAMI 2023 (arXiv 2209.13929).
Origin: github.com/BICLab/Attention-SNN (MIT); written anew from the description, its checkpoints load.

Deviations: none in value; where several places share the largest value, its gradient is shared among them.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["MA"]


class MA(nn.Module):
    """Attention that scales currents by time step (T), then channel (C), then place (S), and ends in a ReLU.

    T and C: ``sigmoid(W_2 relu(W_1 mean) + W_2 relu(W_1 max))`` of the means and maxima over all other dimensions; S:
    ``sigmoid(conv3x3([mean, max]))`` over time and channels, one map for all of both.

    Args:
        dimensions: which of them, such as "TCS".
        channels: C. time: T, fixed by the attention over time, and needed for it alone.
        channel_reduction, time_reduction: how many times narrower the hidden layers are.

    Shapes: ``[T, B, C, H, W] -> [T, B, C, H, W]``.

    Raises:
        ValueError: dimensions not of "TCS" in order, a reduction that leaves nothing, a sequence of another length.
    """

    ta: nn.Module
    ca: nn.Module

    def __init__(
        self, dimensions: str, channels: int, time: int = 0, *, channel_reduction: int = 16, time_reduction: int = 4
    ) -> None:
        super().__init__()
        if not dimensions or dimensions != "".join(d for d in "TCS" if d in dimensions):
            raise ValueError(f"MA: dimensions must be one or more of TCS, in this order, got {dimensions!r}")
        self.dimensions, self.time = dimensions, time
        for name, width, reduction in (("ta", time, time_reduction), ("ca", channels, channel_reduction)):
            if name[0].upper() in dimensions:
                if width < reduction:
                    raise ValueError(f"MA: a width of {width} is too small for a reduction of {reduction} in {name}")
                hidden = width // reduction  # published as 1x1 convolutions of single pixels
                shared = nn.Sequential(nn.Linear(width, hidden, bias=False), nn.ReLU(),
                                       nn.Linear(hidden, width, bias=False))  # fmt: skip
                self.add_module(name, shared)
        if "S" in dimensions:
            self.sa = nn.Conv2d(2, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if "T" in self.dimensions:
            if len(x) != self.time:
                raise ValueError(f"MA: the attention over time was built for T = {self.time}, got {list(x.shape)}")
            x = x * gate(lambda pooled: self.ta(pooled.T).T, x, (2, 3, 4))[:, :, None, None, None]
        if "C" in self.dimensions:
            x = x * gate(self.ca, x, (0, 3, 4))[:, :, None, None]
        if "S" in self.dimensions:
            pooled = torch.stack([x.mean((0, 2)), x.amax((0, 2))], 1)
            x = x * self.sa(pooled).sigmoid()
        return x.relu()


def gate(shared: Callable[[Tensor], Tensor], x: Tensor, over: tuple[int, ...]) -> Tensor:
    return (shared(x.mean(over)) + shared(x.amax(over))).sigmoid()


def checkpoint_filter(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Published: one more container around each part, 1x1 convolutions of single pixels."""
    kept = {}
    for k, v in state.items():
        attention = "sharedMLP" in k or k.endswith("sa.conv.weight")
        name = k.replace(".attention.", ".").replace(".sharedMLP.", ".").replace("sa.conv.", "sa.") if attention else k
        kept[name] = v.flatten(1) if ".sharedMLP." in k else v
    return kept
