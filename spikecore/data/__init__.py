"""Datasets and event frames (extra: ``pip install "spikecore[train]"``)."""

from spikecore.data.digits import Digits, load_digits

__all__ = ["Digits", "load_digits"]
