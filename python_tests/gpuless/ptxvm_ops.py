"""The instructions of ptxvm: one handler per opcode, called with the block, the instruction and the active threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from gpuless.ptxvm import BITS, WINDOW, Array, Block, Instruction, PtxFault, decode, encode, parts

Handler = Callable[[Block, Instruction, Array], None]
HANDLERS: dict[str, Handler] = {}
U32, U64 = np.uint32, np.uint64


def op(*names: str) -> Callable[[Handler], Handler]:
    def add(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return add


def is_float(kind: str) -> bool:
    return kind[0] == "f" or kind.startswith("bf")


def flush(value: Array, ins: Instruction) -> Array:
    """.ftz: subnormal float32 count as zero."""
    if "ftz" not in ins.mods or value.dtype != np.float32:
        return value
    return np.where(np.abs(value) < np.float32(2**-126), np.copysign(np.float32(0), value), value)


def inputs(vm: Block, ins: Instruction, first: int = 1) -> list[Array]:
    return [flush(vm.read(o, ins.type), ins) for o in ins.operands[first:]]


def output(vm: Block, ins: Instruction, value: Array, mask: Array, kind: str | None = None) -> None:
    if "sat" in ins.mods and is_float(kind or ins.type):
        value = np.clip(np.where(np.isnan(value), 0, value), 0, 1).astype(value.dtype)
    vm.write(ins.operands[0], flush(value, ins), kind or ins.type, mask)


def need(ins: Instruction, condition: bool) -> None:
    if not condition:
        raise NotImplementedError(ins.text)


def fused(a: Array, b: Array, c: Array, kind: str) -> Array:
    """a * b + c in one rounding: float64 rounded to odd, from which rounding to the narrower type is exact."""
    if kind == "f64":
        wide = np.longdouble  # 11 bits more: all but the rarest ties
        return (a.astype(wide) * b.astype(wide) + c.astype(wide)).astype(np.float64)
    product, c = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = product + c
    back = total - product
    error = (product - (total - back)) + (c - back)
    u = total.view(U64)
    fix = np.isfinite(total) & (error != 0) & (u & U64(1) == 0)
    u = np.where(fix, np.where((error > 0) == (total > 0), u + U64(1), u - U64(1)), u)
    total = u.view(np.float64)
    return total if kind.startswith("bf16") else total.astype(a.dtype)


# ---- control


@op("bra")
def _bra(vm: Block, ins: Instruction, mask: Array) -> None:
    vm.pc[mask] = vm.kernel.labels[ins.operands[0]]


@op("ret", "exit")
def _exit(vm: Block, ins: Instruction, mask: Array) -> None:
    vm.exited |= mask


@op("trap", "brkpt")
def _trap(vm: Block, ins: Instruction, mask: Array) -> None:
    if mask.any():
        raise PtxFault("trap")


@op("membar", "fence", "nanosleep", "prefetch", "griddepcontrol", "discard", "applypriority")
def _nothing(vm: Block, ins: Instruction, mask: Array) -> None:
    pass


# ---- moves and memory


@op("mov")
def _mov(vm: Block, ins: Instruction, mask: Array) -> None:
    to, source = ins.operands
    if ins.type == "pred" or ("{" not in ins.text):
        return vm.write(to, vm.read(source, ins.type), ins.type, mask)
    width = BITS[ins.type]
    if to[0] == "{":
        names, data = parts(to), np.ascontiguousarray(vm.bits(source, width))
        pieces = data.view(f"u{width // 8 // len(names)}").reshape(vm.n, -1)
        for i, name in enumerate(names):
            vm.write(name, pieces[:, i], f"u{width // len(names)}", mask)
        return None
    names = parts(source)
    pieces = np.stack([vm.bits(name, width // len(names)) for name in names], 1)
    return vm.write(to, pieces.view(f"u{width // 8}")[:, 0], ins.type, mask)


@op("cvta")
def _cvta(vm: Block, ins: Instruction, mask: Array) -> None:
    base = U64(next((WINDOW[m] for m in ins.mods if m in WINDOW), 0))
    value = vm.bits(ins.operands[1], 64)
    vm.write(ins.operands[0], value - base if "to" in ins.mods else value + base, "u64", mask)


@op("ld", "ldu")
def _ld(vm: Block, ins: Instruction, mask: Array) -> None:
    names, kind = parts(ins.operands[0]), ins.type
    each = BITS[kind] // 8
    if not mask.any():
        return
    data = vm.memory.load(vm.address(ins.operands[1], ins.mods)[mask], each * len(names))
    for i, name in enumerate(names):
        full = np.zeros((vm.n, each), np.uint8)
        full[mask] = data[:, i * each : (i + 1) * each]
        vm.write(name, decode(full.view(f"u{each}")[:, 0], kind), kind, mask)


@op("st")
def _st(vm: Block, ins: Instruction, mask: Array) -> None:
    names, width = parts(ins.operands[1]), BITS[ins.type]
    if mask.any():
        data = np.stack([vm.bits(name, width) for name in names], 1)
        vm.memory.store(vm.address(ins.operands[0], ins.mods)[mask], data.view(np.uint8).reshape(vm.n, -1)[mask])


def update(kind: str, what: str, old: Any, value: Any, compare: Any) -> Any:
    if what == "cas":
        return value if old == compare else old
    if what == "inc":
        return 0 if old >= value else old + 1
    pick = {
        "add": np.add,
        "min": np.fmin,
        "max": np.fmax,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }
    return value if what == "exch" else pick[what](old, value)


@op("atom", "red")
def _atom(vm: Block, ins: Instruction, mask: Array) -> None:
    whats = ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc")
    what = next((m for m in ins.mods if m in whats), "")
    need(ins, bool(what) and "{" not in ins.text)
    kind, returns = ins.type, ins.op == "atom"
    where, *values = ins.operands[1:] if returns else ins.operands
    address, size = vm.address(where, ins.mods), BITS[kind] // 8
    value = vm.read(values[-1], kind)
    compare = vm.read(values[0], kind)
    old = np.zeros((vm.n, size), np.uint8)
    for t in np.flatnonzero(mask):  # lanes may share an address
        old[t] = vm.memory.load(address[t : t + 1], size, "atomic")[0]
        before = decode(old[t : t + 1].view(f"u{size}")[:, 0], kind)
        after = np.asarray(update(kind, what, before[0], value[t], compare[t])).astype(value.dtype)
        vm.memory.store(address[t : t + 1], encode(after[None], kind).view(np.uint8).reshape(1, size))
    if returns:
        vm.write(ins.operands[0], decode(old.view(f"u{size}")[:, 0], kind), kind, mask)


@op("cp")
def _cp_async(vm: Block, ins: Instruction, mask: Array) -> None:
    need(ins, ins.mods[0] == "async" and "bulk" not in ins.mods)
    if "commit_group" in ins.mods:
        vm.copy_group[mask] += 1
    elif "wait_group" in ins.mods or "wait_all" in ins.mods:
        if "wait_all" in ins.mods:
            vm.copy_group[mask] += 1
        land(vm, mask, 0 if "wait_all" in ins.mods else int(ins.operands[0], 0))
    else:
        size = int(ins.operands[2], 0)
        count = vm.bits(ins.operands[3], 32) if len(ins.operands) > 3 else np.full(vm.n, size)
        to = vm.address(ins.operands[0], ("shared",))
        source = vm.address(ins.operands[1], ())
        vm.copies.append((mask.copy(), vm.copy_group.copy(), to, source, count, size))


def land(vm: Block, mask: Array, pending: int) -> None:
    """Finish the copies of all but each thread's newest `pending` groups."""
    for done, group, to, source, count, size in vm.copies:
        now = done & mask & (group < vm.copy_group - pending)
        for n in np.unique(count[now]):
            lanes = np.flatnonzero(now & (count == n))
            data = np.zeros((lanes.size, size), np.uint8)
            if n:
                data[:, :n] = vm.memory.load(source[lanes], int(n))
            vm.memory.store(to[lanes], data)
        done &= ~now
    vm.copies = [c for c in vm.copies if c[0].any()]


@op("createpolicy")
def _createpolicy(vm: Block, ins: Instruction, mask: Array) -> None:
    vm.write(ins.operands[0], np.zeros(vm.n, U64), "u64", mask)


# ---- compare and choose

ORDER = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
ORDER |= {"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}
LOGIC = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def compared(name: str, a: Array, b: Array, kind: str) -> Array:
    if not is_float(kind):
        return ORDER[name](a, b)
    unordered = np.isnan(a) | np.isnan(b)
    if name in ("nan", "num"):
        return unordered if name == "nan" else ~unordered
    if name[-1] == "u":
        return unordered | ORDER[name[:-1]](a, b)
    return ~unordered & ORDER[name](a, b)


@op("setp")
def _setp(vm: Block, ins: Instruction, mask: Array) -> None:
    need(ins, not ins.type.endswith("x2"))
    a, b = (flush(vm.read(o, ins.type), ins) for o in ins.operands[1:3])
    first, *second = ins.operands[0].split("|")
    result = compared(ins.mods[0], a, b, ins.type)
    values = [result, ~result]
    if ins.mods[1] in LOGIC:
        other = vm.read(ins.operands[3], "pred")
        values = [LOGIC[ins.mods[1]](v, other) for v in values]
    vm.write(first, values[0], "pred", mask)
    if second:
        vm.write(second[0], values[1], "pred", mask)


@op("set")
def _set(vm: Block, ins: Instruction, mask: Array) -> None:
    to = ins.mods[-2]
    result = compared(ins.mods[0], *inputs(vm, ins), ins.type)
    vm.write(
        ins.operands[0],
        np.where(result, 1 if is_float(to) else -1, 0).astype(np.int64 if not is_float(to) else np.float32),
        to,
        mask,
    )


@op("selp")
def _selp(vm: Block, ins: Instruction, mask: Array) -> None:
    width, chosen = BITS[ins.type], vm.read(ins.operands[3], "pred")
    a, b = vm.bits(ins.operands[1], width), vm.bits(ins.operands[2], width)
    vm.write(ins.operands[0], np.where(chosen, a, b), f"u{width}", mask)


# ---- conversions

ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def to_integer(value: Array, kind: str) -> Array:
    value = value.astype(np.float64)
    limits = np.iinfo(f"{'i' if kind[0] == 's' else 'u'}{BITS[kind] // 8}")
    inside = (value > float(limits.min) - 1) & (value < float(limits.max))
    out = np.where(inside, value, 0).astype(limits.dtype)
    return np.where(inside | np.isnan(value), out, np.where(value > 0, limits.max, limits.min).astype(limits.dtype))


def toward_zero(value: Array, kind: str) -> Array:
    near = encode(value, kind)
    beyond = np.abs(decode(near, kind).astype(np.float64)) > np.abs(value.astype(np.float64))
    return decode(np.where(beyond, near - near.dtype.type(1), near), kind)


@op("cvt")
def _cvt(vm: Block, ins: Instruction, mask: Array) -> None:
    to, source = ins.mods[-2:]
    need(ins, not {"rm", "rp", "relu", "satfinite"} & set(ins.mods))
    if to.endswith("x2"):
        return vm.write(ins.operands[0], np.stack([vm.read(o, source) for o in ins.operands[:0:-1]], 1), to, mask)
    value = flush(vm.read(ins.operands[1], source), ins)
    integral = next((ROUND[m] for m in ins.mods if m in ROUND), None)
    if to == "tf32":
        bits = value.view(U32)
        tie = U32(0x1000) if "rna" in ins.mods else U32(0xFFF) + (bits >> U32(13) & U32(1))
        return vm.write(ins.operands[0], (bits + tie & U32(0xFFFFE000)).view(np.float32), "f32", mask)
    if is_float(source) and not is_float(to):
        need(ins, integral is not None)
        value = to_integer(integral(value), to)  # type: ignore[misc]
    elif is_float(to):
        need(ins, is_float(source) or "rz" not in ins.mods)
        value = integral(value) if integral else value
        value = value if is_float(source) or to != "bf16" else value.astype(np.float64)
        value = toward_zero(value, to) if "rz" in ins.mods else value
    elif "sat" in ins.mods:
        limits = np.iinfo(f"{'i' if to[0] == 's' else 'u'}{BITS[to] // 8}")
        value = np.array([min(max(int(v), limits.min), limits.max) for v in value], limits.dtype)
    return output(vm, ins, value, mask, to)


# ---- arithmetic


@op("add", "sub", "min", "max")
def _two(vm: Block, ins: Instruction, mask: Array) -> None:
    need(ins, not {"cc", "rz", "rm", "rp"} & set(ins.mods))
    pair = {"min": np.minimum, "max": np.maximum} if "NaN" in ins.mods else {"min": np.fmin, "max": np.fmax}
    a, b = inputs(vm, ins)
    output(vm, ins, {"add": np.add, "sub": np.subtract, **pair}[ins.op](a, b), mask)


def high_half(a: Array, b: Array, kind: str) -> Array:
    product = a.astype(object) * b.astype(object) >> BITS[kind]
    return (product % (1 << BITS[kind])).astype(f"u{BITS[kind] // 8}").view(a.dtype)


@op("mul", "mad")
def _mul(vm: Block, ins: Instruction, mask: Array) -> None:
    need(ins, not {"cc", "rz", "rm", "rp"} & set(ins.mods))
    a, b = (flush(vm.read(o, ins.type), ins) for o in ins.operands[1:3])
    kind = ins.type
    if is_float(kind):
        need(ins, ins.op == "mul")
        return output(vm, ins, a * b, mask)
    if "wide" in ins.mods:
        kind = kind[0] + str(2 * BITS[kind])
        a, b = (v.astype(f"{'i' if kind[0] == 's' else 'u'}{BITS[kind] // 8}") for v in (a, b))
    value = high_half(a, b, kind) if "hi" in ins.mods else a * b
    if ins.op == "mad":
        value = value + vm.read(ins.operands[3], kind)
    return output(vm, ins, value, mask, kind)


@op("fma")
def _fma(vm: Block, ins: Instruction, mask: Array) -> None:
    need(ins, not {"relu", "rz", "rm", "rp"} & set(ins.mods))
    output(vm, ins, fused(*inputs(vm, ins), ins.type), mask)


@op("div", "rem")
def _div(vm: Block, ins: Instruction, mask: Array) -> None:
    a, b = inputs(vm, ins)
    if is_float(ins.type):
        return output(vm, ins, a / b, mask)
    zero = b == 0
    b = np.where(zero, np.ones_like(b), b)
    quotient = a // b
    if ins.type[0] == "s":
        quotient = quotient + ((a % b != 0) & ((a < 0) != (b < 0)))
    value = quotient if ins.op == "div" else a - quotient * b
    return output(vm, ins, np.where(zero, ~np.zeros_like(a) if ins.op == "div" else a, value).astype(a.dtype), mask)


UNARY = {
    "rcp": lambda v: 1 / v,
    "sqrt": np.sqrt,
    "rsqrt": lambda v: 1 / np.sqrt(v),
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}


@op(*UNARY)
def _unary(vm: Block, ins: Instruction, mask: Array) -> None:
    (value,) = inputs(vm, ins)
    result = UNARY[ins.op](value.astype(np.float64))
    output(vm, ins, result if ins.type.startswith("bf") else result.astype(value.dtype), mask)


@op("neg", "abs")
def _sign(vm: Block, ins: Instruction, mask: Array) -> None:
    (value,) = inputs(vm, ins)
    output(vm, ins, -value if ins.op == "neg" else np.abs(value), mask)


@op("copysign")
def _copysign(vm: Block, ins: Instruction, mask: Array) -> None:
    sign, magnitude = inputs(vm, ins)
    output(vm, ins, np.copysign(magnitude, sign), mask)


@op("testp")
def _testp(vm: Block, ins: Instruction, mask: Array) -> None:
    (value,) = inputs(vm, ins)
    tiny = np.abs(value) < np.finfo(value.dtype).tiny
    answers = {
        "finite": np.isfinite(value),
        "infinite": np.isinf(value),
        "number": ~np.isnan(value),
        "notanumber": np.isnan(value),
    }
    answers |= {"normal": np.isfinite(value) & ~tiny, "subnormal": tiny & (value != 0)}
    vm.write(ins.operands[0], answers[ins.mods[0]], "pred", mask)


# ---- bits


@op("and", "or", "xor", "not")
def _bitwise(vm: Block, ins: Instruction, mask: Array) -> None:
    values = inputs(vm, ins)
    if ins.op == "not":
        return output(vm, ins, ~values[0], mask)
    return output(vm, ins, {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[ins.op](*values), mask)


@op("shl", "shr")
def _shift(vm: Block, ins: Instruction, mask: Array) -> None:
    width, value = BITS[ins.type], vm.read(ins.operands[1], ins.type)
    by = vm.bits(ins.operands[2], 32)
    low = np.minimum(by, width - 1).astype(value.dtype)
    shifted = np.left_shift(value, low) if ins.op == "shl" else np.right_shift(value, low)
    whole = value >> value.dtype.type(width - 1) if ins.op == "shr" and ins.type[0] == "s" else np.zeros_like(value)
    output(vm, ins, np.where(by >= width, whole, shifted), mask)


@op("shf")
def _funnel(vm: Block, ins: Instruction, mask: Array) -> None:
    low, high, by = (vm.bits(o, 32).astype(U64) for o in ins.operands[1:])
    by = by & U64(31) if "wrap" in ins.mods else np.minimum(by, U64(32))
    both = high << U64(32) | low
    value = both << by >> U64(32) if "l" in ins.mods else both >> by
    output(vm, ins, (value & U64(0xFFFFFFFF)).astype(U32), mask, "u32")


@op("lop3")
def _lop3(vm: Block, ins: Instruction, mask: Array) -> None:
    a, b, c = (vm.bits(o, 32) for o in ins.operands[1:4])
    table, value = int(ins.operands[4], 0), np.zeros(vm.n, U32)
    for i in range(8):
        if table >> i & 1:
            value |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    output(vm, ins, value, mask, "u32")


@op("prmt")
def _prmt(vm: Block, ins: Instruction, mask: Array) -> None:
    need(ins, ins.mods == ("b32",))
    a, b, choice = (vm.bits(o, 32) for o in ins.operands[1:4])
    source = np.stack([a, b], 1).view(np.uint8)
    picked = np.stack([choice >> U32(4 * i) & U32(15) for i in range(4)], 1)
    value = np.take_along_axis(source, (picked & 7).astype(np.int64), 1)
    value = np.where(picked & 8, np.where(value & 128, 255, 0), value).astype(np.uint8)
    output(vm, ins, value.view(U32)[:, 0], mask, "u32")


def field_mask(length: Array) -> Array:
    return np.where(length >= 64, ~U64(0), (U64(1) << np.minimum(length, U64(63))) - U64(1))


@op("bfe", "bfi")
def _bit_field(vm: Block, ins: Instruction, mask: Array) -> None:
    width = BITS[ins.type]
    start, length = (vm.bits(o, 32).astype(U64) & U64(255) for o in ins.operands[-2:])
    ones = field_mask(length)
    at = np.minimum(start, U64(63))
    inside = start < width
    value = vm.bits(ins.operands[1], width).astype(U64)
    if ins.op == "bfi":
        base = vm.bits(ins.operands[2], width).astype(U64)
        result = np.where(inside, base & ~(ones << at) | (value & ones) << at, base)
    else:
        signed = ins.type[0] == "s"
        top = np.minimum(np.maximum(start + length, U64(1)) - U64(1), U64(width - 1))
        negative = signed & (length > 0) & (value >> top & U64(1) == 1)
        have = np.minimum(length, np.where(inside, U64(width) - np.minimum(start, U64(width)), U64(0)))
        field = np.where(inside, value >> at, U64(0)) & field_mask(have)
        result = np.where(negative, field | ~field_mask(have), field)
    vm.write(ins.operands[0], (result & field_mask(np.full(1, width, U64))).astype(f"u{width // 8}"), f"u{width}", mask)


@op("popc", "clz", "brev", "bfind")
def _count(vm: Block, ins: Instruction, mask: Array) -> None:
    width = BITS[ins.type]
    need(ins, ins.op != "bfind" or (ins.type[0] == "u" and "shiftamt" not in ins.mods))
    find = {
        "popc": int.bit_count,
        "clz": lambda v: width - v.bit_length(),
        "brev": lambda v: int(f"{v:0{width}b}"[::-1], 2),
        "bfind": lambda v: (v.bit_length() - 1) % (1 << 32),
    }[ins.op]
    value = np.array([find(int(v)) for v in vm.bits(ins.operands[1], width)], U64)
    to = ins.type if ins.op == "brev" else "u32"
    vm.write(ins.operands[0], value.astype(f"u{BITS[to] // 8}"), f"u{BITS[to]}", mask)
