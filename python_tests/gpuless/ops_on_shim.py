"""The CUDA source of the operators run on the CPU as torch ops: torch.ops.spikecore_shim.*, of csrc/<op>/*."""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import pytest
import torch
from backends import through
from gpuless import shim
from native import kernels

OPS = kernels.cmake_list("ops")
_loaded: dict[bool, ctypes.CDLL] = {}


def cache_dir() -> Path:
    """One folder a user for what is built; its files are named by their content, so stale ones are never taken."""
    folder = Path(tempfile.gettempdir()) / f"spikecore-shim-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user")
    return folder


def on_shim(op: str) -> Callable:
    """`spikecore.ops.<op>` by its CUDA source on the checked shim, which the first call builds."""

    def call(*args: Any, **kwargs: Any) -> Any:
        load(cache_dir(), checked=True)
        return through(op, torch.ops.spikecore_shim)(*args, **kwargs)

    return call


def load(cache: Path, *, checked: bool) -> ctypes.CDLL:
    """Build (or take from `cache`) and load the operators; one library a process, so `checked` must not change."""
    if checked not in _loaded:
        assert not _loaded, "the operators of one process are either checked or not"
        _loaded[checked] = _build_and_load(cache, checked)
    return _loaded[checked]


def set_order(library: ctypes.CDLL, seed: int) -> None:
    """Order of threads and blocks: 0 natural, 1 reversed, else random."""
    library.shim_set_order(ctypes.c_uint(seed))


def _build_and_load(cache: Path, checked: bool) -> ctypes.CDLL:
    kernels = shim.build([shim.CSRC / f"{op}/{op}_cuda.cu" for op in OPS], cache, checked=checked)
    sources = [shim.CSRC / f"{op}/{op}.cpp" for op in OPS] + [shim.TESTING / f"{op}_buffers.cpp" for op in OPS]
    sources.append(shim.TESTING / "ops_on_shim.cpp")
    torch_dir = Path(torch.__file__).parent
    digest = shim._digest([*sources, *shim._headers([shim.CSRC])], [str(torch_dir), torch.__version__])
    library = cache / f"libops_{kernels.stem.removeprefix('libshim_')}_{digest}.so"
    partial = library.with_suffix(f".{os.getpid()}.so")
    with filelock.FileLock(library.with_suffix(".lock")):
        if not library.exists():
            command = [
                "g++", "-shared", "-fPIC", "-std=c++20", "-O1", f"-I{shim.CSRC}", f"-isystem{torch_dir / 'include'}",
                f"-isystem{shim.cuda_include()}", "-DSPK_SHIM", "-DSPK_CUDA", "-DUSE_CUDA",
                "-DSPK_LIBRARY=spikecore_shim", "-DTORCH_TARGET_VERSION=0x020a000000000000",
                *map(str, sources), str(kernels), f"-Wl,-rpath,{cache}", f"-L{torch_dir / 'lib'}",
                "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-o", str(partial),
            ]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                pytest.fail(f"{' '.join(command)}\n{done.stderr[-4000:]}")
            partial.rename(library)
    torch.ops.load_library(library)
    return ctypes.CDLL(str(library))
