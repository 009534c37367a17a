"""What the ImageNet recipes should need on 8 to 64 GPUs, from what one step does: python benches/scale_plan.py [RECIPE]

Measured here, on the CPU, under bfloat16 autocast where the recipe has amp: arithmetic of a step (forward and backward;
convolutions and products, spikecore's own operators not counted), bytes that its kernels take and return, bytes at its
peak with one and with two images (their difference is an image's), calls of operators, and images that one core decodes
and augments in a second (JPEG, 500 x 375). Worked out from these and from a card's published rates, for an update of
`effective_batch`:

  memory      weights, gradients, optimiser's state, half precision copies, and the images that a GPU takes at once
  all-reduce  2 (n - 1) / n times the gradients' 4 bytes a parameter, sent and received by every GPU
  update      arithmetic at ARITHMETIC of the card's peak and bytes at BANDWIDTH of its memory's, one after the other,
              or calls at CALL each, which a small batch cannot outrun; the all-reduce hides behind the last backward
              pass as far as that is long enough
  cores       what the loader needs so that it never waits, a GPU

Refuted by a run on such cards: `samples_per_s` in metrics.csv below two thirds of the plan's, torch's peak memory above
it by more than a fifth, or more than 2 % of waiting in benches/bench_loader.py with so many cores.
"""

import argparse
import json
import os
import pathlib
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from bench_loader import write_images
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from spikecore.testing import timing
from spikecore.train.batches import open_samples
from spikecore.train.build import Parts, autocast, build
from spikecore.train.ranks import Ranks
from spikecore.train.recipe import Recipe, load_recipe

RECIPES = ("sew_resnet18_imagenet", "msresnet34_imagenet", "qkformer_10_384_imagenet", "spikingformer_8_384_imagenet")
GPUS = (8, 16, 32, 64)
NODE = 8  # GPUs of one machine


@dataclass(frozen=True)
class Card:
    """Published: float16 operations a second on dense matrices, bytes a second of memory, of the links within a
    machine (one way) and of a GPU's share of the network, and bytes of memory."""

    operations: float
    memory_rate: float
    link: float
    network: float
    memory: float


# NVIDIA's data sheets of A100 (2021) and H100 (2023), SXM; networks of DGX A100 (8 x 200 Gb/s) and DGX H100 (8 x 400).
CARDS = {
    "A100": Card(312e12, 2.039e12, 300e9, 25e9, 80e9),
    "H100": Card(989e12, 3.35e12, 450e9, 50e9, 80e9),
}
ARITHMETIC, BANDWIDTH, LINK = 0.4, 0.7, 0.7  # shares of the published rates that a step is given credit for
CALL = 10e-6  # seconds of the host for an operator: Python, autograd, launch


@dataclass(frozen=True)
class Step:
    """Of one image: operations, bytes moved, bytes at the peak; `fixed`: bytes at the peak without any image; `calls`:
    of operators, however many images."""

    parameters: int
    operations: float
    moved: float
    image: float
    fixed: float
    calls: int
    decoded: float  # images a second and core


class Calls(TorchDispatchMode):
    """Counts operators that compute."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def measure(recipe: Recipe, images: int = 48) -> Step:
    ranks = Ranks(0, 1, torch.device("cpu"))
    parts = build(recipe, ranks, 1, torch.zeros(3, recipe.img_size, recipe.img_size))
    parts.net.train()
    one, two = (partial(step, recipe, parts, n) for n in (1, 2))
    peaks = [timing.bytes_peak(call) for call in (one, two)]
    parts.optimizer.zero_grad()
    with FlopCounterMode(display=False) as flops, Calls() as calls:
        moved = timing.bytes_moved(two)
    image = peaks[1] - peaks[0]
    return Step(
        sum(p.numel() for p in parts.net.parameters()), flops.get_total_flops() / 2, moved / 2, image,
        peaks[0] - image, calls.count, decode(recipe, images),
    )  # fmt: skip


def step(recipe: Recipe, parts: Parts, n: int) -> None:
    x = torch.rand(n, 3, recipe.img_size, recipe.img_size)
    with autocast(recipe, x.device):
        loss = parts.objective(x, torch.zeros(n, dtype=torch.long))[1]
    loss.backward()
    parts.optimizer.zero_grad()


def decode(recipe: Recipe, n: int) -> float:
    """By the processor's time, which a busy machine does not stretch."""
    with tempfile.TemporaryDirectory() as folder:
        write_images(pathlib.Path(folder), recipe.num_classes, n, (500, 375))
        samples = open_samples(load_recipe(recipe.name, [f"data.root={folder}"]), training=True)
        samples[0]
        started = time.thread_time()
        for i in range(n):
            samples[i]
        return n / (time.thread_time() - started)


def plan(recipe: Recipe, step: Step, card: Card, gpus: int) -> dict[str, float]:
    """One row of the table; bytes, seconds, images a second of all GPUs."""
    effective = recipe.effective_batch or recipe.batch_size * gpus
    share = effective // gpus
    batch = min(recipe.batch_size, share)
    state = 8 if recipe.opt.startswith(("adam", "lamb", "nadam")) else 4
    memory = step.parameters * (4 + state) + max(step.fixed, 4 * step.parameters) + batch * step.image
    image = step.operations / (ARITHMETIC * card.operations) + step.moved / (BANDWIDTH * card.memory_rate)
    turn = max(batch * image, step.calls * CALL)
    sent = 2 * (gpus - 1) / gpus * 4 * step.parameters
    reducing = sent / (LINK * (card.link if gpus <= NODE else card.network))
    exposed = max(0.0, reducing - turn * 2 / 3)
    seconds = share / batch * turn + exposed
    rate = gpus * share / seconds
    return {
        "gpus": gpus, "batch": batch, "turns": share / batch, "memory": memory, "sent": sent, "seconds": seconds,
        "exposed": exposed, "rate": rate, "cores": rate / gpus / step.decoded,
        "hours": recipe.epochs * 1281167 / rate / 3600,
    }  # fmt: skip


def lines(name: str, rows: list[dict[str, float]]) -> list[str]:
    return [
        f"| {name.removesuffix('_imagenet')} | {r['gpus']:.0f} | {r['batch']:.0f} x {r['turns']:.0f} | "
        f"{r['memory'] / 1e9:.1f} | {r['sent'] / 1e6:.0f} | {r['seconds'] * 1e3:.1f} ({r['exposed'] * 1e3:.1f}) | "
        f"{r['rate']:,.0f} | {r['cores']:.1f} | {r['hours']:.1f} |"
        for r in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=RECIPES, metavar="RECIPE", help=f"default: {', '.join(RECIPES)}")
    parser.add_argument("--card", choices=CARDS, default="H100", help="default: %(default)s")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="save what was measured")
    options = parser.parse_args()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler reports each start and stop on stderr
    print(f"{timing.machine_line(timing.machine())}\n\nMeasured, an image (forward and backward):\n")
    print(
        "| recipe | parameters, M | GFLOP | moved, GB | at the peak, MB | calls a step | decoded, images/s and core |"
    )
    print("|---|---|---|---|---|---|---|")
    found: dict[str, tuple[Recipe, Step]] = {}
    saved: dict[str, Any] = {}
    for name in options.recipes:
        recipe = load_recipe(name)
        found[name] = recipe, (s := measure(recipe))
        saved[name] = s.__dict__
        if options.json:
            options.json.write_text(json.dumps(saved, indent=1))
        print(
            f"| {name.removesuffix('_imagenet')} | {s.parameters / 1e6:.1f} | {s.operations / 1e9:.1f} | "
            f"{s.moved / 1e9:.2f} | {s.image / 1e6:.0f} | {s.calls:,} | {s.decoded:.0f} |", flush=True,
        )  # fmt: skip
    print(f"\nOn {options.card}s, {ARITHMETIC:.0%} of the published arithmetic, {BANDWIDTH:.0%} of the bandwidth:\n")
    print("| recipe | GPUs | batch x turns | memory, GB | all-reduce, MB | update, ms (of which all-reduce) | images/s "
          "| cores a GPU | hours in all |\n|---|---|---|---|---|---|---|---|---|")  # fmt: skip
    for name, (recipe, s) in found.items():
        print("\n".join(lines(name, [plan(recipe, s, CARDS[options.card], n) for n in GPUS])))


if __name__ == "__main__":
    main()
