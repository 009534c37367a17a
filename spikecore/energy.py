"""What a network computes and what that costs: MACs, accumulates, firing rates, energy.

The model is that of the spiking literature: in 45 nm CMOS a 32-bit multiply-accumulate costs 4.6 pJ and an accumulate
0.9 pJ (Horowitz, "Computing's energy problem", ISSCC 2014). Memory traffic, which real chips pay most for, is left out.

Conventions:

- Counted are convolutions and linear layers. Normalisation folds into them, pooling and neurons are left out.
- A layer that reads spikes needs an accumulate only where its input is not zero: ``ACs = rate * MACs`` with the rate
  its input's share of non-zeros. Any other layer, such as the one that reads the image, pays all its MACs.
- Average-pooled spikes count as spikes: 0, 1/4, ..., 1 after a 2x2 pool. The factor 1/4 folds into the weights, and
  each non-zero is one accumulate, as if the spikes of one window arrived together.
- Numbers are per sample and summed over the time steps. A layer that reads the same analog input at each step, such as
  a repeated image, would be computed once: it is counted once.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spikecore.neurons import Neuron

__all__ = ["PJ_PER_AC", "PJ_PER_MAC", "EnergyReport", "LayerEnergy", "energy_pj", "estimate_energy"]

PJ_PER_MAC = 4.6
PJ_PER_AC = 0.9

_SYNAPSES = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def energy_pj(macs: float, acs: float) -> float:
    """Energy in pJ of so many multiply-accumulates and accumulates."""
    return PJ_PER_MAC * macs + PJ_PER_AC * acs


@dataclass(frozen=True)
class LayerEnergy:
    """One convolution or linear layer: `rate` is its input's share of non-zeros, `macs` or `acs` what it pays."""

    name: str
    layer: str
    rate: float
    macs: float
    acs: float

    @property
    def energy_pj(self) -> float:
        return energy_pj(self.macs, self.acs)


@dataclass(frozen=True)
class EnergyReport:
    """Layers in the order of first calls, per sample; `firing_rates`: neuron layer -> spikes per neuron and step."""

    layers: tuple[LayerEnergy, ...]
    firing_rates: dict[str, float]

    @property
    def macs(self) -> float:
        return sum(layer.macs for layer in self.layers)

    @property
    def acs(self) -> float:
        return sum(layer.acs for layer in self.layers)

    @property
    def energy_pj(self) -> float:
        return energy_pj(self.macs, self.acs)


@torch.no_grad()
def estimate_energy(model: nn.Module, data: Tensor | Iterable[Tensor]) -> EnergyReport:
    """Run `model` in evaluation mode and count (conventions in the module's docstring).

    Args:
        model: any module; its mode is restored.
        data: one batch ``[B, ...]`` as the model takes it, or several.

    Raises:
        ValueError: no data.
    """
    samples = 0
    counts: dict[str, _Count] = {}
    fired: dict[str, list[int]] = {}

    def watch_synapse(name: str):
        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            counts.setdefault(name, _Count()).add(module, args[0], out, batch=len(x))

        return hook

    def watch_neuron(name: str):
        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            seen = fired.setdefault(name, [0, 0])
            seen[0] += int(out.count_nonzero())
            seen[1] += out.numel()

        return hook

    modules = dict(model.named_modules())
    handles = [m.register_forward_hook(watch_synapse(n)) for n, m in modules.items() if isinstance(m, _SYNAPSES)]
    handles += [m.register_forward_hook(watch_neuron(n)) for n, m in modules.items() if isinstance(m, Neuron)]
    modes = {m: m.training for m in modules.values()}
    model.eval()
    try:
        for x in [data] if isinstance(data, Tensor) else data:
            model(x)
            samples += len(x)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    if not samples:
        raise ValueError("estimate_energy: data holds no sample")
    return EnergyReport(
        layers=tuple(count.row(name, modules[name], samples) for name, count in counts.items()),
        firing_rates={name: spikes / max(seen, 1) for name, (spikes, seen) in fired.items()},
    )


class _Count:
    """Running sums of one layer over calls and batches."""

    def __init__(self) -> None:
        self.macs, self.nonzeros, self.inputs, self.spiking = 0, 0, 0, True

    def add(self, module: nn.Module, x: Tensor, out: Tensor, batch: int) -> None:
        quarters = x * 4
        spiking = bool(((quarters == quarters.round()) & (x >= 0) & (x <= 1)).all())
        # One output of a convolution sums weight[0].numel() products (in_channels / groups * kernel), of a linear layer
        # in_features: the same expression. Padding is counted like any other input, as is usual.
        macs = out.numel() * module.weight[0].numel()  # type: ignore[index, union-attr, operator]
        if not spiking and len(x) > batch and len(x) % batch == 0:  # [T*B, ...]: are all steps the same?
            steps = x.unflatten(0, (-1, batch))
            if bool((steps == steps[:1]).all()):
                macs //= len(steps)
        self.macs += macs
        self.nonzeros += int(x.count_nonzero())
        self.inputs += x.numel()
        self.spiking &= spiking

    def row(self, name: str, module: nn.Module, samples: int) -> LayerEnergy:
        rate, macs = self.nonzeros / max(self.inputs, 1), self.macs / samples
        return LayerEnergy(name, type(module).__name__, rate, *((0.0, rate * macs) if self.spiking else (macs, 0.0)))
