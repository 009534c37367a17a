"""spikecore: fused kernels for spiking vision (see README.md)."""

from spikecore import ops, surrogate
from spikecore._backend import __version__, backend_info
from spikecore.interop import convert
from spikecore.neurons import IF, LIF, PLIF, Leaky

__all__ = ["IF", "LIF", "PLIF", "Leaky", "__version__", "backend_info", "convert", "ops", "surrogate"]
