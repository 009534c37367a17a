"""The dataset that `create_dataset` returns, what a set's reader hands it, and the error a broken file raises."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset

__all__ = ["BrokenFileError", "Samples", "Source", "reading"]


class BrokenFileError(ValueError):
    """A file that cannot be read: the line names the file, the place in it, and what was expected there."""


@contextmanager
def reading(path: str | os.PathLike, expected: str) -> Iterator[None]:
    """What a library raises on a damaged file, which may be anything, becomes one line of a `BrokenFileError`."""
    try:
        yield
    except (BrokenFileError, ImportError):
        raise
    except BaseException as e:
        unopened = isinstance(e, OSError) and e.filename
        if unopened or not (isinstance(e, Exception) or type(e).__name__ == "PanicException"):  # Rust's
            raise
        raise BrokenFileError(f"{path}: expected {expected}: {' '.join(str(e).split()) or type(e).__name__}") from e


@dataclass(frozen=True)
class Source:
    """A set as its reader found it: ``load(items[i])`` is the sample of label ``labels[i]``.

    Where `recipe` is given, `load` is slow and gives numpy arrays: they are made once and kept on disk, under a key of
    `files` and `recipe`.
    """

    classes: Sequence[str]
    items: Sequence[Any]
    labels: Sequence[int]
    load: Callable[[Any], Any]
    files: Sequence[str] = ()
    recipe: dict[str, Any] | None = None


class Samples(Dataset):
    """``(x, label)`` pairs, `x` after `transform`, `label` an int that indexes `classes`.

    Attributes:
        name, kind: the set's name; ``"image"``, ``"events"`` or ``"audio"``.
        classes: names of the classes.
        targets: the label of each sample.
        skipped: one line for each file left out by ``on_error="skip"``.
    """

    def __init__(
        self,
        name: str,
        kind: str,
        classes: Sequence[str],
        items: Sequence[Any],
        targets: Sequence[int],
        load: Callable[[Any], Any],
        transform: Callable[[Any], Any] | None,
        skipped: Sequence[str],
    ) -> None:
        self.name, self.kind, self.classes = name, kind, list(classes)
        self.targets, self.skipped = list(targets), list(skipped)
        self.transform = transform
        self._items, self._load = items, load

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        x = self._load(self._items[index])
        return (x if self.transform is None else self.transform(x)), self.targets[index]

    def __repr__(self) -> str:
        return f"{self.name}: {len(self):,} samples ({self.kind}) of {len(self.classes):,} classes"
