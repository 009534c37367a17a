"""Models by name."""

import difflib
import fnmatch
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

__all__ = ["create_model", "list_models", "register_model"]

Builder = Callable[..., nn.Module]
Filter = Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]]


@dataclass(frozen=True)
class _Entry:
    builder: Builder
    checkpoint_filter: Filter | None


_entries: dict[str, _Entry] = {}


def register_model(
    builder: Builder | None = None, *, name: str | None = None, checkpoint_filter: Filter | None = None
) -> Any:
    """Decorator: `create_model` finds the function under its own name, or `name`.

    Args:
        checkpoint_filter: ``(state, model) -> state``, from published keys and shapes to the model's.

    Raises:
        ValueError: the name is taken.
    """

    def register(builder: Builder) -> Builder:
        key = name or builder.__name__
        if key in _entries:
            raise ValueError(f"register_model: the name {key} is taken by {_entries[key].builder.__module__}")
        _entries[key] = _Entry(builder, checkpoint_filter)
        return builder

    return register if builder is None else register(builder)


def create_model(name: str, *, checkpoint: str | os.PathLike | None = None, **kwargs: Any) -> nn.Module:
    """Build the model registered as `name`; `kwargs` go to its class, over the variant's own settings.

    Args:
        checkpoint: weights to load, as their authors saved them (see `spikecore.models.load_checkpoint`).

    Raises:
        ValueError: no model of this name (the message offers the nearest ones), or a checkpoint that does not fit.
    """
    if name not in _entries:
        near = difflib.get_close_matches(name, _entries, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "spikecore.models.list_models() names them all"
        raise ValueError(f"create_model: there is no model {name!r}; {hint}")
    entry = _entries[name]
    model = entry.builder(**kwargs)
    if checkpoint is not None:
        from spikecore.models._checkpoint import load_checkpoint

        load_checkpoint(model, checkpoint, entry.checkpoint_filter)
    return model


def checkpoint_filter_of(name: str) -> Filter | None:
    """How `name`'s published checkpoints become its state."""
    return _entries[name].checkpoint_filter


def list_models(pattern: str = "*") -> list[str]:
    """Sorted names of the registered models that match a shell pattern, such as ``"ecsnn_*"``."""
    return sorted(fnmatch.filter(_entries, pattern))
