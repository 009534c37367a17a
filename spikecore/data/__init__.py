"""Datasets of images, events and sounds, from files already there (extra: ``pip install "spikecore[train]"``)."""

from spikecore.data._registry import create_dataset, list_datasets
from spikecore.data._samples import BrokenFileError, Samples
from spikecore.data.digits import Digits, load_digits

__all__ = ["BrokenFileError", "Digits", "Samples", "create_dataset", "list_datasets", "load_digits"]
