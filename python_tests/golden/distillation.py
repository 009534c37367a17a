"""Runners of the distillation losses: values, gradients, and the channels that a draw takes away."""

from collections.abc import Callable
from unittest import mock

import torch
from golden.harness import Case, Report, runner

from spikecore.train.distill import KDSNN, WSLD, Blurred, LaSNN

BKDSNN = "Intelligent-Computing-Research-Group/BKDSNN"
FILES = (
    "Spikingformer-CML/cifar10-dvs/loss.py",  # maps
    "Spike-Element-Wise-ResNet/cifar10dvs/loss.py",
    "Spikingformer-CML/imagenet/loss.py",  # a vector from the teacher
)


def each_file(object: str) -> Callable:
    def register(run: Callable) -> Callable:
        for file in FILES:
            runner(BKDSNN, file, object)(run)
        return run

    return register


@each_file("BRDLoss")
def blurred(case: Case, _: None) -> Report:
    report, config, want = Report(), case.config, case.tensors
    loss = Blurred(
        config["student"], config["teacher"], alpha=config["alpha_mgd"], mask=config["lambda_mgd"],
        clip=config["use_clip"],
    )  # fmt: skip
    loss.load_state_dict({k.removeprefix("state."): v for k, v in want.items() if k.startswith("state.")})
    student, teacher = (want[name].clone().requires_grad_() for name in "ST")
    with mock.patch.object(torch, "rand", return_value=want["mask_u"]) as rand:
        got = loss(student, teacher)
    assert rand.call_args.args == (tuple(want["mask"].shape),)
    got.backward()
    report.values("loss", got, want["loss"].squeeze())
    gradients = {"S": student.grad, "T": teacher.grad} | {n: p.grad for n, p in loss.named_parameters()}
    report.gradients(gradients, {k.removeprefix("grad."): v for k, v in want.items() if k.startswith("grad.")})
    return report


@each_file("get_logits_loss")
def weighted_soft_labels(case: Case, _: None) -> Report:
    report, want = Report(), case.tensors
    student, teacher = (want[name].clone().requires_grad_() for name in ("student", "teacher"))
    loss = WSLD(temperature=case.config["temp"])
    got = loss(student, teacher, want["one_hot"])
    got.backward()
    report.values("loss", got, want["loss"].squeeze())
    report.values("loss, classes by number", loss(student, teacher, want["one_hot"].argmax(1)), want["loss"].squeeze())
    report.gradients(
        {"student": student.grad, "teacher": teacher.grad}, {k: want[f"grad.{k}"] for k in ("student", "teacher")}
    )
    return report


@runner(BKDSNN, "Spike-Element-Wise-ResNet/cifar10dvs/loss.py", "KDSNNLoss, LaSNNLoss")
def features_alone(case: Case, _: None) -> Report:
    report, want = Report(), case.tensors
    student, teacher, width = want["S"].clone().requires_grad_(), want["T"], want["S"].shape[1]
    got = KDSNN(width, width, alpha=case.config["alpha"])(student, teacher)
    got.backward()
    report.values("KDSNN", got, want["kdsnn"].squeeze())
    report.gradients({"S": student.grad}, {"S": want["kdsnn.grad.S"]})
    lasnn = LaSNN([width, width], [width, width], alpha=case.config["alpha"])
    got = lasnn([student, 2 * student], [teacher, teacher])
    report.values("LaSNN", got, want["lasnn_S_2S_vs_T"].squeeze())
    return report
