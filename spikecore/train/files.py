"""Files that are written whole or not at all."""

import contextlib
import os
from pathlib import Path

__all__ = ["prepare_folder", "replace_file"]


def prepare_folder(out: Path) -> None:
    """Create the folder and find out whether it can be written before much work depends on it.

    Raises:
        OSError: it cannot; the message says what and why.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise _plain(e, f"cannot create the folder {out}") from e
    probe = out / ".probe"
    replace_file(probe, b"probe")
    probe.unlink()


def replace_file(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: whatever stops the program leaves the old one or the new one.

    Raises:
        OSError: it cannot be written; the message says what and why.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError as e:
        raise _plain(e, f"cannot write {path}") from e
    finally:
        with contextlib.suppress(OSError):  # what refused the file may refuse this too; the first error tells why
            part.unlink(missing_ok=True)


def _plain(e: OSError, what: str) -> OSError:
    return OSError(e.errno, f"{what}: {e.strerror or e}")
