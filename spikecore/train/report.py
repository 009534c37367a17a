"""The quickstart's figure: curves, a spike raster, predictions."""

import io
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn

from spikecore.data.digits import Digits
from spikecore.neurons import Neuron

__all__ = ["draw_report"]

INK, BLUE, ORANGE, RED, GREY = "#1a1a1a", "#1f5fa8", "#d9822b", "#c62828", "#8a8a8a"
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 7.5,
    "axes.labelsize": 7.5,
    "axes.titlesize": 7.5,
    "axes.linewidth": 0.6,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "text.color": INK,
    "lines.linewidth": 1.2,
    "lines.solid_capstyle": "round",
}
COLUMNS, ROWS = 18, 2  # of the grid of predictions


def draw_report(runs: list[list[dict[str, float]]], net: nn.Module, digits: Digits) -> bytes:
    """A PNG of four panels: loss, accuracy, one layer's spikes for one test image, predictions.

    Args:
        runs: per seed, a row of metrics per epoch (`loss`, `accuracy` of `train` and `test`).
        net: the trained network of the first seed; its last but one neuron layer is shown.
        digits: the data; the test images are classified.
    """
    logits, layer, spikes, shown = _look(net, digits)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 5.5), dpi=220)
        FigureCanvasAgg(figure)
        curves = figure.add_gridspec(1, 2, left=0.075, right=0.98, top=0.935, bottom=0.655, wspace=0.2)
        raster = figure.add_gridspec(
            1, 2, left=0.03, right=0.98, top=0.525, bottom=0.355, width_ratios=(1, 7.6), wspace=0.13
        )
        grid = figure.add_gridspec(
            ROWS, COLUMNS, left=0.03, right=0.98, top=0.19, bottom=0.015, wspace=0.14, hspace=0.5
        )
        loss, accuracy = figure.add_subplot(curves[0]), figure.add_subplot(curves[1])
        _curves(loss, runs, "loss", 1.0)
        _curves(accuracy, runs, "accuracy", 100.0)
        _raster(figure.add_subplot(raster[0]), figure.add_subplot(raster[1]), spikes, digits.x_test[shown, 0])
        wrong = _predictions(figure, grid, logits, digits)
        of = f"mean and range of {len(runs)} seeds" if len(runs) > 1 else "one seed"
        _panel(figure, "a", 0.02, 0.955, f"Cross-entropy, {of}")
        _panel(figure, "b", 0.505, 0.955, f"Accuracy (%), {of}")
        _panel(figure, "c", 0.02, 0.55, f"Spikes of layer {layer} for the image on the left: "
               f"{float(spikes.mean()) * 100:.1f} % of its neurons fire per step")  # fmt: skip
        score = f"{wrong} of {len(logits)} are wrong (red, true class in brackets)" if wrong else "none is wrong"
        _panel(figure, "d", 0.02, 0.237, f"Predictions for test images{', seed 0' if len(runs) > 1 else ''}: {score}")
        image = io.BytesIO()
        figure.savefig(image, format="png")
    return image.getvalue()


@torch.no_grad()
def _look(net: nn.Module, digits: Digits) -> tuple[Tensor, str, Tensor, int]:
    """(test logits, name of a neuron layer, its spikes [T, N] for one test image, which image)."""
    neurons = [(name, m) for name, m in net.named_modules() if isinstance(m, Neuron)]
    name, module = neurons[max(len(neurons) - 2, 0)]
    seen: list[Tensor] = []
    handle = module.register_forward_hook(lambda module, args, out: seen.append(out))
    net.eval()
    try:
        logits = net(digits.x_test.to(next(net.parameters()).device)).cpu()
    finally:
        handle.remove()
    shown = int((logits.argmax(1) == digits.y_test).nonzero()[0]) if (logits.argmax(1) == digits.y_test).any() else 0
    return logits, name, seen[0][:, shown].flatten(1).cpu(), shown


def _curves(axes: Axes, runs: list[list[dict[str, float]]], key: str, scale: float) -> None:
    epochs = [row["epoch"] for row in runs[0]]
    low = []
    for part, colour in (("train", ORANGE), ("test", BLUE)):
        lines = torch.tensor([[row[f"{part}_{key}"] * scale for row in rows] for rows in runs])
        mean = lines.mean(0)
        axes.fill_between(epochs, lines.amin(0), lines.amax(0), color=colour, alpha=0.2, linewidth=0)
        axes.plot(epochs, mean, color=colour, label=part, marker="o" if len(epochs) == 1 else None, markersize=3)
        low.append(float(mean.min()))
        if key == "accuracy" and part == "test":
            last = float(mean[-1])
            axes.annotate(
                f"{last:.2f}", (epochs[-1], last), xytext=(0, -5), textcoords="offset points",
                ha="right", va="top", color=colour,
            )  # fmt: skip
    if key == "accuracy":  # where it got beyond 90 %, what happens there is what matters
        axes.set_ylim(80 if float(mean[-1]) > 90 and len(epochs) > 5 else 0, 102)
    else:
        axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.set_xlabel("Epoch")
    axes.legend(loc="upper right" if key == "loss" else "lower right", handlelength=1.4)


def _raster(picture: Axes, axes: Axes, spikes: Tensor, image: Tensor) -> None:
    _digit(picture, image)
    T, N = spikes.shape
    axes.eventplot(
        [row.nonzero().flatten().numpy() for row in spikes],
        lineoffsets=range(1, T + 1), linelengths=0.72, linewidths=0.55, colors=INK,
    )  # fmt: skip
    axes.set(xlim=(-0.004 * N, N * 1.004), ylim=(T + 0.6, 0.4), yticks=range(1, T + 1))
    axes.set(xlabel="Neuron", ylabel="Time step")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def _predictions(figure: Figure, grid: GridSpec, logits: Tensor, digits: Digits) -> int:
    """All the wrong ones (as far as the grid reaches), then right ones; returns how many are wrong."""
    guess, truth = logits.argmax(1), digits.y_test
    wrong, right = (guess != truth).nonzero().flatten(), (guess == truth).nonzero().flatten()
    for k, i in enumerate(torch.cat([wrong, right])[: COLUMNS * ROWS].tolist()):
        axes = figure.add_subplot(grid[k // COLUMNS, k % COLUMNS])
        bad = k < len(wrong)
        _digit(axes, digits.x_test[i, 0], RED if bad else None)
        axes.set_title(
            f"{int(guess[i])} ({int(truth[i])})" if bad else f"{int(guess[i])}",
            pad=2.5, color=RED if bad else INK, fontweight="bold" if bad else "normal",
        )  # fmt: skip
    return len(wrong)


def _digit(axes: Axes, image: Tensor, frame: str | None = None) -> None:
    axes.imshow(image.numpy(), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(visible=True, color=frame or GREY, linewidth=1.4 if frame else 0.4)


def _panel(figure: Figure, letter: str, x: float, y: float, caption: str) -> None:
    figure.text(x, y, letter, fontsize=10, fontweight="bold", va="baseline")
    figure.text(x + 0.022, y, caption, fontsize=8, va="baseline")
