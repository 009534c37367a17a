"""What trained weights are worth: accuracy on a test set, classes of images of one's own."""

import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from spikecore.energy import EnergyReport, estimate_energy
from spikecore.models import load_checkpoint
from spikecore.models._registry import checkpoint_filter_of
from spikecore.train.batches import PADDING, eval_batches, image_transform, open_samples
from spikecore.train.build import autocast, build_net
from spikecore.train.checkpoint import read_card
from spikecore.train.files import prepare_folder, replace_file
from spikecore.train.ranks import Ranks, joined
from spikecore.train.recipe import Recipe, RecipeError, load_recipe, recipe_of

try:
    from PIL import Image, UnidentifiedImageError
    from torchmetrics.functional.classification import multiclass_confusion_matrix
    from tqdm import tqdm

    from spikecore.train.figures import draw_confusion
except ImportError as e:
    raise ImportError(f'test: {e.name} is missing; pip install "spikecore[train]"') from e

__all__ = ["Evaluation", "assess", "evaluate", "predict"]

ENERGY_SAMPLES = 64
IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".gif")


@dataclass(frozen=True)
class Evaluation:
    """`confusion` ``[K, K]`` counts samples by true class (row) and predicted one; `energy` is of a few samples."""

    loss: float
    top5: float
    confusion: Tensor
    energy: EnergyReport

    @property
    def samples(self) -> int:
        return int(self.confusion.sum())

    @property
    def top1(self) -> float:
        return float(self.confusion.diagonal().sum() / self.confusion.sum())

    @property
    def firing_rate(self) -> float:
        """Mean over the neuron layers; 0 without any."""
        rates = self.energy.firing_rates.values()
        return sum(rates) / len(rates) if rates else 0.0


@torch.no_grad()
def evaluate(net: nn.Module, batches: DataLoader, recipe: Recipe, ranks: Ranks) -> Evaluation:
    """The network in evaluation mode on the test set, which the ranks share; every rank has the whole result."""
    was_training, K = net.training, recipe.num_classes
    net.eval()
    sums, confusion = torch.zeros(2, dtype=torch.float64), torch.zeros(K, K, dtype=torch.int64)
    first: Tensor | None = None
    for x, y in tqdm(batches, desc="testing", unit="batch", leave=False, disable=not ranks.main, dynamic_ncols=True):
        x = x.to(ranks.device, non_blocking=True)
        first = x[:ENERGY_SAMPLES] if first is None else first
        with autocast(recipe, ranks.device):
            logits = net(x).float().cpu()
        logits, y = logits[y != PADDING], y[y != PADDING]
        if len(y):
            sums[0] += F.cross_entropy(logits, y, reduction="sum").double()
            sums[1] += (logits.topk(min(5, K)).indices == y[:, None]).sum()
            confusion += multiclass_confusion_matrix(logits, y, K)
    sums, confusion = ranks.sum(sums), ranks.sum(confusion)
    assert first is not None, "a test set has samples"
    energy = estimate_energy(net, first)
    net.train(was_training)
    n = int(confusion.sum())
    return Evaluation(float(sums[0]) / n, float(sums[1]) / n, confusion, energy)


def assess(
    checkpoint: str | os.PathLike, overrides: list[str] | None = None, *, recipe: str | None = None,
    out: str | os.PathLike | None = None,
) -> list[str]:  # fmt: skip
    """Lines to print: accuracy, rates and energy of trained weights on the test part of their data.

    Args:
        checkpoint: weights with a card, as `spikecore train` writes them, or its folder; with `recipe` any file of
            `spikecore.models.load_checkpoint`.
        overrides: of the recipe, such as ``data.root=DIR``.
        recipe: what the weights were trained by, where they have no card.
        out: folder for confusion.png and energy.csv.

    Raises:
        RecipeError, FileNotFoundError, ValueError: see `load_recipe`, `read_card`, `load_checkpoint`, `create_dataset`.
    """
    path, plan, _ = _opened(checkpoint, overrides, recipe)
    with joined() as ranks:
        samples = open_samples(plan, training=False)
        net = _loaded(path, plan).to(ranks.device)
        result = evaluate(net, eval_batches(plan, samples, ranks), plan, ranks)
        if not ranks.main:
            return []
        energy = result.energy
        recall = result.confusion.diagonal() / result.confusion.sum(1).clamp(min=1)
        worst = recall.argsort()[: min(3, len(recall))].tolist()
        lines = [
            f"model        {plan.model}, {sum(p.numel() for p in net.parameters()):,} parameters, weights {path}",
            f"data         {plan.data.name}, {result.samples:,} test samples of {plan.num_classes} classes",
            f"accuracy     {result.top1:.2%}   (top-5 {result.top5:.2%}), cross-entropy {result.loss:.4f}",
            "weakest      " + ", ".join(f"{samples.classes[i]} {recall[i]:.1%}" for i in worst),
            f"firing rate  {result.firing_rate:.1%}, mean of {len(energy.firing_rates)} neuron layers",
            f"energy       {energy.energy_pj * 1e-6:.4g} uJ a sample: {energy.macs:.3g} MACs, {energy.acs:.3g} ACs "
            f"({energy.energy_model.name})",
        ]
        if out is not None:
            folder = Path(out)
            prepare_folder(folder)
            replace_file(folder / "confusion.png", draw_confusion(result.confusion, samples.classes))
            energy.to_csv(folder / "energy.csv")
            lines.append(f"written      {folder}/: confusion.png, energy.csv")
        return lines


@torch.no_grad()
def predict(
    checkpoint: str | os.PathLike, images: Sequence[str], *, classes: str | os.PathLike | None = None,
    recipe: str | None = None, top: int = 5,
) -> list[str]:  # fmt: skip
    """A line for each image: its path and the most probable classes.

    Args:
        checkpoint, recipe: see `assess`.
        images: files, or folders of them.
        classes: JSON of the classes' names (see `class_names`); default: the card's.

    Raises:
        RecipeError, FileNotFoundError, ValueError: see `assess`; an image that is none.
    """
    path, plan, card = _opened(checkpoint, None, recipe)
    kind = card.get("kind", "image")
    if kind != "image":
        raise RecipeError(f"predict takes images; {path} was trained on {kind}")
    if classes is not None:
        names = class_names(Path(classes), plan.num_classes)
    else:
        names = card.get("classes") or [str(i) for i in range(plan.num_classes)]
    files = _image_files(images)
    with joined() as ranks:
        net = _loaded(path, plan).to(ranks.device).eval()
        transform, mode = image_transform(plan, training=False), "L" if getattr(net, "in_chans", 3) == 1 else "RGB"
        lines = []
        for some in (files[i : i + plan.batch_size] for i in range(0, len(files), plan.batch_size)):
            x = torch.stack([transform(_image(file, mode)) for file in some])
            probabilities = net(x.to(ranks.device)).float().softmax(1).cpu()
            best = probabilities.topk(min(top, plan.num_classes))
            for file, values, places in zip(some, best.values.tolist(), best.indices.tolist(), strict=True):
                lines.append(
                    f"{file}: " + ", ".join(f"{names[i]} {p:.1%}" for p, i in zip(values, places, strict=True))
                )
        return lines


def class_names(path: Path, num_classes: int) -> list[str]:
    """Names by class number from JSON: a list, ``{"0": name}``, ``{"0": [id, name]}``, or ``{name: 0}``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another content, or a number of a class that is missing.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no class-index file {path}") from None
    except ValueError as e:
        raise ValueError(f"{path}: no JSON ({e})") from e
    if isinstance(content, list):
        content = dict(enumerate(content))
    elif isinstance(content, dict) and all(isinstance(v, int) for v in content.values()):
        content = {v: k for k, v in content.items()}
    try:
        found = {int(k): v[-1] if isinstance(v, list) else str(v) for k, v in content.items()}
        return [found[i] for i in range(num_classes)]
    except (AttributeError, ValueError, IndexError) as e:
        raise ValueError(f"{path}: expected a list of names or a name for each class number") from e
    except KeyError as e:
        raise ValueError(f"{path}: names {len(found)} classes, the model has {num_classes}; {e} is missing") from e


def _opened(checkpoint: str | os.PathLike, overrides: list[str] | None, name: str | None) -> tuple[Path, Recipe, dict]:
    path = Path(checkpoint)
    if path.is_dir():
        path = path / "model.safetensors"
    if path.name == "state.pt":
        raise RecipeError(f"{path} is the state of a run; its weights are {path.with_name('model.safetensors')}")
    if name is not None:
        return path, load_recipe(name, overrides), {}
    values, card = read_card(path)
    return path, recipe_of(values, str(path.with_suffix(".json")), overrides), card


def _loaded(path: Path, recipe: Recipe) -> nn.Module:
    net = build_net(replace(recipe, initial_checkpoint=None))
    return load_checkpoint(net, path, checkpoint_filter_of(recipe.model))


def _image_files(images: Sequence[str]) -> list[Path]:
    def inside(path: Path) -> list[Path]:
        if not path.is_dir():
            return [path]
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGES)
        if not files:
            raise FileNotFoundError(f"there is no image in the folder {path}")
        return files

    return list(itertools.chain.from_iterable(inside(Path(image)) for image in images))


def _image(path: Path, mode: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert(mode)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no image {path}") from None
    except (UnidentifiedImageError, SyntaxError, ValueError, EOFError) as e:
        raise ValueError(f"{path} is no image that can be read") from e
    except OSError as e:
        if e.filename:
            raise
        raise ValueError(f"{path} is no complete image ({e})") from e
