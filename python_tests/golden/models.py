"""Runners of whole models: outputs, loss, gradients, and the spike count of every neuron layer."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from golden.harness import Case, Report, fill, probe, runner, uniform
from torch import Tensor, nn

from spikecore.models import (
    ECSNN,
    MA,
    SEWDVS,
    SMA,
    SMAVGG,
    MSResNet,
    QKFormer,
    SDTCaption,
    SEWResNet,
    Spikingformer,
    SVMamba,
    VMamba,
    attention_snn,
    create_model,
    ecsnn,
    fold_norms,
    ms_resnet,
    qkformer,
    sdt,
    sew_resnet,
    sma,
    spikformer,
    svmamba,
    vmamba,
)
from spikecore.models._transformer import MLP, Attention, SelfAttention, conv_bn, neuron
from spikecore.neurons import LIF, Neuron
from spikecore.ops import LIFParams, lif
from spikecore.surrogate import Sigmoid

Filter = Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]]


def state_of(case: Case) -> dict[str, Tensor]:
    """The case's state dict by its own keys."""
    state = {}
    for entry in case.data["state"]:
        key, dtype = entry["key"], getattr(torch, entry.get("dtype", "float32"))
        stored = entry["fill"][0] == "stored"
        state[key] = (
            case.tensors[f"state.{key}"]
            if stored
            else fill(case.data["case_seed"], key, entry["shape"], entry["fill"], dtype)
        )
    return state


def spikes(x: Tensor, p: LIFParams) -> Tensor:
    return lif(
        x, p.decay, p.gain, v_threshold=p.v_threshold, v_reset=p.v_reset, strict=p.strict, surrogate=p.surrogate
    )[0]


class Inside:
    """The neurons that a fused attention holds: from the currents it reads, by `lif`, one after the other; what comes
    out must be what the attention gave to its last projection, spike by spike."""

    def __init__(self, name: str, module: Attention, into: dict[str, int], report: Report, hooks: ExitStack) -> None:
        self.name, self.module, self.into, self.report = name, module, into, report
        self.currents: dict[str, Tensor] = {}
        for operand in module.operands:

            def keep(_: nn.Module, args: Any, out: Tensor, operand: str = operand) -> None:
                self.currents[operand] = out.detach()

            hooks.callback(getattr(module, operand).register_forward_hook(keep).remove)
        hooks.callback(module.proj.register_forward_pre_hook(self.count).remove)

    def count(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        m = self.module
        s = {n: spikes(x.flatten(3).unflatten(2, (m.heads, -1)), m.qkv_lif) for n, x in self.currents.items()}
        if isinstance(m, SelfAttention):
            a = out = spikes(0.125 * (s["v"] @ (s["k"].transpose(3, 4) @ s["q"])), m.attn_lif)
        elif m.operands == "qk":
            a = spikes(s["q"].sum(3, keepdim=True), m.attn_lif)
            out = a * s["k"]
        else:
            a = spikes((s["k"] * s["v"]).sum(4, keepdim=True), m.attn_lif)
            out = a * s["q"]
        self.report.spikes(args[0], out.reshape(args[0].shape))
        for name, t in {**s, "attn": a}.items():
            self.into[f"{self.name}.{name}_lif"] = int(t.sum())


def check(
    case: Case, model: nn.Module, rename: Filter, call: Callable[[nn.Module, Tensor], Tensor] | None = None,
    neurons: dict[str, str] | None = None,
) -> Report:  # fmt: skip
    """Evaluation, also with folded norms, then a training step without dropout, as the cases were made."""
    report, call = Report(), call or (lambda model, x: model(x))
    state = state_of(case)
    own = {name: next(iter(rename({name: t}, model)), None) for name, t in state.items()}  # published name -> ours
    margin = case.data.get("min_margin", 1.0)
    near = margin < 2e-6

    # Folding rounds the weights anew, which may flip a spike nearer to its threshold than that.
    for mode, folded in (("eval", False), *((("eval", True),) if margin >= 1e-5 else ()), ("train", False)):
        model.load_state_dict(rename({k: v.clone() for k, v in state.items()}, model))
        model.train(mode == "train")
        for m in model.modules():
            if isinstance(m, nn.Dropout):
                m.eval()
        net = fold_norms(model) if folded else model
        if case.config.get("train_flag") or case.config.get("AZO"):  # the published flag holds in evaluation too
            for m in net.modules():
                if isinstance(m, SMA):
                    m.training = True
        x = case.input("x").requires_grad_(mode == "train")
        fired: dict[str, int] = {}
        with ExitStack() as hooks:
            for name, m in net.named_modules():
                if isinstance(m, Attention):
                    Inside(name, m, fired, report, hooks)
                elif isinstance(m, Neuron):

                    def count(module: nn.Module, args: Any, out: Tensor, name: str = name, into: dict = fired) -> None:
                        into[name] = into.get(name, 0) + int(out.sum())

                    hooks.callback(m.register_forward_hook(count).remove)
            with torch.set_grad_enabled(mode == "train"):
                out = call(net, x)
        ours = {name: (neurons or {}).get(name, name) for name in case.data["neurons"]}
        assert set(fired) == set(ours.values()), (sorted(fired), sorted(ours.values()))
        for name, facts in case.data["neurons"].items():
            report.counts(name, fired[ours[name]], facts[mode]["spikes"], facts[mode]["within_1e-5"] if near else 0)
        report.output(f"{'folded ' * folded}{mode} output", out, case.tensors[f"{mode}.out"])
    results = case.data["results"]["train"]
    weight = torch.from_numpy(2 * uniform(case.data["case_seed"], "loss_weight", list(out.shape)) - 1).float()
    loss = (out * weight).sum()
    report.output("loss", loss, torch.tensor(results["loss"]))
    loss.backward()
    gradients = {
        f"grad:{name}": model.get_parameter(own[name]).grad if own[name] else None
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


# ---- Spikingformer ---------------------------------------------------------------------------------------------------


@runner(BKDSNN, "Spikingformer-CML/imagenet/model.py", "vit_snn")
@runner(BKDSNN, "Spikingformer-CML/cifar10/model.py", "vit_snn")
@runner(BKDSNN, "Spikingformer-CML/cifar10/model.py", "vit_snn.forward(return_inter=True)")
@runner(BKDSNN, "Spikingformer-CML/cifar100/model.py", "vit_snn")
@runner(BKDSNN, "Spikingformer-CML/cifar10-dvs/model.py", "vit_snn")
def spikingformer_model(case: Case, _: None) -> Report:
    config, kind = case.config, case.key[1].split("/")[1]
    model = Spikingformer(
        config["embed_dims"], config["num_heads"], config["depths"], mlp_ratio=config["mlp_ratios"], T=config.get("T"),
        pools=spikformer.CIFAR if kind in ("cifar10", "cifar100") else spikformer.IMAGENET,
        tau=1.75 if "dvs" in kind else 2.0, in_chans=config["in_channels"], num_classes=config["num_classes"],
    )  # fmt: skip
    names = {n: n.replace(".attn.proj_lif", ".attn.lif").replace(".mlp.mlp", ".mlp.fc") for n in case.data["neurons"]}
    return check(case, model, spikformer.checkpoint_filter, neurons=names)


@runner(BKDSNN, "Spikingformer-CML/imagenet/model.py", "MLP")
def spikingformer_mlp(case: Case, _: None) -> Report:
    hidden, channels, *_ = case.data["state"][0]["shape"]
    names = {n: n.replace("mlp", "fc") for n in case.data["neurons"]}
    return check(case, spikformer.MLPFirst(channels, hidden, 2.0), spikformer.checkpoint_filter, neurons=names)


# ---- QKFormer --------------------------------------------------------------------------------------------------------

QKFORMER = "zhouchenlin2096/QKFormer"


def transformer_neurons(case: Case) -> dict[str, str]:
    """Published names of neurons to ours: the last one of an attention is `lif`."""
    names = {}
    for name in case.data["neurons"]:
        ours = name
        for published, own in ((".tssa.", ".attn."), (".ssa.", ".attn."), (".mlp1_", ".fc1_"), (".mlp2_", ".fc2_"),
                               (".attn.proj_lif", ".attn.lif")):  # fmt: skip
            ours = ours.replace(published, own)
        names[name] = ours
    return names


class Discarding(nn.Module):
    """The self attention of a copy that does not use what it attends to: its neuron reads the block's input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in "qkv":
            self.add_module(name, conv_bn(channels, channels))
            self.add_module(f"{name}_lif", neuron())
        self.proj = conv_bn(channels, channels, bias=True)
        self.attn_lif, self.lif = LIF(v_threshold=0.5, surrogate=Sigmoid(4.0)), neuron()

    def forward(self, x: Tensor) -> Tensor:
        for name in "qkv":
            getattr(self, f"{name}_lif")(getattr(self, name)(x))
        y = self.proj(self.attn_lif(x))
        return self.lif(y.flatten(0, 1)).view_as(y)


@runner(QKFORMER, "imagenet/qkformer.py", "MLP")
def qkformer_mlp(case: Case, _: None) -> Report:
    hidden, channels, *_ = case.data["state"][0]["shape"]
    return check(case, MLP(channels, hidden), qkformer.checkpoint_filter)


@runner("para133/SNN_Mamba", "QKFormer/model.py", "QKFormer")
@runner(QKFORMER, "imagenet/qkformer.py", "hierarchical_spiking_transformer")
@runner(QKFORMER, "cifar10/model.py", "spiking_transformer")
@runner(QKFORMER, "cifar100/model.py", "spiking_transformer")
@runner(QKFORMER, "cifar10-dvs/model.py", "vit_snn")
@runner(QKFORMER, "dvs128-gesture/model.py", "vit_snn")
def qkformer_model(case: Case, _: None) -> Report:
    config, events = case.config, case.key[2] == "vit_snn"
    stem = "dvs" if events else "cifar" if "cifar" in case.key[1] else "imagenet"
    heads = config.get("num_heads_effective", [config["num_heads"]])[0]
    model = QKFormer(
        config["embed_dims"], heads, 2 if events else config["depths"], mlp_ratio=config["mlp_ratios"], stem=stem,
        T=config.get("T"), in_chans=config["in_channels"], num_classes=config["num_classes"], published_quirks=True,
    )  # fmt: skip
    if case.key[0] != QKFORMER:
        for block in model.stage3:
            block.attn = Discarding(config["embed_dims"])
    return check(case, model, qkformer.checkpoint_filter, neurons=transformer_neurons(case))


# ---- spike-driven transformer ----------------------------------------------------------------------------------------

CAPTION = (
    "WenhuiHua-com/Dual-Efficient-Spiking-Neural-Network-Vision-Encoder-for-Partitioned-VLM-Edge-Cloud-Co-Inference"
)


@runner(CAPTION, "model/spikeformer.py", "SpikeDrivenTransformer")
def caption_encoder(case: Case, _: None) -> Report:
    config = case.config
    model = SDTCaption(
        config["embed_dims"], config["num_heads"], config["depths"], mlp_ratio=config["mlp_ratios"], T=config["T"],
        pools=[c == "1" for c in config.get("pooling_stat", "1111")], in_chans=config["in_channels"],
        num_classes=config["num_classes"],
    )  # fmt: skip
    names = {n: n.replace(".talking_heads_lif", ".attn_lif") for n in case.data["neurons"]}
    return check(case, model, sdt.checkpoint_filter, neurons=names)


@runner(CAPTION, "module/ms_conv.py", "MS_MLP_Conv")
def caption_mlp(case: Case, _: None) -> Report:
    hidden, channels, *_ = case.data["state"][0]["shape"]
    return check(case, sdt.MLP(channels, hidden), sdt.checkpoint_filter)


# ---- EC-SNN ----------------------------------------------------------------------------------------------------------


def same(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    return state


def vgg(config: dict[str, Any]) -> ECSNN:
    layers, hidden = ecsnn.ARCHITECTURES[config["arch"]]
    return ECSNN(
        layers, hidden, img_size=(config["img_height"], config["img_width"]), spiking=config["act"] == "snn",
        T=config["T"], in_chans=config["input_dim"], num_classes=config["num_cls"],
    )  # fmt: skip


@runner("AmazingDD/EC-SNN", "model.py", "VGG")
def ecsnn_vgg(case: Case, _: None) -> Report:
    return check(case, vgg(case.config), same)


@runner("AmazingDD/EC-SNN", "energy.py, utils.py", "mac_ac_count, spike_count")
def ecsnn_counts(case: Case, _: None) -> Report:
    report, model, x = Report(), vgg(case.config).eval(), case.input("x")
    model.load_state_dict(state_of(case))
    report.output("steps", model.steps(x), case.tensors["out_per_step"])
    operations, spikes = ecsnn.published_counts(model, x)
    for t, want in enumerate(case.data["spike_count_per_step"]):
        report.counts(f"step {t}", int(spikes[t]), want)
    report.values("operations", operations, torch.tensor(case.data["mac_ac_count_per_step"], dtype=torch.float64))
    operations, _ = ecsnn.published_counts(model, x, case.data["init_lsar_used"])
    report.values("of events", operations[0], torch.tensor(case.data["mac_ac_count_first_step_with_init_lsar"]))
    return report


@runner("AmazingDD/EC-SNN", "model.py", "Fusion")
def ecsnn_fusion(case: Case, _: None) -> Report:
    config = case.config
    model = ecsnn.Fusion(
        config["in_dim"], config["pmodel_num"], num_classes=config["num_cls"], bias=config["act"] == "ann"
    )
    return check(case, model, same)


# ---- VMamba, SVMamba -------------------------------------------------------------------------------------------------

SNN_MAMBA = "para133/SNN_Mamba"


@runner(SNN_MAMBA, "VMamba/SS2D.py", "SS2D")
def ss2d(case: Case, _: None) -> Report:
    config = case.config
    model = vmamba.SS2D(
        config["d_model"], state=config["d_state"], ratio=config["ssm_ratio"], conv_bias=config.get("conv_bias", True),
        **vmamba.form(config["forward_type"]),
    )  # fmt: skip

    def channels_last(model: nn.Module, x: Tensor) -> Tensor:
        return model(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    return check(case, model, vmamba.checkpoint_filter, None if config["channel_first"] else channels_last)


@runner(SNN_MAMBA, "VMamba/model.py", "VSSM")
@runner("MzeroMiko/VMamba", "classification/models/vmamba.py", "VSSM")
def vmamba_model(case: Case, _: None) -> Report:
    config = case.config
    patches = config["imgsize"] // 4
    model = VMamba(
        config["depths"], config["dims"], state=config["ssm_d_state"], ratio=config["ssm_ratio"],
        conv_bias=config["ssm_conv_bias"], forward_type=config["forward_type"], mlp_ratio=config["mlp_ratio"],
        patches=config["patchembed_version"], downsamples=config["downsample_version"],
        pos_size=(patches, patches) if config["posembed"] else None, in_chans=config["in_chans"],
        num_classes=config["num_classes"],
    )  # fmt: skip
    return check(case, model, vmamba.checkpoint_filter)


@runner(SNN_MAMBA, "SVMamba/model.py", "SVMamba")
def svmamba_model(case: Case, _: None) -> Report:
    config = case.config
    model = SVMamba(
        config["depths"], config["dims"], T=config["T"], in_chans=config["in_chans"], num_classes=config["num_classes"],
        published_quirks=True,
    )  # fmt: skip
    return check(case, model, vmamba.checkpoint_filter)


@runner(SNN_MAMBA, "SVMamba/SpikMamba.py", "SpikeMamba")
def spike_mamba(case: Case, _: None) -> Report:
    return check(case, svmamba.SpikeMamba(case.config["dim"], True), vmamba.checkpoint_filter)


@runner(SNN_MAMBA, "SVMamba/SpikMamba.py", "SpikMambaBlock")
def spike_mamba_block(case: Case, _: None) -> Report:
    return check(case, svmamba.Block(case.config["dim"], True), vmamba.checkpoint_filter)


@runner(SNN_MAMBA, "SVMamba/SpikMamba.py", "SpikeLinearAttention")
def spike_linear_attention(case: Case, _: None) -> Report:
    model = svmamba.SpikeLinearAttention(case.config["dim"], case.config["heads"], published_quirks=True)

    def used(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        return {k: v for k, v in state.items() if not k.startswith("out_proj.")}

    return check(case, model, used)


# ---- MS-ResNet, Attention-SNN ----------------------------------------------------------------------------------------


class PublishedNorm(nn.BatchNorm2d):
    """The published layout, ``[B, C, T, H, W]`` by way of copies.

    For one sample of 1 x 1 pixels, as the cases end in, torch's CPU kernel misreads this layout in backward: it sums
    g_y as though it were ``[C, T]``. The cases' gradients carry that error; so do ours if called this way, only then.
    """

    T: int

    def forward(self, x: Tensor) -> Tensor:
        steps = self.T if len(x) % self.T == 0 else 1  # a repeated image's first norm comes without T
        y = x.unflatten(0, (steps, -1)).transpose(0, 2).contiguous().transpose(0, 1).contiguous()
        y = nn.functional.batch_norm(
            y, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum or 0.0,
            self.eps,
        )  # fmt: skip
        y = y.contiguous().transpose(0, 1).contiguous().transpose(0, 2).flatten(0, 1)
        if y.requires_grad and y.shape[2:].numel() > 1:  # where our maps, and so their gradients, lie channels last
            y.register_hook(lambda g: g.contiguous())
        return y


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
        ms_resnet.DEPTHS[depth], deep_stem=depth > 34, pooled=depth > 34, T=config["time_window"],
        num_classes=config["num_classes"],
        sma=None if inserted is None else attention(inserted),
    )  # fmt: skip
    return as_published(case, model)


def as_published(case: Case, model: MSResNet) -> Report:
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.__class__, m.T = PublishedNorm, model.T
    return check(case, model, ms_resnet.checkpoint_filter)


ATTENTION = "BICLab/Attention-SNN"


@runner(ATTENTION, "Att_Res_SNN/models/resnet_2.py", "resnet18")
def attention_resnet(case: Case, _: None) -> Report:
    return as_published(case, create_model("att_resnet18", T=case.config["time_window"]))


def attentions(run: Callable) -> Callable:
    for name in ("TA", "CA", "SA", "CSA", "TCA", "TSA", "TCSA"):
        runner(ATTENTION, "MA_SNN/module/Attention.py", name)(run)
    return run


@attentions
def attention_module(case: Case, _: None) -> Report:
    config = case.config
    model = MA(
        case.key[2].removesuffix("A"), config["channels"], config["timeWindows"], channel_reduction=config["c_ratio"],
        time_reduction=config["t_ratio"],
    )  # fmt: skip

    def time_second(model: nn.Module, x: Tensor) -> Tensor:
        return model(x.transpose(0, 1)).transpose(0, 1)

    return check(case, model, attention_snn.checkpoint_filter, time_second)
