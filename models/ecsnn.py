"""EC-SNN's spiking VGGs and CifarNet, their ReLU twins, and the net that fuses the parts of a split one.

Paper: "EC-SNN: Splitting Deep Spiking Neural Networks for Edge Devices", IJCAI 2024.
Origin: github.com/AmazingDD/EC-SNN, model.py (Apache-2.0); written anew, with its state-dict keys.

The published code walks through the whole network one time step after the other, so that in training batch norm takes
one mean and variance per step, and updates its running statistics T times; so it is here too, unless
``step_norm=False``: then all steps share them, as in the other families. All else sees all steps at once.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from spikecore.models._base import Folded, SpikingModel, walk
from spikecore.models._registry import register_model
from spikecore.neurons import LIF, Neuron
from spikecore.surrogate import ATan

__all__ = ["ECSNN", "Fusion", "published_counts"]


class ECSNN(SpikingModel):
    """Spiking VGG: Conv-BN-LIF blocks and average pools, then linear layers with nothing between, averaged over time.

    Args:
        layers: the convolutions' widths in order, "P" for a 2x2 pool, as in ``"64 P 128 128 P"``.
        hidden: widths of the linear layers before the last.
        img_size: height = width (or ``(height, width)``) of the input.
        spiking: False: the twin, with ReLU, biases and max pools.
        tau: membrane time constant of every neuron, in steps.
        dropout: probability, before each linear layer.
        step_norm: in training, batch norm takes every step's own statistics (see above).
        T, in_chans, num_classes, and shapes: see `SpikingModel`.

    Raises:
        ValueError: an unreadable `layers`, an image that the pools leave nothing of, an input of another shape.
    """

    def __init__(
        self, layers: str, hidden: tuple[int, ...], *, img_size: int | tuple[int, int] = 32, spiking: bool = True,
        tau: float = 4 / 3, dropout: float = 0.5, step_norm: bool = True, T: int | None = 5, in_chans: int = 3,
        num_classes: int = 10,
    ) -> None:  # fmt: skip
        super().__init__(T, in_chans, num_classes)
        self.step_norm = step_norm
        self.settings: dict[str, Any] = {  # whatever builds another one of this form
            "layers": layers, "hidden": hidden, "img_size": img_size, "spiking": spiking, "tau": tau,
            "dropout": dropout, "step_norm": step_norm, "T": T, "in_chans": in_chans, "num_classes": num_classes,
        }  # fmt: skip
        self.conv_fc = nn.Sequential()  # one flat sequence: the published keys are conv_fc.{index}
        channels, pools = in_chans, []
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        for layer in layers.split():
            if layer == "P":
                self.conv_fc.append(Folded(nn.AvgPool2d(2) if spiking else nn.MaxPool2d(2)))
                pools.append(f"conv_fc.{len(self.conv_fc) - 1}")
                height, width = height // 2, width // 2
            elif layer.isdecimal():
                self.conv_fc.append(nn.Conv2d(channels, int(layer), 3, padding=1, bias=not spiking))
                self.conv_fc.append(nn.BatchNorm2d(int(layer)))
                self.conv_fc.append(LIF(tau, v_reset=None, surrogate=ATan(2.0)) if spiking else nn.ReLU())
                channels = int(layer)
            else:
                raise ValueError(f"ECSNN: layers must be numbers and P, as in '64 P 128 128 P', got {layer!r}")
        if not layers or layers.split()[0] == "P":
            raise ValueError(f"ECSNN: layers must begin with a convolution's width, got {layers!r}")
        if not height or not width:
            raise ValueError(f"ECSNN: img_size {img_size} is too small for the {len(pools)} pools")
        self.stages, self.convolutions = tuple(pools), len(self.conv_fc)
        self.features = channels, height, width
        features = channels * height * width
        self.conv_fc.append(nn.Flatten())
        for out_features in (*hidden, num_classes):
            self.conv_fc.append(nn.Dropout(dropout))
            self.conv_fc.append(nn.Linear(features, out_features, bias=not spiking) if out_features else nn.Identity())
            self.num_features, features = features, out_features
        self.classifier_name = f"conv_fc.{len(self.conv_fc) - 1}"

    def walk(self, layers: Iterable[nn.Module], x: Tensor) -> Tensor:
        if not (self.step_norm and self.training):
            return walk(layers, x)
        for layer in layers:
            x = torch.stack([layer(step) for step in x]) if isinstance(layer, nn.BatchNorm2d) else walk([layer], x)
        return x

    def sequence_features(self, x: Tensor) -> Tensor:
        return self.walk([*self.conv_fc][: self.convolutions], x)

    def steps(self, x: Tensor) -> Tensor:
        """Output of every time step, ``[T, B, num_classes]``: what losses over single steps take."""
        return self._head(self.forward_features(x), len(self.conv_fc))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self._head(x, len(self.conv_fc) - pre_logits).mean(0)

    def _head(self, x: Tensor, end: int) -> Tensor:
        if tuple(x.shape[2:]) != self.features:
            raise ValueError(
                f"ECSNN: the linear layers were built for maps {list(self.features)}, the input gives "
                f"{list(x.shape[2:])}"
            )
        return self.walk([*self.conv_fc][self.convolutions : end], x)


@torch.no_grad()
def published_counts(model: ECSNN, x: Tensor, activity: float = 1.0) -> tuple[Tensor, Tensor]:
    """Operations and spikes of a batch as the published energy script counts them, ``[T]`` each, for its tables.

    Its operations are not those of the network, which `spikecore.estimate_energy` counts: every convolution is given
    the input's height and width, whatever its own map, and a single sample, where linear layers get the whole batch;
    each times the firing share of the last neurons before it. Its spikes are the non-zeros behind all neurons (or
    ReLUs): the paper's ATSAN is their sum over T, per sample.

    Args:
        x: as the model takes it.
        activity: the share in front of the first neuron; the script has the share of non-zeros for event frames.
    """
    x = model.frames(x)
    height, width = x.shape[-2:]
    share = torch.full((len(x),), activity, dtype=torch.float64)
    operations, spikes = torch.zeros_like(share), torch.zeros(len(x), dtype=torch.int64)
    for layer in model.conv_fc:
        x = model.walk([layer], x)
        if isinstance(layer, nn.Conv2d):
            operations += layer.weight.numel() * height * width * share
        elif isinstance(layer, nn.Linear):
            operations += layer.weight.numel() * x.shape[1] * share
        elif isinstance(layer, Neuron | nn.ReLU):
            fired = x.flatten(1).count_nonzero(1).cpu()
            spikes += fired
            share = fired / x[0].numel()
    return operations, spikes


class Fusion(nn.Module):
    """Classes from what the sub-networks of a split network see, with nothing between its linear layers.

    Args:
        features: F, of all sub-networks together: their maps, flattened and concatenated.
        parts: how many sub-networks.
        num_classes: K, of the whole network.
        bias: in every layer, as for the ReLU twins.
        dropout: behind each of the first two layers.

    Shapes: ``[..., F] -> [..., K]``.
    """

    def __init__(
        self, features: int, parts: int, *, num_classes: int = 10, bias: bool = False, dropout: float = 0.5
    ) -> None:
        super().__init__()
        if min(features, parts, num_classes) < 1:
            raise ValueError(
                f"Fusion: features, parts and num_classes must be at least 1, got {features}, {parts}, {num_classes}"
            )
        wide, narrow, joined = 384 * parts, 192 * parts, num_classes * parts
        self.mlp = nn.Sequential(
            nn.Linear(features, wide, bias), nn.Dropout(dropout),
            nn.Linear(wide, narrow, bias), nn.Dropout(dropout),
            nn.Linear(narrow, joined, bias), nn.Linear(joined, num_classes, bias),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


ARCHITECTURES = {
    "vgg5": ("64 P 128 128 P", (1024,)),
    "vgg9": ("64 64 P 128 128 P 256 256 256 P", (1024,)),
    "vgg16": ("64 64 P 128 128 P 256 256 256 P 512 512 512 P 512 512 512 P", (4096, 4096)),
    "vgg19": ("64 64 P 128 128 P 256 256 256 256 P 512 512 512 512 P 512 512 512 512 P", (4096, 4096)),
    "cifarnet": ("256 256 256 P 256 256 256 P", (384, 192)),
}


def _variant(name: str, **settings: Any) -> None:
    def build(**kwargs: Any) -> ECSNN:
        return ECSNN(**{**settings, **kwargs})

    register_model(build, name=name)


for _name, (_layers, _hidden) in ARCHITECTURES.items():
    _variant(f"ecsnn_{_name}", layers=_layers, hidden=_hidden)
    _variant(f"ecsnn_{_name}_ann", layers=_layers, hidden=_hidden, spiking=False, T=1)
# Not of the paper: 99,232 parameters on 8x8 gray images, for tests.
_variant("ecsnn_vgg_test", layers="32 32 P 64 64 P", hidden=(128,), in_chans=1, img_size=8, T=4, step_norm=False)
