"""Recipes: a model, its data and how it is trained, as YAML in `spikecore/models/recipes` or in a user's file.

Keys have timm's names where timm has one. Two differ, so that a recipe means the same on any number of devices:
`effective_batch` is how many samples an update of the weights sees, `batch_size` how many of them a device takes at
once; ranks and accumulation make up for the rest.
"""

import copy
import dataclasses
import difflib
import fnmatch
import os
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import spikecore.models

try:
    import yaml
except ImportError as e:
    raise ImportError(f'recipes: {e.name} is missing; pip install "spikecore[train]"') from e

__all__ = ["Data", "Recipe", "RecipeError", "list_recipes", "load_recipe", "recipe_of", "recipe_table"]

FOLDER = Path(spikecore.models.__file__).parent / "recipes"


class RecipeError(ValueError):
    """A recipe, or an override of one, that cannot be followed; the message says where and what was expected."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """Arguments of `spikecore.data.create_dataset`."""

    name: str
    root: str | None = None
    train_split: str = "train"
    val_split: str = "test"
    on_error: str = "raise"  # or "skip": leave out files that cannot be read
    options: dict[str, Any] = field(default_factory=dict)  # of this data set: T, size, classes ...


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is not given has timm's default, or none. Lengths are epochs, batches samples."""

    name: str
    model: str
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    initial_checkpoint: str | None = None  # weights to start from
    data: Data
    note: str = ""  # where we differ from what was published

    # the task
    loss: str = "ce"  # of the logits; "tet": mean over the steps' own; "mse": squared error to the one-hot label
    smoothing: float = 0.1
    distill: dict[str, Any] | None = None  # see `spikecore.train.distill`

    # batches and optimiser
    batch_size: int = 128
    effective_batch: int | None = None  # None: batch_size on each rank
    opt: str = "adamw"
    opt_eps: float | None = None
    opt_betas: list[float] | None = None
    opt_kwargs: dict[str, Any] = field(default_factory=dict)
    momentum: float = 0.9
    weight_decay: float = 0.0
    filter_bias_and_bn: bool = True  # no decay of biases and of parameters with one dimension
    clip_grad: float | None = None  # norm
    lr: float | None = None  # None: lr_base * effective_batch / lr_base_size, or the root of that ratio
    lr_base: float = 0.1
    lr_base_size: int = 256
    lr_base_scale: str = "linear"

    # schedule
    epochs: int = 300
    sched: str = "cosine"
    sched_on_updates: bool = False
    warmup_epochs: int = 0
    warmup_lr: float = 1e-5
    warmup_prefix: bool = False  # the schedule begins behind the warm-up, not with it; `epochs` are both together
    min_lr: float = 0.0
    cooldown_epochs: int = 0  # more epochs at min_lr
    decay_epochs: float = 90  # step
    decay_rate: float = 0.1

    # augmentation of images
    img_size: int | None = None  # of events too; None: as they are
    mean: list[float] | None = None  # None: not normalised
    std: list[float] | None = None
    scale: list[float] = field(default_factory=lambda: [0.08, 1.0])
    ratio: list[float] = field(default_factory=lambda: [3 / 4, 4 / 3])
    crop_padding: int | None = None  # instead of scale and ratio: a crop of the image with so many black pixels around
    hflip: float = 0.5
    color_jitter: float = 0.0
    aa: str | None = None
    reprob: float = 0.0
    remode: str = "pixel"
    recount: int = 1
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    crop_mode: str = "center"

    # augmentation of events
    event_aug: str | None = None  # see `spikecore.data.augment`: "nda", or "roll" (with flip); `hflip` as for images

    # mixing of samples
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    mixup_mode: str = "batch"
    mixup_off_epoch: int = 0

    # moving average, precision, ranks
    model_ema: bool = False
    model_ema_decay: float = 0.9999
    model_ema_warmup: bool = False
    amp: bool = False
    amp_dtype: str = "float16"  # on the CPU always bfloat16
    torchcompile: str | None = None  # a backend, such as inductor
    parallel: str = "ddp"  # or "fsdp"
    sync_bn: bool = False  # statistics over all ranks (GPUs only)
    dist_bn: str = "reduce"  # running statistics before they are used: ranks' mean, or "broadcast" of the first's

    # the run
    seed: int = 42
    workers: int = 4
    val_interval: int = 1
    recovery_interval: int = 0  # updates between checkpoints within an epoch; 0: none

    # for the reader
    published: list[dict[str, Any]] = field(default_factory=list)  # metric, value, source
    run_here: str | None = None  # whether these weights were ever trained with this package, and how far

    @property
    def num_classes(self) -> int:
        return self.model_kwargs["num_classes"]

    @property
    def base_lr(self) -> float:
        """The peak of the schedule."""
        if self.lr is not None:
            return self.lr
        ratio = (self.effective_batch or self.batch_size) / self.lr_base_size
        return self.lr_base * (ratio**0.5 if self.lr_base_scale == "sqrt" else ratio)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


CHOICES = {
    "loss": ("ce", "tet", "mse"),
    "lr_base_scale": ("linear", "sqrt"),
    "sched": ("cosine", "step", "poly", "tanh"),
    "mixup_mode": ("batch", "pair", "elem"),
    "crop_mode": ("center", "squash", "border"),
    "remode": ("const", "rand", "pixel"),
    "event_aug": ("nda", "roll", None),
    "amp_dtype": ("float16", "bfloat16"),
    "parallel": ("ddp", "fsdp"),
    "dist_bn": ("reduce", "broadcast"),
}
AT_LEAST = {
    "batch_size": 1, "effective_batch": 1, "epochs": 1, "val_interval": 1, "img_size": 1, "workers": 0,
    "recovery_interval": 0, "warmup_epochs": 0, "cooldown_epochs": 0, "mixup": 0, "cutmix": 0, "smoothing": 0,
    "weight_decay": 0, "lr": 0,
}  # fmt: skip


def list_recipes() -> list[str]:
    """Names of the package's recipes, sorted."""
    return sorted(path.stem for path in FOLDER.glob("[!_]*.yaml"))


def recipe_table(pattern: str = "*") -> list[str]:
    """Lines to print: a row for each recipe whose name matches a shell pattern.

    Raises:
        RecipeError: none does.
    """
    names = fnmatch.filter(list_recipes(), pattern)
    if not names:
        raise RecipeError(f"no recipe matches {pattern!r}{_near(pattern, list_recipes())}")
    rows = [("recipe", "model", "data", "epochs", "published", "run here")]
    for name in names:
        recipe = load_recipe(name)
        accuracy = next((x for x in recipe.published if x["metric"] == "top1"), None)
        rows.append((name, recipe.model, recipe.data.name, str(recipe.epochs),
                     f"{accuracy['value']:.2f} %" if accuracy else "-", recipe.run_here or "not yet"))  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[5]]) for row in rows]
    return [lines[0], "-" * max(len(line) for line in lines), *lines[1:]]


def load_recipe(name: str | os.PathLike, overrides: list[str] | None = None) -> Recipe:
    """A recipe by its name in the package or from a YAML file, then overrides such as ``data.root=DIR`` or ``lr=1e-3``.

    Raises:
        RecipeError: there is none of this name, a key that recipes do not have, or a value of another kind.
    """
    return recipe_of(_read(name), str(name), overrides)


def recipe_of(values: dict[str, Any], where: str, overrides: list[str] | None = None) -> Recipe:
    """A recipe from its keys, as a checkpoint's card holds them; `where` begins the message of an error."""
    values = copy.deepcopy(values)
    for override in overrides or []:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise RecipeError(f"an override must be KEY=VALUE, such as data.root=DIR, got {override!r}")
        *sections, last = key.split(".")
        inner = values
        for section in sections:
            if inner.get(section) is None:
                inner[section] = {}
            inner = inner[section]
            if not isinstance(inner, dict):
                raise RecipeError(f"{key}: {section} is no section with keys of its own")
        inner[last] = _yaml(text, f"override {override}")
    recipe = _build(Recipe, values, where, "")
    for key, allowed in CHOICES.items():
        if getattr(recipe, key) not in allowed:
            choices = ", ".join(str(x) for x in allowed if x is not None)
            raise RecipeError(f"{where}: {key} must be one of {choices}, got {getattr(recipe, key)!r}")
    for key, least in AT_LEAST.items():
        value = getattr(recipe, key)
        if value is not None and value < least:
            raise RecipeError(f"{where}: {key} must be at least {least}, got {value}")
    if recipe.model not in spikecore.models.list_models():
        raise RecipeError(f"{where}: there is no model {recipe.model!r}{_near(recipe.model, _models())}")
    if not isinstance(recipe.model_kwargs.get("num_classes"), int):
        raise RecipeError(f"{where}: model_kwargs.num_classes is missing")
    for entry in recipe.published:
        if set(entry) != {"metric", "value", "source"}:
            raise RecipeError(f"{where}: an entry of published has the keys metric, value, source, got {sorted(entry)}")
    return recipe


def _models() -> list[str]:
    return spikecore.models.list_models()


def _read(name: str | os.PathLike) -> dict[str, Any]:
    """The keys of a recipe over those of the recipes it is based on."""
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = FOLDER / f"{name}.yaml"
        if not path.is_file():
            raise RecipeError(f"there is no recipe {str(name)!r}{_near(str(name), list_recipes())}")
    try:
        text = path.read_text()
    except FileNotFoundError:
        raise RecipeError(f"there is no file {path}") from None
    values = _yaml(text, str(path))
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a recipe consists of keys and values")
    base = values.pop("base", None)
    if base is not None:
        beside = path.parent / f"{base}.yaml"
        values = _merge(_read(beside if beside.is_file() else base), values)
    values["name"] = path.stem
    return values


def _yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise RecipeError(f"{where}: no YAML ({' '.join(str(e).split())})") from None


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    return base | {
        k: _merge(base[k], v) if isinstance(v, dict) and isinstance(base.get(k), dict) else v for k, v in over.items()
    }


def _build(kind: type, values: dict[str, Any], where: str, prefix: str) -> Any:
    hints, fields = typing.get_type_hints(kind), {f.name: f for f in dataclasses.fields(kind)}
    for key in values:
        if key not in fields:
            raise RecipeError(f"{where}: there is no key {prefix}{key}{_near(str(key), [*fields], prefix)}")
    missing = [
        k for k, f in fields.items()
        if k not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]  # fmt: skip
    if missing:
        raise RecipeError(f"{where}: the key {prefix}{missing[0]} is missing")
    return kind(**{k: _value(hints[k], v, where, prefix + k) for k, v in values.items()})


def _value(hint: Any, value: Any, where: str, key: str) -> Any:
    """`value` as the annotation `hint` has it; YAML reads 1e-3 as a string."""
    if isinstance(hint, types.UnionType):
        options = typing.get_args(hint)
        if value is None and types.NoneType in options:
            return None
        hint = next(x for x in options if x is not types.NoneType)
    if hint is Data and isinstance(value, dict):
        return _build(Data, value, where, f"{key}.")
    origin = typing.get_origin(hint) or hint
    if origin is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    if origin is list and isinstance(value, list):
        return [_value(typing.get_args(hint)[0], x, where, key) for x in value]
    if origin is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)  # a folder named 2024
    if origin is Any or (isinstance(value, origin) and not (origin is int and isinstance(value, bool))):
        return _numbers(value) if origin is dict else value
    kinds = {float: "a number", int: "a whole number", bool: "true or false", str: "text", list: "a list"}
    raise RecipeError(f"{where}: {key} must be {kinds.get(origin, 'a section of keys')}, got {value!r}")


def _numbers(value: Any) -> Any:
    """YAML's strings such as 1e-3, in sections of free keys, as the numbers that they are."""
    if isinstance(value, dict):
        return {k: _numbers(v) for k, v in value.items()}
    if isinstance(value, str) and value[:1] in "+-.0123456789" and value:
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _near(name: str, names: list[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(prefix + x for x in near)}?" if near else ""
