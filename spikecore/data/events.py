"""Recordings of event cameras as frames of counts, float32 ``[T, 2, H, W]``.

Every set takes ``frames`` (T), ``by`` and ``duration`` as `spikecore.data.frames.events_to_frames` does; frames are
made once and kept in the cache. Where `root` holds SpikingJelly's tree of the same frames
(``frames_number_{T}_split_by_{by}``) that is read as it is; else its ``events_np``; else the files as published, also
below SpikingJelly's ``extract``.
"""

import csv
import functools
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spikecore.data._samples import BrokenFileError, Source
from spikecore.data.folders import (
    class_files,
    divided,
    first_folder,
    missing,
    no_val,
    numbered,
    split_folder,
)
from spikecore.data.formats import EXTENSIONS, Events, npz_arrays, read_events
from spikecore.data.frames import check_frames, events_to_frames
from spikecore.data.splits import FIXED, split_files

Size = tuple[int, int]

CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
GESTURES = [
    "hand_clapping", "right_hand_wave", "left_hand_wave", "right_arm_clockwise", "right_arm_counter_clockwise",
    "left_arm_clockwise", "left_arm_counter_clockwise", "arm_roll", "air_drums", "air_guitar", "other_gestures",
]  # fmt: skip


def n_mnist(
    root: Path, split: str, *, frames: int | None = 16, by: str = "number", duration: int | None = None
) -> Source:
    """N-MNIST (Orchard et al. 2015), 34x34, about 0.3 s: 60,000 to train on and 10,000 to test on.

    Reads ``<Train|Test>/<digit>/*.bin``; there is no val.
    """
    return _divided("n_mnist", root, split, (34, 34), (frames, by, duration), [str(digit) for digit in range(10)])


def dvs128_gesture(
    root: Path, split: str, *, frames: int | None = 16, by: str = "number", duration: int | None = None
) -> Source:
    """DVS128 Gesture (Amir et al. 2017), 128x128, about 6 s: 1,176 to train on and 288 of other people to test on.

    Reads ``DvsGesture/trials_to_<train|test>.txt``, the ``.aedat`` files named there and their ``_labels.csv``; also
    without the folder ``DvsGesture``. There is no val.
    """
    name, size = "dvs128_gesture", (128, 128)
    check_frames(frames, by, duration)
    if _trees(root, frames, by):
        source = _divided(name, root, split, size, (frames, by, duration), [str(i) for i in range(11)])
        return Source(GESTURES, source.items, source.labels, source.load, source.files, source.recipe)
    no_val(name, split)
    list_name = f"trials_to_{split}.txt"
    folder = first_folder(root, ("DvsGesture", "extract/DvsGesture", ".")) or root
    if not (folder / list_name).is_file():
        raise missing(name, root, f"DvsGesture/{list_name} and the recordings it names")
    items: list[tuple[str, int, int]] = []
    labels = []
    for line in (folder / list_name).read_text().split():
        recording = folder / line
        table = recording.with_name(f"{recording.stem}_labels.csv")
        if not recording.is_file() or not table.is_file():
            raise missing(name, folder, f"{recording.name} and {table.name}, which {list_name} names")
        for label, start, end in _gesture_rows(table):
            items.append((str(recording), start, end))
            labels.append(label)
    load = partial(_framed, _gesture, size=size, frames=frames, by=by, duration=duration)
    recipe = _recipe(size, frames, by, duration)
    return Source(GESTURES, items, labels, load, [item[0] for item in items], recipe)


def cifar10_dvs(
    root: Path,
    split: str,
    *,
    frames: int | None = 16,
    by: str = "number",
    duration: int | None = None,
    test_share: float | None = None,
    split_file: str | None = None,
) -> Source:
    """CIFAR10-DVS (Li et al. 2017), 128x128, about 1.2 s: 1,000 recordings of each of 10 classes.

    Reads ``<class>/*.aedat`` (AEDAT 2 or 4) or ``<class>/*.mat``. The division is that of a fixed file, 9:1 per class:
    of the recordings in the order of their names, as text, the first 900 are for training; another set of files needs
    `test_share` or `split_file` (`spikecore.data.splits.split_files`).
    """
    if test_share is None and split_file is None:
        split_file = str(FIXED / "cifar10_dvs.json")
    places, expected = ("extract", "."), "<class>/*.aedat or <class>/*.mat"
    files, base = _undivided("cifar10_dvs", root, frames, by, places, (".aedat", ".aedat4", ".mat"), expected)
    files = {of: files[of] for of in CIFAR10_CLASSES if of in files}
    files = split_files("cifar10_dvs", files, split, test_share, split_file)
    return _source(files, CIFAR10_CLASSES, base, (128, 128), (frames, by, duration))


def n_caltech101(
    root: Path,
    split: str,
    *,
    frames: int | None = 16,
    by: str = "number",
    duration: int | None = None,
    test_share: float = 0.1,
    split_file: str | None = None,
) -> Source:
    """N-Caltech101 (Orchard et al. 2015), 180x240, about 0.3 s: 8,709 recordings of 101 classes, one the background.

    Reads ``Caltech101/<class>/*.bin`` or ``<class>/*.bin``.

    Args:
        test_share, split_file: see `spikecore.data.splits.split_files`.
    """
    places, expected = ("Caltech101", "extract/Caltech101", "."), "Caltech101/<class>/*.bin"
    files, base = _undivided("n_caltech101", root, frames, by, places, (".bin",), expected)
    chosen = split_files("n_caltech101", files, split, test_share, split_file)
    return _source(chosen, list(files), base, (180, 240), (frames, by, duration))


def event_folder(
    root: Path,
    split: str,
    *,
    height: int,
    width: int,
    frames: int | None = 16,
    by: str = "number",
    duration: int | None = None,
) -> Source:
    """Recordings of your own: ``<train|val|test>/<class>/*``, of the extensions in `spikecore.data.formats.EXTENSIONS`.

    Args:
        height, width: of the sensor.
    """
    return _divided("event_folder", root, split, (height, width), (frames, by, duration), None)


Options = tuple[int | None, str, int | None]


def _trees(root: Path, frames: int | None, by: str) -> Path | None:
    """SpikingJelly's folder of such frames, or of events."""
    return first_folder(root, ((f"frames_number_{frames}_split_by_{by}",) if by != "duration" else ()) + ("events_np",))


def _divided(name: str, root: Path, split: str, size: Size, options: Options, classes: list[str] | None) -> Source:
    """A set whose folders divide it."""
    if classes is not None:
        no_val(name, split)
    base = _trees(root, *options[:2]) or next((at for at in (root, root / "extract") if split_folder(at, split)), root)
    expected = (
        f"{split.title()}/<class>/*.bin or another file of events, or SpikingJelly's events_np or frames_number_..."
    )
    files, known = divided(name, base, split, EXTENSIONS, expected, classes)
    return _source(files, known, base, size, options)


def _undivided(
    name: str, root: Path, frames: int | None, by: str, places: Sequence[str], extensions: Sequence[str], expected: str
) -> tuple[dict[str, list[str]], Path]:
    """``(files by class, their folder)`` of a set in class folders, in SpikingJelly's tree or in one of `places`."""
    candidates = [(_trees(root, frames, by), (".npz",)), *((first_folder(root, [at]), extensions) for at in places)]
    for base, kinds in candidates:
        if base and (files := class_files(base, kinds)):
            return files, base
    raise missing(name, root, f"{expected}, or SpikingJelly's events_np or frames_number_...")


def _source(files: dict[str, list[str]], classes: list[str], base: Path, size: Size, options: Options) -> Source:
    paths, labels = numbered(files, classes)
    frames, by, duration = options
    check_frames(frames, by, duration)
    if base.name.startswith("frames_number_"):
        load: Callable[[Any], Any] = partial(_saved_frames, shape=(frames, 2, *size))
        return Source(classes, paths, labels, load, paths)
    load = partial(_framed, read_events, size=size, frames=frames, by=by, duration=duration)
    return Source(classes, paths, labels, load, paths, _recipe(size, frames, by, duration))


def _recipe(size: Size, frames: int | None, by: str, duration: int | None) -> dict[str, Any]:
    return {"size": size, "frames": frames, "by": by, "duration": duration}


def _framed(
    read: Callable[[Any], Events], item: Any, size: Size, frames: int | None, by: str, duration: int | None
) -> np.ndarray:
    events = read(item)
    try:
        return events_to_frames(events, size, frames, by, duration)
    except BrokenFileError as e:
        raise BrokenFileError(f"{item if isinstance(item, str) else item[0]}: {e}") from e


def _saved_frames(path: str, shape: tuple[int | None, ...]) -> Tensor:
    (frames,) = npz_arrays(path, ("frames",))
    if frames.shape != shape:
        raise BrokenFileError(f"{path}: expected frames of {list(shape)}, got {list(frames.shape)}")
    return torch.from_numpy(frames).float()


def _gesture_rows(table: Path) -> list[tuple[int, int, int]]:
    """``(label from 0, start, end)``, times in microseconds, of a ``_labels.csv``."""
    rows = []
    with open(table, newline="") as file:
        for line, row in enumerate(csv.reader(file), 1):
            if line == 1 or not row:
                continue
            try:
                label, start, end = (int(cell) for cell in row)
            except ValueError:
                label = start = end = 0
            if not 1 <= label <= 11 or end <= start:
                raise BrokenFileError(
                    f"{table}: line {line}: expected class 1 to 11, start and end in us, got {','.join(row)}"
                )
            rows.append((label - 1, start, end))
    return rows


def _gesture(item: tuple[str, int, int]) -> Events:
    path, start, end = item
    events = _last_recording(path)
    inside = (events.t >= start) & (events.t < end)
    return Events(*(column[inside] for column in events))


@functools.lru_cache(maxsize=1)  # a recording holds about twelve gestures, which are asked for one after the other
def _last_recording(path: str) -> Events:
    return read_events(path)
