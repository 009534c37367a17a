"""Times every operator against its peers: python benches/run.py [--op lif] [--threads 1,2] [--json FILE] ...

Per row: median times (ours with its quartiles), times over a copy of the input with the bar it must stay under, how
many times as long each peer takes (in brackets: how many it must), bytes our kernels take and return over bytes that
must move, and the share of the copy's bandwidth; in training also the bytes autograd keeps beside inputs and spikes,
and the peak beyond spikes and gradient, both over the bytes of x. Ratios are medians over turns (see
spikecore.testing.timing), so they may differ slightly from the ratio of the medians. An operator that disagrees with
its reference gets no number. Peers: pip install "spikecore[bench]".

Adding an operator: benches/bench_<op>.py with parity(device), problems(device, quick) and DISTRIBUTIONS.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import textwrap
import traceback
from dataclasses import asdict
from types import ModuleType
from typing import Any

import torch

from spikecore._backend import gpu_backend
from spikecore.testing import timing
from spikecore.testing.timing import Problem, machine_line

HERE = pathlib.Path(__file__).parent
OURS, COPY = "spikecore", "copy"
KEY = ("op", "name", "direction", "device", "threads")
# Colours told apart by the colour-blind too (Okabe and Ito 2008).
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442")


def discover() -> dict[str, ModuleType]:
    """The benches beside this file, by operator."""
    modules = {}
    for path in sorted(HERE.glob("bench_*.py")):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        modules[path.stem.removeprefix("bench_")] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return modules


def measure(op: str, problem: Problem, device: str, quick: bool) -> dict[str, Any]:
    """One row: everything known about one problem, ready for JSON."""
    calls, skipped = dict(problem.calls), dict(problem.skipped)
    for name in [name for name in calls if name not in (OURS, COPY)]:
        try:
            calls[name]()
        except Exception as e:  # a peer that cannot run here must not take the others down
            reason = (str(e).strip() or type(e).__name__).splitlines()[0]
            skipped[name] = f"fails: {reason[:100]}"
            del calls[name]
    duration = {"warmup": 0.01, "duration": 0.03, "turn": 0.005} if quick else {"warmup": 0.2, "duration": 1.0}
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


# ---- output ----------------------------------------------------------------------------------------------------------


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
        out += ["", f"{chosen[0]['op']}, {title}, {where(chosen[0])}"]
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


def where(row: dict[str, Any]) -> str:
    return row["device"] if row["threads"] == 0 else f"{row['threads']} thread{'s' * (row['threads'] != 1)}"


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
        title = f"{row['op']} {row['name']}, {row['direction']}, {where(row)}"
        if was is None:
            lines.append([title, "-", seconds(new), "-", "-", f"{row['over_copy']:.2f}"])
            continue
        then, copies = was["times"][OURS]["median"], (f"{r['over_copy']:.2f}" for r in (was, row))
        lines.append([title, seconds(then), seconds(new), f"{new / then:.2f}", *copies])
    return out + aligned(lines)


def plot(rows: list[dict[str, Any]], machine_text: str, path: pathlib.Path) -> None:
    """Times over copy by contestant on a log scale: a panel per direction and number of threads."""
    from matplotlib.figure import Figure

    directions, threads = (list(dict.fromkeys(row[k] for row in rows)) for k in ("direction", "threads"))
    names = [OURS, *dict.fromkeys(p for row in rows for p in row["peer_over_ours"])]
    shapes = list(dict.fromkeys(row["name"] for row in rows))
    size = (2 + 1.15 * len(shapes) * len(directions), 1.4 + 3.1 * len(threads))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(threads), len(directions), squeeze=False, sharey=True)
    width = 0.84 / len(names)
    for panel, (n, direction) in zip(axes.flat, ((n, d) for n in threads for d in directions), strict=True):
        chosen = {row["name"]: row for row in rows if (row["threads"], row["direction"]) == (n, direction)}
        for i, (peer, colour) in enumerate(zip(names, COLOURS, strict=False)):
            at = [(shapes.index(s), over(row, peer)) for s, row in chosen.items() if peer in row["times"]]
            xs, ys = [a + (i - (len(names) - 1) / 2) * width for a, _ in at], [y for _, y in at]
            bars = panel.bar(xs, [y - FLOOR for y in ys], width * 0.94, bottom=FLOOR, color=colour, label=peer)
            panel.bar_label(bars, [f"{y:.1f}" if y < 9.95 else f"{y:.0f}" for y in ys], fontsize=6, padding=1)
        for s, row in chosen.items():
            if COPY in row["bars"]:
                left = shapes.index(s) - 0.46
                bound = panel.plot([left, left + width + 0.06], [row["bars"][COPY]] * 2, color="black", lw=1.6)[0]
                bound.set_label("bar ours must stay under" if s == shapes[0] else "_")
        panel.axhline(1, color="0.35", lw=0.8, ls="--", zorder=0)
        panel.set_yscale("log")
        panel.set_ylim(FLOOR, 2 * max(over(row, name) for row in rows for name in names if name in row["times"]))
        panel.set_xticks(range(len(shapes)), [s.replace(" ", "\n") for s in shapes], fontsize=7)
        panel.yaxis.set_major_formatter("{x:g}")
        panel.set_title(f"{direction}, {where(next(iter(chosen.values())))}", fontsize=9)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", lw=0.4, color="0.85")
        panel.set_axisbelow(True)
    for panel in axes[:, 0]:
        panel.set_ylabel("time / time of copying x", fontsize=8)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8)
    note = textwrap.fill(machine_text, int(size[0] * 17))
    figure.suptitle(f"{rows[0]['op']}: times over Tensor.copy_, lower is better\n{note}", fontsize=7)
    figure.savefig(path, dpi=200)


FLOOR = 0.5  # of the logarithmic axis, whose bars have no natural foot


def over(row: dict[str, Any], name: str) -> float:
    return row["over_copy"] * (1 if name == OURS else row["peer_over_ours"][name])


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
    parser.add_argument("--plot", type=pathlib.Path, metavar="DIR", help="one PNG per operator")
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

    rows, red = [], []
    for op, module in chosen.items():
        try:
            module.parity(device)
        except Exception:
            traceback.print_exc()
            print(f"{op}: disagrees with its reference on {device}, so no numbers")
            red.append(op)
            continue
        mine = []
        try:
            for n in threads if device == "cpu" else [everything]:
                torch.set_num_threads(n)
                mine += [row_of(op, p, device, options.quick) for p in module.problems(device, options.quick)]
        finally:
            torch.set_num_threads(everything)
        print("\n".join(table(mine)))
        if options.plot:
            options.plot.mkdir(parents=True, exist_ok=True)
            plot(mine, text, options.plot / f"{op}.png")
        rows += mine
    if options.json:
        saved = {"commit": commit(), "machine": here, "memory": memory, "rows": rows}
        options.json.write_text(json.dumps(saved, indent=1))
    if old:
        print("\n".join(compare(rows, old, here)))
    return 1 if red else 0


def row_of(op: str, problem: Problem, device: str, quick: bool) -> dict[str, Any]:
    print(f"\r{op} {problem.name} {problem.direction} ...".ljust(79), end="", file=sys.stderr, flush=True)
    row = measure(op, problem, device, quick)
    print("\r".ljust(80), end="\r", file=sys.stderr, flush=True)
    return row


if __name__ == "__main__":
    sys.exit(main())
