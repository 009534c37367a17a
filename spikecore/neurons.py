"""Spiking neurons as modules over whole sequences ``[T, ...]``.

They keep no state: one call takes the sequence and returns its spikes, ``step`` takes one time step with the potential
``v`` of the last one and returns the new. So nothing is ever to be reset, and no state is in ``state_dict``.

| neuron | decay | gain | source |
|---|---|---|---|
| `IF` | 1 | 1 | |
| `LIF(decay_input=True)` | 1 - 1/tau | 1/tau | SpikingJelly's default |
| `LIF(decay_input=False)` | 1 - 1/tau | 1 | |
| `PLIF`, k = sigmoid(w) | 1 - k | k, or 1 | Fang et al. 2021 |
| `Leaky(beta)` | beta | 1 | snnTorch: fires above the threshold, its `mem` is our h |
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from spikecore.ops import bn_lif, lif
from spikecore.ops.lif import check_reset
from spikecore.surrogate import ATan

__all__ = ["IF", "LIF", "PLIF", "Leaky"]


class Neuron(nn.Module):
    """Base: `decay` and `gain` of `spikecore.ops.lif` come from the subclass, the other arguments are its own.

    Shapes: ``[T, ...] -> [T, ...]`` in the dtype of the input.

    Raises:
        ValueError: threshold below the resting potential, or another constant that makes no neuron.
    """

    def __init__(
        self,
        *,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        reset_by: float | None = None,
        strict: bool = False,
        detach_reset: bool = True,
        surrogate: Callable[[Tensor], Tensor] = ATan(2.0),
        channel_dim: int = 2,
    ) -> None:
        super().__init__()
        check_reset(type(self).__name__, v_threshold, v_reset, reset_by)
        self.v_threshold, self.v_reset, self.reset_by = v_threshold, v_reset, reset_by
        self.strict, self.detach_reset, self.surrogate, self.channel_dim = strict, detach_reset, surrogate, channel_dim

    def decay_and_gain(self) -> tuple[float | Tensor, float | Tensor]:
        raise NotImplementedError

    def run(
        self, x: Tensor, v_init: Tensor | None = None, *, return_h: bool = False, return_v: bool = False
    ) -> tuple[Tensor, ...]:
        """The sequence ``[T, ...]`` from `v_init`, as `spikecore.ops.lif` returns it: ``(s, v_last[, h][, v])``."""
        return lif(x, v_init=v_init, return_h=return_h, return_v=return_v, **self.constants())

    def constants(self) -> dict[str, Any]:
        """Arguments of the operators."""
        decay, gain = self.decay_and_gain()
        names = "v_threshold", "v_reset", "reset_by", "strict", "detach_reset", "surrogate", "channel_dim"
        return {"decay": decay, "gain": gain, **{name: getattr(self, name) for name in names}}

    def forward(self, x: Tensor, norm: nn.BatchNorm2d | None = None, residual: Tensor | None = None) -> Tensor:
        """Spikes of x; with `norm`, of ``norm(x) + residual`` (batch norm over all but `channel_dim`), in one operator
        (`spikecore.ops.bn_lif`) and without calling the module `norm`."""
        if norm is None:
            return self.run(x if residual is None else x + residual)[0]
        momentum: float | Tensor = norm.momentum or 0.0
        if norm.training and norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
            if norm.momentum is None:  # means over all batches
                momentum = 1 / norm.num_batches_tracked
        spikes = bn_lif(
            x, norm.weight, norm.bias, norm.running_mean, norm.running_var,
            None if residual is None else residual.to(x.dtype), training=norm.training, momentum=momentum, eps=norm.eps,
            **self.constants(),
        )  # fmt: skip
        assert isinstance(spikes, Tensor)
        return spikes

    def step(self, x_t: Tensor, v: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One time step ``[...]`` from potential `v` (None: at rest); returns ``(s, v)``, for streaming."""
        s, v = self.run(x_t.unsqueeze(0), v)
        return s.squeeze(0), v

    def extra_repr(self) -> str:
        soft = self.v_threshold if self.reset_by is None else self.reset_by
        reset = f"reset_by={soft}" if self.v_reset is None else f"v_reset={self.v_reset}"
        return f"v_threshold={self.v_threshold}, {reset}, surrogate={self.surrogate}"


class IF(Neuron):
    """Integrate-and-fire: ``h = v + x``."""

    def decay_and_gain(self) -> tuple[float, float]:
        return 1.0, 1.0


class LIF(Neuron):
    """Leaky integrate-and-fire: ``h = v + (x - (v - v_rest)) / tau``; ``decay_input=False``: ``+ x`` undivided.

    Args:
        tau: membrane time constant in steps, >= 1.
    """

    def __init__(self, tau: float = 2.0, *, decay_input: bool = True, **kwargs) -> None:
        super().__init__(**kwargs)
        if not 1 <= tau < math.inf:
            raise ValueError(f"LIF: tau must be a finite number of steps >= 1, got {tau}")
        self.tau, self.decay_input = tau, decay_input

    def decay_and_gain(self) -> tuple[float, float]:
        return 1 - 1 / self.tau, 1 / self.tau if self.decay_input else 1.0

    def extra_repr(self) -> str:
        return f"tau={self.tau}, decay_input={self.decay_input}, {super().extra_repr()}"


class PLIF(Neuron):
    """LIF with a learnable time constant, ``1 / tau = sigmoid(w)`` (Fang et al. 2021, eq. 9).

    Args:
        tau: initial time constant in steps, > 1.
        channels: None for one ``w`` (0-d), or the number of channels, each with its own (dimension `channel_dim`).
    """

    def __init__(self, tau: float = 2.0, *, decay_input: bool = True, channels: int | None = None, **kwargs) -> None:
        super().__init__(**kwargs)
        if not 1 < tau < math.inf:
            raise ValueError(f"PLIF: tau must be a finite number of steps > 1, got {tau}")
        w = -math.log(tau - 1)
        self.w = nn.Parameter(torch.tensor(w) if channels is None else torch.full((channels,), w))
        self.decay_input = decay_input

    def decay_and_gain(self) -> tuple[Tensor, float | Tensor]:
        k = self.w.sigmoid()
        return 1 - k, k if self.decay_input else 1.0


class Leaky(Neuron):
    """snnTorch's Leaky: ``h = beta * v + x``, fires strictly above the threshold.

    snnTorch resets one step later, so that its soft reset is not decayed: ``reset_by = v_threshold / beta`` here.

    Args:
        beta: decay per step, in (0, 1] with reset "subtract", [0, 1] with "zero".
        reset: "subtract" (soft) or "zero" (hard).
    """

    def __init__(self, beta: float = 0.9, *, reset: str = "subtract", v_threshold: float = 1.0, **kwargs) -> None:
        if reset not in ("subtract", "zero"):
            raise ValueError(f'Leaky: reset must be "subtract" or "zero", got {reset!r}')
        if not 0 <= beta <= 1 or (beta == 0 and reset == "subtract"):
            raise ValueError(f"Leaky: beta must be in (0, 1], got {beta}")
        soft = reset == "subtract"
        super().__init__(
            v_threshold=v_threshold, v_reset=None if soft else 0.0, reset_by=v_threshold / beta if soft else None,
            strict=True, **kwargs,
        )  # fmt: skip
        self.beta = beta

    def decay_and_gain(self) -> tuple[float, float]:
        return self.beta, 1.0

    def extra_repr(self) -> str:
        return f"beta={self.beta}, {super().extra_repr()}"
