"""Models by name."""

import difflib
import fnmatch
from collections.abc import Callable
from typing import TypeVar

from torch import nn

__all__ = ["create_model", "list_models", "register_model"]

Builder = TypeVar("Builder", bound=Callable[..., nn.Module])

_builders: dict[str, Callable[..., nn.Module]] = {}


def register_model(builder: Builder) -> Builder:
    """Decorator: `create_model` finds the function under its own name.

    Raises:
        ValueError: the name is taken.
    """
    name = builder.__name__
    if name in _builders:
        raise ValueError(f"register_model: the name {name} is taken by {_builders[name].__module__}")
    _builders[name] = builder
    return builder


def create_model(name: str, **kwargs) -> nn.Module:
    """Build the model registered as `name`; `kwargs` go to its class, over the variant's own settings.

    Raises:
        ValueError: no model of this name; the message offers the nearest ones.
    """
    if name not in _builders:
        near = difflib.get_close_matches(name, _builders, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "spikecore.models.list_models() names them all"
        raise ValueError(f"create_model: there is no model {name!r}; {hint}")
    return _builders[name](**kwargs)


def list_models(pattern: str = "*") -> list[str]:
    """Sorted names of the registered models that match a shell pattern, such as ``"ecsnn_*"``."""
    return sorted(fnmatch.filter(_builders, pattern))
