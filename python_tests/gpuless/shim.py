"""Builds .cu sources with g++ and csrc/testing into a library that runs the kernels on the CPU, and calls it.

library = build([CSRC / "lif/lif_cuda.cu"], cache)
shim = Shim(library)
shim.reset(seed=1, ro_x=x, out=out)
assert shim.call("spk::lif_fwd_cuda", ctypes.byref(params), None) == 0
assert not shim.error
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import filelock
import pytest
import torch

CSRC = Path(__file__).resolve().parents[2] / "csrc"
TESTING = CSRC / "testing"

FLAGS = ["-std=c++20", "-fPIC", "-ffp-contract=off", "-DSPK_HOST", "-Wno-attributes", "-Wno-unknown-pragmas"]
# Without SRA and the vectoriser an access in the source stays one access: the coalescing count depends on it.
CHECKED = [
    "-fsanitize=thread,alignment,bounds,signed-integer-overflow,shift,integer-divide-by-zero",
    "-fno-tree-sra",
    "-fno-ipa-sra",
    "-fno-tree-vectorize",
]
RENAMED = [f"--redefine-sym={name}=shim_{name}" for name in ("memcpy", "memmove", "memset")]


def _toolkit_of_nvcc() -> Path | None:
    if not (nvcc := shutil.which("nvcc")):
        return None
    dry = subprocess.run([nvcc, "-dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.+)$", dry.stderr + dry.stdout, re.M)
    return Path(top[1].strip()) if top else None


@functools.cache
def cuda_include() -> Path:
    """The folder of the CUDA headers; skips the test where there is none."""
    roots = [_toolkit_of_nvcc(), os.environ.get("CUDA_HOME"), *Path(torch.__file__).parents[1].glob("nvidia/cu1*")]
    for root in filter(None, roots):
        include = Path(root) / "include"
        if (include / "cuda_fp16.h").exists() and (include / "cuda_runtime_api.h").exists():
            return include.resolve()
    pytest.skip("no CUDA headers: neither nvcc, nor $CUDA_HOME, nor pip's nvidia/cu13", allow_module_level=True)


def _require_host() -> None:
    for tool in ("g++", "objcopy"):
        if not shutil.which(tool):
            pytest.skip(f"the host shim needs {tool}", allow_module_level=True)
    if platform.machine() != "x86_64":
        pytest.skip("the host shim switches stacks in x86-64 assembly", allow_module_level=True)


def _digest(files: Sequence[Path], words: Sequence[str]) -> str:
    h = hashlib.sha256()
    for path in files:
        h.update(str(path).encode() + path.read_bytes())
    h.update("\0".join(words).encode())
    return h.hexdigest()[:16]


def _headers(folders: Sequence[Path]) -> list[Path]:
    return sorted(p for f in folders for p in f.rglob("*") if p.suffix in (".h", ".cuh", ".cpp"))


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")


def _compile(source: Path, extra: Sequence[str], cache: Path, inputs: str) -> Path:
    out = cache / f"{source.stem}_{_digest([source], [inputs, *extra])}.o"
    with filelock.FileLock(out.with_suffix(".lock")):  # one of the test processes compiles, the others wait
        if not out.exists():
            partial = out.with_suffix(f".{os.getpid()}.o")
            includes = [f"-I{CSRC}", f"-isystem{cuda_include()}"]
            _run(["g++", *FLAGS, *includes, *extra, "-x", "c++", "-c", str(source), "-o", str(partial)])
            if CHECKED[0] in extra:
                _run(["objcopy", *RENAMED, str(partial)])
            partial.rename(out)
    return out


def build(
    sources: Sequence[Path | str],
    cache: Path,
    *,
    checked: bool = True,
    defines: Sequence[str] = (),
    include_dirs: Sequence[Path | str] = (),
    optimise: str = "",
) -> Path:
    """Compile `sources` and the shim into one shared library in `cache`, or take it from there where nothing changed.

    checked: every access of the kernels is checked (bounds, alignment, races ...); else as fast as the CPU allows.
    defines: preprocessor names to set, `"NAME"` or `"NAME=value"`.
    """
    _require_host()
    cache = Path(cache)
    cache.mkdir(parents=True, exist_ok=True)
    folders = [CSRC, *map(Path, include_dirs)]
    inputs = _digest(_headers(folders), [str(cuda_include())])
    level = optimise or ("-O1" if checked else "-O2")  # -O1 compiles many instantiations in half the time
    extra = [level, *(CHECKED if checked else []), *(f"-D{d}" for d in defines), *(f"-I{d}" for d in include_dirs)]
    objects = [_compile(TESTING / name, ["-O2"], cache, inputs) for name in ("shim.cpp", "checks.cpp")]
    objects += [_compile(Path(source), extra, cache, inputs) for source in sources]
    library = cache / f"libshim_{_digest(objects, [])}.so"
    if not library.exists():
        partial = library.with_suffix(f".{os.getpid()}.so")
        _run(["g++", "-shared", "-Wl,-Bsymbolic", *map(str, objects), "-o", str(partial)])
        partial.rename(library)
    return library


def apart(buffers: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies, each amid 64 KiB that belong to no argument: a stray access near one of them meets no other."""

    def copy(t: torch.Tensor) -> torch.Tensor:
        margin = (1 << 16) // t.element_size()
        return t.new_zeros(2 * margin + t.numel())[margin : margin + t.numel()].view(t.shape).copy_(t)

    return {name: copy(t) for name, t in buffers.items()}


class Shim:
    """A library made by `build`. One launch sequence: `reset`, `call`s, then `error` and the counts."""

    def __init__(self, library: Path) -> None:
        self._path = library
        self._library = ctypes.CDLL(str(library))
        self._library.shim_error.restype = ctypes.c_char_p
        self._library.shim_count.restype = ctypes.c_uint64
        self._library.shim_switches.restype = ctypes.c_uint64
        self._buffers: dict[str, torch.Tensor] = {}

    def reset(self, seed: int = 0, coalescing: bool = False, **buffers: torch.Tensor | None) -> None:
        """Forget the last run. Kernels may touch only `buffers`; those named ro_... are read-only.

        Races are told apart by element, so pass a tensor of the type that the kernel uses.

        seed: order of threads and blocks; 0 natural, 1 reversed, else random.
        """
        self._library.shim_reset(ctypes.c_uint(seed), int(coalescing))
        self._buffers = {name: t for name, t in buffers.items() if t is not None}
        for name, t in self._buffers.items():
            span = 1 + sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
            item = t.element_size()
            begin, size = ctypes.c_void_p(t.data_ptr()), ctypes.c_size_t(span * item)
            self._library.shim_register(begin, size, name.encode(), int(name.startswith("ro_")), item)

    @property
    def error(self) -> str:
        """The first fault since `reset`, or ''."""
        return self._library.shim_error().decode()

    @property
    def switches(self) -> int:
        return self._library.shim_switches()

    def count(self, write: bool, bytes_: int) -> int:
        """Accesses of 1, 2, 4, 8 or 16 bytes to the buffers."""
        return self._library.shim_count(int(write), bytes_.bit_length() - 1)

    def coalescing(self, write: bool) -> tuple[int, int]:
        """Requests (one warp executing one access) and the 32-byte sectors they touched."""
        requests, sectors = ctypes.c_uint64(), ctypes.c_uint64()
        self._library.shim_coalescing(int(write), ctypes.byref(requests), ctypes.byref(sectors))
        return requests.value, sectors.value

    def call(self, symbol: str, *args: object) -> int:
        """Call `symbol`, an extern "C" name or a C++ one (`spk::lif_fwd_cuda`), which returns int.

        Tensors become pointers, ints int64 (right for narrower parameters too), floats float, None a null pointer;
        ctypes objects pass as they are.
        """
        return self._function(symbol)(*map(_argument, args))

    @functools.cached_property
    def _symbols(self) -> dict[str, str]:
        listed = subprocess.run(
            ["nm", "-D", "--defined-only", str(self._path)], capture_output=True, text=True, check=True
        )
        mangled = [line.split()[-1] for line in listed.stdout.splitlines()]
        plain = subprocess.run(["c++filt", *mangled], capture_output=True, text=True, check=True).stdout.splitlines()
        return {name.split("(")[0]: m for name, m in zip(plain, mangled, strict=True)}

    def _function(self, symbol: str) -> ctypes._CFuncPtr:
        name = symbol if hasattr(self._library, symbol) else self._symbols[symbol]
        function = getattr(self._library, name)
        function.restype = ctypes.c_int
        return function


def _argument(value: object) -> object:
    if value is None:
        return ctypes.c_void_p()
    if isinstance(value, torch.Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, (bool, int)):
        return ctypes.c_int64(value)
    return ctypes.c_float(value) if isinstance(value, float) else value
