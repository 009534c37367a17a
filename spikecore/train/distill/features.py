"""Feature maps of any model, by the names of its modules."""

import difflib
import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from spikecore.models._base import VisionModel

__all__ = ["check_names", "observe"]


def check_names(model: nn.Module, names: Sequence[str], what: str) -> None:
    """Raises ValueError for a name that no module of `model` has, with the nearest ones."""
    known = [n for n, _ in model.named_modules() if n]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
            hint = f"did you mean {' or '.join(near)}?" if near else f"its modules begin with {', '.join(known[:5])}"
            raise ValueError(f"distill: {what} {name!r} is no module of {type(model).__name__}; {hint}")


def observe(model: nn.Module, names: Sequence[str], x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The model's output for x, and the outputs of the named modules as maps ``[B, C, h, w]``.

    Time is averaged: of a model with time steps T a module's output is ``[T, B, ...]``, ``[T*B, ...]`` or, where a
    repeated image was computed once, ``[B, ...]``. A vector ``[B, C]`` is a map of one pixel. Of three dimensions our
    models' are ``[B, C, N]``, others' tokens ``[B, N, C]``, those of classes left out; N is the model's grid of patches
    or a square where it can be. Models of timm and torchvision whose maps are ``[B, h, w, C]`` are known as such.

    Raises:
        ValueError: a module that was not called, or whose output is no such thing.
    """
    maps: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for name in dict.fromkeys(names):

            def keep(module: nn.Module, args: Any, out: Any, name: str = name) -> None:
                try:
                    maps[name] = _as_map(model, module, x, out[0] if isinstance(out, tuple) else out)
                except ValueError as e:
                    raise ValueError(f"distill: {name} of {type(model).__name__} gives no feature map: {e}") from e

            hooks.callback(model.get_submodule(name).register_forward_hook(keep).remove)
        out = model(x)
    for name in names:
        if name not in maps:
            raise ValueError(f"distill: {name} of {type(model).__name__} was not called, so it has no features")
    return out, [maps[name] for name in names]


def _as_map(model: nn.Module, module: nn.Module, x: Tensor, out: Any) -> Tensor:
    if not isinstance(out, Tensor):
        raise ValueError(f"expected a tensor, got {type(out).__name__}")
    B, T = len(x), getattr(model, "T", None)
    if T is None and isinstance(model, VisionModel) and x.dim() == 5:
        T = x.shape[1]
    if T is not None and tuple(out.shape[:2]) == (T, B):
        y = out.mean(0)
    elif T is not None and T > 1 and len(out) == T * B:
        y = out.unflatten(0, (T, B)).mean(0)
    elif out.dim() > 1 and len(out) == B:
        y = out.clone()  # layers behind it may work in place
    else:
        raise ValueError(f"expected {f'[{T}, {B}, ...] or ' if T else ''}[{B}, ...], got {list(out.shape)}")
    if y.dim() == 2:
        return y[:, :, None, None]
    if y.dim() == 3:
        return _grid(y, y.shape[2]) if isinstance(model, VisionModel) else _tokens_as_map(model, y)
    if y.dim() == 4:
        return y.permute(0, 3, 1, 2) if _channels_last(model, module) else y
    raise ValueError(f"expected 2 to 4 dimensions besides time, got {list(out.shape)}")


def _tokens_as_map(model: nn.Module, y: Tensor) -> Tensor:
    """timm's models count the tokens that are no pixels (some add them late), torchvision's transformer has one."""
    others, N = getattr(model, "num_prefix_tokens", int(hasattr(model, "class_token"))), y.shape[1]
    h, w = getattr(getattr(model, "patch_embed", None), "grid_size", None) or (0, 0)
    if h * w and N in (h * w, h * w + others):
        return y[:, -h * w :].transpose(1, 2).unflatten(2, (h, w))
    others = next((n for n in (others, 0) if math.isqrt(N - n) ** 2 == N - n), others)
    return _grid(y[:, others:].transpose(1, 2), N - others)


def _grid(y: Tensor, N: int) -> Tensor:
    side = math.isqrt(N)
    return y.unflatten(2, (side, side) if side * side == N else (N, 1))


def _channels_last(model: nn.Module, module: nn.Module) -> bool:
    timm = str(getattr(model, "output_fmt", "")).rpartition(".")[2] == "NHWC"
    torchvision = type(model).__name__ == "SwinTransformer" and type(model).__module__.startswith("torchvision.")
    return timm or (torchvision and type(module).__name__ != "Permute")
