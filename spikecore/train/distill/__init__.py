"""Distillation: a student learns from a teacher's features and logits beside its labels.

In a recipe::

    distill:
      teacher: vit_small_patch16_224       # of spikecore, timm or torchvision (torchvision/NAME: that one)
      teacher_checkpoint: teacher.safetensors
      loss: mixed                          # blurred, wsld, mixed, kdsnn or lasnn
      student_feature: block.3             # module names; lists of them for lasnn
      teacher_feature: fc_norm
      teacher_size: 224

In Python::

    distiller = build_distiller(student, criterion, input_shape=(3, 32, 32), **recipe["distill"])
    optimizer = AdamW(distiller.parameters())      # the student's and the losses'; never the teacher's
    logits, loss = distiller(x, targets)           # criterion(logits, targets) + what the teacher adds
"""

from spikecore.train.distill.build import LOSSES, build_distiller, create_teacher
from spikecore.train.distill.distiller import Distiller
from spikecore.train.distill.losses import KDSNN, WSLD, Blurred, LaSNN

__all__ = ["LOSSES", "WSLD", "Blurred", "Distiller", "KDSNN", "LaSNN", "build_distiller", "create_teacher"]
