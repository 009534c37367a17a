"""Files by class, and the one line that says which folders were expected and what was found."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

__all__ = ["class_files", "class_names", "divided", "first_folder", "missing", "no_val", "numbered", "split_folder"]

# how the folder of a split is called by those who publish sets
_SPLITS = {
    "train": ("train", "Train", "training"),
    "val": ("val", "Val", "validation", "valid"),
    "test": ("test", "Test", "testing"),
}


def missing(name: str, root: Path, expected: str) -> FileNotFoundError:
    """To be raised where a set's files are not there."""
    if not root.is_dir():
        return FileNotFoundError(f"{name}: {root}: expected {expected}; there is no such folder")
    there = sorted(entry.name + "/" * entry.is_dir() for entry in os.scandir(root) if not entry.name.startswith("."))
    found = ", ".join(there[:8]) + f" and {len(there) - 8:,} more" * (len(there) > 8)
    return FileNotFoundError(f"{name}: {root}: expected {expected}; found {found or 'an empty folder'}")


def first_folder(root: Path, names: Sequence[str]) -> Path | None:
    """The first of `names` (``"."`` is `root`) that is a folder below `root`."""
    return next((root / name for name in names if (root / name).is_dir()), None)


def split_folder(root: Path, split: str) -> Path | None:
    """`root`'s folder for `split`, under the names in use."""
    return first_folder(root, _SPLITS[split])


def class_files(folder: Path, extensions: Sequence[str]) -> dict[str, list[str]]:
    """``{class: paths}`` of the files of `extensions` in each folder below `folder` and its subfolders, both in the
    order of their names; folders without such a file are left out."""
    return {name: files for name in _subfolders(folder) if (files := list(_files(folder / name, extensions)))}


def class_names(folder: Path, extensions: Sequence[str]) -> list[str]:
    """The classes of `class_files`, without reading through their folders."""
    return [name for name in _subfolders(folder) if next(_files(folder / name, extensions), None)]


def divided(
    name: str,
    root: Path,
    split: str,
    extensions: Sequence[str],
    expected: str,
    classes: Sequence[str] | None = None,
) -> tuple[dict[str, list[str]], list[str]]:
    """``(files, classes)`` of a set whose folders divide it; by default the classes are those of its train folder."""
    folder = split_folder(root, split)
    files = class_files(folder, extensions) if folder else {}
    if not files:
        raise missing(name, root, expected)
    train = split_folder(root, "train")
    known = list(classes or (class_names(train, extensions) if train and train != folder else files))
    if unknown := sorted(files.keys() - set(known)):
        raise ValueError(f"{name}: {folder}: class {unknown[0]!r} is not among the {len(known):,} of the training part")
    return files, known


def no_val(name: str, split: str) -> None:
    """Raises:
    ValueError: `split` is val, for a set that has none.
    """
    if split == "val":
        raise ValueError(f"{name}: it has no val split; use 'train' and 'test'")


def numbered(files: dict[str, list[str]], classes: Sequence[str]) -> tuple[list[str], list[int]]:
    """``(paths, labels)``, in the order of `classes`."""
    pairs = [(file, label) for label, name in enumerate(classes) for file in files.get(name, ())]
    return [file for file, _ in pairs], [label for _, label in pairs]


def _subfolders(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def _files(folder: Path, extensions: Sequence[str]) -> Iterator[str]:
    for at, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        for file in sorted(files):
            if file.lower().endswith(tuple(extensions)) and not file.startswith("."):
                yield os.path.join(at, file)
