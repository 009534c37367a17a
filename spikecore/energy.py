"""What a network computes and what that costs: MACs, accumulates, firing rates, energy.

The model is that of the spiking literature, over layers l and summed over the time steps::

    E = e_MAC * sum of MAC_l (layers that read numbers) + e_AC * sum of rate_l * MAC_l (layers that read spikes)

with, in 45 nm CMOS, e_MAC = 4.6 pJ for a 32-bit multiply-accumulate and e_AC = 0.9 pJ for an accumulate (Horowitz,
"Computing's energy problem", ISSCC 2014). Memory traffic, which real chips pay most for, is left out.

Conventions:

- Counted are convolutions and linear layers, MAC_l the products they sum (biases not), and what fused attentions do
  between them. Normalisation folds into them; pools, neurons, masks and selective scans are left out.
- A layer that reads spikes needs an accumulate only where its input is not zero: ``ACs = rate * MACs`` with the rate
  its input's share of non-zeros. Any other layer, such as the one that reads the image, pays all its MACs.
- Sums of spikes, as residual sums make them, count as the spikes they are the sum of: an input 3 is three accumulates.
  So behind a neuron whole numbers are spikes; in front of all neurons they are an image.
- Average-pooled spikes count as spikes: 0, 1/4, ..., 1 after a 2x2 pool. The factor 1/4 folds into the weights, and
  each non-zero is one accumulate, as if the spikes of one window arrived together.
- Self attention is q (k^T v): D accumulates for each spike of k and each of q, D the width of a head. Q-K attention:
  one for each spike of q; spike-driven attention: one wherever k and v both fire.
- SynOps are operations with a non-zero input, of either kind: ``rate * MACs`` of every layer.
- Numbers are per sample and summed over the time steps. A layer that reads the same analog input at each step, such as
  a repeated image, would be computed once: it is counted once.
"""

import csv
import os
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spikecore.neurons import Neuron

__all__ = ["HOROWITZ_45NM", "PJ_PER_AC", "PJ_PER_MAC", "EnergyModel", "EnergyReport", "LayerEnergy", "energy_pj",
           "estimate_energy"]  # fmt: skip

PJ_PER_MAC = 4.6
PJ_PER_AC = 0.9

_SYNAPSES = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


@dataclass(frozen=True)
class EnergyModel:
    """Picojoules of a multiply-accumulate and of an accumulate."""

    name: str
    pj_per_mac: float
    pj_per_ac: float

    def pj(self, macs: float, acs: float) -> float:
        return self.pj_per_mac * macs + self.pj_per_ac * acs


HOROWITZ_45NM = EnergyModel("45 nm, 32-bit float (Horowitz 2014)", PJ_PER_MAC, PJ_PER_AC)


def energy_pj(macs: float, acs: float) -> float:
    """Energy in pJ of so many multiply-accumulates and accumulates, by `HOROWITZ_45NM`."""
    return HOROWITZ_45NM.pj(macs, acs)


@dataclass(frozen=True)
class LayerEnergy:
    """One layer: `rate` is spikes per input (of numbers: the share of non-zeros), `macs` or `acs` what it pays,
    `synops` the operations with a non-zero input.
    """

    name: str
    layer: str
    rate: float
    macs: float
    acs: float
    synops: float
    energy_pj: float


@dataclass(frozen=True)
class EnergyReport:
    """Layers in the order of first calls, per sample; `firing_rates`: neuron layer -> spikes per neuron and step.

    The neurons inside a fused attention are called q_lif, k_lif, v_lif and attn_lif behind its name.
    """

    layers: tuple[LayerEnergy, ...]
    firing_rates: dict[str, float]
    energy_model: EnergyModel = HOROWITZ_45NM

    @property
    def macs(self) -> float:
        return sum(layer.macs for layer in self.layers)

    @property
    def acs(self) -> float:
        return sum(layer.acs for layer in self.layers)

    @property
    def synops(self) -> float:
        return sum(layer.synops for layer in self.layers)

    @property
    def energy_pj(self) -> float:
        return self.energy_model.pj(self.macs, self.acs)

    def to_csv(self, path: str | os.PathLike) -> None:
        """A row for each layer, one for their total, and one for each neuron layer, which has a rate alone."""
        with open(path, "w", newline="") as f:
            table = csv.writer(f)
            table.writerow(["name", "layer", "rate", "macs", "acs", "synops", "energy_pj"])
            for x in self.layers:
                table.writerow([x.name, x.layer, x.rate, x.macs, x.acs, x.synops, x.energy_pj])
            table.writerow(["total", "", "", self.macs, self.acs, self.synops, self.energy_pj])
            for name, rate in self.firing_rates.items():
                table.writerow([name, "neuron", rate, "", "", "", ""])

    def plot(self, path: str | os.PathLike) -> None:
        """Bar chart: energy by layer, and firing rate by neuron layer (needs matplotlib)."""
        from matplotlib.figure import Figure

        layers, rates = self.layers[::-1], [*self.firing_rates.items()][::-1]
        figure = Figure(figsize=(11, 1.6 + 0.19 * max(len(layers), len(rates), 8)), layout="constrained")
        left, right = figure.subplots(1, 2)
        colours = ["tab:red" if x.macs else "tab:blue" for x in layers]
        left.barh(range(len(layers)), [x.energy_pj * 1e-6 for x in layers], color=colours)
        left.set_yticks(range(len(layers)), [x.name for x in layers], fontsize=7)
        left.set_xlabel("energy, microjoule a sample")
        left.set_title(f"{self.energy_pj * 1e-6:.3g} microjoule: {self.macs:.3g} MAC (red), {self.acs:.3g} AC (blue)",
                       fontsize=9)  # fmt: skip
        right.barh(range(len(rates)), [rate for _, rate in rates], color="tab:gray")
        right.set_yticks(range(len(rates)), [name for name, _ in rates], fontsize=7)
        right.set_xlabel("spikes per neuron and step")
        right.set_title(self.energy_model.name, fontsize=9)
        for axes in (left, right):
            axes.margins(y=0.01)
        figure.savefig(path, dpi=120)


@torch.no_grad()
def estimate_energy(
    model: nn.Module, data: Tensor | Iterable[Tensor], energy_model: EnergyModel = HOROWITZ_45NM
) -> EnergyReport:
    """Run `model` in evaluation mode and count (formula and conventions in the module's docstring).

    Args:
        model: any module; its mode is restored.
        data: one batch ``[B, ...]`` as the model takes it, or several.
        energy_model: what an operation costs.

    Raises:
        ValueError: no data.
    """
    samples, batch = 0, 0
    fired_before = False  # whether a neuron has run in this pass
    counts: dict[str, _Count] = {}
    fired: dict[str, list[int]] = {}

    def saw(name: str, spikes: Tensor) -> None:
        nonlocal fired_before
        fired_before = True
        seen = fired.setdefault(name, [0, 0])
        seen[0] += int(spikes.count_nonzero())
        seen[1] += spikes.numel()

    def watch(name: str, module: nn.Module, hooks: ExitStack) -> None:
        if isinstance(module, _SYNAPSES):

            def synapse(m: Any, args: tuple[Tensor, ...], out: Tensor) -> None:
                count = counts.setdefault(name, _Count(type(m).__name__))
                count.layer_ran(m, args[0], out, batch, fired_before)

            hooks.callback(module.register_forward_hook(synapse).remove)
        elif isinstance(module, Neuron):
            hooks.callback(module.register_forward_hook(lambda m, args, out: saw(name, out)).remove)
        elif hasattr(module, "fused_spikes"):  # an attention: its neurons and products lie within one operator
            currents: dict[str, Tensor] = {}

            def attention(m: nn.Module, args: tuple[Tensor, ...]) -> None:
                spikes, accumulates, dense = module.fused_spikes(**currents)  # type: ignore[operator]
                for neuron, s in spikes.items():
                    saw(f"{name}.{neuron}", s)
                counts.setdefault(name, _Count(type(module).__name__)).add(accumulates, dense)
                currents.clear()

            for operand in module.operands:  # type: ignore[union-attr]

                def keep(m: nn.Module, args: tuple, out: Tensor, operand: str = operand) -> None:
                    currents[operand] = out

                hooks.callback(module.get_submodule(operand).register_forward_hook(keep).remove)
            hooks.callback(module.get_submodule("proj").register_forward_pre_hook(attention).remove)

    modules = dict(model.named_modules())
    modes = {m: m.training for m in modules.values()}
    with ExitStack() as hooks:
        for name, module in modules.items():
            watch(name, module, hooks)
        model.eval()
        try:
            for x in [data] if isinstance(data, Tensor) else data:
                batch, fired_before = len(x), False
                model(x)
                samples += batch
        finally:
            for module, mode in modes.items():
                module.training = mode
    if not samples:
        raise ValueError("estimate_energy: data holds no sample")
    return EnergyReport(
        tuple(count.row(name, samples, energy_model) for name, count in counts.items()),
        {name: spikes / max(seen, 1) for name, (spikes, seen) in fired.items()},
        energy_model,
    )


class _Count:
    """Running sums of one layer over calls and batches."""

    def __init__(self, layer: str) -> None:
        self.layer, self.dense, self.spikes, self.nonzeros, self.inputs, self.spiking = layer, 0.0, 0.0, 0, 0, True

    def add(self, accumulates: float, dense: float) -> None:
        """Products within an attention; the rate is the share of them that a spike asks for."""
        self.dense += dense
        self.spikes += accumulates
        self.inputs += int(dense)

    def layer_ran(self, module: nn.Module, x: Tensor, out: Tensor, batch: int, behind_neurons: bool) -> None:
        quarters = x * 4
        small = (x <= 1) | (x == x.round()) if behind_neurons else x <= 1
        spiking = bool(((quarters == quarters.round()) & (x >= 0) & small).all())
        # One output of a convolution sums weight[0].numel() products (in_channels / groups * kernel), of a linear layer
        # in_features: the same expression. Padding is counted like any other input, as is usual.
        macs = out.numel() * module.weight[0].numel()  # type: ignore[index, union-attr, operator]
        if not spiking and len(x) > batch and len(x) % batch == 0:  # [T*B, ...]: are all steps the same?
            steps = x.unflatten(0, (-1, batch))
            if bool((steps == steps[:1]).all()):
                macs //= len(steps)
        self.dense += macs
        self.nonzeros += int(x.count_nonzero())
        self.spikes += float(x.ceil().sum(dtype=torch.float64)) if spiking else 0.0
        self.inputs += x.numel()
        self.spiking &= spiking

    def row(self, name: str, samples: int, model: EnergyModel) -> LayerEnergy:
        rate, dense = (self.spikes if self.spiking else self.nonzeros) / max(self.inputs, 1), self.dense / samples
        macs, acs = (0.0, rate * dense) if self.spiking else (dense, 0.0)
        return LayerEnergy(name, self.layer, rate, macs, acs, rate * dense, model.pj(macs, acs))
