"""Runners of whole models: outputs, loss, gradients, and the spike count of every neuron layer."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from golden.harness import Case, Report, fill, probe, runner, uniform
from torch import Tensor, nn

from spikecore.models import SEWDVS, SMA, SMAVGG, MSResNet, SEWResNet, ms_resnet, sew_resnet, sma
from spikecore.neurons import Neuron

Filter = Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]]


def state_of(case: Case) -> dict[str, Tensor]:
    """The case's state dict by its own keys."""
    state = {}
    for entry in case.data["state"]:
        key, dtype = entry["key"], getattr(torch, entry["dtype"])
        stored = entry["fill"][0] == "stored"
        state[key] = (
            case.tensors[f"state.{key}"]
            if stored
            else fill(case.data["case_seed"], key, entry["shape"], entry["fill"], dtype)
        )
    return state


def check(
    case: Case, model: nn.Module, rename: Filter, call: Callable[[nn.Module, Tensor], Tensor] | None = None,
    neurons: dict[str, str] | None = None,
) -> Report:  # fmt: skip
    """Evaluation, then a training step without dropout, as the cases were made."""
    report, call = Report(), call or (lambda model, x: model(x))
    state = state_of(case)
    own = {name: next(iter(rename({name: t}, model))) for name, t in state.items()}  # published name -> ours
    near = case.data.get("min_margin", 1.0) < 2e-6

    for mode in ("eval", "train"):
        model.load_state_dict(rename({k: v.clone() for k, v in state.items()}, model))
        model.train(mode == "train")
        for m in model.modules():
            if isinstance(m, nn.Dropout):
                m.eval()
        if case.config.get("train_flag") or case.config.get("AZO"):  # the published flag holds in evaluation too
            for m in model.modules():
                if isinstance(m, SMA):
                    m.training = True
        x = case.input("x").requires_grad_(mode == "train")
        spikes: dict[str, int] = {}
        with ExitStack() as hooks:
            for name, m in model.named_modules():
                if isinstance(m, Neuron):

                    def count(module: nn.Module, args: Any, out: Tensor, name: str = name, into: dict = spikes) -> None:
                        into[name] = into.get(name, 0) + int(out.sum())

                    hooks.callback(m.register_forward_hook(count).remove)
            with torch.set_grad_enabled(mode == "train"):
                out = call(model, x)
        ours = {name: (neurons or {}).get(name, name) for name in case.data["neurons"]}
        assert set(spikes) == set(ours.values()), (sorted(spikes), sorted(ours.values()))
        for name, facts in case.data["neurons"].items():
            report.counts(name, spikes[ours[name]], facts[mode]["spikes"], facts[mode]["within_1e-5"] if near else 0)
        report.output(f"{mode} output", out, case.tensors[f"{mode}.out"])
    results = case.data["results"]["train"]
    weight = torch.from_numpy(2 * uniform(case.data["case_seed"], "loss_weight", list(out.shape)) - 1).float()
    loss = (out * weight).sum()
    report.output("loss", loss, torch.tensor(results["loss"]))
    loss.backward()
    gradients = {
        f"grad:{name}": model.get_parameter(own[name]).grad
        for name in results["grads"]
        if not name.startswith("input:")
    }
    gradients["grad:input:x"] = x.grad
    records = {f"grad:{name}": record for name, record in results["grads"].items()}
    largest = max(record["norm"] for record in records.values() if record)
    for name, record in records.items():
        got = gradients[name]
        if record is None:
            assert got is None, f"{name}: published code gives no gradient"
            continue
        assert got is not None, f"{name}: no gradient"
        stored = case.tensors.get(f"train.{name.replace(':', '.', 1)}")
        if stored is not None:
            report.gradients({name: got.view_as(stored)}, {name: stored}, largest)
        # The probe sees what the norm does not: |dot - dot'| <= |g - g'| |w|, and |w| is about sqrt(n / 3).
        scale = (record["norm"] + 0.01 * largest) * (got.numel() / 3) ** 0.5
        error = abs(probe(got, case.data["case_seed"], name) - record["dot"]) / scale
        report.gradient_error = max(report.gradient_error, error)
        report._limit(f"{name} (probe)", error, 1e-4)
    return report


# ---- SEW-ResNet ------------------------------------------------------------------------------------------------------

BKDSNN = "Intelligent-Computing-Research-Group/BKDSNN"


def resnets(run: Callable) -> Callable:
    for kind in ("sew", "spiking"):
        for depth in sew_resnet.DEPTHS:
            file = f"Spike-Element-Wise-ResNet/imagenet/{kind}_resnet.py"
            runner(BKDSNN, file, f"{kind}_resnet{depth}")(run)
    return run


@resnets
def image_resnet(case: Case, _: None) -> Report:
    kind, depth = case.key[2].split("_resnet")
    config = dict(case.config)
    connect = config.pop("connect_f", None) if kind == "sew" else None
    model = SEWResNet(sew_resnet.DEPTHS[int(depth)], connect=connect, bottleneck=int(depth) >= 50, **config)
    return check(case, model, sew_resnet.checkpoint_filter)


@runner(BKDSNN, "Spike-Element-Wise-ResNet/cifar10dvs/smodels.py", "ResNetN")
def event_resnet(case: Case, _: None) -> Report:
    config = case.config
    model = SEWDVS(config["layer_list"], connect=config["connect_f"], num_classes=config["num_classes"])
    return check(case, model, sew_resnet.checkpoint_filter)


# ---- SMA -------------------------------------------------------------------------------------------------------------

SMA_REPO = "Ym-Shan/Spiking_Multiscale_Attention_Arxiv"


def attention(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Keyword arguments of our SMA from published ones."""
    names = {
        "C_reduction": "channel_reduction",
        "T_reduction": "time_reduction",
        "AZO": "azo",
        "RCR": "channel_drop",
        "RTR": "time_drop",
    }
    return {names.get(k, k): v for k, v in config.items()} | changes


@runner(SMA_REPO, "SMA VGG/vgg8_dvs128_SMA.py", "SMA(AZO=False)")
@runner(SMA_REPO, "SMA VGG/vgg8_dvs128_SMA.py", "SMA(AZO=True), train_flag=1")
@runner(SMA_REPO, "Two version of Attention ZoneOut/Explict Loop/Explict Loop Demo.py", "SMA(AZO=True), train_flag=1")
@runner(SMA_REPO, "Spiking Multiscale Attention-Lightweight/SMA-L.py", "SMA_L")
@runner(SMA_REPO, "SMA Resnet/train_amp.py", "SMA(AZO=False)")
def sma_module(case: Case, _: None) -> Report:
    config = attention(case.config)
    channels, file = config.pop("channel"), case.key[1]
    model = SMA(channels, **config, light="SMA-L" in file, spiking="Resnet" not in file)
    return check(case, model, sma.checkpoint_filter)


def vggs(run: Callable) -> Callable:
    for data in ("dvs128", "cifar10dvs", "NCaltech101"):
        runner(SMA_REPO, f"SMA VGG/vgg8_{data}_SMA.py", "VGG8")(run)
    return run


@vggs
def sma_vgg(case: Case, _: None) -> Report:
    config = case.config
    time_reduction = {"dvs128": 4, "cifar10dvs": 4, "NCaltech101": 4}
    drop = {"dvs128": 10, "cifar10dvs": 4, "NCaltech101": 24}
    data = case.key[1].removeprefix("SMA VGG/vgg8_").removesuffix("_SMA.py")
    width = {int(k): v for k, v in config.get("widths", {}).items()}
    model = SMAVGG(
        config["T"], widths=[width.get(w, w) for w in (64, 128, 256, 512, 512)], azo=bool(config["train_flag"]),
        hidden=[width.get(w, w) for w in (2048, 1024)], time_reduction=time_reduction[data], channel_drop=drop[data],
        num_classes=config["num_classes"],
    )  # fmt: skip

    def steps(model: SMAVGG, x: Tensor) -> Tensor:  # the published net takes [T, B, ...] and returns every step
        return model.others(model.sequence_features(x))

    moved = {"block1.1": "block1.2"} if data == "NCaltech101" else {}
    return check(case, model, sma.checkpoint_filter, steps, moved)


# ---- MS-ResNet -------------------------------------------------------------------------------------------------------


def norm_as_published(norm: nn.BatchNorm2d, T: int, x: Tensor) -> Tensor:
    """The published layout, ``[B, C, T, H, W]`` by way of copies.

    For one sample of 1 x 1 pixels, as the cases end in, torch's CPU kernel misreads this layout in backward: it sums
    g_y as though it were ``[C, T]``. The cases' gradients carry that error; so do ours if called this way, only then.
    """
    folded = x.dim() == 4
    y = (x.unflatten(0, (T, -1)) if folded else x).transpose(0, 2).contiguous().transpose(0, 1).contiguous()
    y = nn.functional.batch_norm(
        y, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.training, norm.momentum or 0.0, norm.eps
    )
    y = y.contiguous().transpose(0, 1).contiguous().transpose(0, 2)
    return y.flatten(0, 1) if folded else y


def membrane_resnets(run: Callable) -> Callable:
    file = "SMA Resnet/models/MS_ResNet.py"
    for depth in ms_resnet.DEPTHS:
        runner(SMA_REPO, file, f"resnet{depth}")(run)
    inserted = "resnet18 with SMA inserted at index 2 of every residual_function"
    return runner(SMA_REPO, f"SMA Resnet/train_amp.py + models/{file.rpartition('/')[2]}", inserted)(run)


@membrane_resnets
def membrane_resnet(case: Case, _: None) -> Report:
    config = dict(case.config)
    depth = int(case.key[2].split()[0].removeprefix("resnet"))
    inserted = config.pop("SMA", None)
    model = MSResNet(
        ms_resnet.DEPTHS[depth], deep_stem=depth > 34, T=config["time_window"], num_classes=config["num_classes"],
        sma=None if inserted is None else attention(inserted),
    )  # fmt: skip
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.forward = partial(norm_as_published, m, model.T)
    return check(case, model, ms_resnet.checkpoint_filter)
