"""Whole operators by compiled code: launchers as they are, each kernel they launch run by the PTX interpreter.

of_nvcc: the public function by its CUDA source, of_triton: by its Triton kernels. Both yield (function, names of the
kernels launched so far).
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from backends import through
from gpuless import aot, ops_on_shim, ptxvm
from gpuless.shim import CSRC

Launched = tuple[Callable[..., Any], list[str]]

# ---- nvcc: the launcher's host code runs in the shim's library, which hands every launch over to Python


class Dim3(ctypes.Structure):
    _fields_ = [(axis, ctypes.c_uint32) for axis in "xyz"]


LAUNCHER = ctypes.CFUNCTYPE(
    None, ctypes.c_char_p, Dim3, Dim3, ctypes.c_size_t, ctypes.c_int, ctypes.POINTER(ctypes.c_void_p),
    ctypes.POINTER(ctypes.c_size_t),
)  # fmt: skip


def plain(name: str) -> str:
    """sum_kernel<float, 4> of what g++ or c++filt make of it."""
    found = re.search(r"(\w+_kernel)(<[^<>()]*>)?", name)
    assert found, name
    return found[0]


class Kernels(dict[str, ptxvm.Kernel]):
    """By plain name, decoded when they are first asked for."""

    def __init__(self, *sources: Path) -> None:
        self.found: dict[str, tuple[str, str]] = {}
        for source in sources:
            ptx = aot.nvcc_ptx(source, [CSRC], ["-fmad=false"])
            names = ptxvm.entries(ptx)
            readable = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True).stdout
            self.found |= {plain(r): (ptx, name) for r, name in zip(readable.splitlines(), names, strict=True)}

    def __missing__(self, name: str) -> ptxvm.Kernel:
        kernel = self[name] = ptxvm.Kernel(*self.found[name])
        return kernel


def registered(library: ctypes.CDLL) -> dict[str, torch.Tensor]:
    """The memory that the launch may touch, as bytes; read-only: ro_NAME."""
    out: dict[str, torch.Tensor] = {}
    at, size, name, read_only = ctypes.c_void_p(), ctypes.c_size_t(), ctypes.c_char_p(), ctypes.c_int()
    places = [ctypes.byref(p) for p in (at, size, name, read_only)]
    library.shim_registered.restype = ctypes.c_bool
    while library.shim_registered(len(out), *places):
        assert name.value is not None
        label = ("ro_" if read_only.value else "") + name.value.decode()
        assert label not in out, f"{label} is registered twice"
        data = (ctypes.c_uint8 * size.value).from_address(at.value or 0)
        out[label] = torch.from_numpy(np.ctypeslib.as_array(data))
    return out


@contextlib.contextmanager
def of_nvcc(op: str, kernels: Kernels) -> Iterator[Launched]:
    launched: list[str] = []
    library = ops_on_shim.load(ops_on_shim.cache_dir(), checked=True)

    def launch(name: bytes, grid: Dim3, block: Dim3, shared: int, count: int, arguments: Any, sizes: Any) -> None:
        if library.shim_error():
            return
        try:  # ctypes would print an exception, and go on
            kernel = plain(name.decode().split("K = ")[1])
            launched.append(kernel)
            args = [ctypes.string_at(arguments[i], sizes[i]) for i in range(count)]
            sizes_of = [(d.x, d.y, d.z) for d in (grid, block)]
            ptxvm.launch(kernels[kernel], *sizes_of, args, shared=shared, buffers=registered(library))
        except Exception as error:
            library.shim_fail(f"{type(error).__name__}: {error}".encode())

    library.shim_error.restype = ctypes.c_char_p
    callback = LAUNCHER(launch)
    library.shim_set_launcher(callback)
    try:
        yield through(op, torch.ops.spikecore_shim), launched
    finally:
        library.shim_set_launcher(None)


# ---- Triton


POINTERS = {
    torch.uint8: "*u8", torch.int32: "*i32", torch.int64: "*i64", torch.float16: "*fp16", torch.bfloat16: "*bf16",
    torch.float32: "*fp32", torch.float64: "*fp64",
}  # fmt: skip


def type_of(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    return "fp32" if isinstance(value, float) else "i32" if -(1 << 31) <= value < 1 << 31 else "i64"


class Launch(NamedTuple):
    """What a launch of a @triton.jit function compiles, as a GPU would see these arguments."""

    fn: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    how: dict[str, Any]  # align16, options
    grid: tuple[int, ...]
    arguments: list[Any]

    def facts(self, arch: int) -> aot.Facts:
        return aot.triton_aot(self.fn, self.signature, self.constants, arch, **self.how)

    def run(self) -> None:
        compiled = aot.triton_compile(self.fn, self.signature, self.constants, 80, **self.how)
        kernel = ptxvm.Kernel(compiled.asm["ptx"], self.fn.__name__)
        threads = 32 * self.how["options"].get("num_warps", 4)
        ptxvm.launch(kernel, self.grid, threads, self.arguments, shared=compiled.metadata.shared)


class Launcher:
    """Stands for a @triton.jit function; `then` gets each of its launches."""

    def __init__(self, fn: Any, then: Callable[[Launch], None]) -> None:
        self.fn, self.then = fn, then

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **given: Any) -> None:
            names = self.fn.arg_names
            values = dict(zip(names, args, strict=False))
            values |= {n: given.pop(n) for n in names if n in given}
            constants = {p.name: values[p.name] for p in self.fn.params if p.is_constexpr}
            constants |= {n: v for n, v in values.items() if v is None or (type(v) is int and v == 1)}
            free = {n: v for n, v in values.items() if n not in constants}
            aligned = [n for n, v in free.items() if not isinstance(v, float) and _address(v) % 16 == 0]
            signature = {n: type_of(v) for n, v in free.items()}
            how = {"align16": aligned, "options": given}
            self.then(Launch(self.fn, signature, constants, how, grid, list(free.values())))

        return launch


def _address(value: Any) -> int:
    return value.data_ptr() if isinstance(value, torch.Tensor) else value


@contextlib.contextmanager
def of_triton(op: str, then: Callable[[Launch], None] = Launch.run) -> Iterator[Launched]:
    """`then`: what is done with a launch."""
    pytest.importorskip("triton", reason="triton is not installed")
    from triton.runtime.jit import JITFunction

    module = importlib.import_module(f"spikecore.triton.{op}")
    launched: list[str] = []

    def launch(one: Launch) -> None:
        launched.append(one.fn.__name__)
        then(one)

    with pytest.MonkeyPatch.context() as patch:
        for name, fn in list(vars(module).items()):
            if name.endswith("_kernel") and isinstance(fn, JITFunction):
                patch.setattr(module, name, Launcher(fn, launch))
        yield through(op, module), launched
