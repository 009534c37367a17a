"""Accuracy over seconds of training, ours beside SpikingJelly's:

    python benches/accuracy_over_time.py --root CIFAR10 --out DIR [--epochs N] [--max-minutes N] [--threads N]

Recipe qkformer_small_cifar10, trained twice: with the model as it is here, and as SpikingJelly's model zoo builds the
same architecture (its multi-step LIF on the CPU, torch's norms and products). Both begin with equal weights and see the
same batches, augmentation and schedule; they take turns batch by batch, so that whatever else the machine does meets
both. Seconds are those of steps alone (forward, backward, optimiser), not of loading, which both share, nor of testing.
Test accuracy is taken at fixed updates, nothing is chosen by it. First outputs and gradients must agree in float64.

Leaves accuracy_over_time.csv and .png in DIR, anew at each point. Peer: pip install "spikecore[bench]".
"""

import argparse
import copy
import csv
import itertools
import pathlib
import time
from typing import Any

import torch
from bench_models import counterparts
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from spikecore.models import create_model
from spikecore.testing import timing
from spikecore.train.batches import Order, eval_batches, open_samples, seed_all, seed_of, train_batches
from spikecore.train.build import Parts, build
from spikecore.train.ranks import joined
from spikecore.train.recipe import Recipe, load_recipe

RECIPE = "qkformer_small_cifar10"
POINTS = 20  # tests of the whole schedule
COLOURS = {"spikecore": "#0072B2", "spikingjelly": "#E69F00"}
LABELS = {"spikecore": "spikecore", "spikingjelly": "SpikingJelly"}


class Peer(nn.Module):
    """SpikingJelly's QKFormer of a recipe's settings; ``[B, 3, H, W] -> [B, K]``."""

    def __init__(self, *, embed_dim: int, heads: int, depth: int, mlp_ratio: float, T: int, num_classes: int) -> None:
        from spikingjelly.activation_based.model.qkformer import QKFormer

        super().__init__()
        self.T = T
        self.net = QKFormer(
            T=T, num_classes=num_classes, embed_dims=embed_dim, num_heads=(heads,) * 3, depths=(1, 2, depth - 3),
            mlp_ratio=mlp_ratio, detach_reset=True,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        from spikingjelly.activation_based import functional

        functional.reset_net(self.net)
        return self.net(x.expand(self.T, *x.shape))


@torch.no_grad()
def contestants(recipe: Recipe, x: Tensor) -> dict[str, nn.Module]:
    """Both models with the recipe's first weights and as many parameters; x is an input for one walk through them."""
    seed_all(recipe.seed)
    ours, peer = create_model(recipe.model, **recipe.model_kwargs), Peer(**recipe.model_kwargs)
    for layer, twin, part, parts in counterparts(ours.eval(), peer.eval(), peer, x):
        if (layer.bias is None) != (twin.bias is None):  # in front of a norm, where it has no effect
            twin.bias = None if layer.bias is None else nn.Parameter(layer.bias.clone())
        for name, v in layer.named_parameters():
            rows = getattr(twin, name).chunk(parts)[part]
            rows.copy_(v.reshape(rows.shape))
    counts = [sum(p.numel() for p in m.parameters()) for m in (ours, peer)]
    assert counts[0] == counts[1], f"parameters differ: {counts}"
    return {"spikecore": ours.train(), "spikingjelly": peer.train()}


def parity(models: dict[str, nn.Module], x: Tensor) -> None:
    """Outputs and the first convolution's gradient of a training step in float64."""
    found = []
    for model in models.values():
        model = copy.deepcopy(model).double()
        first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
        y = model(x.double())
        found.append((y, torch.autograd.grad(y.square().sum(), first.weight)[0]))
    assert all(t.abs().max() > 0 for t in found[0]), "silent"
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-9)


def step(parts: Parts, x: Tensor, y: Tensor) -> None:
    targets = y
    if parts.mixup is not None:
        x, targets = parts.mixup(x.clone(), y)  # it mixes in place
    parts.wrapped(x, targets)[1].backward()
    parts.optimizer.step()
    parts.optimizer.zero_grad()


@torch.inference_mode()
def accuracies(models: dict[str, nn.Module], tests: DataLoader) -> dict[str, float]:
    right, n = dict.fromkeys(models, 0), 0
    for x, y in tests:
        n += len(y)
        for name, model in models.items():
            right[name] += int((model.eval()(x).argmax(1) == y).sum())
    for model in models.values():
        model.train()
    return {name: count / n for name, count in right.items()}


def run(recipe: Recipe, out: pathlib.Path, minutes: float | None, text: str) -> list[dict[str, Any]]:
    """Rows of the table: update, epochs, and of each contestant seconds and test accuracy."""
    begun = time.perf_counter()
    with joined() as ranks:
        samples, tests = open_samples(recipe, training=True), open_samples(recipe, training=False)
        batches, order = train_batches(recipe, samples, ranks)
        test_batches = eval_batches(recipe, tests, ranks)
        x = torch.stack([samples[i][0] for i in range(0, len(samples), len(samples) // 8)])
        models = contestants(recipe, x)
        parity(models, x)
        parts = {name: build(recipe, ranks, order.updates, x[0], model) for name, model in models.items()}
        if order.accumulate > 1 or recipe.amp or recipe.clip_grad or recipe.model_ema:
            raise ValueError(f"{RECIPE}: accumulation, amp, clip_grad and model_ema are not followed here")
        total = recipe.epochs * order.updates
        due = {total * i // POINTS for i in range(POINTS + 1)}
        spent, rows = dict.fromkeys(models, 0.0), []
        flow = itertools.chain.from_iterable(epoch(order, batches, n, parts) for n in range(recipe.epochs))
        for update, batch in enumerate(tqdm(flow, total=total, unit="update", smoothing=0.05)):
            if update in due:
                rows.append(point(update, order.updates, spent, models, test_batches))
                save(rows, out, text)
            if minutes is not None and time.perf_counter() - begun > 60 * minutes:
                print(f"stopped after {minutes:g} minutes, {update} of {total} updates")
                break
            for name in sorted(models, reverse=bool(update % 2)):  # first in turns
                seed_all(seed_of(recipe.seed, update, 0, 0))
                parts[name].scheduler.step_update(update)
                started = time.perf_counter()
                step(parts[name], *batch)
                spent[name] += time.perf_counter() - started
        else:
            update = total
        rows.append(point(update, order.updates, spent, models, test_batches))
        save(rows, out, text)
    return rows


def epoch(order: Order, batches: DataLoader, number: int, parts: dict[str, Parts]) -> DataLoader:
    order.start(number)
    for p in parts.values():
        p.scheduler.step(number)
    return batches


def point(
    update: int, updates: int, spent: dict[str, float], models: dict[str, nn.Module], tests: DataLoader
) -> dict[str, Any]:
    row: dict[str, Any] = {"update": update, "epochs": update / updates}
    for name, accuracy in accuracies(models, tests).items():
        row |= {f"{name}_seconds": spent[name], f"{name}_accuracy": accuracy}
    return row


def save(rows: list[dict[str, Any]], out: pathlib.Path, text: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with (out / "accuracy_over_time.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" for k, v in row.items()} for row in rows)
    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, by in zip(panels, ("seconds", "epochs"), strict=True):
        for name, label in LABELS.items():
            at = [row[f"{name}_seconds"] if by == "seconds" else row["epochs"] for row in rows]
            values = [100 * row[f"{name}_accuracy"] for row in rows]
            panel.plot(at, values, "o-", ms=3, lw=1.6, color=COLOURS[name], label=label)
        panel.set_xlabel("Seconds of training" if by == "seconds" else "Epochs")
        panel.set(xlim=0, ylim=0)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(lw=0.4, color="0.88")
    panels[0].set_ylabel("Test accuracy (%)")
    panels[0].legend(frameon=False, loc="lower right")
    figure.suptitle(f"{RECIPE}: equal first weights, batches and schedule\n{text}", fontsize=7)
    figure.savefig(out / "accuracy_over_time.png", dpi=200)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="CIFAR-10, in any layout of spikecore.data")
    parser.add_argument("--out", required=True, type=pathlib.Path, metavar="DIR")
    parser.add_argument("--epochs", type=int, help="of the whole schedule; default: the recipe's")
    parser.add_argument("--max-minutes", type=float, help="stop after so many in all, loading and tests included")
    parser.add_argument("--threads", type=int, help="default: all")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    overrides = [f"data.root={options.root}", *([f"epochs={options.epochs}"] if options.epochs else [])]
    recipe = load_recipe(RECIPE, overrides)
    memory = timing.steady_memory()
    here = f"{timing.machine_line(timing.machine('spikingjelly'))}; {torch.get_num_threads()} threads"
    print(f"{here}\n{memory}; contestants take turns")
    rows = run(recipe, options.out, options.max_minutes, here)
    last = rows[-1]
    for name, label in LABELS.items():
        print(f"{label:<14}{last[f'{name}_accuracy']:.2%} after {last[f'{name}_seconds']:,.0f} s of training")
    faster = last["spikingjelly_seconds"] / last["spikecore_seconds"]
    print(f"spikecore's step takes 1/{faster:.2f} of the time over {last['update']:,} updates; {options.out}/")


if __name__ == "__main__":
    main()
