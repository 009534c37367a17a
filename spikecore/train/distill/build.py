"""From a recipe's section to a `Distiller`."""

import difflib
import inspect
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spikecore.models import create_model, list_models, load_checkpoint
from spikecore.train.distill.distiller import Criterion, Distiller
from spikecore.train.distill.features import check_names, observe
from spikecore.train.distill.losses import KDSNN, WSLD, Blurred, LaSNN

__all__ = ["LOSSES", "build_distiller", "create_teacher"]

LOSSES: dict[str, tuple[Callable[..., nn.Module], ...]] = {
    "blurred": (Blurred,),
    "wsld": (WSLD,),
    "mixed": (Blurred, WSLD),
    "kdsnn": (KDSNN,),
    "lasnn": (LaSNN,),
}


def create_teacher(
    name: str, checkpoint: str | os.PathLike, *, num_classes: int, in_chans: int = 3, **settings: Any
) -> nn.Module:
    """A teacher by name, with its weights.

    Args:
        name: of a model of spikecore, timm or torchvision, the first that knows it; ``timm/NAME``,
            ``torchvision/NAME``: of that one.
        checkpoint: a file (see `spikecore.models.load_checkpoint`), or "pretrained": the library's own weights, which
            it downloads unless it has them.
        settings: of the model, over `num_classes` and `in_chans`.

    Raises:
        ValueError: no such model (the nearest ones are offered), or weights that do not fit.
    """
    wanted, _, bare = name.rpartition("/")
    pretrained, settings = checkpoint == "pretrained", {"num_classes": num_classes, "in_chans": in_chans, **settings}
    names = {"spikecore": list_models(), **_libraries()}
    source = next((s for s in names if wanted in ("", s) and bare in names[s]), None)
    if source is None:
        near = difflib.get_close_matches(bare, {n for s in names if wanted in ("", s) for n in names[s]}, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"looked in {', '.join(names)}"
        raise ValueError(f"distill: there is no teacher {name!r}; {hint}")
    if source == "spikecore":
        if pretrained:
            raise ValueError(f"distill: spikecore has no pretrained weights for {bare}; teacher_checkpoint: FILE")
        return create_model(bare, checkpoint=checkpoint, **settings)
    if source == "timm":
        import timm

        teacher = timm.create_model(bare, pretrained=pretrained, **settings)
    else:
        import torchvision

        if settings.pop("in_chans") != 3:
            raise ValueError(f"distill: torchvision's {bare} takes 3 channels, the input has {in_chans}")
        teacher = torchvision.models.get_model(bare, weights="DEFAULT" if pretrained else None, **settings)
    return teacher if pretrained else load_checkpoint(teacher, checkpoint)


def _libraries() -> dict[str, list[str]]:
    found = {}
    try:
        import timm

        found["timm"] = timm.list_models()
    except (ImportError, RuntimeError):  # a torchvision built for another torch raises the latter
        pass
    try:
        import torchvision

        found["torchvision"] = torchvision.models.list_models(module=torchvision.models)
    except (ImportError, RuntimeError):
        pass
    return found


def build_distiller(
    student: nn.Module, criterion: Criterion, input_shape: Sequence[int], *, teacher: str | nn.Module = "",
    loss: str = "", student_feature: str | Sequence[str] = (), teacher_feature: str | Sequence[str] = (),
    teacher_checkpoint: str | os.PathLike | None = None, teacher_settings: dict[str, Any] | None = None,
    teacher_size: int | None = None, teacher_mean: Sequence[float] | None = None,
    teacher_std: Sequence[float] | None = None, teacher_amp: str | None = None,
    cache: str | os.PathLike | None = None, mean: Sequence[float] | None = None, std: Sequence[float] | None = None,
    teacher_input_shape: Sequence[int] | None = None, **settings: Any,
) -> Distiller:  # fmt: skip
    """A distiller from a recipe's section, whose keys are the keyword arguments.

    Both models are called once with zeros, in evaluation mode, to find the widths of their features.

    Args:
        input_shape: of one sample of the student's: ``(C, H, W)``, or ``(T, C, H, W)`` for frames.
        teacher: a name (see `create_teacher`), or a module that is ready.
        loss: one of `LOSSES`; `settings` are its own: alpha, mask, clip, published_quirks (see `Blurred`, `KDSNN`,
            `LaSNN`), temperature, weight (`WSLD`).
        student_feature, teacher_feature: module names; all losses but wsld need one of each, lasnn takes lists.
        teacher_checkpoint, teacher_settings: see `create_teacher`.
        teacher_size, teacher_amp ("float16", "bfloat16"), cache: see `Distiller`.
        teacher_mean, teacher_std: normalisation that the teacher was trained with, where it is not the student's,
            `mean` and `std`.
        teacher_input_shape: of what comes as `teacher_x`, where that is not the student's input.

    Raises:
        ValueError: an unknown name or setting (the nearest ones are offered), one that is missing, models that cannot
            take the input, features that cannot be aligned.
    """
    if teacher == "":
        raise ValueError("distill: teacher is missing: the name of a model")
    settings = _check(loss, settings)
    ours = [student_feature] if isinstance(student_feature, str) else [*student_feature]
    theirs = [teacher_feature] if isinstance(teacher_feature, str) else [*teacher_feature]
    if loss != "wsld":
        for key, names in (("student_feature", ours), ("teacher_feature", theirs)):
            if not names or (len(names) > 1 and loss != "lasnn"):
                raise ValueError(f"distill: {loss} needs {key}: a module's name, got {names}")
    x = torch.zeros(2, *input_shape, device=next(student.parameters()).device)
    logits, maps = _probe("student", student, ours, x)
    if isinstance(teacher, str):
        if teacher_checkpoint is None:
            raise ValueError(f"distill: teacher_checkpoint is missing: {teacher} with random weights teaches nothing")
        channels = (teacher_input_shape or input_shape)[-3]
        fitting: dict[str, Any] = {"num_classes": logits.shape[1], "in_chans": channels, **(teacher_settings or {})}
        try:
            teacher = create_teacher(teacher, teacher_checkpoint, **fitting)
        except TypeError as e:
            raise ValueError(f"distill: the teacher {teacher} does not take these teacher_settings: {e}") from e
    elif teacher_checkpoint is not None or teacher_settings:
        raise ValueError("distill: teacher_checkpoint and teacher_settings are for a teacher given by name")
    distiller = Distiller(
        student, teacher, {}, criterion, student_features=ours, teacher_features=theirs, teacher_size=teacher_size,
        renormalize=_renormalize(mean, std, teacher_mean, teacher_std), teacher_amp=_amp(teacher_amp), cache=cache,
    ).to(x.device)  # fmt: skip
    x = distiller.prepare(x) if teacher_input_shape is None else torch.zeros(2, *teacher_input_shape, device=x.device)
    soft, teacher_maps = _probe("teacher", teacher, theirs, x)
    if soft.shape != logits.shape:
        raise ValueError(
            f"distill: student and teacher must give as many logits, got {logits.shape[1]} and {soft.shape[1]}"
        )
    for kind in LOSSES[loss]:
        own = {key: value for key, value in settings.items() if key in _settings(kind)}
        distiller.losses[kind.__name__.lower()] = _loss(kind, maps, teacher_maps, own).to(x.device)
    with torch.no_grad():
        distiller.add_up(logits, maps, soft, teacher_maps, logits.argmax(1))
    return distiller


def _loss(kind: Callable[..., nn.Module], maps: list[Tensor], teacher_maps: list[Tensor], own: dict) -> nn.Module:
    if kind is WSLD:
        return WSLD(**own)
    widths, teacher_widths = [m.shape[1] for m in maps], [m.shape[1] for m in teacher_maps]
    return kind(widths, teacher_widths, **own) if kind is LaSNN else kind(widths[0], teacher_widths[0], **own)


def _settings(kind: Callable) -> list[str]:
    return [p.name for p in inspect.signature(kind).parameters.values() if p.kind is p.KEYWORD_ONLY]


def _check(loss: str, settings: dict[str, Any]) -> dict[str, Any]:
    if loss not in LOSSES:
        raise ValueError(f"distill: loss must be one of {', '.join(LOSSES)}, got {loss!r}")
    known = [name for kind in LOSSES[loss] for name in _settings(kind)]
    for key, value in settings.items():
        if key not in known:
            near = difflib.get_close_matches(key, [*known, *_settings(build_distiller)], n=1)
            hint = f"did you mean {near[0]}?" if near else f"{loss} takes {', '.join(known)}"
            raise ValueError(f"distill: {key!r} is no setting of the loss {loss}; {hint}")
        want = bool if key in ("clip", "published_quirks") else (int, float)
        if not isinstance(value, want) or (want is not bool and isinstance(value, bool)):
            what = "true or false" if want is bool else "a number (YAML reads 2e-3 as text, 2.0e-3 as a number)"
            raise ValueError(f"distill: {key} must be {what}, got {value!r}")
    return settings


def _amp(name: str | None) -> torch.dtype | None:
    if name not in (None, "float16", "bfloat16"):
        raise ValueError(f"distill: teacher_amp must be float16 or bfloat16, got {name!r}")
    return None if name is None else getattr(torch, name)


def _renormalize(mean: Any, std: Any, teacher_mean: Any, teacher_std: Any) -> tuple[list[float], list[float]] | None:
    if teacher_mean is None and teacher_std is None:
        return None
    if None in (mean, std, teacher_mean, teacher_std):
        raise ValueError("distill: teacher_mean and teacher_std belong together, and need the student's mean and std")
    channels = list(zip(mean, std, teacher_mean, teacher_std, strict=True))
    return [s / ts for _, s, _, ts in channels], [(m - tm) / ts for m, _, tm, ts in channels]


@torch.no_grad()
def _probe(who: str, model: nn.Module, names: Sequence[str], x: Tensor) -> tuple[Tensor, list[Tensor]]:
    check_names(model, names, f"{who}_feature")
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        return observe(model, names, x)
    except (RuntimeError, AssertionError, TypeError) as e:
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise ValueError(f"distill: the {who} {type(model).__name__} does not take {list(x.shape)}: {reason}") from e
    finally:
        for m, mode in modes:
            m.training = mode
