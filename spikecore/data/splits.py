"""Train and test parts of sets that come without: by rule, or as a file lists them."""

import hashlib
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path

from spikecore.data.folders import no_val

__all__ = ["read_split", "save_split", "split_files"]

FIXED = Path(__file__).parent / "fixed"


def split_files(
    name: str,
    files: dict[str, list[str]],
    split: str,
    test_share: float | None = None,
    split_file: str | os.PathLike | None = None,
) -> dict[str, list[str]]:
    """The files of `split` among ``{class: paths}``; what is not in test is in train, so that nothing is in both.

    Args:
        test_share: the rule: of each class's files in the order of their names, the first ``ceil(n (1 - test_share))``
            are for training (with 0.1 the division that SpikingJelly's users call 9:1).
        split_file: a file of `save_split`, in place of the rule. It must be of exactly these files.

    Raises:
        ValueError: a share outside ]0, 1[, a val split, or a split file that was changed or is of other files.
    """
    no_val(name, split)
    if split_file is not None:
        count, test = read_split(split_file)
        keys = {_key(file, of) for of, paths in files.items() for file in paths}
        other = "other files need test_share or a split file of their own"
        if lost := sorted(test - keys):
            raise ValueError(
                f"{name}: {len(lost):,} test samples of {split_file} are not there, first {lost[0]}; {other}"
            )
        if len(keys) != count:
            raise ValueError(f"{name}: {split_file} divides {count:,} samples, but {len(keys):,} are there; {other}")
        return {of: [f for f in paths if (_key(f, of) in test) == (split == "test")] for of, paths in files.items()}
    if not isinstance(test_share, (int, float)) or not 0 < test_share < 1:
        raise ValueError(f"{name}: test_share must be between 0 and 1, got {test_share}")
    chosen = {}
    for of, paths in files.items():
        cut = math.ceil(round(len(paths) * (1 - test_share), 9))
        chosen[of] = paths[:cut] if split == "train" else paths[cut:]
    return chosen


def save_split(path: str | os.PathLike, files: dict[str, list[str]], test: dict[str, list[str]]) -> str:
    """Write the division of `files` of which `test` (``{class: paths}`` both) is the test part; gives its sha256."""
    keys = {_key(file, of) for of, paths in files.items() for file in paths}
    chosen = {_key(file, of) for of, paths in test.items() for file in paths}
    if not chosen <= keys:
        raise ValueError(f"save_split: {min(chosen - keys)} is in the test part but not among the files")
    digest = _hash(len(keys), chosen)
    unfinished = Path(f"{path}.unfinished")
    unfinished.write_text(json.dumps({"samples": len(keys), "test": sorted(chosen), "sha256": digest}, indent=0) + "\n")
    unfinished.replace(path)
    return digest


def read_split(path: str | os.PathLike) -> tuple[int, set[str]]:
    """``(samples in all, keys of the test part)`` of a split file; a key is ``class/name``, without extension.

    Raises:
        ValueError: not a split file, or changed after it was written.
    """
    try:
        content = json.loads(Path(path).read_text())
        count, test, digest = content["samples"], content["test"], content["sha256"]
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path}: expected a split file with 'samples', 'test' and 'sha256': {e}") from e
    if _hash(count, test) != digest:
        raise ValueError(f"{path}: its lists are not those of its sha256 {digest}")
    return count, set(test)


def _key(path: str, of: str) -> str:
    """CIFAR10-DVS calls a recording ``cifar10_airplane_7.aedat`` or ``7.mat``: both are ``airplane/7``."""
    stem = Path(path).stem
    return f"{of}/{stem.removeprefix(f'cifar10_{of}_')}"


def _hash(count: int, test: Iterable[str]) -> str:
    return hashlib.sha256("\n".join([str(count), *sorted(test)]).encode()).hexdigest()
