"""Batches whose samples, order and augmentation depend on (seed, epoch, place) alone.

So neither the number of workers nor of ranks changes what is trained on, and a run that was cut off anywhere goes on
with the very samples that it would have seen: no state of a random generator is kept.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from spikecore.data import Samples, augment, create_dataset
from spikecore.train.ranks import Ranks
from spikecore.train.recipe import Recipe, RecipeError

try:
    from timm.data import create_transform
    from torchvision.transforms import v2 as transforms
except ImportError as e:
    raise ImportError(f'train: {e.name} is missing; pip install "spikecore[train]"') from e

__all__ = [
    "Order",
    "eval_batches",
    "image_transform",
    "open_samples",
    "plain_worker_errors",
    "seed_all",
    "seed_of",
    "train_batches",
]

PADDING = -100  # label of samples that only fill up a rank's last batch; cross_entropy ignores it


def seed_of(*numbers: int) -> int:
    """One seed for several whole numbers, such as (seed, epoch, index)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def seed_all(seed: int) -> None:
    """Python's, numpy's and torch's generators."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.manual_seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """`seed_all`, and the generators as they were afterwards (those of GPUs are not touched)."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def open_samples(recipe: Recipe, *, training: bool) -> Samples:
    """The recipe's training or test part.

    Raises:
        RecipeError: no folder is named, or the data's classes are not as many as the model's.
        FileNotFoundError, ValueError: see `spikecore.data.create_dataset`.
    """
    data = recipe.data
    if data.root is None and data.name != "digits":
        raise RecipeError(f"{recipe.name}: where is {data.name}? Say data.root=FOLDER")
    options = dict(data.options)
    if recipe.distill and "student_frames" in recipe.distill and not training:
        options["frames"] = recipe.distill["student_frames"]
    split = data.train_split if training else data.val_split
    samples = create_dataset(data.name, data.root, split, on_error=data.on_error, **options)
    if len(samples.classes) != recipe.num_classes:
        raise RecipeError(
            f"{recipe.name}: {data.name} in {data.root} has {len(samples.classes)} classes, the model "
            f"{recipe.num_classes}; say model_kwargs.num_classes={len(samples.classes)} where that is meant"
        )
    if samples.kind == "image":
        samples.transform = image_transform(recipe, training=training)
    elif samples.kind == "events":
        kind = recipe.event_aug if training else None
        samples.transform = partial(_events, size=recipe.img_size, kind=kind, hflip=recipe.hflip)
    return samples


def image_transform(recipe: Recipe, *, training: bool) -> Callable[[Any], Tensor]:
    """From a PIL image to ``[C, H, W]``, by timm."""
    if recipe.img_size is None:
        raise RecipeError(f"{recipe.name}: images need img_size")
    common: dict[str, Any] = {
        "input_size": recipe.img_size,
        "interpolation": recipe.interpolation,
        "mean": tuple(recipe.mean or (0.0,)),
        "std": tuple(recipe.std or (1.0,)),
    }
    if not training:
        return create_transform(**common, crop_pct=recipe.crop_pct, crop_mode=recipe.crop_mode)
    sizes: dict[str, Any] = {"scale": tuple(recipe.scale), "ratio": tuple(recipe.ratio)}
    try:
        transform: Any = create_transform(
            **common, is_training=True, **sizes, hflip=recipe.hflip,
            color_jitter=recipe.color_jitter, auto_augment=recipe.aa, re_prob=recipe.reprob, re_mode=recipe.remode,
            re_count=recipe.recount,
        )  # fmt: skip
    except (AssertionError, ValueError, KeyError) as e:
        raise RecipeError(f"{recipe.name}: timm does not know aa={recipe.aa!r} ({e})") from e
    if recipe.crop_padding is not None:
        size = recipe.img_size
        transform.transforms[0] = transforms.Compose(
            [transforms.Resize((size, size)), transforms.RandomCrop(size, padding=recipe.crop_padding)]
        )
    return transform


def _events(x: Tensor, size: int | None, kind: str | None, hflip: float) -> Tensor:
    """Frames ``[T, 2, H, W]`` to height = width = `size`, then changed at random, all steps alike."""
    if size is not None and x.shape[-2:] != (size, size):
        x = transforms.functional.resize(x, [size, size], antialias=True)
    if kind == "nda":
        return augment.nda(x, p=hflip)
    return x if kind is None else augment.roll(augment.flip(x, hflip))


class _Keyed(Dataset):
    """Samples by (index, epoch, whether it counts), with generators that depend on the key alone.

    `named`: the index comes as a third element, which a teacher's cache knows the sample by.
    """

    def __init__(self, samples: Samples, seed: int, named: bool = False) -> None:
        self.samples, self.seed, self.named = samples, seed, named

    def __getitem__(self, key: tuple[int, int, bool]) -> tuple[Any, ...]:
        index, epoch, counts = key
        with seeded(seed_of(self.seed, epoch, index)):
            x, y = self.samples[index]
        found = x, y if counts else PADDING
        return (*found, index) if self.named else found


class Order(Sampler):
    """This rank's batches of epochs: keys for `_Keyed`.

    An update takes `effective` samples that lie together in the epoch's permutation, whatever the number of ranks is;
    what is left over at the end waits for the next epoch's permutation.

    Args:
        n: samples in all.
        batch: of one rank at once. accumulate: batches of an update.
    """

    def __init__(self, n: int, batch: int, accumulate: int, ranks: Ranks, seed: int) -> None:
        self.n, self.batch, self.accumulate, self.ranks, self.seed = n, batch, accumulate, ranks, seed
        self.effective = batch * accumulate * ranks.world
        self.updates = n // self.effective
        self.start(0)

    def start(self, epoch: int, update: int = 0, end: int | None = None) -> None:
        """The next iteration is over this epoch, from this update on, and those after it before epoch `end`: in one, so
        that workers fetch an epoch's first batches while the one before is tested."""
        self.epoch, self.first, self.end = epoch, update, epoch + 1 if end is None else end

    def __iter__(self) -> Iterator[list[tuple[int, int, bool]]]:
        first = self.first
        for epoch in range(self.epoch, self.end):
            generator = torch.Generator().manual_seed(seed_of(self.seed, epoch))
            order = torch.randperm(self.n, generator=generator)
            for update in range(first, self.updates):
                for part in range(self.accumulate):
                    at = update * self.effective + (part * self.ranks.world + self.ranks.rank) * self.batch
                    yield [(i, epoch, True) for i in order[at : at + self.batch].tolist()]
            first = 0

    def __len__(self) -> int:
        return ((self.end - self.epoch) * self.updates - self.first) * self.accumulate


class _Shard(Sampler):
    """This rank's part of the test set: each sample once in all, the ranks' batches alike."""

    def __init__(self, n: int, batch: int, ranks: Ranks) -> None:
        share = -(-n // ranks.world)
        places = range(ranks.rank, share * ranks.world, ranks.world)
        keys = [(i, 0, True) if i < n else (0, 0, False) for i in places]
        self.batches = [keys[at : at + batch] for at in range(0, share, batch)]

    def __iter__(self) -> Iterator[list[tuple[int, int, bool]]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def train_batches(recipe: Recipe, samples: Samples, ranks: Ranks) -> tuple[DataLoader, Order]:
    """Raises:
    RecipeError: batches that do not add up to `effective_batch`, or are larger than the data; a teacher's cache where
        samples are not the same in every epoch.
    """
    named = bool(recipe.distill and recipe.distill.get("cache"))
    if named and (drawn := _drawn(recipe, samples.kind)):
        raise RecipeError(
            f"{recipe.name}: distill.cache keeps what the teacher says of each sample, so samples must be the same in "
            f"every epoch, but {', '.join(drawn)} would change them"
        )
    effective = recipe.effective_batch or recipe.batch_size * ranks.world
    batch = min(recipe.batch_size, effective // ranks.world)
    if not batch or effective % (batch * ranks.world):
        raise RecipeError(
            f"{recipe.name}: effective_batch must be a multiple of batch_size x ranks, got {effective} and "
            f"{max(batch, 1)} x {ranks.world}"
        )
    if effective > len(samples):
        raise RecipeError(f"{recipe.name}: effective_batch is {effective}, but there are only {len(samples)} samples")
    if (recipe.mixup or recipe.cutmix) and batch % 2:
        raise RecipeError(f"{recipe.name}: mixup and cutmix need an even batch on every rank, got {batch}")
    order = Order(len(samples), batch, effective // (batch * ranks.world), ranks, recipe.seed)
    return _loader(recipe, samples, order, ranks, named), order


def _drawn(recipe: Recipe, kind: str) -> list[str]:
    """Settings that change samples of this kind at random."""
    fixed: dict[str, Any] = {"mixup": 0, "cutmix": 0}
    if kind == "image":
        fixed |= {"hflip": 0, "color_jitter": 0, "aa": None, "reprob": 0, "crop_padding": (None, 0)}
        if recipe.crop_padding is None:
            fixed |= {"scale": [1, 1], "ratio": [1, 1]}
    elif kind == "events":
        fixed["event_aug"] = None
    values = {key: getattr(recipe, key) for key in fixed}
    return [
        f"{key}={value}" for key, value in values.items()
        if value not in (fixed[key] if isinstance(fixed[key], tuple) else (fixed[key],))
    ]  # fmt: skip


def eval_batches(recipe: Recipe, samples: Samples, ranks: Ranks) -> DataLoader:
    return _loader(recipe, samples, _Shard(len(samples), recipe.batch_size, ranks), ranks)


def _loader(recipe: Recipe, samples: Samples, order: Sampler, ranks: Ranks, named: bool = False) -> DataLoader:
    return DataLoader(
        _Keyed(samples, recipe.seed, named), batch_sampler=order, num_workers=recipe.workers,
        persistent_workers=recipe.workers > 0, pin_memory=ranks.device.type == "cuda",
    )  # fmt: skip


@contextmanager
def plain_worker_errors() -> Iterator[None]:
    """What is wrong with a sample is said in one line, also where a worker found it, whose traceback comes along."""
    try:
        yield
    except (ValueError, OSError) as e:
        text = str(e).strip()
        if "DataLoader worker process" not in text:
            raise
        raise ValueError(text.splitlines()[-1].partition(": ")[2]) from e
