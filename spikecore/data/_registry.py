"""Datasets by name."""

import difflib
import fnmatch
import importlib
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from spikecore.data._cache import broken_items, made_arrays
from spikecore.data._samples import Samples, Source

__all__ = ["create_dataset", "list_datasets"]

# kind -> (module, names of its readers); a module is imported when one of its sets is asked for
_KINDS = {
    "image": (
        "images",
        "caltech101 cifar10 cifar100 digits fashion_mnist image_folder imagenet mini_imagenet mnist",
    ),
    "events": ("events", "cifar10_dvs dvs128_gesture event_folder n_caltech101 n_mnist"),
    "audio": ("audio", "audio_folder gtzan spoken_digits urbansound8k"),
}
_SETS = {name: (kind, module) for kind, (module, names) in _KINDS.items() for name in names.split()}


def list_datasets(pattern: str = "*") -> list[str]:
    """Sorted names of the sets that match a shell pattern, such as ``"cifar*"``."""
    return sorted(fnmatch.filter(_SETS, pattern))


def create_dataset(
    name: str,
    root: str | os.PathLike | None,
    split: str = "train",
    *,
    transform: Callable[[Any], Any] | None = None,
    on_error: str = "raise",
    classes: Iterable[str] | None = None,
    cache: str | os.PathLike | None = None,
    **options: Any,
) -> Samples:
    """The set `name`, from the files below `root`; nothing is ever downloaded.

    Before `transform`, x is a PIL image (kind ``"image"``), float32 counts ``[T, 2, H, W]``, channel 0 for off and 1
    for on (``"events"``), or float32 ``[1, bins, frames]`` (``"audio"``). The functions of `spikecore.data.images`,
    `.events` and `.audio` under the sets' names say which folders they read, how large the set is, and which `options`
    they take.

    Args:
        root: the folder that holds the set; None for ``"digits"``.
        split: ``"train"``, ``"val"`` or ``"test"``.
        on_error: ``"raise"``, or ``"skip"`` to leave out files that cannot be read: all are tried once, here; a warning
            counts them and `Samples.skipped` says what is wrong with each.
        classes: only these classes, labelled in this order.
        cache: folder for frames, spectra and lists of broken files; default: ``.spikecore`` in `root`.

    Raises:
        ValueError: no set or split of this name, a wrong option, or a broken file (of a folder of images only
            when the sample is read).
        FileNotFoundError: the files are not there; the line says what was expected and what was found.
        ImportError: a package of the extra ``train`` is missing.
    """
    if name not in _SETS:
        near = difflib.get_close_matches(name, _SETS, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "spikecore.data.list_datasets() names them all"
        raise ValueError(f"create_dataset: there is no dataset {name!r}; {hint}")
    if split not in ("train", "val", "test"):
        raise ValueError(f"create_dataset: split must be 'train', 'val' or 'test', got {split!r}")
    if on_error not in ("raise", "skip"):
        raise ValueError(f"create_dataset: on_error must be 'raise' or 'skip', got {on_error!r}")
    kind, module = _SETS[name]
    if root is None and name != "digits":
        raise ValueError(f"create_dataset: root must be the folder that holds {name}, got None")
    folder = Path(root or ".").expanduser()
    source = _read(name, module, folder, split, options)
    if classes is not None:
        source = _only(name, source, list(classes))
    if not source.labels:
        raise FileNotFoundError(f"{name}: {folder}: no sample of the {split} split")
    where = Path(cache).expanduser() if cache is not None else folder / ".spikecore"
    skip = on_error == "skip"
    if source.recipe is not None:
        load, broken = made_arrays(where, name, source, skip)
    else:
        load, broken = source.load, broken_items(where, name, source) if skip and source.files else {}
    keep = [i for i in range(len(source.labels)) if i not in broken]
    if broken:
        warnings.warn(f"{name}: left out {len(broken):,} of {len(source.labels):,} samples that cannot be read; "
                      f"first {broken[min(broken)]}", stacklevel=2)  # fmt: skip
    items: Sequence[Any] = range(len(source.labels)) if source.recipe is not None else source.items
    if broken:
        items = [items[i] for i in keep]
    labels = [source.labels[i] for i in keep]
    return Samples(name, kind, source.classes, items, labels, load, transform, list(broken.values()))


def _read(name: str, module: str, folder: Path, split: str, options: dict[str, Any]) -> Source:
    try:
        reader = getattr(importlib.import_module(f"spikecore.data.{module}"), name)
    except ModuleNotFoundError as e:
        raise ImportError(f'{name} needs {e.name}: pip install "spikecore[train]"') from e
    taken = reader.__code__.co_varnames[2 : reader.__code__.co_argcount + reader.__code__.co_kwonlyargcount]
    if unknown := sorted(options.keys() - set(taken)):
        raise ValueError(f"{name}: unknown option {unknown[0]!r}; it takes {', '.join(taken) or 'none'}")
    if needed := sorted(set(taken) - options.keys() - (reader.__kwdefaults__ or {}).keys()):
        raise ValueError(f"{name}: it also needs the option {needed[0]!r}")
    return reader(folder, split, **options)


def _only(name: str, source: Source, classes: list[str]) -> Source:
    if unknown := [c for c in classes if c not in source.classes]:
        near = difflib.get_close_matches(unknown[0], source.classes, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"{name}: there is no class {unknown[0]!r}{hint}")
    if len(set(classes)) < len(classes) or not classes:
        raise ValueError(f"{name}: classes must name each class once, got {classes}")
    label = {source.classes.index(c): i for i, c in enumerate(classes)}
    keep = [i for i, old in enumerate(source.labels) if old in label]
    return replace(
        source,
        classes=classes,
        items=[source.items[i] for i in keep],
        labels=[label[source.labels[i]] for i in keep],
        files=[source.files[i] for i in keep] if source.files else (),
    )
