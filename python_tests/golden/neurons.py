"""Runners of the single neurons: SpikingJelly's nodes of four releases, and MS-ResNet's `mem_update`."""

import re
from collections.abc import Callable
from typing import Any

import torch
from golden.harness import Case, Report, backends, runner
from torch import Tensor

from spikecore.neurons import IF, LIF, PLIF, Neuron
from spikecore.ops import lif, lif_ref
from spikecore.surrogate import ATan, Erf, LeakyReLU, Rectangle, Sigmoid, Surrogate, Triangle

backends["lif"] = {"cpu": lif, "ref": lif_ref}

SPIKINGJELLY = "fangwei123456/spikingjelly"


def every_node(run: Callable) -> Callable:
    """The nodes of all releases: clock_driven's, single and MultiStep, and activation_based's."""
    for release in ("0.0.0.0.4", "0.0.0.0.8", "0.0.0.0.12", "0.0.0.0.14"):
        for node in ("IFNode", "LIFNode", "ParametricLIFNode"):
            for module in ("clock_driven.neuron.", "clock_driven.neuron.MultiStep", "activation_based.neuron."):
                runner(SPIKINGJELLY, release, f"spikingjelly.{module}{node}", op="lif")(run)
    return run


@every_node
def spikingjelly_node(case: Case, lif: Callable) -> Report:
    """Single-step cases go through `lif` step by step, which checks that the state may be carried from call to call."""
    config = case.config
    neuron = node(case)
    x, want = case.input("x").requires_grad_(), case.tensors
    single = config.get("single_step") or config.get("step_mode") == "s"
    spike, h_seq, v_seq = run(neuron, lif, list(x.unsqueeze(1)) if single else [x])
    (spike * want["grad_out"]).sum().backward()

    if case.key[1] == "0.0.0.0.4":
        # This release charges in place (self.v += ...): what was recorded after a step became the next step's h.
        v_seq = torch.cat([h_seq[1:], v_seq[-1:]])
    report = Report()
    report.spikes(spike, want["spike"])
    report.output("v_seq", v_seq, want["v_seq"])
    got = {"grad_x": x.grad, **({"grad.w": neuron.w.grad} if "grad.w" in want else {})}
    report.gradients(got, {name: want[name] for name in got})
    return report


@runner("Ym-Shan/Spiking_Multiscale_Attention_Arxiv", "SMA Resnet/models/MS_ResNet.py", "mem_update", op="lif")
def mem_update(case: Case, lif: Callable) -> Report:
    config, want = case.config, case.tensors
    x = case.input("x").requires_grad_()
    spike, _ = lif(
        x, config["decay"], 1.0, v_threshold=config["thresh"], strict=True, surrogate=Rectangle(2 * config["lens"])
    )
    (spike * want["grad_out"]).sum().backward()
    report = Report()
    report.spikes(spike, want["spike"])
    report.gradients({"grad_x": x.grad}, {"grad_x": want["grad_x"]})
    return report


def node(case: Case) -> Neuron:
    """The module of spikecore.neurons that a node's class and configuration ask for."""
    config = case.config
    kind = case.key[2].rpartition(".")[2].removeprefix("MultiStep")
    options = {
        "v_threshold": config.get("v_threshold", 1.0),
        "v_reset": config.get("v_reset", 0.0),
        "detach_reset": config.get("detach_reset", False),
        "surrogate": surrogate(config),
    }
    if kind == "IFNode":
        return IF(**options)
    options["decay_input"] = config.get("decay_input", True)
    if kind == "LIFNode":
        return LIF(config["tau"], **options)
    neuron = PLIF(config["init_tau"], **options)
    torch.testing.assert_close(neuron.w.detach(), case.tensors["param.w"].reshape(()))
    with torch.no_grad():
        neuron.w.copy_(case.tensors["param.w"].reshape(()))
    return neuron


def surrogate(config: dict[str, Any]) -> Surrogate:
    """From ``surrogate_function: "Name(alpha=4.0)"``, or ``surrogate`` and ``alpha``."""
    if "surrogate" in config:
        name, p = config["surrogate"], {k: config[k] for k in ("alpha", "k", "leak") if k in config}
    else:
        name = config["surrogate_function"].partition("(")[0]
        p = {k: float(v) for k, v in re.findall(r"(\w+)=([-+.\de]+)", config["surrogate_function"])}
    return {
        "ATan": ATan,
        "Erf": Erf,
        "LeakyKReLU": LeakyReLU,
        "PiecewiseQuadratic": lambda alpha: Triangle(1 / alpha),
        "Rect": lambda alpha: Rectangle(1 / alpha),
        "Sigmoid": Sigmoid,
    }[name](**p)


def run(neuron: Neuron, lif: Callable, pieces: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Spikes, h and v ``[T, ...]``, from pieces of the sequence, one after the other."""
    v, steps = None, []
    decay, gain = neuron.decay_and_gain()
    for x in pieces:
        s, v, *h_and_v = lif(
            x, decay, gain, v_threshold=neuron.v_threshold, v_reset=neuron.v_reset, detach_reset=neuron.detach_reset,
            surrogate=neuron.surrogate, v_init=v, return_h=True, return_v=True,
        )  # fmt: skip
        steps.append((s, *h_and_v))
    s, h, v = (torch.cat(parts) for parts in zip(*steps, strict=True))
    return s, h, v
