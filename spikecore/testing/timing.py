"""How benches measure: durations instead of counts, contestants interleaved, medians with their spread, exact bytes.

A machine that does other work too slows down for seconds at a time. Contestants therefore take turns in slices of a few
milliseconds (A B C A B C ...), and a ratio of two is the median over the turns of the ratio within one turn.
"""

import ctypes
import math
import os
import platform
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from spikecore._backend import backend_info

__all__ = [
    "Problem", "Scaling", "Timing", "bench", "bytes_kept", "bytes_moved", "bytes_peak", "machine", "machine_line",
    "steady_memory",
]  # fmt: skip


@dataclass(frozen=True)
class Timing:
    """Seconds per call: `turns` has the median of each turn; median and quartiles are over turns, the minimum over all.

    Not over all samples: a fast turn holds more of them, so that they would flatter a short call on a busy machine.
    """

    median: float
    minimum: float
    lower: float
    upper: float
    samples: int
    turns: tuple[float, ...]

    def over(self, other: "Timing") -> float:
        """How many times as long as `other` of the same `bench`: the median over turns of the ratio within a turn."""
        return statistics.median(a / b for a, b in zip(self.turns, other.turns, strict=True))


@dataclass
class Problem:
    """One row of a bench. `calls` holds the contestants by name: ours is "spikecore", the yardstick "copy".

    `trained` gives, by contestant, a forward pass under autograd (for the bytes it keeps); empty for inference.
    `bars`: by contestant, how many times our time it must take at least; for "copy": how many times its time ours may
    take at most. `skipped`: absent contestants and why.
    """

    name: str
    direction: str  # "forward" or "training": forward and backward
    calls: dict[str, Callable[[], Any]]
    must_move: int  # bytes that have to be read and written at least
    copied: int  # bytes that "copy" reads and writes
    inputs: tuple[Tensor, ...]
    trained: dict[str, Callable[[], Tensor]] = field(default_factory=dict)
    bars: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    kept: int = 0  # bytes that ours may keep for backward beside inputs and result


@dataclass
class Scaling:
    """One plot of a bench: how time and peak memory grow along `axis`; `problems`: a Problem for each of its values."""

    name: str
    axis: str
    problems: dict[int, Problem]


def bench(
    calls: Mapping[str, Callable[[], Any]], *, warmup: float = 0.2, duration: float = 1.0, turn: float = 0.02,
    device: str | torch.device = "cpu",
) -> dict[str, Timing]:  # fmt: skip
    """Time `calls` against one another, in one run.

    Args:
        calls: contestants by name, none with arguments; what they return is dropped at once.
        warmup, duration: seconds for each contestant, before and while it is measured (at least one call, five turns).
        turn: seconds a contestant runs before the next has its turn (at least one call).
        device: where they compute; on a GPU a sample is as many calls as fill 2 ms between two synchronisations.
    """
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    shortest = 2e-3 if torch.device(device).type == "cuda" else 1e-4

    def sample(call: Callable[[], Any], count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            call()
        wait()
        return (time.perf_counter() - start) / count

    counts: dict[str, int] = {}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    turns: dict[str, list[float]] = {name: [] for name in calls}
    for name, call in calls.items():
        sample(call, 1)  # compilers and allocators
        seconds, end = [sample(call, 1)], time.perf_counter() + warmup
        while time.perf_counter() < end:
            seconds.append(sample(call, 1))
        counts[name] = max(1, math.ceil(shortest / max(min(seconds), 1e-9)))
    end, done = time.perf_counter() + duration * len(calls), 0
    while done < 5 or time.perf_counter() < end:
        for name, call in calls.items():
            stop = time.perf_counter() + turn
            first = sample(call, counts[name])  # finds the caches as the contestant before left them
            taken = []
            while time.perf_counter() < stop:
                taken.append(sample(call, counts[name]))
            taken = taken or [first]
            samples[name] += taken
            turns[name].append(statistics.median(taken))
        done += 1
    return {name: _timing(samples[name], turns[name]) for name in calls}


def _timing(samples: list[float], turns: list[float]) -> Timing:
    lower, median, upper = statistics.quantiles(turns, n=4, method="inclusive")
    return Timing(median, min(samples), lower, upper, len(samples), tuple(turns))


# ---- bytes -----------------------------------------------------------------------------------------------------------


class _Saved:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def bytes_kept(forward: Callable[[], Tensor], *known: Tensor) -> int:
    """Bytes of all storages autograd holds for backward, each once, beside those of the result and of `known`."""
    packed: weakref.WeakSet[_Saved] = weakref.WeakSet()  # autograd drops some again before forward is over

    def pack(t: Tensor) -> _Saved:
        saved = _Saved(t)
        packed.add(saved)
        return saved

    with saved_tensors_hooks(pack, lambda saved: saved.tensor):
        result = forward()
    kept = {(s := saved.tensor.untyped_storage()).data_ptr(): s.nbytes() for saved in packed}
    for t in (result, *known):
        kept.pop(t.untyped_storage().data_ptr(), None)
    return sum(kept.values())


def bytes_peak(call: Callable[[], Any], device: str | torch.device = "cpu") -> int:
    """Most bytes allocated at once by tensors during `call`, beyond those that were there before.

    On the CPU from the profiler's record of every allocation and release, which unlike resident memory sees what the
    allocator reuses (releases of what was there before are not in it: a module's old state counts on); on a GPU from
    the caching allocator.
    """
    call()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as record:
        result = call()
    del result
    now = peak = 0
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


class _Traffic(TorchDispatchMode):
    """Adds up what every kernel reads and writes: its tensor arguments and results, views excepted."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.is_view or func.name().startswith(("aten::empty", "aten::detach", "aten::_unsafe_view")):
            return result
        leaves = [t for t in torch.utils._pytree.tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
        self.total += sum({(t.data_ptr(), t.shape): t.numel() * t.element_size() for t in leaves}.values())
        return result


def bytes_moved(call: Callable[[], Any]) -> int:
    """Bytes that the kernels of an eager `call` take and return, backward included; a hidden copy shows here."""
    with _Traffic() as traffic:
        call()
    return traffic.total


# ---- machine ---------------------------------------------------------------------------------------------------------


def steady_memory() -> str:
    """Let glibc keep what tensors free, as a training loop in steady state has it; returns a line that says so.

    By default it hands large blocks back to the kernel at once, and the page faults of each fresh output would drown
    every contestant alike.
    """
    if platform.libc_ver()[0] != "glibc":
        return "allocator as it is (not glibc)"
    libc = ctypes.CDLL(None)
    trim, mmap = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    if libc.mallopt(mmap, 1 << 30) and libc.mallopt(trim, 2**31 - 1):
        return "glibc keeps freed memory (mallopt M_MMAP_THRESHOLD 1 GiB, M_TRIM_THRESHOLD 2 GiB), for all contestants"
    return "allocator as it is (mallopt refused): page faults of fresh outputs are in every time"


def machine(*distributions: str) -> dict[str, Any]:
    """What a time depends on: processor, cores, instruction set, threads, GPU, and versions (also `distributions`)."""
    info = backend_info()
    versions = {"spikecore": info["version"], "torch": info["torch"], "python": platform.python_version()}
    for name in distributions:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": _cpu_model(),
        "cores": cores,
        "isa": info["isa"],
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "gpu_backend": info["gpu_backend"],
        "os": f"{platform.system()} {platform.machine()}",
        "versions": versions,
    }


def machine_line(m: dict[str, Any]) -> str:
    gpu = f"{m['gpu']} ({m['gpu_backend'] or 'no kernels'}); " if m["gpu"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items() if version)
    cpu = f"{m['cpu']}, {m['cores']} cores, {m['isa']}, load {m['load']}"
    return f"{gpu}{cpu}, {m['os']}; {versions}"


def _cpu_model() -> str:
    if sys.platform == "linux":
        with open("/proc/cpuinfo") as f:
            names = [line.partition(":")[2].strip() for line in f if line.startswith(("model name", "Model"))]
        if names:
            return names[0]
    return platform.processor() or platform.machine()
