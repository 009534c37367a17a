"""Modules with planted defects, for checks that must find them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType


def planted(module: ModuleType, folder: Path, *edits: tuple[str, str]) -> ModuleType:
    """A second copy of `module`, written to `folder`, in which each `old` of edits (old, new) is replaced by `new`."""
    source = Path(module.__file__ or "").read_text()
    for old, new in edits:
        assert old in source, f"{module.__name__} no longer contains {old!r}"
        source = source.replace(old, new)
    path = folder / "planted.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("planted", path)
    assert spec is not None
    assert spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy
