"""What is made once and kept on disk: the arrays of a set, and the list of its broken files.

A folder below the cache is named after the set and a hash of its files (path, size, time of change), the recipe and
`VERSION`. It is written under another name and renamed when complete; of processes that want it at once, such as the
ranks of a training, one makes it while the others wait.
"""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock  # torch needs it too
from torch import Tensor

from spikecore.data._samples import BrokenFileError, Source

VERSION = 1
_ROW = np.dtype([("offset", "i8"), ("dtype", "S4"), ("shape", "i4", 4)])  # of arrays of up to four dimensions


def made_arrays(cache: Path, name: str, source: Source, skip: bool) -> tuple[Callable[[int], Tensor], dict[int, str]]:
    """``(load, broken)``: ``load(i)`` is ``source.load(source.items[i])`` as a float32 tensor.

    Raises:
        BrokenFileError: for the first one, unless `skip`.
    """
    folder = cache / f"{name}-{_key(source)}"
    _make(folder, partial(_write_arrays, source=source, skip=skip))
    index = np.load(folder / "index.npy")
    broken = _load_broken(folder)
    if broken and not skip:
        raise BrokenFileError(broken[min(broken)])
    return partial(_load_array, str(folder / "arrays.bin"), index), broken


def broken_items(cache: Path, name: str, source: Source) -> dict[int, str]:
    """What is wrong with each item that cannot be loaded, by its place; all are tried, in threads."""
    folder = cache / f"{name}-broken-{_key(source)}"
    _make(folder, partial(_write_broken, source=source))
    return _load_broken(folder)


def _key(source: Source) -> str:
    digest = hashlib.sha256(json.dumps([VERSION, source.recipe], sort_keys=True).encode())
    stamp: dict[str, str] = {}
    for file in source.files:
        if file not in stamp:
            stat = os.stat(file)
            stamp[file] = f"{file}\0{stat.st_size}\0{stat.st_mtime_ns}\n"
        digest.update(stamp[file].encode())
    digest.update(repr(list(source.items)).encode())
    return digest.hexdigest()[:16]


def _make(folder: Path, fill: Callable[[Path], None]) -> None:
    if folder.is_dir():
        return
    lock = FileLock(folder.parent / f".{folder.name}.lock")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as e:
        raise OSError(f"cannot write to the cache {folder.parent} ({e.strerror}); choose another with cache=") from e
    try:
        if not folder.is_dir():  # else another process made it meanwhile
            with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as unfinished:
                filled = Path(unfinished) / "filled"
                filled.mkdir()
                fill(filled)
                filled.rename(folder)
    finally:
        lock.release()


def _write_arrays(folder: Path, source: Source, skip: bool) -> None:
    index, broken = np.zeros(len(source.items), _ROW), {}
    with open(folder / "arrays.bin", "wb") as out:
        for i, item in enumerate(_progress(source.items)):
            try:
                array = source.load(item)
            except (BrokenFileError, OSError) as e:
                if not skip:
                    raise
                broken[i] = _line(e)
            else:
                index[i] = (out.tell(), array.dtype.str, array.shape + (-1,) * (4 - array.ndim))
                out.write(array.tobytes())
    np.save(folder / "index.npy", index)
    _save_broken(folder, broken)


def _write_broken(folder: Path, source: Source) -> None:
    def attempt(item: Any) -> str | None:
        try:
            source.load(item)
        except (BrokenFileError, OSError) as e:
            return _line(e)
        return None

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        lines = list(_progress(pool.map(attempt, source.items, chunksize=64), len(source.items)))
    _save_broken(folder, {i: line for i, line in enumerate(lines) if line is not None})


def _load_array(file: str, index: np.ndarray, i: int) -> Tensor:
    offset, dtype, shape = index[i].item()
    shape = [size for size in shape if size >= 0]
    return torch.from_numpy(np.fromfile(file, dtype.decode(), math.prod(shape), offset=offset).reshape(shape)).float()


def _save_broken(folder: Path, broken: dict[int, str]) -> None:
    (folder / "broken.json").write_text(json.dumps(broken, indent=1))


def _load_broken(folder: Path) -> dict[int, str]:
    return {int(i): line for i, line in json.loads((folder / "broken.json").read_text()).items()}


def _line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _progress(items: Iterable[Any], total: int | None = None) -> Iterable[Any]:
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, total=total, unit="sample", leave=False, disable=None)  # silent where no one watches
