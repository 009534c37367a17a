"""What a teacher says about samples that never change, kept on disk."""

import hashlib
import os
import pathlib
import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import closing

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

__all__ = ["Cache", "weights_hash"]

Outputs = dict[str, Tensor]


def weights_hash(model: nn.Module) -> str:
    """sha256 over names, types, shapes and values of the model's state."""
    digest = hashlib.sha256()
    for name, t in sorted(model.state_dict().items()):
        digest.update(f"{name}|{t.dtype}|{list(t.shape)}|".encode())
        digest.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class Cache:
    """A file of outputs by sample, ``FOLDER/KEY.sqlite``: a batch is written whole or not at all, several processes may
    read and write it. `key` names all that outputs depend on but the sample.

    Raises:
        OSError: the file cannot be opened, read or written; the message says which and why.
    """

    def __init__(self, folder: str | os.PathLike, key: str) -> None:
        self.path = pathlib.Path(folder) / f"{key}.sqlite"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._run(lambda db: db.execute("CREATE TABLE IF NOT EXISTS outputs (sample TEXT PRIMARY KEY, data BLOB)"))

    def get(self, samples: Sequence[str]) -> dict[str, Outputs]:
        """Those of `samples` that are there."""
        query = "SELECT data FROM outputs WHERE sample = ?"
        rows = self._run(lambda db: [(s, db.execute(query, (s,)).fetchone()) for s in samples])
        return {sample: load(row[0]) for sample, row in rows if row}

    def put(self, outputs: Iterable[tuple[str, Outputs]]) -> None:
        rows = [(sample, save({k: t.contiguous().cpu() for k, t in o.items()})) for sample, o in outputs]
        self._run(lambda db: db.executemany("INSERT OR REPLACE INTO outputs VALUES (?, ?)", rows))

    def _run(self, action):  # type: ignore[no-untyped-def]
        """One transaction on a connection of its own, which no process can inherit."""
        try:
            with closing(sqlite3.connect(self.path, timeout=60)) as db, db:
                return action(db)
        except sqlite3.Error as e:
            raise OSError(f"distill: the cache {self.path} cannot be used: {e}") from e
