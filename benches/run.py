"""Times every operator against its peers: python benches/run.py [--op lif] [--threads 1,2] [--json FILE] ...

Per row: median times (ours with its quartiles), times over a copy of the input with the bar it must stay under, how
many times as long each peer takes (in brackets: how many it must), bytes our kernels take and return over bytes that
must move, and the share of the copy's bandwidth; in training also the bytes autograd keeps beside inputs and spikes,
and the peak beyond spikes and gradient, both over the bytes of x. Ratios are medians over turns (see
spikecore.testing.timing), so they may differ slightly from the ratio of the medians. An operator that disagrees with
its reference gets no number. Peers: pip install "spikecore[bench]".

`--scaling` then measures how time and peak memory grow with sequence length, tokens, codes ...

Adding an operator: benches/bench_<op>.py with parity(device), problems(device, quick), scaling(device, quick) and
DISTRIBUTIONS.
"""

import argparse
import importlib.util
import json
import math
import os
import pathlib
import subprocess
import sys
import traceback
from dataclasses import asdict
from types import ModuleType
from typing import Any

import torch

from spikecore._backend import gpu_backend
from spikecore.testing import timing
from spikecore.testing.timing import Problem, Scaling, machine_line
from spikecore.train.files import replace_file

HERE = pathlib.Path(__file__).parent
OURS, COPY = "spikecore", "copy"
KEY = ("op", "name", "direction", "device", "threads")


def load(name: str) -> ModuleType:
    """A file beside this one."""
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def discover() -> dict[str, ModuleType]:
    """The benches beside this file, by operator; those of models, readers and loaders stand alone."""
    names = sorted({path.stem for path in HERE.glob("bench_*.py")} - {"bench_loader", "bench_models", "bench_readers"})
    return {name.removeprefix("bench_"): load(name) for name in names}


def measure(op: str, problem: Problem, device: str, quick: bool) -> dict[str, Any]:
    """One row: everything known about one problem, ready for JSON."""
    calls, skipped = runnable(problem)
    duration = {"warmup": 0.2, "duration": 1.0} if device == "cpu" else {"warmup": 0.05, "duration": 0.2}  # steadier
    if quick:
        duration = {"warmup": 0.01, "duration": 0.03, "turn": 0.005}
    times = timing.bench(calls, device=device, **duration)
    over_copy, peers = times[OURS].over(times[COPY]), {n: t.over(times[OURS]) for n, t in times.items() if n != OURS}
    passed = {n: (over_copy <= b if n == COPY else peers[n] >= b) for n, b in problem.bars.items() if n in times}
    x_bytes = sum(t.nbytes for t in problem.inputs)
    memory = {}
    for name in calls:
        if name in problem.trained:
            kept = timing.bytes_kept(problem.trained[name], *problem.inputs)
            # What every training step has to allocate: the outputs and the gradients of the inputs.
            memory[name] = {"kept": kept / x_bytes, "peak": timing.bytes_peak(calls[name], device) / x_bytes - 2}
    if problem.trained:
        passed["memory"] = memory[OURS]["kept"] <= problem.kept / x_bytes
    return {
        "op": op,
        "name": problem.name,
        "direction": problem.direction,
        "device": device,
        "threads": torch.get_num_threads() if device == "cpu" else 0,
        "where": where(device),
        "times": {n: {k: v for k, v in asdict(t).items() if k != "turns"} for n, t in times.items()},
        "over_copy": over_copy,
        "peer_over_ours": {n: r for n, r in peers.items() if n != COPY},
        "bars": problem.bars,
        "passed": passed,
        "moved_over_must": timing.bytes_moved(calls[OURS]) / problem.must_move,
        "copy_bandwidth": problem.copied / times[COPY].median,
        "bandwidth_over_copy": problem.must_move / problem.copied / over_copy,
        "memory_over_x": memory,
        "kept_bar": problem.kept / x_bytes,
        "skipped": skipped,
    }


def where(device: str) -> str:
    n = torch.get_num_threads()
    return device if device != "cpu" else f"{n} thread{'s' * (n != 1)}"


def runnable(problem: Problem) -> tuple[dict[str, Any], dict[str, str]]:
    """The contestants that run here, and why the others do not."""
    calls, skipped = dict(problem.calls), dict(problem.skipped)
    for name in [name for name in calls if name not in (OURS, COPY)]:
        try:
            calls[name]()
        except Exception as e:  # a peer that cannot run here must not take the others down
            reason = (str(e).strip() or type(e).__name__).splitlines()[0]
            skipped[name] = f"fails: {reason[:100]}"
            del calls[name]
    return calls, skipped


def grow(op: str, scaling: Scaling, device: str, quick: bool) -> dict[str, Any]:
    """Median seconds and peak bytes of every contestant along one axis, ready for JSON."""
    duration = {"warmup": 0.01, "duration": 0.03, "turn": 0.005} if quick else {"warmup": 0.05, "duration": 0.3}
    out: dict[str, Any] = {"op": op, "name": scaling.name, "axis": scaling.axis, "points": {}}
    out["where"] = where(device)
    for size, problem in scaling.problems.items():
        say(f"{op} {scaling.name} {scaling.axis} = {size}")
        calls, _ = runnable(problem)
        calls.pop(COPY, None)
        times = timing.bench(calls, device=device, **duration)
        out["points"][size] = {
            n: {"s": t.median, "bytes": timing.bytes_peak(calls[n], device)} for n, t in times.items()
        }
    say("")
    return out


# ---- output ----------------------------------------------------------------------------------------------------------


def say(what: str) -> None:
    """Where we are, on one line of a terminal that the next overwrites."""
    print(f"\r{what[:79]}".ljust(80), end="\r" if not what else "", file=sys.stderr, flush=True)


def seconds(s: float) -> str:
    return f"{s * 1e3:.2f} ms" if s < 1 else f"{s:.2f} s"


def mark(row: dict[str, Any], name: str) -> str:
    if name not in row["passed"]:
        return ""
    return f" {'pass' if row['passed'][name] else 'FAIL'}({row['bars'].get(name, 0):g})"


def cells(row: dict[str, Any], peers: list[str]) -> list[str]:
    """One line of the table; what its columns are called stands in `table`."""
    ours, copy = row["times"][OURS], row["times"][COPY]
    line = [
        row["name"],
        seconds(copy["median"]),
        f"{seconds(ours['median'])} [{ours['lower'] * 1e3:.2f}, {ours['upper'] * 1e3:.2f}]",
        f"{row['over_copy']:.2f}{mark(row, COPY)}",
    ]
    for peer in peers:
        if peer in row["times"]:
            ratio = f"{row['peer_over_ours'][peer]:.1f}x{mark(row, peer)}"
            line.append(f"{seconds(row['times'][peer]['median'])} {ratio}")
        else:
            line.append("-")
    return [*line, f"{row['moved_over_must']:.2f}", f"{row['bandwidth_over_copy']:.0%}"]


def aligned(lines: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines]


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The tables of one operator, one per number of threads and direction, then memory and what was left out."""
    out = []
    peers = list(dict.fromkeys(p for row in rows for p in row["peer_over_ours"]))
    for threads, direction in dict.fromkeys((row["threads"], row["direction"]) for row in rows):
        chosen = [row for row in rows if (row["threads"], row["direction"]) == (threads, direction)]
        title = f"{direction}{' (forward + backward)' if direction == 'training' else ''}"
        out += ["", f"{chosen[0]['op']}, {title}, {chosen[0]['where']}"]
        head = ["", "copy", "spikecore [quartiles]", "over copy (bar)", *peers, "moved/must", "of copy's bandwidth"]
        out += aligned([head, *(cells(row, peers) for row in chosen)])
        if any(row["memory_over_x"] for row in chosen):
            out += ["", "kept for backward beside x and s | peak beyond s and g_x, over the bytes of x"]
            lines = [["", OURS, *peers]]
            for row in chosen:
                memory = row["memory_over_x"]
                shown = {p: f"{m['kept']:.2f} | {m['peak']:.2f}" for p, m in memory.items()}
                line = [row["name"], *(shown.get(p, "-") for p in lines[0][1:])]
                line[1] += "" if row["passed"]["memory"] else f" FAIL({row['kept_bar']:.2f})"
                lines.append(line)
            out += aligned(lines)
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for peer, reason in row["skipped"].items():
            reasons.setdefault((peer, reason), []).append(row["name"])
    out += ["", *(f"left out: {p} ({why}) in {', '.join(dict.fromkeys(n))}" for (p, why), n in reasons.items())]
    return out


def growth(g: dict[str, Any]) -> list[str]:
    """A table of one scaling: time and peak memory by contestant, and the exponent from its first size to its last."""
    names = list(dict.fromkeys(n for point in g["points"].values() for n in point))
    lines = [[g["axis"], *names]]
    for size, point in g["points"].items():
        cell = {n: f"{seconds(v['s'])} {v['bytes'] / 2**20:.1f} MiB" for n, v in point.items()}
        lines.append([str(size), *(cell.get(n, "-") for n in names)])
    out = ["", f"{g['op']}, {g['name']}, {g['where']}: time and peak memory", *aligned(lines)]
    sizes = list(g["points"])
    first, last = (g["points"][s][OURS]["s"] for s in (sizes[0], sizes[-1]))
    return [*out, f"ours grows as {g['axis']}^{math.log(last / first) / math.log(sizes[-1] / sizes[0]):.2f}"]


def compare(rows: list[dict[str, Any]], old: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """Old and new medians of ours side by side; "over copy" also holds where the machine was busier."""
    before = {tuple(row[k] for k in KEY): row for row in old["rows"]}
    out = ["", f"against {old['commit'] or 'an unknown commit'} on {machine_line(old['machine'])}"]
    if (old["machine"]["cpu"], old["machine"]["gpu"]) != (here["cpu"], here["gpu"]):
        out.append("another machine: compare the columns over copy, not the times")
    lines = [["", "old", "new", "new/old", "over copy: old", "new"]]
    for row in rows:
        was = before.get(tuple(row[k] for k in KEY))
        new = row["times"][OURS]["median"]
        title = f"{row['op']} {row['name']}, {row['direction']}, {row['where']}"
        if was is None:
            lines.append([title, "-", seconds(new), "-", "-", f"{row['over_copy']:.2f}"])
            continue
        then, copies = was["times"][OURS]["median"], (f"{r['over_copy']:.2f}" for r in (was, row))
        lines.append([title, seconds(then), seconds(new), f"{new / then:.2f}", *copies])
    return out + aligned(lines)


def commit() -> str | None:
    try:
        git = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


# ---- command ---------------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """Exit status 1 where an operator disagrees with its reference."""
    modules = discover()
    parser = argparse.ArgumentParser(description="Time every operator against its peers.")
    parser.add_argument("--op", choices=modules, help="only this one")
    parser.add_argument("--threads", help="comma-separated, CPU only (default: one and all)")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="save rows, machine and commit")
    parser.add_argument("--compare", type=pathlib.Path, metavar="OLD.json", help="print medians beside saved ones")
    parser.add_argument("--plot", type=pathlib.Path, metavar="DIR", help="PNGs per operator")
    parser.add_argument("--scaling", action="store_true", help="also how time and peak memory grow with the size")
    parser.add_argument("--quick", action="store_true", help="does it run? tiny shapes, no meaning in the numbers")
    options = parser.parse_args(arguments)
    old = json.loads(options.compare.read_text()) if options.compare else None  # a wrong path fails now, not at the end

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler reports each start and stop on stderr
    device = "cuda" if gpu_backend else "cpu"
    chosen = {options.op: modules[options.op]} if options.op else modules
    memory = timing.steady_memory() if device == "cpu" else "torch's caching allocator"
    here = timing.machine(*dict.fromkeys(d for module in chosen.values() for d in module.DISTRIBUTIONS))
    everything = torch.get_num_threads()
    threads = [int(n) for n in options.threads.split(",")] if options.threads else sorted({1, everything})
    text = machine_line(here)
    print(f"commit {commit() or 'unknown'}; {text}\n{memory}; times are medians, contestants interleaved")
    if options.quick:
        print("--quick: the numbers mean nothing")

    rows: list[dict[str, Any]] = []
    scalings: list[dict[str, Any]] = []
    red = []

    def save() -> None:  # after each row: a long run that is stopped keeps what it has
        if options.json:
            saved = {"commit": commit(), "machine": here, "memory": memory, "rows": rows, "scaling": scalings}
            replace_file(options.json, json.dumps(saved, indent=1).encode())

    for op, module in chosen.items():
        try:
            module.parity(device)
        except Exception:
            traceback.print_exc()
            print(f"{op}: disagrees with its reference on {device}, so no numbers")
            red.append(op)
            continue
        try:
            for n in threads if device == "cpu" else [everything]:
                torch.set_num_threads(n)
                for problem in module.problems(device, options.quick):
                    rows.append(row_of(op, problem, device, options.quick))
                    save()
        finally:
            torch.set_num_threads(everything)
        mine = [row for row in rows if row["op"] == op]
        print("\n".join(table(mine)))
        if options.plot:
            options.plot.mkdir(parents=True, exist_ok=True)
            load("plots").bars(mine, text, options.plot / f"{op}.png")  # needs matplotlib
        for scaling in module.scaling(device, options.quick) if options.scaling else ():
            scalings.append(grow(op, scaling, device, options.quick))
            save()
            print("\n".join(growth(scalings[-1])), flush=True)
            if options.plot:
                grown = [g for g in scalings if g["op"] == op]
                load("plots").growth(grown, text, options.plot / f"{op}_scaling.png")
    save()
    if old:
        print("\n".join(compare(rows, old, here)))
    return 1 if red else 0


def row_of(op: str, problem: Problem, device: str, quick: bool) -> dict[str, Any]:
    say(f"{op} {problem.name} {problem.direction} ...")
    row = measure(op, problem, device, quick)
    say("")
    return row


if __name__ == "__main__":
    sys.exit(main())
