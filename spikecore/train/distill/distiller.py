"""Student and teacher in one module."""

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikecore.train.distill.cache import Cache, weights_hash
from spikecore.train.distill.features import check_names, observe

__all__ = ["Criterion", "Distiller"]

Criterion = Callable[[Tensor, Tensor], Tensor]


class Distiller(nn.Module):
    """Calls the student and, in evaluation mode and without gradients, the teacher; adds up the losses.

    `parameters()` are the student's and the losses' own. The teacher is no submodule: it follows `to()`, and stands in
    neither `parameters()` nor `state_dict()`. The student's weights alone are ``distiller.student.state_dict()``; to
    resume, ``distiller.losses.state_dict()`` too. Compile or distribute the distiller, not the student.

    Args:
        student, teacher: with outputs ``[B, K]``. The teacher's parameters stop requiring gradients.
        losses: by name; "wsld" reads logits, "lasnn" all features, each other one the first.
        criterion: of the student's logits and the targets.
        student_features, teacher_features: module names (see `observe`), as many of one as of the other.
        teacher_size: height = width of the teacher's input, to which the student's is resized (bicubic).
        renormalize: scale and shift of each channel from the student's input to the teacher's.
        teacher_amp: type in which the teacher computes under autocast; None: as the caller does.
        cache: folder for the teacher's outputs, used for samples whose `ids` are given.
    """

    student: nn.Module
    teacher: nn.Module

    def __init__(
        self, student: nn.Module, teacher: nn.Module, losses: dict[str, nn.Module], criterion: Criterion, *,
        student_features: Sequence[str] = (), teacher_features: Sequence[str] = (), teacher_size: int | None = None,
        renormalize: tuple[Sequence[float], Sequence[float]] | None = None, teacher_amp: torch.dtype | None = None,
        cache: str | os.PathLike | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if len(student_features) != len(teacher_features):
            raise ValueError(
                f"distill: student and teacher must name as many features, got {len(student_features)} and "
                f"{len(teacher_features)}"
            )
        if hasattr(student, "_orig_mod") or student._compiled_call_impl is not None:
            raise ValueError("distill: a compiled student shows no features; compile the distiller instead")
        check_names(student, student_features, "student_feature")
        check_names(teacher, teacher_features, "teacher_feature")
        self.student, self.losses, self.criterion = student, nn.ModuleDict(losses), criterion
        self.__dict__["teacher"] = teacher.requires_grad_(False).eval()
        self.student_features, self.teacher_features = tuple(student_features), tuple(teacher_features)
        self.teacher_size, self.teacher_amp = teacher_size, teacher_amp
        for name, values in zip(("scale", "shift"), renormalize or (None, None), strict=True):
            value = None if values is None else torch.tensor(values).view(-1, 1, 1)
            self.register_buffer(name, value, persistent=False)
        self.cache = None if cache is None else Cache(cache, self._key(renormalize))
        self.parts: dict[str, Tensor] = {}  # of the last call, detached: the task's loss and each of `losses`

    scale: Tensor | None
    shift: Tensor | None

    def _apply(self, fn: Callable, recurse: bool = True) -> "Distiller":
        self.teacher._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def forward(
        self, x: Tensor, targets: Tensor, *, ids: Tensor | Sequence[str] | None = None, teacher_x: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The student's logits and the loss to minimise.

        Args:
            x: the student's input.
            targets: as `criterion` takes them: classes ``[B]``, or probabilities ``[B, K]`` after mixing.
            ids: of the samples, for the cache. The same id must always come with the same input.
            teacher_x: the teacher's input where it is another than x, such as frames of another number of steps; it is
                neither resized nor renormalised.

        Raises:
            ValueError: an output that cannot be aligned; a cached sample whose input has changed.
        """
        logits, ours = observe(self.student, self.student_features, x)
        with torch.no_grad():
            if self.cache is None or ids is None:
                soft, theirs = self._ask(x, teacher_x)
            else:
                soft, theirs = self._recall(self.cache, x, teacher_x, ids)
        return logits, self.add_up(logits, ours, soft, theirs, targets)

    def add_up(self, logits: Tensor, ours: list[Tensor], soft: Tensor, theirs: list[Tensor], targets: Tensor) -> Tensor:
        """The loss of the student's logits and maps, given the teacher's."""
        losses = {"task": self.criterion(logits, targets)}
        for name, loss in self.losses.items():
            if name == "wsld":
                losses[name] = loss(logits, soft, targets)
            elif name == "lasnn":
                losses[name] = loss(ours, theirs)
            else:
                losses[name] = loss(ours[0], theirs[0])
        self.parts = {name: loss.detach() for name, loss in losses.items()}
        return torch.stack([loss.float() for loss in losses.values()]).sum()

    def prepare(self, x: Tensor) -> Tensor:
        """What the teacher sees of the student's input."""
        if self.scale is not None and self.shift is not None:
            x = x * self.scale + self.shift
        if self.teacher_size is not None:
            size = (self.teacher_size, self.teacher_size)
            x = F.interpolate(x.flatten(0, -4), size, mode="bicubic", antialias=True).unflatten(0, x.shape[:-3])
        return x

    def _ask(self, x: Tensor, teacher_x: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        x = self.prepare(x) if teacher_x is None else teacher_x
        with nullcontext() if self.teacher_amp is None else torch.autocast(x.device.type, self.teacher_amp):
            return observe(self.teacher, self.teacher_features, x)

    def _recall(
        self, cache: Cache, x: Tensor, teacher_x: Tensor | None, ids: Tensor | Sequence[str]
    ) -> tuple[Tensor, list[Tensor]]:
        """From the cache, and of the samples it has not seen from the teacher."""
        samples = [str(i) for i in (ids.tolist() if isinstance(ids, Tensor) else ids)]
        if len(samples) != len(x):
            raise ValueError(f"distill: ids must be {len(x)}, one for each sample, got {len(samples)}")
        prints = _fingerprints(x if teacher_x is None else teacher_x)
        known = cache.get(samples)
        missing = [i for i, sample in enumerate(samples) if sample not in known]
        if missing:
            logits, maps = self._ask(x[missing], None if teacher_x is None else teacher_x[missing])
            fresh = {}
            for row, i in enumerate(missing):
                tensors = {"print": prints[i], "logits": logits[row]}
                fresh[samples[i]] = tensors | {f"map{k}": m[row] for k, m in enumerate(maps)}
            cache.put(fresh.items())
            known |= fresh
        outputs = [known[sample] for sample in samples]
        for sample, output, now in zip(samples, outputs, prints, strict=True):
            if not torch.allclose(output["print"], now, rtol=1e-6, atol=1e-6):
                raise ValueError(
                    f"distill: sample {sample} is not what the cache {cache.path} saw: a cache needs inputs that "
                    "are the same in every epoch, without random augmentation"
                )
        stack = {key: torch.stack([o[key].to(x.device) for o in outputs]) for key in outputs[0] if key != "print"}
        return stack["logits"], [stack[f"map{k}"] for k in range(len(self.teacher_features))]

    def _key(self, renormalize: Any) -> str:
        teacher = self.teacher
        settings = (
            type(teacher).__name__, getattr(teacher, "T", None), self.teacher_features, self.teacher_size, renormalize,
            self.teacher_amp,
        )  # fmt: skip
        return hashlib.sha256(f"{weights_hash(teacher)}|{settings}".encode()).hexdigest()[:32]


def _fingerprints(x: Tensor) -> Tensor:
    """Two numbers of each sample, ``[B, 2]`` on the CPU, that another picture or a shifted one would not have."""
    flat = x.flatten(1).double()
    chirp = torch.cos(0.618 * torch.arange(flat.shape[1], dtype=torch.double, device=x.device).square())
    return torch.stack([flat.mean(1), (flat * chirp).mean(1)], 1).cpu()
