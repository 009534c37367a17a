"""What the models share: their input, their head as timm's users know it, layers that do not see time."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack

import torch
from torch import Tensor, nn

__all__ = ["Folded", "SpikingModel", "VisionModel", "over_time", "truncated_normal"]


def over_time(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A layer that knows no time, on ``[T, B, ...]``: it sees ``[T*B, ...]``, so batch statistics run over T too.

    A repeated image, or what was computed from one, is computed once, and the result repeated. Batch statistics are the
    same but for the update of running_var, which is larger by (n - 1/T) / (n - 1), n = B*H*W: less than 1e-3 from
    n = 1000 on.
    """
    if len(x) > 1 and x.stride(0) == 0:
        y = layer(x[0])
        return y.expand(len(x), *y.shape)
    return layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class Folded(nn.Sequential):
    """Layers that know no time, over ``[T, B, ...]`` (see `over_time`)."""

    def forward(self, x: Tensor) -> Tensor:
        return over_time(super().forward, x)


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
