"""The instructions of ptxvm in which threads work together: barriers, shuffles, votes, reductions, matrix tiles."""

from __future__ import annotations

import numpy as np
from gpuless.ptxvm import Array, Block, Instruction, PtxFault, parts
from gpuless.ptxvm_ops import HANDLERS, U32, need, op

__all__ = ["HANDLERS"]

ROW, COLUMN = np.arange(32) // 4, np.arange(32) % 4  # of a lane in an mma fragment


def whole_warps(vm: Block, ins: Instruction, mask: Array, members: str) -> None:
    """Every live lane that the member mask names must be here, or the compiled code has diverged."""
    member = (vm.bits(members, 32) >> (vm.thread % 32).astype(U32) & U32(1)).astype(bool)
    if (mask & ~member).any():
        raise PtxFault("a lane outside the member mask")
    for warp in np.unique(vm.thread[mask] // 32):
        lanes = np.flatnonzero((vm.thread // 32 == warp) & ~vm.exited)
        named = vm.bits(members, 32)[lanes[mask[lanes]][0]]
        if any(named >> U32(t % 32) & U32(1) and not mask[t] for t in lanes):
            raise PtxFault("a lane of the member mask is not here")


@op("bar", "barrier")
def _barrier(vm: Block, ins: Instruction, mask: Array) -> None:
    if "warp" in ins.mods:
        return whole_warps(vm, ins, mask, ins.operands[0])
    if "red" not in ins.mods:
        need(ins, len(ins.operands) < 2 or int(ins.operands[1], 0) == vm.n)
        return None
    value = vm.read(ins.operands[-1], "pred")[mask]
    if "popc" in ins.mods:
        return vm.write(ins.operands[0], np.full(vm.n, value.sum()), "u32", mask)
    return vm.write(ins.operands[0], np.full(vm.n, value.all() if "and" in ins.mods else value.any()), "pred", mask)


@op("shfl")
def _shfl(vm: Block, ins: Instruction, mask: Array) -> None:
    whole_warps(vm, ins, mask, ins.operands[4])
    kind = ins.mods[1]
    by, control = (vm.bits(o, 32).astype(np.int64) & 0x1F1F for o in ins.operands[2:4])
    by, clamp, segment, lane = by & 31, control & 31, control >> 8, vm.thread % 32
    last, first = lane & segment | clamp & ~segment, lane & segment
    source = {"up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": first | by & ~segment}[kind]
    inside = source >= last if kind == "up" else source <= last
    index = np.where(inside, vm.thread - lane + source, vm.thread)
    value = vm.bits(ins.operands[1], 32)
    there = (index < vm.n) & mask[np.minimum(index, vm.n - 1)]
    to, *valid = ins.operands[0].split("|")
    vm.write(to, np.where(there, value[np.minimum(index, vm.n - 1)], U32(0xFFFFFFFF)), "u32", mask)
    if valid:
        vm.write(valid[0], inside, "pred", mask)


@op("vote", "activemask")
def _vote(vm: Block, ins: Instruction, mask: Array) -> None:
    if ins.op == "vote":
        whole_warps(vm, ins, mask, ins.operands[2])
    said = mask & vm.read(ins.operands[1], "pred") if ins.op == "vote" else mask
    warp = vm.thread // 32
    bits = np.zeros(warp[-1] + 1, np.uint64)
    here = bits.copy()
    np.bitwise_or.at(bits, warp[said], np.uint64(1) << (vm.thread[said] % 32).astype(np.uint64))
    np.bitwise_or.at(here, warp[mask], np.uint64(1) << (vm.thread[mask] % 32).astype(np.uint64))
    if ins.type == "b32":
        return vm.write(ins.operands[0], bits[warp].astype(U32), "u32", mask)
    answer = {"any": bits != 0, "all": bits == here, "uni": (bits == 0) | (bits == here)}[ins.mods[1]]
    return vm.write(ins.operands[0], answer[warp], "pred", mask)


@op("redux")
def _redux(vm: Block, ins: Instruction, mask: Array) -> None:
    whole_warps(vm, ins, mask, ins.operands[2])
    reduce = {
        "add": np.add,
        "min": np.minimum,
        "max": np.maximum,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }
    value, out = vm.read(ins.operands[1], ins.type), np.zeros(vm.n, np.int64)
    for warp in np.unique(vm.thread[mask] // 32):
        lanes = mask & (vm.thread // 32 == warp)
        out[lanes] = reduce[ins.mods[1]].reduce(value[lanes])
    vm.write(ins.operands[0], out, ins.type, mask)


@op("ldmatrix")
def _ldmatrix(vm: Block, ins: Instruction, mask: Array) -> None:
    """Register i of lane t: two neighbours of tile i, whose rows start at the addresses of lanes 8 i ... 8 i + 7."""
    need(ins, "m8n8" in ins.mods and ins.type == "b16" and mask.all())
    address = vm.address(ins.operands[1], ("shared",))
    for i, name in enumerate(parts(ins.operands[0])):
        out = np.zeros((vm.n // 32, 32), U32)
        for w in range(vm.n // 32):
            rows = vm.memory.load(address[w * 32 + 8 * i : w * 32 + 8 * i + 8], 16).view(np.uint16)
            tile = np.ascontiguousarray(rows.T if "trans" in ins.mods else rows)
            out[w] = tile.view(U32).reshape(32)
        vm.write(name, out.reshape(-1), "u32", mask)


def _fragments(vm: Block, names: list[str], kind: str) -> Array:
    """[warps, lanes, registers, values per register] as float32."""
    packed = {"f16": "f16x2", "bf16": "bf16x2"}.get(kind, kind)
    values = np.stack([vm.read(n, packed).astype(np.float32).reshape(vm.n, -1) for n in names], 1)
    return values.reshape(vm.n // 32, 32, len(names), -1)


@op("mma")
def _mma(vm: Block, ins: Instruction, mask: Array) -> None:
    """D = A B + C; sums in float64, so closer to the exact ones than a GPU's."""
    shape, to, kind_a, kind_b, kind_c = ins.mods[2], *ins.mods[-4:]
    need(
        ins, ins.mods[:2] == ("sync", "aligned") and ins.mods[3:5] == ("row", "col") and mask.all() and kind_a == kind_b
    )
    need(
        ins,
        (shape, kind_a)
        in [("m16n8k16", "f16"), ("m16n8k16", "bf16"), ("m16n8k8", "f16"), ("m16n8k8", "bf16"), ("m16n8k8", "tf32")],
    )
    need(ins, to == kind_c == "f32")
    depth = int(shape.rsplit("k", 1)[1])
    a, b, c = (_fragments(vm, parts(o), k) for o, k in zip(ins.operands[1:], (kind_a, kind_b, "f32"), strict=True))
    left, right = np.zeros((len(a), 16, depth)), np.zeros((len(a), depth, 8))
    each = a.shape[3]  # neighbours along k in one register
    stride = 4 * each
    for h in range(each):
        for r in range(a.shape[2]):
            left[:, ROW + 8 * (r & 1), COLUMN * each + h + stride * (r >> 1)] = a[:, :, r, h]
        for r in range(b.shape[2]):
            right[:, COLUMN * each + h + stride * r, ROW] = b[:, :, r, h]
    total = left @ right
    for r, name in enumerate(parts(ins.operands[0])):
        value = total[:, ROW + 8 * (r >> 1), COLUMN * 2 + (r & 1)] + c[:, :, r, 0]
        vm.write(name, value.reshape(-1).astype(np.float32), "f32", mask)
