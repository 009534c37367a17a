"""What a run leaves: weights as safetensors with a JSON card, and the state that it can go on from."""

import hashlib
import io
import json
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from spikecore._backend import backend_info
from spikecore.train.build import Parts
from spikecore.train.files import replace_file
from spikecore.train.ranks import Ranks
from spikecore.train.recipe import Recipe, RecipeError

try:
    import safetensors.torch
except ImportError as e:
    raise ImportError(f'train: {e.name} is missing; pip install "spikecore[train]"') from e

__all__ = ["STATE", "Progress", "load_state", "read_card", "save_state", "save_weights", "whole"]

STATE = "state.pt"
# What may be different when a run goes on; everything else decides what the weights become.
FREE = ("name", "note", "published", "run_here", "workers", "val_interval", "recovery_interval", "torchcompile",
        "parallel", "batch_size")  # fmt: skip


@dataclass
class Progress:
    """`update` of `epoch` is the next one; the sums are over the epoch's updates before it."""

    epoch: int = 0
    update: int = 0
    loss: float = 0.0
    correct: int = 0
    seen: int = 0
    rows: list[dict[str, float]] = field(default_factory=list)  # of the epochs that are over
    best: float = -1.0  # test accuracy


def whole(state: Any) -> Any:
    """The same on the CPU, with the parts of sharded tensors from all ranks; every rank must call it."""

    def to_cpu(x: Any) -> Any:
        if isinstance(x, DTensor):
            x = x.full_tensor()
        return x.detach().cpu() if isinstance(x, Tensor) else x

    return tree_map(to_cpu, state)


def save_state(path: Path, recipe: Recipe, parts: Parts, progress: Progress, ranks: Ranks, effective: int) -> None:
    """Everything that the next update depends on; random generators are not among it (see `spikecore.train.batches`).

    Raises:
        OSError: it cannot be written; the one before stays.
    """
    sums = ranks.sum(torch.tensor([progress.loss, progress.correct, progress.seen], dtype=torch.float64)).tolist()
    totals = {"loss": sums[0], "correct": int(sums[1]), "seen": int(sums[2])}
    state = {
        "objective": whole(parts.objective.state_dict()),
        "optimizer": whole(parts.optimizer.state_dict()),
        "ema": None if parts.ema is None else whole(parts.ema.module.state_dict()),
        "scaler": parts.scaler.state_dict(),
        "progress": {**asdict(progress), **totals},
        "recipe": recipe.to_dict(),
        "effective": effective,
    }
    if ranks.main:
        file = io.BytesIO()
        torch.save(state, file)
        replace_file(path, file.getvalue())


def load_state(path: Path, recipe: Recipe, parts: Parts, ranks: Ranks, effective: int) -> Progress:
    """The parts as `save_state` found them.

    Raises:
        RecipeError: the run was started with another recipe.
        ValueError: the file is no state, or is cut short.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved, progress = state["recipe"], Progress(**state["progress"])
    except (RuntimeError, EOFError, KeyError, TypeError, ValueError) as e:
        raise ValueError(
            f"{path} is no complete state of a run ({(str(e) or type(e).__name__).splitlines()[0]})"
        ) from e
    except Exception as e:  # unpickling raises what it likes
        raise ValueError(f"{path} is no state of a run ({type(e).__name__})") from e
    now = recipe.to_dict()
    for key in now:
        ours, theirs = now[key], saved.get(key)
        if key == "data":
            ours, theirs = ({k: v for k, v in x.items() if k != "root"} for x in (ours, theirs))
        if key not in FREE and ours != theirs:
            raise RecipeError(f"the run in {path.parent} has {key}={theirs}, not {ours}; it can only go on as it began")
    if state["effective"] != effective:
        raise RecipeError(
            f"the run in {path.parent} has {state['effective']} samples in an update, not {effective}: "
            f"say effective_batch={state['effective']}"
        )
    _copy(parts.objective, state["objective"])
    if parts.ema is not None:
        _copy(parts.ema.module, state["ema"])
    _load_optimizer(parts.optimizer, state["optimizer"])
    parts.scaler.load_state_dict(state["scaler"])
    if not ranks.main:  # the first rank carries the sums of all
        progress.loss, progress.correct, progress.seen = 0.0, 0, 0
    return progress


@torch.no_grad()
def _copy(module: nn.Module, state: dict[str, Tensor]) -> None:
    for key, own in module.state_dict().items():
        own.copy_(_like(own, state[key]))


def _like(own: Tensor, value: Tensor) -> Tensor:
    value = value.to(own.device)
    return distribute_tensor(value, own.device_mesh, own.placements) if isinstance(own, DTensor) else value


def _load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i, values in state["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor) and value.shape == parameters[i].shape and value.dim():
                values[key] = _like(parameters[i], value)
    optimizer.load_state_dict(state)


def save_weights(path: Path, weights: dict[str, Tensor], recipe: Recipe, facts: dict[str, Any]) -> None:
    """``NAME.safetensors`` and its card ``NAME.json``: model, recipe, classes, metrics, versions.

    Args:
        weights: of the network alone, on the CPU.
        facts: more of the card's entries.

    Raises:
        OSError: one of them cannot be written; the one before stays.
    """
    # One entry: safetensors writes several in an order that changes, and equal weights shall be equal files.
    data = safetensors.torch.save({k: v.contiguous() for k, v in weights.items()}, {"format": "pt"})
    info = backend_info()
    card = {
        "model": recipe.model,
        "settings": recipe.model_kwargs,
        "parameters": sum(v.numel() for k, v in weights.items() if "running_" not in k and "num_batches" not in k),
        "recipe": recipe.to_dict(),
        **facts,
        "weights": {"file": path.name, "sha256": hashlib.sha256(data).hexdigest()},
        "spikecore": info["version"],
        "versions": {"torch": torch.__version__, "python": platform.python_version(), "isa": info["isa"]},
    }
    replace_file(path, data)
    replace_file(path.with_suffix(".json"), (json.dumps(card, indent=1) + "\n").encode())


def read_card(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keys of the recipe of trained weights, and all that their card says.

    Raises:
        FileNotFoundError, ValueError: there is no card beside the weights, or one without a recipe.
    """
    card_path = path.with_suffix(".json")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        card = json.loads(card_path.read_text())
        values = card["recipe"]
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} has no card {card_path.name} beside it; say what it is by --recipe NAME"
        ) from None
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{card_path} holds no recipe; say what {path.name} is by --recipe NAME") from e
    return values, card
