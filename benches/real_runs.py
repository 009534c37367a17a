"""Runs of `spikecore train` on real data: trained seed after seed, laid side by side as a figure and a table.

    python benches/real_runs.py train RECIPE DATA RUNS [KEY=VALUE ...] [--seeds 0 1 2]
    python benches/real_runs.py show RUNS/* --out docs/real_data.png

`train` leaves RUNS/{name}_s{seed}, with the CPU seconds of the whole process in cpu_seconds.txt; one thread a run.
`show` puts runs together that differ in nothing but seed and folder, and takes every figure from the last epoch's
weights.
"""

import argparse
import csv
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import yaml
from matplotlib.figure import Figure

from spikecore.models import create_model
from spikecore.train.batches import open_samples
from spikecore.train.recipe import Recipe, recipe_of

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito 2008


@dataclass
class Run:
    recipe: Recipe
    rows: list[dict[str, float]]  # of metrics.csv
    cpu_seconds: float | None

    @property
    def tested(self) -> list[tuple[float, float]]:
        """(epoch, accuracy in %) of the epochs after which it was tested, the last one among them."""
        return [(row["epoch"], 100 * row["test_accuracy"]) for row in self.rows if "test_accuracy" in row]


def train(recipe: str, data: str, runs: pathlib.Path, overrides: list[str], seeds: list[int], name: str | None) -> None:
    for seed in seeds:
        out = runs / f"{name or recipe}_s{seed}"
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-m", "spikecore", "train", recipe, f"data.root={data}", f"seed={seed}"]
        subprocess.run(
            [*command, *overrides, "--out", str(out)], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        (out / "cpu_seconds.txt").write_text(f"{spent:.0f}\n")


def read(folder: pathlib.Path) -> Run:
    recipe = recipe_of(yaml.safe_load((folder / "recipe.yaml").read_text()), str(folder / "recipe.yaml"))
    with (folder / "metrics.csv").open() as file:
        rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    if len(rows) < recipe.epochs + recipe.cooldown_epochs:
        raise SystemExit(f"{folder}: {len(rows)} of {recipe.epochs + recipe.cooldown_epochs} epochs; not finished")
    spent = folder / "cpu_seconds.txt"
    return Run(recipe, rows, float(spent.read_text()) if spent.is_file() else None)


def grouped(folders: list[pathlib.Path]) -> dict[str, list[Run]]:
    """Runs by the name of their folder without ``_s{seed}``, in the order given.

    Raises:
        SystemExit: runs of one name that differ in more than seed and folder of the data, or twice the same seed.
    """
    groups: dict[str, list[Run]] = {}
    settings: dict[str, str] = {}
    for folder in folders:
        run = read(folder)
        name = folder.name.removesuffix(f"_s{run.recipe.seed}")
        of: dict[str, Any] = run.recipe.to_dict()
        for key in ("seed", "note", "run_here", "published"):
            del of[key]
        del of["data"]["root"]
        text = json.dumps(of, sort_keys=True)
        if settings.setdefault(name, text) != text:
            raise SystemExit(f"{folder}: other settings than those of the runs before it under the name {name}")
        if run.recipe.seed in [other.recipe.seed for other in groups.get(name, [])]:
            raise SystemExit(f"{folder}: seed {run.recipe.seed} a second time under the name {name}")
        groups.setdefault(name, []).append(run)
    return groups


def table(groups: dict[str, list[Run]]) -> list[str]:
    lines = ["| run | test set | parameters | epochs | last epoch's accuracy, by seed | mean ± s.d. | CPU seconds |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, runs in groups.items():
        recipe, last = runs[0].recipe, [run.tested[-1][1] for run in runs]
        tested = f"{len(open_samples(recipe, training=False)):,} of {recipe.data.name}"
        size = sum(p.numel() for p in create_model(recipe.model, **recipe.model_kwargs).parameters())
        spread = f" ± {statistics.stdev(last):.2f}" if len(last) > 1 else ""
        spent = [run.cpu_seconds for run in runs if run.cpu_seconds is not None]
        seconds = f"{statistics.mean(spent):.0f}" if len(spent) == len(runs) else "not measured"
        each = ", ".join(f"{value:.2f}" for value in last)
        lines.append(
            f"| {name} | {tested} | {size:,} | {len(runs[0].rows)} | {each} % | {statistics.mean(last):.2f}{spread} % "
            f"| {seconds} |"
        )
    return lines


def draw(groups: dict[str, list[Run]], path: pathlib.Path) -> None:
    """Test accuracy by epoch: a panel for each set of data, a colour for each recipe, a line for each seed."""
    sets: dict[str, list[str]] = {}
    for name, runs in groups.items():
        data = runs[0].recipe.data
        title = data.name + (", other speakers" if data.options.get("speakers") else "")
        sets.setdefault(title, []).append(name)
    columns = min(len(sets), 4)
    rows = -(-len(sets) // columns)
    figure = Figure(figsize=(2.3 * columns, 2.1 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for panel, (title, names) in zip(panels, sets.items(), strict=False):
        for name, colour in zip(names, COLOURS, strict=False):
            runs = groups[name]
            for i, run in enumerate(runs):
                panel.plot(*zip(*run.tested, strict=True), color=colour, lw=0.9, label=name if not i else None)
                panel.plot(*run.tested[-1], "o", color=colour, ms=2)
        panel.set_title(title, fontsize=7, loc="left", fontweight="bold")
        panel.set_xlabel("epoch", fontsize=7)
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.set_ylim(0, 101)
        panel.tick_params(labelsize=6.5)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", lw=0.4, color="0.88")
        panel.legend(fontsize=5.5, frameon=False, loc="lower right", handlelength=1.2)
    for panel in panels:
        panel.axis("off")
    figure.get_axes()[0].set_ylabel("test accuracy (%)", fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("train")
    one.add_argument("recipe")
    one.add_argument("data", help="the data's folder")
    one.add_argument("runs", type=pathlib.Path, help="the folder for the runs")
    one.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    one.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    one.add_argument("--name", help="of the runs; default: the recipe's")
    two = commands.add_parser("show")
    two.add_argument("folders", nargs="+", type=pathlib.Path)
    two.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs/real_data.png"))
    args = parser.parse_args()
    if args.command == "train":
        train(args.recipe, args.data, args.runs, args.overrides, args.seeds, args.name)
    else:
        groups = grouped(args.folders)
        print("\n".join(table(groups)))
        draw(groups, args.out)


if __name__ == "__main__":
    main()
