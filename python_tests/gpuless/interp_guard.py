"""Makes Triton's interpreter strict: out-of-bounds accesses and races between programs fault, bf16 computes right.

Call `install()` in a process started with TRITON_INTERPRET=1, before any kernel runs. The stock interpreter reads and
writes past tensors silently, runs programs one after the other so that races never show, and keeps bf16 as uint16 on
whose bits it computes. It patches private names, hence one version of Triton only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

SUPPORTED = "3.8."
NOBODY = -1
Array = np.ndarray[Any, Any]


class KernelFault(Exception):  # noqa: N818
    """What a GPU run would do wrong, silently or not."""


@dataclass
class Argument:
    """A tensor argument's bytes [begin, end), and per element the last program that touched it."""

    name: str
    begin: int
    end: int
    itemsize: int
    writer: Array
    reader: Array
    atomic: Array


arguments: list[Argument] = []
_installed = False


def install() -> None:
    """Patch the interpreter; skips the test on an untested version of Triton."""
    global _installed
    try:
        import triton
        from triton.runtime import interpreter
    except ImportError:
        pytest.skip("triton is not installed", allow_module_level=True)
    if not triton.__version__.startswith(SUPPORTED):
        pytest.skip(f"interp_guard knows triton {SUPPORTED}*, not {triton.__version__}", allow_module_level=True)
    if not _installed:
        _guard_memory(interpreter)
        _fix_bf16(interpreter, triton.language)
        _installed = True


# ---- memory


def _register(names: Iterable[str], values: Iterable[Any]) -> None:
    arguments.clear()
    for name, t in zip(names, values, strict=False):
        if not isinstance(t, torch.Tensor) or not t.numel():
            continue
        span = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))  # a view's own, not its storage's
        size, begin = t.element_size(), t.data_ptr()
        same = next(
            (a for a in arguments if a.begin == begin and a.itemsize == size and a.end == begin + span * size), None
        )
        shadows = (
            (same.writer, same.reader, same.atomic) if same else [np.full(span, NOBODY, np.int32) for _ in range(3)]
        )
        arguments.append(Argument(name, begin, begin + span * size, size, *shadows))


def _check_race(a: Argument, index: Array, program: int, where: str, kind: str) -> None:
    def others(shadow: Array) -> bool:
        return bool(((shadow[index] != NOBODY) & (shadow[index] != program)).any())

    if kind != "atomic" and others(a.atomic):
        raise KernelFault(f"race: {where} {kind}s '{a.name}' where another program updates it atomically")
    if others(a.writer):
        raise KernelFault(f"race: {where} {kind}s '{a.name}' where another program stores")
    if kind != "load" and others(a.reader):
        raise KernelFault(f"race: {where} {kind}s '{a.name}' where another program loads")
    if kind == "store" and np.unique(index).size != index.size:
        raise KernelFault(f"race: lanes of {where} store to one address of '{a.name}'")
    {"load": a.reader, "store": a.writer, "atomic": a.atomic}[kind][index] = program


def _out_of_bounds(pointers: Array, where: str, kind: str) -> KernelFault:
    at = int(pointers[0])
    message = f"out of bounds {kind}: {pointers.size} lane(s) of {where}"
    if arguments:
        near = min(arguments, key=lambda a: min(abs(at - a.begin), abs(at - a.end)))
        message += f", nearest '{near.name}' at byte {at - near.begin} of {near.end - near.begin}"
    return KernelFault(message)


def _check(builder: Any, pointers: Array, mask: Array, size: int, kind: str) -> None:
    x, y, z = builder.grid_idx
    program = (x * builder.grid_dim[1] + y) * builder.grid_dim[2] + z
    where = f"program ({x}, {y}, {z})"
    pointers, mask = np.broadcast_arrays(pointers, mask)
    p = pointers[mask.astype(bool)].astype(np.int64)
    unknown = np.ones(p.size, bool)
    for a in arguments:
        inside = unknown & (p >= a.begin) & (p + size <= a.end)
        unknown &= ~inside
        if inside.any() and a.itemsize == size:  # an access of another width than the tensor's: bounds only
            _check_race(a, (p[inside] - a.begin) // size, program, where, kind)
    if unknown.any():
        raise _out_of_bounds(p[unknown], where, kind)


def _guard_memory(interpreter: Any) -> None:
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    init, load, store = executor._init_args_hst, builder.create_masked_load, builder.create_masked_store
    rmw, cas = builder.create_atomic_rmw, builder.create_atomic_cas

    def init_args(self: Any, args: Any, kwargs: Any) -> Any:
        host, host_kwargs = init(self, args, kwargs)
        values = [
            interpreter._unwrap_tensor(v) if hasattr(v, "data_ptr") else v for v in (*host, *host_kwargs.values())
        ]
        _register([*self.arg_names[: len(host)], *host_kwargs], values)
        return host, host_kwargs

    def masked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        _check(self, pointers.data, mask.data, interpreter._get_np_dtype(pointers.get_element_ty()).itemsize, "load")
        return load(self, pointers, mask, *rest)

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        _check(self, pointers.data, mask.data, interpreter._get_np_dtype(pointers.get_element_ty()).itemsize, "store")
        return store(self, pointers, value, mask, *rest)

    def atomic_rmw(self: Any, what: Any, pointer: Any, value: Any, mask: Any, *rest: Any) -> Any:
        _check(self, pointer.data, mask.data, value.data.itemsize, "atomic")
        return rmw(self, what, pointer, value, mask, *rest)

    def atomic_cas(self: Any, pointer: Any, expected: Any, value: Any, *rest: Any) -> Any:
        _check(self, pointer.data, np.ones_like(pointer.data, bool), value.data.itemsize, "atomic")
        return cas(self, pointer, expected, value, *rest)

    executor._init_args_hst = init_args
    builder.create_masked_load, builder.create_masked_store = masked_load, masked_store
    builder.create_atomic_rmw, builder.create_atomic_cas = atomic_rmw, atomic_cas


# ---- bf16


def bf16_bits(value: Array) -> Array:
    """float32 -> bits of the nearest bf16, ties to even."""
    u = np.ascontiguousarray(value, np.float32).view(np.uint32)
    near = ((u + np.uint32(0x7FFF) + (u >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(value), np.uint16(0x7FC0), near)


def bf16_values(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _fix_bf16(interpreter: Any, tl: Any) -> None:
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    dot, cast, fp_to_fp = builder.create_dot, builder.cast_impl, builder.create_fp_to_fp

    def is_bf16(*handles: Any) -> bool:
        return any(h.dtype.scalar == tl.bfloat16 for h in handles)

    def values(h: Any) -> Array:
        return bf16_values(h.data) if is_bf16(h) else h.data

    def elementwise(original: Callable[..., Any], operands: int) -> Callable[..., Any]:
        """unary_op, binary_op or ternary_op, computed in float32 and rounded once where bf16 takes part."""

        def fixed(self: Any, *args: Any) -> Any:
            if not is_bf16(*args[:operands]):
                return original(self, *args)
            out = args[operands](*map(values, args[:operands]))
            return handle(out, tl.int1) if out.dtype == bool else handle(bf16_bits(out), tl.bfloat16)

        return fixed

    def cast_impl(self: Any, src: Any, to: Any) -> Any:
        if to.scalar == tl.bfloat16 and not is_bf16(src):
            return handle(bf16_bits(src.data.astype(np.float32)), to.scalar)
        if is_bf16(src) and to.scalar != tl.bfloat16:
            return handle(bf16_values(src.data).astype(interpreter._get_np_dtype(to)), to.scalar)
        return cast(self, src, to)

    def create_fp_to_fp(self: Any, src: Any, to: Any, rounding: Any) -> Any:
        return (
            cast_impl(self, src, to) if is_bf16(src) or to.scalar == tl.bfloat16 else fp_to_fp(self, src, to, rounding)
        )

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        if not is_bf16(a, b):
            return dot(self, a, b, d, *rest)
        return handle(np.matmul(values(a), values(b)).astype(d.data.dtype) + d.data, d.dtype.scalar)

    def create_fabs(self: Any, a: Any) -> Any:
        return handle(a.data & np.uint16(0x7FFF), tl.bfloat16) if is_bf16(a) else fabs(self, a)

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        """One rounding (but for rare ties), as the hardware does; the stock one rounds the product too."""
        out = values(x).astype(np.float64) * values(y) + values(z)
        return handle(bf16_bits(out.astype(np.float32)) if is_bf16(z) else out.astype(z.data.dtype), z.dtype.scalar)

    fabs = builder.create_fabs
    builder.create_fabs, builder.create_fma = create_fabs, create_fma
    for name, operands in (("unary_op", 1), ("binary_op", 2), ("ternary_op", 3)):
        setattr(builder, name, elementwise(getattr(builder, name), operands))
    builder.cast_impl, builder.create_fp_to_fp, builder.create_dot = cast_impl, create_fp_to_fp, create_dot
