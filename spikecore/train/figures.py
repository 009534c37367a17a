"""A run's figures: curves over the epochs, confusion of the classes."""

import io
from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from spikecore.train.report import BLUE, GREY, ORANGE, STYLE

__all__ = ["draw_confusion", "draw_curves"]

NAMED = 30  # classes whose names fit beside a matrix


def draw_curves(rows: Sequence[dict[str, float]]) -> bytes:
    """A PNG: loss, accuracy, firing rate with energy, learning rate, each over the epochs of `rows`."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.6), dpi=200, layout="constrained")
        FigureCanvasAgg(figure)
        (loss, accuracy), (energy, rate) = figure.subplots(2, 2)
        _line(loss, rows, "train_loss", ORANGE, "train")
        _line(loss, rows, "test_loss", BLUE, "test")
        loss.set_title("Loss", loc="left", fontweight="bold")
        _line(accuracy, rows, "train_accuracy", ORANGE, "train", 100)
        _line(accuracy, rows, "test_accuracy", BLUE, "test", 100)
        tested = [row for row in rows if "test_accuracy" in row]
        title = "Accuracy (%)"
        if tested:
            best = max(tested, key=lambda row: row["test_accuracy"])
            title += f", best {best['test_accuracy'] * 100:.2f} in epoch {best['epoch']:.0f}"
        accuracy.set_title(title, loc="left", fontweight="bold")
        _line(energy, rows, "energy_uj", BLUE, "energy")
        energy.set_title("Energy of a sample (uJ)", loc="left", fontweight="bold")
        spikes = energy.twinx()
        spikes.spines["right"].set_visible(True)
        _line(spikes, rows, "firing_rate", GREY, "firing rate", 100)
        spikes.set_ylabel("Neurons that fire in a step (%)", color=GREY)
        spikes.tick_params(axis="y", colors=GREY)
        _line(rate, rows, "lr", BLUE, "learning rate")
        rate.set_title("Learning rate", loc="left", fontweight="bold")
        for axes in (loss, accuracy):
            axes.legend(handlelength=1.4, loc="upper right" if axes is loss else "lower right")
        for axes in (loss, accuracy, energy, rate, spikes):
            top = max((max(line.get_ydata()) for line in axes.lines), default=0.0)
            axes.set(ylim=(0, 1.06 * top or 1), xlim=(rows[0]["epoch"] - 0.3, rows[-1]["epoch"] + 0.3))
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
            axes.set_xlabel("Epoch")
        return _png(figure)


def draw_confusion(confusion: Tensor, classes: Sequence[str]) -> bytes:
    """A PNG of the matrix ``[K, K]`` of counts, each true class (row) as shares of its samples."""
    K = len(classes)
    shares = confusion.double() / confusion.sum(1, keepdim=True).clamp(min=1)
    with matplotlib.rc_context(STYLE):
        side = 2.4 + 0.24 * min(K, NAMED)
        figure = Figure(figsize=(side + 0.8, side), dpi=200, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        image = axes.imshow(shares.numpy() * 100, cmap="Blues", vmin=0, vmax=100, interpolation="nearest")
        figure.colorbar(image, ax=axes, shrink=0.8, label="Share of the true class (%)")
        axes.set(xlabel="Predicted", ylabel="True")
        right = float(confusion.diagonal().sum() / confusion.sum().clamp(min=1))
        axes.set_title(f"{right:.2%} of {int(confusion.sum()):,} right", loc="left", fontweight="bold")
        for spine in axes.spines.values():
            spine.set_visible(True)
        if K <= NAMED:
            axes.set_xticks(range(K), classes, rotation=90 if max(map(len, classes)) > 2 else 0)
            axes.set_yticks(range(K), classes)
        if K <= 12:
            for i in range(K):
                for j in range(K):
                    if share := float(shares[i, j]):
                        colour = "white" if share > 0.55 else GREY if share < 0.01 else "black"
                        axes.text(j, i, f"{share * 100:.0f}", ha="center", va="center", fontsize=6, color=colour)
        return _png(figure)


def _line(axes: Axes, rows: Sequence[dict[str, float]], key: str, colour: str, label: str, scale: float = 1.0) -> None:
    points = [(row["epoch"], row[key] * scale) for row in rows if key in row]
    if points:
        axes.plot(*zip(*points, strict=True), color=colour, label=label, marker="o" if len(points) < 3 else None,
                  markersize=3)  # fmt: skip


def _png(figure: Figure) -> bytes:
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()
