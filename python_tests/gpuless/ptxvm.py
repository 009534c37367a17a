"""Runs PTX, as nvcc and Triton emit it for sm_80, in numpy: the one check of compiled code that needs no GPU.

    kernel = Kernel(ptx, "lif_fwd")                # any part of the entry's name that is unique
    launch(kernel, (4,), (128,), [x, y, 1000, 0.9], shared=2048)

The threads of a block go in lock step, the smallest program counter first; blocks one after the other. Global memory
is the tensors passed as arguments and in `buffers`; anything else is a PtxFault. Copies of cp.async land when they are
waited for. Not here: calls, textures, wgmma, mbarriers, clusters. ptxas's own step stays unchecked.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

Array = np.ndarray[Any, Any]

# Windows of the generic address space; global memory is the host's own addresses, far below.
WINDOW = {"shared": 1 << 56, "local": 2 << 56, "param": 3 << 56}

BITS = {"pred": 1, "f16x2": 32, "bf16x2": 32, "bf16": 16, "tf32": 32}
BITS |= {f"{kind}{n}": n for kind in "busf" for n in (8, 16, 32, 64) if kind != "f" or n > 8}
STRUCT = {"b8": "B", "u8": "B", "s8": "b", "b16": "H", "u16": "H", "s16": "h", "b32": "I", "u32": "I", "s32": "i"}
STRUCT |= {"b64": "Q", "u64": "Q", "s64": "q", "f16": "e", "f32": "f", "f64": "d"}


class PtxFault(Exception):  # noqa: N818
    """What a GPU would do wrong: an access out of bounds or misaligned, a barrier that not all threads reach."""


class Instruction(NamedTuple):
    op: str
    mods: tuple[str, ...]
    operands: tuple[str, ...]
    guard: str | None  # predicate register
    guard_not: bool
    text: str

    @property
    def type(self) -> str:
        return self.mods[-1]


# ---- parsing


def entries(ptx: str) -> list[str]:
    return re.findall(r"\.entry\s+([\w$]+)", ptx)


def _statements(body: str) -> list[str]:
    """Statements in order; scopes appear as '{' and '}', labels as 'name:'."""
    out: list[str] = []
    text, depth = "", 0
    for ch in body:
        blank = not text.strip()
        if ch in "{}" and blank and not depth:
            out.append(ch)
        elif ch == ";":
            out.append(" ".join(text.split()))
            text = ""
        elif ch == ":" and re.fullmatch(r"\s*[$\w]+", text):
            out.append(text.strip() + ":")
            text = ""
        else:
            depth += (ch == "{") - (ch == "}")
            text += ch
    return list(filter(None, out))


@dataclass
class Parameter:
    name: str
    type: str
    offset: int
    size: int


@dataclass
class Kernel:
    """One entry of a PTX module, decoded."""

    ptx: str
    name: str
    parameters: list[Parameter] = field(default_factory=list)
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)  # of registers, in bits
    symbols: dict[str, tuple[str, int]] = field(default_factory=dict)  # name: space, offset
    shared_bytes: int = 0
    local_bytes: int = 0

    def __post_init__(self) -> None:
        ptx = re.sub(r"//[^\n]*|/\*.*?\*/", "", self.ptx, flags=re.S)
        ptx = re.sub(r"^\s*\.(loc|file)\b[^\n]*", "", ptx, flags=re.M)
        names = entries(ptx)
        found = [e for e in names if e == self.name] or [e for e in names if self.name in e]
        if len(found) != 1:
            raise KeyError(f"{self.name!r} names {len(found)} of the entries {names}")
        self.name = found[0]
        entry = re.search(r"\.entry\s+" + re.escape(self.name) + r"\s*\((.*?)\)[^{]*\{(.*?)\n\}", ptx, re.S)
        assert entry
        self._read_parameters(entry[1])
        words = set(re.findall(r"[\w$]+", entry[2]))
        module = re.findall(r"^\s*((?:\.extern )?\.shared[^;]*);", ptx.replace(entry[2], ""), re.M)
        keywords = {"extern", "align", "shared", *BITS}
        outer = [" ".join(d.split()) for d in module if set(re.findall(r"[A-Za-z_$][\w$]*", d)) & words - keywords]
        static = [d for d in outer if not d.startswith(".extern")]
        for text in static:
            self._declare(text)
        self._read_body(_statements(entry[2]))
        for text in outer:
            if text not in static:  # dynamic shared memory comes last
                self._declare(text.removeprefix(".extern "))

    def _read_parameters(self, text: str) -> None:
        pointer = r"(?:\.ptr\s+(?:\.\w+\s+)??(?:\.align\s+\d+\s+)?)?"
        pattern = r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+" + pointer + r"([\w$]+)(?:\[(\d+)\])?"
        offset = 0
        for align, kind, name, count in re.findall(pattern, text):
            size = BITS[kind] // 8
            step = int(align or size)
            offset = -(-offset // step) * step
            self.parameters.append(Parameter(name, kind, offset, size * int(count or 1)))
            self.symbols[name] = ("param", offset)
            offset += size * int(count or 1)

    def _declare(self, text: str) -> None:
        m = re.match(r"\.(shared|local) (?:\.align (\d+) )?\.(\w+) ([\w$]+)(?:\[(\d*)\])?", text)
        if not m:
            raise NotImplementedError(text)
        space, align, kind, name, count = m.groups()
        used = self.shared_bytes if space == "shared" else self.local_bytes
        begin = -(-used // int(align or 16)) * int(align or 16)
        self.symbols[name] = (space, begin)
        end = begin + BITS[kind] // 8 * int(1 if count is None else count or 0)
        if space == "shared":
            self.shared_bytes = end
        else:
            self.local_bytes = -(-end // 16) * 16

    def _read_body(self, statements: list[str]) -> None:
        scopes: list[dict[str, str]] = [{}]
        opened = 0
        for text in statements:
            if text == "{":
                opened += 1
                scopes.append({})
            elif text == "}":
                scopes.pop()
            elif text.endswith(":"):
                self.labels[text[:-1]] = len(self.code)
            elif text.startswith(".reg"):
                self._registers(text, scopes[-1] if len(scopes) > 1 else None, opened)
            elif text.startswith((".shared", ".local")):
                self._declare(text)
            elif not text.startswith("."):
                for scope in scopes[1:]:
                    text = re.sub(r"%?[A-Za-z_$][\w$]*", lambda m, s=scope: s.get(m[0], m[0]), text)
                self.code.append(instruction(text))

    def _registers(self, text: str, scope: dict[str, str] | None, number: int) -> None:
        kind, names = re.fullmatch(r"\.reg \.(\w+) (.*)", text).groups()  # type: ignore[union-attr]
        for name in re.split(r"\s*,\s*", names):
            stem, count = re.fullmatch(r"(%?[\w$]+?)(?:<(\d+)>)?", name).groups()  # type: ignore[union-attr]
            for one in [f"{stem}{i}" for i in range(int(count))] if count else [stem]:
                unique = one if scope is None else f"%scope{number}.{one.lstrip('%')}"
                if scope is not None:
                    scope[one] = unique
                self.widths[unique] = BITS[kind]


def instruction(text: str) -> Instruction:
    m = re.fullmatch(r"(?:@(!?)(%?[\w.$]+) )?([\w.:]+) ?(.*)", text)
    if not m:
        raise NotImplementedError(text)
    op, *mods = m[3].replace("::cta", "").split(".")
    operands = tuple(o.strip() for o in re.findall(r"\s*(\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*)", m[4]))
    return Instruction(op, tuple(mods), operands, m[2], m[1] == "!", text)


def parts(operand: str) -> list[str]:
    """The registers of '{a, b}', or the one operand."""
    return [p.strip() for p in operand.strip("{} ").split(",")]


# ---- memory


@dataclass
class Segment:
    name: str
    base: int
    data: Array  # bytes
    read_only: bool = False


def _tensor_segment(name: str, t: torch.Tensor) -> Segment:
    span = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
    flat = t.detach().as_strided((span,), (1,)).view(torch.uint8).numpy() if span else np.zeros(0, np.uint8)
    return Segment(name, t.data_ptr(), flat, name.startswith("ro_"))


class Memory:
    def __init__(self, segments: Sequence[Segment]) -> None:
        self.segments = sorted((s for s in segments if s.data.size), key=lambda s: s.base)
        self.bases = np.array([s.base for s in self.segments], np.uint64)

    def _find(self, address: Array, size: int, what: str) -> list[tuple[Segment, Array, Array]]:
        """Per segment: it, the lanes that fall into it, and the byte indices [lanes, size] there."""
        out = []
        index = np.maximum(np.searchsorted(self.bases, address, side="right").astype(np.int64) - 1, 0)
        for i in np.unique(index):
            s, lanes = self.segments[i], np.flatnonzero(index == i)
            offset = address[lanes].astype(np.int64) - s.base
            wrong = (offset < 0) | (offset + size > s.data.size)
            if wrong.any():
                at = int(offset[wrong][0])
                raise PtxFault(f"out of bounds {what} of {size} bytes at byte {at} of {s.name} ({s.data.size} bytes)")
            if (address[lanes] % np.uint64(size)).any():
                raise PtxFault(f"misaligned {size}-byte {what} of {s.name}")
            out.append((s, lanes, offset[:, None] + np.arange(size)))
        return out

    def load(self, address: Array, size: int, what: str = "read") -> Array:
        data = np.zeros((address.size, size), np.uint8)
        for s, lanes, at in self._find(address, size, what):
            data[lanes] = s.data[at]
        return data

    def store(self, address: Array, data: Array) -> None:
        for s, lanes, at in self._find(address, data.shape[1], "write"):
            if s.read_only:
                raise PtxFault(f"write to the read-only {s.name}")
            s.data[at] = data[lanes]


# ---- values


def to_bf16(value: Array) -> Array:
    """Bits of the nearest bf16, ties to even; from float64 by float32 rounded to odd, so that it rounds only once."""
    near = value.astype(np.float32)
    u = near.view(np.uint32)
    if value.dtype == np.float64:
        u = np.where(np.abs(near) > np.abs(value), u - np.uint32(1), u)
        u = np.where(u.view(np.float32) != value, u | np.uint32(1), u)
    bits = ((u + np.uint32(0x7FFF) + (u >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(value), np.uint16(0x7FFF), bits)


def _numpy(kind: str) -> Any:
    return np.dtype({"b": "u", "u": "u", "s": "i", "f": "f"}[kind[0]] + str(BITS[kind] // 8))


def decode(bits: Array, kind: str) -> Array:
    """Unsigned bits -> values; bf16 as float32, packed types as [threads, 2]."""
    if kind.endswith("x2"):
        return decode(np.ascontiguousarray(bits).view(np.uint16).reshape(-1, 2), kind[:-2])
    if kind == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return bits.view(np.float32 if kind == "tf32" else _numpy(kind))


def encode(value: Array, kind: str) -> Array:
    if kind.endswith("x2"):
        return np.ascontiguousarray(encode(value, kind[:-2])).view(np.uint32)[:, 0]
    if kind == "bf16":
        return to_bf16(value)
    width = BITS[kind]
    return np.ascontiguousarray(value.astype(_numpy(kind), copy=False)).view(f"u{width // 8}")


# ---- one block


class Block:
    """The threads of one block: their registers and memory. The handlers in ptxvm_ops and ptxvm_warp work on it."""

    def __init__(
        self, kernel: Kernel, index: Sequence[int], grid: Sequence[int], block: Sequence[int], memory: Memory
    ) -> None:
        self.kernel, self.memory = kernel, memory
        self.n = n = block[0] * block[1] * block[2]
        self.thread = np.arange(n)
        self.pc = np.zeros(n, np.int64)
        self.waiting = np.zeros(n, bool)
        self.exited = np.zeros(n, bool)
        self.copies: list[tuple[Array, Array, Array, Array, Array, int]] = []  # cp.async not yet waited for
        self.copy_group = np.zeros(n, np.int64)
        self.registers: dict[str, Array] = {}
        lane = self.thread % 32
        special = {
            "%laneid": lane,
            "%warpid": self.thread // 32,
            "%lanemask_lt": (1 << lane) - 1,
            "%lanemask_eq": 1 << lane,
        }
        special |= {
            "%lanemask_le": (2 << lane) - 1,
            "%lanemask_ge": (1 << 32) - (1 << lane),
            "%lanemask_gt": (1 << 32) - (2 << lane),
        }
        tid = (self.thread % block[0], self.thread // block[0] % block[1], self.thread // (block[0] * block[1]))
        for i, axis in enumerate("xyz"):
            special[f"%tid.{axis}"] = tid[i]
            for name, size in (("ctaid", index), ("ntid", block), ("nctaid", grid)):
                special[f"%{name}.{axis}"] = np.full(n, size[i])
        self.special = {name: v.astype(np.uint32) for name, v in special.items()}

    def register(self, name: str) -> Array:
        if name not in self.registers:
            width = self.kernel.widths.get(name)
            if width is None:
                raise NotImplementedError(f"operand {name}")
            self.registers[name] = np.zeros(self.n, bool if width == 1 else f"u{width // 8}")
        return self.registers[name]

    def bits(self, operand: str, width: int) -> Array:
        """An operand's low `width` bits, unsigned."""
        kind = f"u{width // 8}"
        if operand in self.special:
            return self.special[operand].astype(kind)
        if m := re.fullmatch(r"(-?)(?:(0[xX][0-9a-fA-F]+)|(\d+))U?", operand):
            value = int(m[2], 16) if m[2] else int(m[3])
            return np.full(self.n, (-value if m[1] else value) % (1 << width), kind)
        if m := re.fullmatch(r"(-?)0([fFdD])([0-9a-fA-F]+)", operand):
            return np.full(self.n, int(m[3], 16), kind)
        if operand in self.kernel.symbols:
            space, offset = self.kernel.symbols[operand]
            each = self.thread * self.kernel.local_bytes if space == "local" else np.zeros(self.n, np.int64)
            return (each + offset).astype(kind)
        return self.register(operand).astype(kind)

    def read(self, operand: str, kind: str) -> Array:
        if kind == "pred":
            if operand.lstrip("-").isdigit():
                return np.full(self.n, int(operand) != 0)
            return ~self.register(operand[1:]) if operand[0] == "!" else self.register(operand)
        return decode(self.bits(operand, BITS[kind]), kind)

    def write(self, operand: str, value: Array, kind: str, mask: Array) -> None:
        if operand == "_":
            return
        register = self.register(operand)
        if register.dtype != bool:
            value = encode(value, kind)
            if kind[0] == "s":
                value = value.view(f"i{value.itemsize}")
        register[mask] = value.astype(register.dtype)[mask]

    def address(self, operand: str, mods: Sequence[str]) -> Array:
        """Generic addresses of '[base+offset]' in the space that the modifiers name."""
        m = re.fullmatch(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\w+))?\s*\]", operand)
        if not m:
            raise NotImplementedError(f"address {operand}")
        address = self.bits(m[1], 64) + np.uint64(int(m[2] or "0", 0) % (1 << 64))
        for space, base in WINDOW.items():
            if space in mods:
                return address & np.uint64(0xFFFFFFFF) | np.uint64(base)
        return address

    def step(self, handlers: Mapping[str, Any]) -> bool:
        """Run the instruction of the smallest program counter; False when every thread has exited."""
        ready = ~(self.waiting | self.exited)
        if not ready.any():
            if self.exited.all():
                return False
            if np.unique(self.pc[self.waiting]).size > 1:
                raise PtxFault("threads of one block wait at different barriers")
            ready, self.waiting = self.waiting, np.zeros(self.n, bool)
            arrived = True
        else:
            arrived = False
        at = int(self.pc[ready].min())
        active = ready & (self.pc == at)
        ins = self.kernel.code[at]
        mask = active if ins.guard is None else active & (self.register(ins.guard) != ins.guard_not)
        if ins.op in ("bar", "barrier") and "warp" not in ins.mods and not arrived:
            self.waiting |= mask
            self.pc[active & ~mask] += 1
            return True
        self.pc[active] += 1
        handler = handlers.get(ins.op)
        if handler is None:
            raise NotImplementedError(ins.text)
        try:
            handler(self, ins, mask)
        except PtxFault as fault:
            raise PtxFault(f"{fault} ({ins.text}; {self.kernel.name})") from None
        except KeyError as missing:
            raise NotImplementedError(f"{ins.text}: {missing}") from missing
        return True


def _pack(kernel: Kernel, args: Sequence[Any]) -> Array:
    """The parameter space. Pointers that Triton adds at the end may be left out."""
    size = max((p.offset + p.size for p in kernel.parameters), default=0)
    out = bytearray(size)
    if len(args) > len(kernel.parameters):
        raise TypeError(f"{kernel.name} has {len(kernel.parameters)} parameters, not {len(args)}")
    for p, arg in zip(kernel.parameters, args, strict=False):
        if isinstance(arg, torch.Tensor):
            arg = arg.data_ptr()
        if p.size != BITS[p.type] // 8 or isinstance(arg, bytes):
            data = bytes(arg)
            if len(data) != p.size:
                raise TypeError(f"{p.name} has {p.size} bytes, not {len(data)}")
        else:
            whole = arg is None or p.type[0] != "f"
            low = int(arg or 0) & ((1 << BITS[p.type]) - 1) if whole else arg
            data = struct.pack("<" + STRUCT["u" + p.type[1:] if whole else p.type], low)
        out[p.offset : p.offset + p.size] = data
    for p in kernel.parameters[len(args) :]:
        if p.size != 8:
            raise TypeError(f"{kernel.name}: no value for {p.name}")
    return np.frombuffer(bytes(out), np.uint8)


def _three(size: Sequence[int] | int) -> tuple[int, int, int]:
    size = (size,) if isinstance(size, int) else tuple(size)
    return (*size, *(1,) * (3 - len(size)))  # type: ignore[return-value]


def launch(
    kernel: Kernel,
    grid: Sequence[int] | int,
    block: Sequence[int] | int,
    args: Sequence[Any],
    *,
    shared: int = 0,
    buffers: Mapping[str, torch.Tensor] | None = None,
) -> int:
    """Run the kernel; returns the number of instructions issued, all blocks together.

    args: one per parameter: tensors, numbers, or bytes (a ctypes structure is enough) as they lie in memory.
    shared: bytes of dynamic shared memory. buffers: tensors that structs point to; named ro_..., they are read-only.
    """
    from gpuless.ptxvm_warp import HANDLERS  # which builds on this module

    tensors = dict(buffers or {})
    taken = {t.data_ptr() for t in tensors.values()}
    tensors |= {
        f"argument {i}": a for i, a in enumerate(args) if isinstance(a, torch.Tensor) and a.data_ptr() not in taken
    }
    segments = [_tensor_segment(name, t) for name, t in tensors.items()]
    segments.append(Segment("parameters", WINDOW["param"], _pack(kernel, args), True))
    grid, block = _three(grid), _three(block)
    issued = 0
    for z, y, x in np.ndindex(grid[2], grid[1], grid[0]):
        poison = [
            np.full(n, 0xFF, np.uint8) for n in (kernel.shared_bytes + shared, kernel.local_bytes * np.prod(block))
        ]
        own = [Segment(s, WINDOW[s], data) for s, data in zip(("shared", "local"), poison, strict=True)]
        state = Block(kernel, (x, y, z), grid, block, Memory(segments + own))
        with np.errstate(all="ignore"):
            while state.step(HANDLERS):
                issued += 1
    return issued
