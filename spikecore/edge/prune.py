"""Pruning by the average percentage of zeros (APoZ): filters that hardly ever answer are taken out.

Papers: Hu et al., "Network Trimming: A Data-Driven Neuron Pruning Approach towards Efficient Deep Architectures", arXiv
1607.03250 (APoZ); "EC-SNN: Splitting Deep Spiking Neural Networks for Edge Devices", IJCAI 2024 (per class, for spikes
averaged over time).

::

    apoz = measure_apoz(model, loader)                       # once for all classes
    keep = select_filters(apoz.of([0, 3, 7]), threshold=95)  # what these classes need
    small = prune(model, keep, num_classes=4)                # to be trained further
    save_pruned(small, "small.safetensors", kept=keep)
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spikecore._backend import __version__
from spikecore.models import ECSNN, load_checkpoint
from spikecore.neurons import Neuron
from spikecore.train.files import replace_file

__all__ = ["APoZ", "load_pruned", "measure_apoz", "prune", "save_pruned", "select_filters"]

MODEL = "ecsnn_vgg5"  # a registered name; the card's settings say all of its form


class APoZ(NamedTuple):
    """Of each convolution in order ``sums [K, C]``, the samples' shares of zeros added up by class and filter, and the
    number of samples of each class ``counts [K]``, all float64."""

    sums: list[Tensor]
    counts: Tensor

    def of(self, classes: Sequence[int] | None = None) -> list[Tensor]:
        """The average share of zeros ``[C]`` of each convolution's filters over the samples of `classes` (None: all).

        Raises:
            ValueError: a class that no sample had.
        """
        chosen = [int(k) for k in self.counts.nonzero()] if classes is None else [*classes]
        for k in chosen:
            if not 0 <= k < len(self.counts) or not self.counts[k]:
                raise ValueError(f"APoZ: no sample was of class {k}")
        if not chosen:
            raise ValueError("APoZ: no samples")
        return [s[chosen].sum(0) / self.counts[chosen].sum() for s in self.sums]


@torch.no_grad()
def measure_apoz(model: ECSNN, batches: Iterable[tuple[Tensor, Tensor]], *, published_quirks: bool = False) -> APoZ:
    """How often each filter's neurons are silent, class by class, in one pass over the data in evaluation mode.

    Args:
        batches: pairs of what the model takes (images or frames of any number of steps) and classes ``[B]``.
        published_quirks: every batch weighs the same, the last one too if it is smaller.

    Raises:
        ValueError: a class outside the model's outputs.
    """
    layers = [m for m in [*model.conv_fc][: model.convolutions] if isinstance(m, Neuron | nn.ReLU)]
    device, K = next(model.parameters()).device, model.num_classes
    sums: list[Tensor] = []
    counts = torch.zeros(K, dtype=torch.double, device=device)
    shares: list[Tensor] = []  # [B, C] of each layer, of the batch at hand

    def keep(module: nn.Module, args: Any, out: Tensor) -> None:
        """``[T, B, C, h, w]``, ``[T*B, C, h, w]``, or ``[B, C, h, w]`` where an image was computed once."""
        zeros = (out == 0).sum((-2, -1), dtype=torch.double) / out.shape[-2:].numel()
        shares.append(zeros.reshape(-1, B, zeros.shape[-1]).mean(0))

    training = model.training
    model.eval()
    with ExitStack() as hooks:
        hooks.callback(model.train, training)
        for layer in layers:
            hooks.callback(layer.register_forward_hook(keep).remove)
        for x, y in batches:
            B, y = len(x), y.to(device)
            if B and not 0 <= int(y.min()) <= int(y.max()) < K:
                raise ValueError(f"measure_apoz: classes must be 0 to {K - 1}, got {int(y.min())} to {int(y.max())}")
            shares.clear()
            model.forward_features(x.to(device))
            weight = 1 / B if published_quirks and B else 1.0
            counts.index_add_(0, y, torch.full((B,), weight, dtype=torch.double, device=device))
            sums = sums or [torch.zeros(K, s.shape[1], dtype=torch.double, device=device) for s in shares]
            for total, share in zip(sums, shares, strict=True):
                total.index_add_(0, y, weight * share)
    return APoZ(sums, counts)


def select_filters(apoz: Sequence[Tensor], threshold: float, min_filters: int = 16) -> list[list[int]]:
    """Numbers of the filters to keep in each convolution.

    A filter goes if its share of zeros is above ``(threshold - l) / 100`` in convolution l = 0, 1, ... (so deeper ones
    lose more), in the order of the filters, as long as more than `min_filters` are left.

    Args:
        apoz: as `APoZ.of` gives it.
        threshold: percent; the paper's 95 for spikes, and 56 for ReLU in the published code.
    """
    if min_filters < 1:
        raise ValueError(f"select_filters: min_filters must be at least 1, got {min_filters}")
    kept = []
    for layer, shares in enumerate(apoz):
        silent = (shares > (threshold - layer) / 100).nonzero().flatten().tolist()
        dropped = silent[: max(len(shares) - min_filters, 0)]
        kept.append(sorted(set(range(len(shares))).difference(dropped)))
    return kept


@torch.no_grad()
def prune(
    model: ECSNN, keep: Sequence[Sequence[int]], num_classes: int, *, hidden: Sequence[int] = (384, 192),
    dropout: float = 0.5, published_quirks: bool = False,
) -> ECSNN:  # fmt: skip
    """The smaller network: the kept filters with their norms, and fresh linear layers for other classes.

    Args:
        keep: of each convolution, the numbers of filters to keep.
        num_classes: of the new network; EC-SNN's parts have one more than the classes they know, for all others.
        hidden, dropout: of the new linear layers, by default the paper's.
        published_quirks: convolutions take over their weights only; biases and norms start afresh.

    Raises:
        ValueError: `keep` has another number of layers, leaves a layer empty, or names a filter that is not there.
    """
    convolutions = [i for i in range(model.convolutions) if isinstance(model.conv_fc[i], nn.Conv2d)]
    if len(keep) != len(convolutions):
        raise ValueError(f"prune: keep must be of {len(convolutions)} convolutions, got {len(keep)}")
    for layer, (i, filters) in enumerate(zip(convolutions, keep, strict=True)):
        width = len(model.get_parameter(f"conv_fc.{i}.weight"))
        if not filters or not 0 <= min(filters) <= max(filters) < width or len(set(filters)) < len(filters):
            raise ValueError(f"prune: keep[{layer}] must be different numbers from 0 to {width - 1}, got {[*filters]}")
    widths = map(len, keep)
    layers = [layer if layer == "P" else str(next(widths)) for layer in model.settings["layers"].split()]
    small = ECSNN(
        **{
            **model.settings, "layers": " ".join(layers), "hidden": tuple(hidden), "dropout": dropout,
            "num_classes": num_classes,
        }
    ).to(next(model.parameters()).device)  # fmt: skip
    old, new = model.state_dict(), small.state_dict()
    inputs: Sequence[int] = range(model.in_chans)
    for i, filters in zip(convolutions, keep, strict=True):
        new[f"conv_fc.{i}.weight"].copy_(old[f"conv_fc.{i}.weight"][list(filters)][:, list(inputs)])
        inputs = filters
        for key in () if published_quirks else old:
            if key == f"conv_fc.{i}.bias" or key.startswith(f"conv_fc.{i + 1}."):
                new[key].copy_(old[key][list(filters)] if old[key].dim() else old[key])
    return small


def save_pruned(model: ECSNN, path: str | os.PathLike, **facts: Any) -> Path:
    """Write the weights as safetensors, and beside them a JSON card with all that builds the network again.

    Args:
        path: ends in ``.safetensors``.
        facts: more for the card, such as what was kept, by which threshold, for which classes.

    Returns:
        The card's path.

    Raises:
        ValueError: another suffix.
        OSError: a file cannot be written.
    """
    from safetensors.torch import save

    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"save_pruned: path must end in .safetensors, got {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = save({k: v.contiguous() for k, v in model.state_dict().items()}, {"model": MODEL, "format": "pt"})
    card = {
        "model": MODEL,
        "settings": model.settings,
        "parameters": sum(p.numel() for p in model.parameters()),
        "weights": {"file": path.name, "sha256": hashlib.sha256(weights).hexdigest()},
        "spikecore": __version__,
        **facts,
    }
    text = json.dumps(card, indent=1) + "\n"
    replace_file(path, weights)
    replace_file(path.with_suffix(".json"), text.encode())
    return path.with_suffix(".json")


def load_pruned(path: str | os.PathLike) -> ECSNN:
    """The network that `save_pruned` wrote to `path`.

    Raises:
        FileNotFoundError: no weights, or no card beside them.
        ValueError: weights that are not the card's.
    """
    path = Path(path)
    card = json.loads(path.with_suffix(".json").read_text())
    if hashlib.sha256(path.read_bytes()).hexdigest() != card["weights"]["sha256"]:
        raise ValueError(f"load_pruned: {path} is not the file that {path.with_suffix('.json').name} describes")
    model = ECSNN(**card["settings"])
    load_checkpoint(model, path)
    return model
