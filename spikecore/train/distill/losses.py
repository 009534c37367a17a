"""What a student is asked to share with its teacher, as modules: by feature maps, or by logits.

A map is ``[B, C, h, w]``, a vector ``[B, C]`` a map of one pixel. Of two maps the finer one is averaged down to the
grid of the other. Learnable layers, where a loss has them, match the student's width to the teacher's.

Papers: Xu et al., "BKDSNN: Enhancing the Performance of Learning-based Spiking Neural Networks Training with Blurred
Knowledge Distillation", ECCV 2024 (`Blurred`; `KDSNN` and `LaSNN` as its ablation has them, without terms of logits);
Zhou et al., "Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance Tradeoff Perspective", ICLR 2021
(`WSLD`); Xu et al., "Constructing Deep Spiking Neural Networks from Artificial Neural Networks with Knowledge
Distillation", CVPR 2023 (`KDSNN`); Hong et al., "LaSNN", 2023 (`LaSNN`).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["WSLD", "Blurred", "KDSNN", "LaSNN"]


class Blurred(nn.Module):
    """The teacher's map is regenerated from the student's with some channels taken away (BRD).

    ``alpha sum (G - F)^2 / B`` with ``G = conv(relu(conv(m S)))``, 3x3 convolutions; S the student's map, through a 1x1
    convolution where its width is another; ``m`` 0 with probability `mask`, else 1, drawn per sample and channel; F the
    teacher's map.

    Args:
        student, teacher: widths C and D of the maps.
        alpha: weight.
        mask: the paper's lambda, the share of channels taken away.
        clip: scale F so that its largest value is that of S.
        published_quirks: as the published training on CIFAR10-DVS called it: the teacher's map is masked and
            regenerated, the student's is the target; and channels are taken away in evaluation too.

    Shapes: ``[B, C, h, w]``, ``[B, D, h, w]`` or ``[B, D]`` -> a scalar.
    """

    def __init__(
        self, student: int, teacher: int, *, alpha: float = 2e-3, mask: float = 0.15, clip: bool = False,
        published_quirks: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if not 0 <= mask < 1:
            raise ValueError(f"Blurred: mask must be in [0, 1), got {mask}")
        self.alpha, self.mask, self.clip, self.published_quirks = alpha, mask, clip, published_quirks
        source, target = (teacher, student) if published_quirks else (student, teacher)
        self.align = _align(source, target)
        self.generation = nn.Sequential(
            nn.Conv2d(target, target, 3, padding=1), nn.ReLU(), nn.Conv2d(target, target, 3, padding=1)
        )

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        source, target = (teacher, student) if self.published_quirks else (student, teacher)
        source, target = self.align(_map(source)), _map(target)
        if self.clip:
            tiny = torch.finfo(target.dtype).tiny
            target = target / target.max().clamp(min=tiny) * source.max()
        if self.training or self.published_quirks:
            draws = torch.rand((*source.shape[:2], 1, 1), device=source.device)
            source = source * (draws >= self.mask)
        return self.alpha * _distance(self.generation(source), target)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha:g}, mask={self.mask:g}, clip={self.clip}"


class WSLD(nn.Module):
    """Weighted soft labels: the teacher's distribution counts where the student is worse than the teacher.

    ``weight temperature^2 mean(w CE(softmax(t / temperature), s / temperature))`` over samples, with
    ``w = 1 - exp(-CE(y, s) / CE(y, t))``, through which no gradient goes.

    Shapes: logits s ``[B, K]`` of the student and t of the teacher; targets y ``[B]`` (classes) or ``[B, K]``
    (probabilities) -> a scalar.
    """

    def __init__(self, *, temperature: float = 2.0, weight: float = 1.0) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"WSLD: temperature must be above 0, got {temperature}")
        self.temperature, self.weight = temperature, weight

    def forward(self, student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
        student, teacher = student.float(), teacher.float()
        with torch.no_grad():
            ours = F.cross_entropy(student, targets, reduction="none")
            theirs = F.cross_entropy(teacher, targets, reduction="none")
            w = 1 - torch.exp(-ours / (theirs + 1e-7))
        soft = F.softmax(teacher / self.temperature, 1)
        loss = F.cross_entropy(student / self.temperature, soft, reduction="none")
        return self.weight * self.temperature**2 * (w * loss).mean()

    def extra_repr(self) -> str:
        return f"temperature={self.temperature:g}, weight={self.weight:g}"


class KDSNN(nn.Module):
    """``alpha sum (S - F)^2 / B``; S goes through a 1x1 convolution where its width is another.

    Shapes: student ``[B, C, h, w]``, teacher ``[B, D, h, w]`` or ``[B, D]`` -> a scalar.
    """

    def __init__(self, student: int, teacher: int, *, alpha: float = 2e-3) -> None:
        super().__init__()
        self.alpha, self.align = alpha, _align(student, teacher)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return self.alpha * _distance(self.align(_map(student)), _map(teacher))

    def extra_repr(self) -> str:
        return f"alpha={self.alpha:g}"


class LaSNN(nn.Module):
    """The sum of `KDSNN` over several layers.

    Args:
        student, teacher: widths, layer by layer.
        published_quirks: the convolutions that match widths stay as they were drawn (the published ones are kept in a
            plain list, where no optimiser finds them).
    """

    def __init__(
        self, student: Sequence[int], teacher: Sequence[int], *, alpha: float = 2e-3, published_quirks: bool = False
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(KDSNN(s, t, alpha=alpha) for s, t in zip(student, teacher, strict=True))
        self.layers.requires_grad_(not published_quirks)

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        losses = [layer(s, t) for layer, s, t in zip(self.layers, student, teacher, strict=True)]
        return torch.stack(losses).sum()


def _align(source: int, target: int) -> nn.Module:
    return nn.Identity() if source == target else nn.Conv2d(source, target, 1)


def _map(x: Tensor) -> Tensor:
    return x[:, :, None, None] if x.dim() == 2 else x


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """Sum of squares over the batch's size, in float32, on the coarser of the two grids."""
    (h, w), (H, W) = a.shape[2:], b.shape[2:]
    if h >= H and w >= W:
        a = F.adaptive_avg_pool2d(a, (H, W))
    elif h <= H and w <= W:
        b = F.adaptive_avg_pool2d(b, (h, w))
    else:
        raise ValueError(f"distill: maps of {h}x{w} and {H}x{W} pixels cannot be aligned: neither grid is the coarser")
    return (a.float() - b.float()).square().sum() / len(a)
