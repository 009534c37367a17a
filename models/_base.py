"""What the models share: their input, their head as timm's users know it, layers that do not see time."""

import copy
import itertools
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from spikecore.neurons import Neuron

__all__ = [
    "Chain", "Folded", "SpikingModel", "VisionModel", "fire", "fold_norms", "over_time", "truncated_normal", "walk",
]  # fmt: skip


def over_time(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A layer that knows no time, on ``[T, B, ...]``: it sees ``[T*B, ...]``, so batch statistics run over T too.

    A repeated image, or what was computed from one, is computed once, and the result repeated. Batch statistics are the
    same but for the update of running_var, which is larger by (n - 1/T) / (n - 1), n = B*H*W: less than 1e-3 from
    n = 1000 on (not where a neuron's operator does the norm's work, see `fire`).
    """
    if len(x) > 1 and x.stride(0) == 0:
        y = layer(laid_out(x[0]))
        return y.expand(len(x), *y.shape)
    return layer(laid_out(x.flatten(0, 1))).unflatten(0, x.shape[:2])


def laid_out(x: Tensor) -> Tensor:
    """Maps in the layout that is fastest on the CPU: large ones channels last, where max pools are ten times as fast,
    batch norms two to three and convolutions a little, small ones not, where convolutions lose a fifth."""
    if x.dim() != 4 or x.device.type != "cpu":
        return x
    large = x.shape[2] * x.shape[3] >= 128
    return x.contiguous(memory_format=torch.channels_last if large else torch.contiguous_format)


class Folded(nn.Sequential):
    """Layers that know no time, over ``[T, B, ...]`` (see `over_time`)."""

    def forward(self, x: Tensor) -> Tensor:
        return over_time(super().forward, x)


class Chain(nn.Sequential):
    """Layers over ``[T, B, ...]``, neurons among them (see `walk`)."""

    def forward(self, x: Tensor) -> Tensor:
        return walk(self, x)


def walk(layers: Iterable[nn.Module], x: Tensor) -> Tensor:
    """The layers in turn over ``[T, B, ...]``; a batch norm in front of a neuron goes into its operator."""
    todo = [*layers]
    while todo:
        layer = todo.pop(0)
        normed = isinstance(layer, Folded | nn.modules.batchnorm._BatchNorm)
        if normed and todo and isinstance(neuron := todo[0], Neuron):
            x = fire(x, layer if isinstance(layer, Folded) else (layer,), neuron)
            del todo[0]
        elif isinstance(layer, nn.Conv2d | nn.modules.batchnorm._BatchNorm | nn.Flatten):
            x = over_time(layer, x)
        else:
            x = layer(x)
    return x


def fire(x: Tensor, layers: Sequence[nn.Module] | Folded, neuron: Neuron, residual: Tensor | None = None) -> Tensor:
    """``neuron(layers(x) + residual)``, the layers knowing no time; a batch norm at their end and the sum go into the
    neuron's operator, unless somebody watches them by hooks."""
    *front, norm = layers
    if is_plain(norm) and not (isinstance(layers, Folded) and is_watched(layers)):
        y = over_time(partial(in_turn, front), x) if front else x
        return neuron(y, norm, residual)
    y = layers(x) if isinstance(layers, Folded) else over_time(partial(in_turn, layers), x)
    return neuron(y if residual is None else y + residual)


def in_turn(layers: Iterable[nn.Module], x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


def is_plain(norm: nn.Module) -> bool:
    """Whether a neuron's operator can do this norm's work (that of `nn.SyncBatchNorm` it cannot)."""
    return type(norm) is nn.BatchNorm2d and norm.track_running_stats and not is_watched(norm)


def is_watched(m: nn.Module) -> bool:
    return bool(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks)


@torch.no_grad()
def fold_norms(model: nn.Module) -> nn.Module:
    """A copy of a model of this package for inference, every batch norm within the convolution in front of it.

    Its state dict is another: load weights before. Outputs are the same but for the rounding of the weights, which may
    flip a spike whose potential lies within it of the threshold.

    Raises:
        ValueError: a model in training mode.
    """
    if model.training:
        raise ValueError("fold_norms: the model must be in evaluation mode, call model.eval() first")
    model = copy.deepcopy(model)
    parents = {m: (parent, name) for parent in model.modules() for name, m in parent.named_children()}
    leaves = [m for m in model.modules() if not [*m.children()]]  # in the order of construction: norm behind its conv
    for conv, norm in itertools.pairwise(leaves):
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            for old, new in ((conv, fuse_conv_bn_eval(conv, norm)), (norm, nn.Identity())):
                parent, name = parents[old]
                setattr(parent, name, new)
    return model


class VisionModel(nn.Module):
    """What timm's users know. A model defines `forward_features`, `forward_head`, the names of its last layer
    (`classifier_name`) and of its stages (`stages`, for `forward_intermediates`).

    Args:
        in_chans: channels of the input.
        num_classes: width of the output; 0: no classifier, features instead.
    """

    classifier_name: str
    stages: tuple[str, ...]
    num_features: int

    def __init__(self, in_chans: int, num_classes: int) -> None:
        super().__init__()
        if num_classes < 0:
            raise ValueError(f"{type(self).__name__}: num_classes must be at least 0, got {num_classes}")
        self.in_chans, self.num_classes = in_chans, num_classes

    def forward_features(self, x: Tensor) -> Tensor:
        """Features before pooling."""
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """From `forward_features` to the output, or to what the classifier reads."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        return self.get_submodule(self.classifier_name)

    def reset_classifier(self, num_classes: int) -> None:
        """A new classifier, freshly initialised, for another number of classes (0: none)."""
        old = self.get_classifier()
        width = getattr(old, "in_features", None) or self.num_features
        new = (
            nn.Linear(width, num_classes, bias=getattr(old, "bias", True) is not None) if num_classes else nn.Identity()
        )
        parent, _, name = self.classifier_name.rpartition(".")
        setattr(self.get_submodule(parent), name, new.to(next(self.parameters()).device))
        self.num_features, self.num_classes = width, num_classes

    def forward_intermediates(
        self, x: Tensor, indices: int | Iterable[int] | None = None, *, intermediates_only: bool = False
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Outputs of the stages (averaged over time, where there is one), beside `forward_features`' result.

        Args:
            indices: which of `stages`: the last n, or their numbers; default: all.
        """
        names = self.stages
        if isinstance(indices, int):
            names = names[-indices:]
        elif indices is not None:
            names = tuple(names[i] for i in indices)
        found: dict[str, Tensor] = {}
        with ExitStack() as hooks:
            for name in names:

                def keep(module: nn.Module, args: tuple, out: Tensor, name: str = name) -> None:
                    found[name] = self.as_map(out)

                hooks.callback(self.get_submodule(name).register_forward_hook(keep).remove)
            features = self.forward_features(x)
        maps = [found[name] for name in names]
        return maps if intermediates_only else (features, maps)

    def as_map(self, out: Tensor) -> Tensor:
        return out


class SpikingModel(VisionModel):
    """Base of the image and event models. A model defines `sequence_features`, ``[T, B, C, H, W] -> [T, B, ...]``.

    Args:
        T: time steps. An image is shown so many times; event frames must have so many. None (event models): any.
        in_chans, num_classes: see `VisionModel`.

    Shapes: image ``[B, C, H, W]`` or frames ``[B, T, C, H, W]`` -> ``[B, num_classes]``.

    Raises:
        ValueError: T or num_classes out of range; an input that fits neither shape.
    """

    def __init__(self, T: int | None, in_chans: int, num_classes: int) -> None:
        super().__init__(in_chans, num_classes)
        if T is not None and T < 1:
            raise ValueError(f"{type(self).__name__}: T must be at least 1, got {T}")
        self.T = T

    def frames(self, x: Tensor) -> Tensor:
        """The input as a sequence ``[T, B, C, H, W]``; a repeated image is a view."""
        name, C = type(self).__name__, self.in_chans
        if x.dim() not in (4, 5) or x.shape[-3] != C:
            T = "T" if self.T is None else self.T
            raise ValueError(f"{name}: x must be [B, {C}, H, W] or [B, {T}, {C}, H, W], got {list(x.shape)}")
        if x.dim() == 4:
            if self.T is None:
                raise ValueError(f"{name}: an image needs T, the number of times it is shown; got {list(x.shape)}")
            return x.expand(self.T, *x.shape)
        if self.T is not None and x.shape[1] != self.T:
            raise ValueError(f"{name}: x must have T = {self.T} frames, got {x.shape[1]} in {list(x.shape)}")
        return x.transpose(0, 1)

    def sequence_features(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward_features(self, x: Tensor) -> Tensor:
        """Features before pooling, for every time step: ``[T, B, ...]``."""
        return self.sequence_features(self.frames(x))

    def steps(self, x: Tensor) -> Tensor:
        """Output of every time step, ``[T, B, num_classes]``: what losses over single steps take."""
        return torch.cat([self.forward_head(step)[None] for step in self.forward_features(x).split(1)])

    def as_map(self, out: Tensor) -> Tensor:
        return out.mean(0)


@torch.no_grad()
def truncated_normal(model: nn.Module) -> None:
    """Linear weights from a normal of deviation 0.02 cut at 2, biases 0: the transformers' start."""
    for m in model.modules():
        if isinstance(m, nn.Linear):
            nn.init.trunc_normal_(m.weight, std=0.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
