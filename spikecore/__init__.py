"""spikecore: fused kernels for spiking vision (see README.md)."""

from typing import Any

from spikecore import ops, surrogate
from spikecore._backend import __version__, backend_info
from spikecore.interop import convert
from spikecore.neurons import IF, LIF, PLIF, Leaky

__all__ = [
    "IF", "LIF", "PLIF", "Leaky", "__version__", "backend_info", "convert", "create_model", "estimate_energy",
    "list_models", "ops", "surrogate",
]  # fmt: skip

_LAZY = {
    "create_model": "spikecore.models",
    "list_models": "spikecore.models",
    "estimate_energy": "spikecore.energy",
}


def __getattr__(name: str) -> Any:
    """What need not be imported by those who want the kernels alone."""
    if name not in _LAZY:
        raise AttributeError(f"module 'spikecore' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
