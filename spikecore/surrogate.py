"""Surrogate gradients: what replaces the derivative of the spike function in backward.

Each object holds one family's parameters. With ``u = h - v_threshold`` it gives the derivative that the kernels use
(``derivative``) and the smooth function of which it is the derivative (``primitive``, for gradient checks and plots).
The C++, CUDA and Triton kernels know every class of this file; any other callable ``u -> ds/du`` may be passed as a
surrogate too and runs through the reference (see `spikecore.ops.lif`).
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

__all__ = ["ATan", "Erf", "FastSigmoid", "LeakyReLU", "Rectangle", "Sigmoid", "Surrogate", "Triangle"]


@dataclass(frozen=True)
class Surrogate:
    """Base of the surrogates the kernels know. `kind` is the number csrc/core/surrogate.h gives the family."""

    kind: ClassVar[int] = -1
    # The (at most two) numbers of the formula, padded with 0.
    parameters: tuple[float, float] = field(init=False, repr=False, compare=False, default=(0.0, 0.0))

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not math.isfinite(value) or (value <= 0 and name != "leak"):
                raise ValueError(f"{type(self).__name__}: {name} must be a positive finite number, got {value}")
        a, b, *_ = (*map(float, vars(self).values()), 0.0, 0.0)
        object.__setattr__(self, "parameters", (a, b))  # once: torch.compile of older releases cannot trace astuple

    def derivative(self, u: Tensor) -> Tensor:
        raise NotImplementedError

    def primitive(self, u: Tensor) -> Tensor:
        raise NotImplementedError

    def __call__(self, u: Tensor) -> Tensor:
        return self.derivative(u)


@dataclass(frozen=True)
class ATan(Surrogate):
    """(alpha / 2) / (1 + (pi alpha u / 2)^2)   (Fang et al. 2021, PLIF)"""

    alpha: float = 2.0
    kind: ClassVar[int] = 0

    def derivative(self, u: Tensor) -> Tensor:
        return (self.alpha / 2) / (1 + (math.pi / 2 * self.alpha * u) ** 2)

    def primitive(self, u: Tensor) -> Tensor:
        return torch.atan(math.pi / 2 * self.alpha * u) / math.pi + 0.5


@dataclass(frozen=True)
class Sigmoid(Surrogate):
    """alpha s (1 - s), s = sigmoid(alpha u); computed as written, so it underflows to 0 as the published codes do"""

    alpha: float = 4.0
    kind: ClassVar[int] = 1

    def derivative(self, u: Tensor) -> Tensor:
        s = torch.sigmoid(self.alpha * u)
        return self.alpha * s * (1 - s)

    def primitive(self, u: Tensor) -> Tensor:
        return torch.sigmoid(self.alpha * u)


@dataclass(frozen=True)
class Rectangle(Surrogate):
    """1 / width where abs(u) < width / 2, else 0   (Wu et al. 2018, STBP)"""

    width: float = 1.0
    kind: ClassVar[int] = 2

    def derivative(self, u: Tensor) -> Tensor:
        return (u.abs() < self.width / 2).to(u.dtype) / self.width

    def primitive(self, u: Tensor) -> Tensor:
        return (u / self.width + 0.5).clamp(0, 1)


@dataclass(frozen=True)
class Triangle(Surrogate):
    """max(0, 1 - abs(u) / width) / width   (Esser et al. 2016; SpikingJelly's PiecewiseQuadratic(1 / width))"""

    width: float = 1.0
    kind: ClassVar[int] = 3

    def derivative(self, u: Tensor) -> Tensor:
        return (1 - u.abs() / self.width).clamp(min=0) / self.width

    def primitive(self, u: Tensor) -> Tensor:
        r = (u / self.width).clamp(-1, 1)
        return 0.5 + r - r.abs() * r / 2


@dataclass(frozen=True)
class FastSigmoid(Surrogate):
    """1 / (1 + slope abs(u))^2   (Zenke & Ganguli 2018, SuperSpike)"""

    slope: float = 25.0
    kind: ClassVar[int] = 4

    def derivative(self, u: Tensor) -> Tensor:
        return 1 / (1 + self.slope * u.abs()) ** 2

    def primitive(self, u: Tensor) -> Tensor:
        return u / (1 + self.slope * u.abs())


@dataclass(frozen=True)
class Erf(Surrogate):
    """alpha / sqrt(pi) exp(-(alpha u)^2)   (SpikingJelly's Erf)"""

    alpha: float = 2.0
    kind: ClassVar[int] = 5

    def derivative(self, u: Tensor) -> Tensor:
        return self.alpha / math.sqrt(math.pi) * torch.exp(-((self.alpha * u) ** 2))

    def primitive(self, u: Tensor) -> Tensor:
        return 0.5 * (1 + torch.erf(self.alpha * u))


@dataclass(frozen=True)
class LeakyReLU(Surrogate):
    """k where u >= 0, else leak   (SpikingJelly's LeakyKReLU)"""

    k: float = 1.0
    leak: float = 0.1
    kind: ClassVar[int] = 6

    def derivative(self, u: Tensor) -> Tensor:
        return torch.where(u >= 0, self.k, self.leak).to(u.dtype)

    def primitive(self, u: Tensor) -> Tensor:
        return torch.where(u >= 0, self.k * u, self.leak * u)
