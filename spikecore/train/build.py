"""Everything that a run computes with, from its recipe: network, loss, optimiser, schedule, average, mixing, ranks."""

import inspect
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from spikecore.models import create_model
from spikecore.train.batches import seed_all
from spikecore.train.ranks import Ranks
from spikecore.train.recipe import Recipe, RecipeError

try:
    from timm.data import Mixup
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.scheduler.scheduler import Scheduler
    from timm.utils import ModelEmaV3
except ImportError as e:
    raise ImportError(f'train: {e.name} is missing; pip install "spikecore[train]"') from e

__all__ = ["Objective", "Parts", "autocast", "build", "build_net"]


class Objective(nn.Module):
    """The network and what it is to minimise, in one module, so that ranks and compiler see the whole step.

    Args:
        criterion: of logits ``[n, K]`` and targets ``[n]`` or ``[n, K]``.
        by_step: applied to every time step's logits rather than to their mean (TET: Deng et al., "Temporal efficient
            training of spiking neural network via gradient re-weighting", ICLR 2022, without its regulariser).

    Shapes: x and targets -> (logits ``[B, K]``, loss).
    """

    def __init__(self, net: nn.Module, criterion: nn.Module, by_step: bool = False) -> None:
        super().__init__()
        self.net, self.criterion, self.by_step = net, criterion, by_step

    def forward(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if not self.by_step:
            logits = self.net(x)
            return logits, self.criterion(logits, targets)
        steps = self.net.steps(x)  # type: ignore[operator]
        every = targets.expand(len(steps), *targets.shape).flatten(0, 1)
        return steps.mean(0), self.criterion(steps.flatten(0, 1), every)


class SquaredError(nn.Module):
    """Mean squared error to the one-hot (or mixed) label."""

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        if targets.dim() == 1:
            targets = F.one_hot(targets, logits.shape[1])
        return F.mse_loss(logits.float(), targets.float())


@dataclass
class Parts:
    """`net` is the network alone, `objective` it and its loss, `wrapped` that as the ranks run it."""

    net: nn.Module
    objective: nn.Module
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None
    mixup: Mixup | None

    @property
    def judged(self) -> nn.Module:
        """What is tested and kept: the moving average, where there is one."""
        return self.net if self.ema is None else self.ema.module

    def synced(self, now: bool) -> AbstractContextManager:
        """Gradients are averaged over the ranks only in an update's last batch."""
        if isinstance(self.net, FSDPModule):
            self.net.set_requires_gradient_sync(now)
        elif isinstance(self.wrapped, DistributedDataParallel) and not now:
            return self.wrapped.no_sync()
        return nullcontext()


def build_net(recipe: Recipe) -> nn.Module:
    """The recipe's model, with its first weights.

    Raises:
        RecipeError: settings that the model does not take.
    """
    try:
        return create_model(recipe.model, checkpoint=recipe.initial_checkpoint, **recipe.model_kwargs)
    except TypeError as e:
        raise RecipeError(f"{recipe.name}: model_kwargs do not fit {recipe.model}: {e}") from e


def build(recipe: Recipe, ranks: Ranks, updates: int, sample: Tensor, net: nn.Module | None = None) -> Parts:
    """All parts on their devices, in the state before the first update.

    Args:
        updates: in an epoch.
        sample: one input ``[...]``, for its shape.
        net: trained in place of the recipe's model.

    Raises:
        RecipeError: settings that do not go together.
    """
    seed_all(recipe.seed)
    net = (build_net(recipe) if net is None else net).to(ranks.device)
    if recipe.sync_bn and ranks.world > 1:
        if ranks.device.type == "cpu":
            raise RecipeError(f"{recipe.name}: sync_bn needs GPUs; on CPUs norms see each rank's own batch")
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    ema = None
    if recipe.model_ema:
        ema = ModelEmaV3(net, decay=recipe.model_ema_decay, use_warmup=recipe.model_ema_warmup)
    sharded = recipe.parallel == "fsdp" and ranks.world > 1
    if sharded:
        scalar = next((name for name, p in net.named_parameters() if not p.dim()), None)
        if scalar is not None:
            raise RecipeError(
                f"{recipe.name}: fsdp cannot shard {scalar}, a parameter without dimensions; say parallel=ddp"
            )
        _shard(net)
        if ema is not None:
            _shard(ema.module)
    objective = _objective(recipe, net, sample)
    if recipe.torchcompile:
        objective.compile(backend=recipe.torchcompile)
    wrapped = objective
    if ranks.world > 1 and not sharded:
        # Norms' running statistics stay each rank's own until they are used; then `dist_bn` makes them one.
        known = inspect.signature(DistributedDataParallel).parameters
        own: dict[str, Any] = {
            "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False
        }
        wrapped = DistributedDataParallel(objective, [ranks.device] if ranks.device.type == "cuda" else None, **own)
    optimizer, scheduler = _optimizer(recipe, objective, updates)
    half = recipe.amp and recipe.amp_dtype == "float16" and ranks.device.type == "cuda"
    return Parts(
        net, objective, wrapped, optimizer, scheduler, torch.amp.GradScaler(ranks.device.type, enabled=half), ema,
        _mixup(recipe, events=sample.dim() > 3),
    )  # fmt: skip


def autocast(recipe: Recipe, device: torch.device) -> AbstractContextManager:
    if not recipe.amp:
        return nullcontext()
    half = torch.bfloat16 if device.type == "cpu" else getattr(torch, recipe.amp_dtype)
    return torch.autocast(device.type, half)


def _objective(recipe: Recipe, net: nn.Module, sample: Tensor) -> nn.Module:
    criterion = SquaredError() if recipe.loss == "mse" else nn.CrossEntropyLoss(label_smoothing=recipe.smoothing)
    if recipe.mixup or recipe.cutmix:  # which smooths the labels itself
        criterion = SquaredError() if recipe.loss == "mse" else nn.CrossEntropyLoss()
    by_step = recipe.loss == "tet"
    if by_step and not hasattr(net, "steps"):
        raise RecipeError(f"{recipe.name}: loss=tet needs a model with time steps, which {recipe.model} has not")
    if recipe.distill is None:
        return Objective(net, criterion, by_step)
    if by_step:
        raise RecipeError(f"{recipe.name}: distill does not go with loss=tet")
    from spikecore.train.distill import build_distiller

    settings, shape = dict(recipe.distill), list(sample.shape)
    frames = settings.pop("student_frames", None)
    if frames is None:
        return build_distiller(net, criterion, shape, mean=recipe.mean, std=recipe.std, **settings)
    student_shape = [frames, *shape[1:]]
    return FewerFrames(build_distiller(net, criterion, student_shape, teacher_input_shape=shape, **settings), frames)


class FewerFrames(nn.Module):
    """A distiller whose student sees the teacher's frames summed up to `frames` of them."""

    def __init__(self, distiller: nn.Module, frames: int) -> None:
        super().__init__()
        self.distiller, self.frames = distiller, frames

    def forward(self, x: Tensor, targets: Tensor, *, ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if x.shape[1] % self.frames:
            raise ValueError(f"distill: student_frames must divide the teacher's {x.shape[1]}, got {self.frames}")
        return self.distiller(x.unflatten(1, (self.frames, -1)).sum(2), targets, ids=ids, teacher_x=x)


def _optimizer(recipe: Recipe, objective: nn.Module, updates: int) -> tuple[torch.optim.Optimizer, Scheduler]:
    settings: dict[str, Any] = dict(recipe.opt_kwargs)
    if recipe.opt_eps is not None:
        settings["eps"] = recipe.opt_eps
    if recipe.opt_betas is not None:
        settings["betas"] = tuple(recipe.opt_betas)
    try:
        optimizer = create_optimizer_v2(
            objective, recipe.opt, recipe.base_lr, recipe.weight_decay, recipe.momentum,
            filter_bias_and_bn=recipe.filter_bias_and_bn, **settings,
        )  # fmt: skip
    except (ValueError, TypeError, AssertionError) as e:
        raise RecipeError(f"{recipe.name}: timm's optimiser opt={recipe.opt}: {e}") from e
    behind = recipe.warmup_epochs if recipe.warmup_prefix else 0
    if behind >= recipe.epochs:
        raise RecipeError(f"{recipe.name}: warmup_epochs must be below epochs, got {behind} of {recipe.epochs}")
    scheduler, _ = create_scheduler_v2(
        optimizer, recipe.sched, recipe.epochs - behind, decay_epochs=recipe.decay_epochs, decay_rate=recipe.decay_rate,
        cooldown_epochs=recipe.cooldown_epochs, min_lr=recipe.min_lr, warmup_lr=recipe.warmup_lr,
        warmup_epochs=recipe.warmup_epochs, warmup_prefix=recipe.warmup_prefix,
        step_on_epochs=not recipe.sched_on_updates, updates_per_epoch=updates,
    )  # fmt: skip
    return optimizer, scheduler


def _mixup(recipe: Recipe, events: bool) -> Mixup | None:
    if not recipe.mixup and not recipe.cutmix:
        return None
    if recipe.cutmix and events:
        raise RecipeError(f"{recipe.name}: cutmix is for images, not for frames of events")
    return Mixup(
        recipe.mixup, recipe.cutmix, prob=recipe.mixup_prob, switch_prob=recipe.mixup_switch_prob,
        mode=recipe.mixup_mode, label_smoothing=recipe.smoothing, num_classes=recipe.num_classes,
    )  # fmt: skip


def _shard(net: nn.Module) -> None:
    """FSDP2: each stage's parameters come together when it runs, the rest's when the network does."""
    for name in net.stages:  # type: ignore[union-attr]
        stage = net.get_submodule(name)
        if any(True for _ in stage.parameters()):
            fully_shard(stage)
    fully_shard(net)
    if hasattr(net, "steps"):
        register_fsdp_forward_method(net, "steps")
