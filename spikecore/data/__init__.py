"""Datasets of images, events and sounds, from files already there (extra: ``pip install "spikecore[train]"``)."""

from spikecore.data._registry import create_dataset, list_datasets
from spikecore.data._samples import BrokenFileError, Samples
from spikecore.data.digits import Digits, load_digits
from spikecore.data.formats import Events, read_events
from spikecore.data.frames import events_to_frames

__all__ = [
    "BrokenFileError", "Digits", "Events", "Samples", "create_dataset", "events_to_frames", "list_datasets",
    "load_digits", "read_events",
]  # fmt: skip
