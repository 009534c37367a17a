"""What run.py draws: times over a copy as bars, growth as lines."""

import pathlib
import textwrap
from typing import Any

from matplotlib.figure import Figure

OURS, COPY = "spikecore", "copy"
# Colours told apart by the colour-blind too (Okabe and Ito 2008).
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442")
FLOOR = 0.5  # of the logarithmic axis, whose bars have no natural foot


def bars(rows: list[dict[str, Any]], machine_text: str, path: pathlib.Path) -> None:
    """Times over copy by contestant on a log scale: a panel per direction and number of threads."""
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
            drawn = panel.bar(xs, [y - FLOOR for y in ys], width * 0.94, bottom=FLOOR, color=colour, label=peer)
            panel.bar_label(drawn, [f"{y:.1f}" if y < 9.95 else f"{y:.0f}" for y in ys], fontsize=6, padding=1)
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
        panel.set_title(f"{direction}, {next(iter(chosen.values()))['where']}", fontsize=9)
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


def over(row: dict[str, Any], name: str) -> float:
    return row["over_copy"] * (1 if name == OURS else row["peer_over_ours"][name])


def growth(scalings: list[dict[str, Any]], machine_text: str, path: pathlib.Path) -> None:
    """A column for each scaling: seconds above, peak memory below, both axes logarithmic; dotted: linear growth."""
    size = (1.2 + 3.6 * len(scalings), 6.4)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(2, len(scalings), squeeze=False, sharex="col")
    names = list(dict.fromkeys(n for g in scalings for point in g["points"].values() for n in point))
    names.sort(key=lambda n: n != OURS)
    for column, g in enumerate(scalings):
        for panel, key, unit in zip(axes[:, column], ("s", "bytes"), (1e-3, 2**20), strict=True):
            for name, colour in zip(names, COLOURS, strict=False):
                at = [(x, point[name][key] / unit) for x, point in g["points"].items() if name in point]
                at = [(x, y) for x, y in at if y > 0]
                if at:
                    style = {"lw": 2.2, "zorder": 3} if name == OURS else {"lw": 1.2}
                    panel.plot(*zip(*at, strict=True), "o-", ms=3.5, color=colour, label=name, **style)
                if at and name == OURS:
                    (x0, y0), (x1, _) = at[0], at[-1]
                    panel.plot([x0, x1], [y0, y0 * x1 / x0], ":", color="0.5", lw=1, zorder=0)
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.spines[["top", "right"]].set_visible(False)
            panel.grid(lw=0.4, color="0.88")
        axes[0, column].set_title(g["name"], fontsize=9)
        axes[1, column].set_xlabel(g["axis"])
    axes[0, 0].set_ylabel("milliseconds")
    axes[1, 0].set_ylabel("peak memory, MiB")
    handles = {label: h for panel in axes.flat for h, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    note = textwrap.fill(machine_text, int(size[0] * 17))
    figure.suptitle(f"{scalings[0]['op']}: growth, lower is better; dotted: linear\n{note}", fontsize=7)
    figure.savefig(path, dpi=200)
