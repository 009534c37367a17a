"""What the compiled CUDA kernels should cost on a GPU, found without one: python benches/gpu_prediction.py [--op lif].

Per operator and direction: bytes that the kernels' source asks memory for on the checked host shim (32-byte sectors
of each warp's requests, caches not counted) over bytes that must move; of each kernel launched, registers and shared
memory as nvcc compiles it for sm_90, threads a block, and the share of a multiprocessor's 2,048 threads that fit; and
the time that follows for the bench's first shape at 3.0 TB/s, if memory is all that counts. A run on a card (run.py)
confirms or refutes it. Needs nvcc, g++ and the clone's python_tests.
"""

import argparse
import ctypes
import functools
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import torch

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "python_tests")]

import run  # noqa: E402
from backends import results  # noqa: E402
from gpuless import aot, ops_on_shim, shim  # noqa: E402

from spikecore.testing.cases import CASES  # noqa: E402

ARCH, BANDWIDTH = 90, 3.0e12
REGISTERS, THREADS, BLOCKS, SHARED = 65536, 2048, 32, 227 << 10  # of one sm_90 multiprocessor


def occupancy(registers: int, block: int, shared: int) -> float:
    """Share of a multiprocessor's threads that can be resident; registers are handed out by 8 to a thread."""
    by_registers = REGISTERS // (-(-registers // 8) * 8 * block)
    by_shared = SHARED // shared if shared else BLOCKS  # what the system takes of it is in the compiler's figure
    return min(BLOCKS, THREADS // block, by_registers, by_shared) * block / THREADS


@functools.cache
def compiled(op: str) -> dict[str, aot.Facts]:
    """Of each kernel template the float32 instantiation with the most registers, by its plain name."""
    flags = ["-fmad=false"]
    facts = aot.nvcc_facts(shim.CSRC / op / f"{op}_cuda.cu", [ARCH], [shim.CSRC], flags)
    plain = subprocess.run(["c++filt", *(f.name for f in facts)], capture_output=True, text=True, check=True).stdout
    worst: dict[str, aot.Facts] = {}
    for name, f in zip(plain.splitlines(), facts, strict=True):
        kernel = re.search(r"(\w+_kernel)", name)
        if kernel and not re.search(r"__half|__nv_bfloat16", name):
            worst[kernel[1]] = max(f, worst.get(kernel[1], f), key=lambda f: f.registers)
    return worst


def launches(library: ctypes.CDLL) -> Iterator[tuple[str, int, int]]:
    """(kernel, threads a block, dynamic shared bytes) of each launch since the last call, each once."""
    library.shim_launches.restype = ctypes.c_char_p
    seen = set()
    for line in library.shim_launches().decode().splitlines():
        name, _, threads, dynamic = line.split("|")
        row = (re.search(r"(\w+_kernel)", name)[1], int(threads), int(dynamic))  # type: ignore[index]
        if row not in seen:
            seen.add(row)
            yield row


def counted(library: ctypes.CDLL, call: Any) -> int:
    library.shim_counted.restype = ctypes.c_uint64
    library.shim_start_counting()
    call()
    return library.shim_counted()


def facts_of(kernel: str, op: str) -> aot.Facts:
    """An operator launches kernels of its own, and some those of lif."""
    return compiled(op).get(kernel) or compiled("lif")[kernel]


def rows(op: str, library: ctypes.CDLL) -> Iterator[list[str]]:
    case, call = CASES[op], ops_on_shim.on_shim(op)
    sample = next(case.large(torch.float32))
    forward_must, backward_must = case.bytes_moved(sample)
    with torch.no_grad():
        forward = counted(library, lambda: call(**sample.arguments))
    kernels = {"forward": list(launches(library))}
    both = counted(library, lambda: results(case, call, sample))
    kernels["backward"] = [k for k in launches(library) if k not in kernels["forward"]]
    moved = {"forward": (forward, forward_must), "backward": (both - forward, backward_must)}
    full: dict[tuple[str, str], float] = {}
    for p in run.load(f"bench_{op}").problems("cpu", False):  # up to the first that is trained, after its forward
        full[p.direction, p.name] = p.must_move
        if p.direction == "training":
            break
    bench = {"forward": full["forward", p.name], "backward": full["training", p.name] - full["forward", p.name]}
    for direction, (bytes_, must) in moved.items():
        ratio = bytes_ / must
        time = f"{bench[direction] * ratio / BANDWIDTH * 1e6:.1f}"
        for i, (kernel, block, dynamic) in enumerate(kernels[direction]):
            f = facts_of(kernel, op)
            resident = f"{occupancy(f.registers, block, f.shared + dynamic):.0%}"
            shared = str(f.shared + dynamic)
            head = [f"{op} {direction}", f"{ratio:.2f}", time] if i == 0 else ["", "", ""]
            yield [*head, kernel, str(block), str(f.registers), str(f.spills), shared, resident]


def main() -> None:
    parser = argparse.ArgumentParser(description="What the CUDA kernels should cost on a GPU.")
    ops = [op for op, case in CASES.items() if case.registered == (f"{op}_fwd", f"{op}_bwd")]  # each kernel once
    parser.add_argument("--op", choices=ops, help="only this one")
    options = parser.parse_args()
    library = ops_on_shim.load(ops_on_shim.cache_dir(), checked=True)
    head = ["", "moved/must", "us at 3.0 TB/s", "kernel", "block", "registers", "spills", "shared", "resident"]
    lines = [head]
    for op in [options.op] if options.op else ops:
        lines += rows(op, library)
    print("\n".join(run.aligned(lines)))


if __name__ == "__main__":
    main()
