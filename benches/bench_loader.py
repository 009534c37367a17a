"""Does the loader keep up with the step? Per update, how long it waited for its batch, and how long it computed:

    python benches/bench_loader.py [RECIPE ...] [KEY=VALUE ...] [--updates N] [--threads N] [--plot FILE.png]

The recipe's own batches, augmentation, workers, model and optimiser, on JPEG files in folders of classes that are made
for it, of CIFAR's size or, where the recipe's images are larger, of ImageNet's usual one (500 x 375). Overrides such as
workers=4 follow as KEY=VALUE. The first updates (until the workers have started) are shown but not counted.

Beside it the loader's own rate, with nothing to wait for it, over what the step asks for: above 1 it keeps up.
"""

import argparse
import json
import os
import pathlib
import statistics
import tempfile
import time
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from spikecore.testing import timing
from spikecore.train.batches import open_samples, train_batches
from spikecore.train.build import autocast, build
from spikecore.train.ranks import joined
from spikecore.train.recipe import Recipe, load_recipe

RECIPES = ("qkformer_small_cifar10", "sew_resnet18_imagenet")
STARTED = 3  # updates until every worker has sent its first batch
WAIT, STEP = "#D55E00", "#0072B2"


def write_images(root: pathlib.Path, classes: int, n: int, size: tuple[int, int]) -> None:
    """``train/CLASS/*.jpg``, at least `n` in all and one of each class; 64 of them differ, the others are links.

    Noise over smooth colours, which compresses as photographs do: to about ImageNet's 110 KB at its size.
    """
    rng = np.random.default_rng(0)
    different = []
    for i in range(min(n, 64)):
        coarse = Image.fromarray(rng.integers(0, 256, (size[1] // 8 + 1, size[0] // 8 + 1, 3), dtype=np.uint8))
        noise = rng.normal(0, 12, (size[1], size[0], 3))
        different.append(root / f"{i}.jpg")
        pixels = np.clip(np.asarray(coarse.resize(size)) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(different[-1], quality=85)
    for i in range(max(n, classes)):
        folder = root / "train" / f"n{i % classes:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        os.link(different[i % len(different)], folder / f"{i}.jpg")


def measure(recipe: Recipe, updates: int) -> dict[str, Any]:
    """Seconds: of each update when its wait, its step began and it ended, and of a batch of the loader left alone."""
    with joined() as ranks:
        samples = open_samples(recipe, training=True)
        batches, order = train_batches(recipe, samples, ranks)
        parts = build(recipe, ranks, order.updates, samples[0][0])
        parts.net.train()
        rows, device = [], ranks.device
        alone = max(updates // 2, STARTED)
        order.start(0, 0, 1 + (updates + STARTED + alone) // order.updates)
        flow = iter(batches)
        for _ in range(updates):
            waiting = time.perf_counter()
            x, y = next(flow)
            begun = time.perf_counter()
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            if parts.mixup is not None:
                x, y = parts.mixup(x, y)
            with autocast(recipe, device):
                loss = parts.wrapped(x, y)[1]
            parts.scaler.scale(loss).backward()
            parts.scaler.step(parts.optimizer)
            parts.scaler.update()
            parts.optimizer.zero_grad()
            loss.item()  # waits for a GPU
            rows.append((waiting, begun, time.perf_counter()))
        for _ in range(STARTED):
            next(flow)
        started = time.perf_counter()
        for _ in range(alone):
            next(flow)
        alone_seconds = (time.perf_counter() - started) / alone
    origin = rows[0][0]
    return {
        "recipe": recipe.name, "batch": order.batch, "workers": recipe.workers, "alone": alone_seconds,
        "updates": [[t - origin for t in row] for row in rows],
    }  # fmt: skip


def line(row: dict[str, Any]) -> str:
    counted = row["updates"][STARTED:]
    waits, steps = [b - a for a, b, _ in counted], [c - b for _, b, c in counted]
    share = sum(waits) / (sum(waits) + sum(steps))
    return (
        f"{row['recipe']:<28}{row['batch']:>6}{row['workers']:>9}{statistics.median(waits) * 1e3:>10.1f}"
        f"{max(waits) * 1e3:>10.1f}{statistics.median(steps) * 1e3:>10.0f}{share:>10.1%}"
        f"{row['batch'] / row['alone']:>12,.0f}{statistics.median(steps) / row['alone']:>12.1f}x"
    )


def draw(rows: list[dict[str, Any]], text: str, path: pathlib.Path) -> None:
    """A panel for each recipe: the run's time from left to right, a bar of waiting and a bar of computing."""
    figure = Figure(figsize=(7.2, 0.9 + 1.15 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    for panel, row in zip(panels, rows, strict=True):
        for height, at, colour, edge in ((1, 0, WAIT, WAIT), (0, 1, STEP, "white")):
            spans = [(u[at], u[at + 1] - u[at]) for u in row["updates"]]
            panel.broken_barh(spans, (height - 0.4, 0.8), facecolor=colour, edgecolor=edge, lw=0.5)
        panel.axvspan(0, row["updates"][STARTED][0], color="0.93", zorder=0)
        title = f"{row['recipe']}, batches of {row['batch']}, {row['workers']} workers; grey: start"
        panel.set_title(title, fontsize=8, loc="left")
        panel.set_yticks([1, 0], ["waits", "computes"], fontsize=8)
        panel.set(ylim=(-0.6, 1.6), xlim=(0, row["updates"][-1][2]))
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("Seconds", fontsize=8)
    figure.suptitle(text, fontsize=7)
    figure.savefig(path, dpi=200)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="RECIPE | KEY=VALUE", help=f"default: {', '.join(RECIPES)}")
    parser.add_argument("--updates", type=int, default=30, help="of each recipe; default: %(default)s")
    parser.add_argument("--threads", type=int, help="of the step; default: all")
    parser.add_argument("--plot", type=pathlib.Path, metavar="FILE.png")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    options = parser.parse_args()
    if options.updates <= STARTED:
        parser.error(f"--updates must be above {STARTED}, got {options.updates}")
    if options.threads:
        torch.set_num_threads(options.threads)
    names = [w for w in options.words if "=" not in w] or RECIPES
    overrides = [*(w for w in options.words if "=" in w), "effective_batch=null"]  # a step for each batch
    text = timing.machine_line(timing.machine())
    print(f"{text}\n{timing.steady_memory()}")
    print(f"{'':<28}{'batch':>6}{'workers':>9}{'wait, ms':>10}{'longest':>10}{'step, ms':>10}{'waiting':>10}"
          f"{'images/s':>12}{'loader/step':>13}")  # fmt: skip
    rows = []
    for name in names:
        recipe = load_recipe(name, overrides)
        size = (32, 32) if (recipe.img_size or 0) <= 64 else (500, 375)
        with tempfile.TemporaryDirectory() as folder:
            write_images(pathlib.Path(folder), recipe.num_classes, 4 * recipe.batch_size, size)
            rows.append(measure(load_recipe(name, [*overrides, f"data.root={folder}"]), options.updates))
        print(line(rows[-1]), flush=True)
    if options.plot:
        draw(rows, text, options.plot)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
