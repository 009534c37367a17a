"""What every image and event model promises, on the small variants; checkpoints."""

import copy
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikecore.models import create_model, fold_norms, list_models, load_checkpoint
from spikecore.models._base import SpikingModel, VisionModel, fire
from spikecore.models._transformer import Attention, conv_bn
from spikecore.models.svmamba import SpikeLinearAttention, SpikeMamba
from spikecore.models.vmamba import DropPath
from spikecore.neurons import LIF, PLIF, Neuron
from spikecore.ops import lif_ref

# name: (settings, input of a batch of 2)
SMALL: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "sew_resnet_test": ({"T": 3}, (2, 3, 32, 32)),
    "sew_dvs_7b": ({"img_size": 128}, (2, 2, 2, 128, 128)),
    "sma_vgg8_test": ({}, (2, 8, 2, 32, 32)),
    "ms_resnet_test": ({"T": 6}, (2, 3, 128, 96)),
    "att_resnet_test": ({}, (2, 3, 32, 64)),
    "qkformer_test": ({}, (2, 3, 32, 40)),
    "ecsnn_vgg_test": ({"img_size": 16, "T": 16}, (2, 1, 16, 16)),
    "ecsnn_vgg5_ann": ({"img_size": (8, 12)}, (2, 3, 8, 12)),
    "svmamba_test": ({}, (2, 3, 24, 32)),
    "vmamba_test": ({}, (2, 3, 24, 32)),
    "sdt_test": ({}, (2, 3, 32, 48)),
    "spikformer_test": ({}, (2, 3, 32, 48)),
    "spikingformer_test": ({}, (2, 3, 48, 32)),
    "spikingformer_dvs_2_256": ({"embed_dim": 32, "heads": 2}, (2, 3, 2, 32, 32)),
    "qkformer_dvs_256": ({"embed_dim": 64, "heads": 2}, (2, 3, 2, 32, 24)),
}
FAMILIES = pytest.mark.parametrize("name", SMALL)


def build(name: str, **changes: Any) -> tuple[VisionModel, Tensor]:
    settings, shape = SMALL[name]
    torch.manual_seed(0)
    model, x = create_model(name, **{**settings, **changes}), torch.rand(shape) * 2
    with torch.no_grad():  # so that neurons behind linear layers fire
        for m in (m for s in model.modules() if isinstance(s, nn.Sequential) for m in s):
            if isinstance(m, nn.Linear):
                m.weight.mul_(10)
        for m in model.modules():
            if isinstance(m, SpikeMamba):
                m.in_proj.weight.mul_(50)
                m.ssm.out_proj.weight.mul_(50)
        warm_up(model, torch.rand(*shape[:-3], model.in_chans, *shape[-2:]) * 2)
    return model.eval(), x


def warm_up(model: nn.Module, x: Tensor) -> None:
    """Batch norms of this batch, in transformers positive on average: those of fresh weights are silent."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for m in norms:
        if not m.weight.any():  # branches that start as zero take part
            m.weight.fill_(0.5)
        m.bias.fill_(float(any(isinstance(a, Attention) for a in model.modules())))
        m.momentum = 1.0
    model(x)
    for m in norms:
        m.momentum = 0.1


@FAMILIES
def test_forward_is_head_of_features(name: str) -> None:
    model, x = build(name)
    features = model.forward_features(x)
    assert features.shape[isinstance(model, SpikingModel)] == len(x)
    assert features.any()
    assert torch.equal(model(x), model.forward_head(features))
    assert model(x).shape == (2, model.num_classes)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)


@FAMILIES
def test_every_parameter_learns(name: str) -> None:
    model, x = build(name)
    model.train()
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.eval()
    model(x).square().sum().backward()
    learning = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    assert [n for n, p in learning if p.grad is None or not p.grad.isfinite().all()] == []
    assert [n for n, p in learning if n.endswith("weight") and p.dim() > 1 and not p.grad.any()] == []


@FAMILIES
def test_other_classes_channels_and_steps(name: str) -> None:
    model, x = build(name, num_classes=7, in_chans=5)
    x = torch.rand(*x.shape[:-3], 5, *x.shape[-2:])
    assert model(x).shape == (2, 7)
    model.reset_classifier(4)
    assert model(x).shape == (2, 4)
    assert isinstance(model.get_classifier(), nn.Linear)
    assert build(name, num_classes=0)[0](build(name)[1]).shape == (2, model.num_features)


@FAMILIES
def test_intermediates(name: str) -> None:
    model, x = build(name)
    features, maps = model.forward_intermediates(x)
    assert torch.equal(features, model.forward_features(x))
    assert len(maps) == len(model.stages)
    assert torch.equal(maps[-1], features.mean(0) if isinstance(model, SpikingModel) else features)
    last = model.forward_intermediates(x, 1, intermediates_only=True)
    assert len(last) == 1
    assert torch.equal(last[0], maps[-1])


@FAMILIES
def test_samples_do_not_see_one_another(name: str) -> None:
    model, x = build(name)
    model, x = model.double(), x.double()
    torch.testing.assert_close(model(x)[:1], model(x[:1]))


@FAMILIES
def test_channels_last_and_autocast(name: str) -> None:
    model, x = build(name)
    rates: list[float] = []
    for m in model.modules():
        if isinstance(m, Neuron):
            m.register_forward_hook(lambda m, args, out: rates.append(float(out.detach().float().mean())))
    want = model(x)
    last = model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(last(x), want, rtol=1e-3, atol=1e-3)
    single = rates[len(rates) // 2 :]
    rates.clear()
    with torch.autocast("cpu", torch.bfloat16):
        half = last(x)
    assert half.isfinite().all()
    if name == "sma_vgg8_test":  # so scaled, its linear layers answer any rounding by other spikes, but as many
        assert rates == pytest.approx(single, abs=0.02)
    else:
        assert torch.nn.functional.cosine_similarity(half.float().flatten(), want.flatten(), dim=0) > 0.9


@FAMILIES
def test_folded_norms(name: str) -> None:
    """Every batch norm but those behind an attention goes into its convolution; in float64 no spike flips."""
    model, x = build(name)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        for m in norms:
            m.weight.mul_(torch.rand_like(m.weight) + 0.5)
            m.running_mean.add_(torch.rand_like(m.running_mean) * 0.1)
    model, x = model.double(), x.double()
    folded = fold_norms(model)
    left = sum(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert left == (2 if name.startswith("sma") else 0)
    torch.testing.assert_close(folded(x), model(x))
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == len(norms)
    torch.testing.assert_close(fold_norms(folded)(x), model(x))


def test_norms_fold_in_evaluation_only() -> None:
    with pytest.raises(
        ValueError, match=r"^fold_norms: the model must be in evaluation mode, call model.eval\(\) first$"
    ):
        fold_norms(create_model("sew_resnet_test"))


@FAMILIES
@pytest.mark.slow
def test_full_graph_compile(name: str) -> None:
    model, x = build(name)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


def test_a_repeated_image_is_the_same_frames() -> None:
    model, x = build("sew_resnet_test")
    torch.testing.assert_close(model(x), model(x.unsqueeze(1).expand(-1, 3, -1, -1, -1)))


def test_the_published_quirk_couples_a_batch() -> None:
    model, x = build("qkformer_test")
    quirk = create_model("qkformer_test", published_quirks=True).eval()
    quirk.load_state_dict(model.state_dict())
    assert not torch.equal(quirk(x), model(x))
    torch.testing.assert_close(quirk(x[:1]), model(x[:1]))


@pytest.mark.parametrize("name", [n for n in SMALL if "former" in n or "sdt" in n or "mamba" in n])
def test_sizes_of_one(name: str) -> None:
    """One step, one sample, one pixel."""
    model, x = build(name)
    model.T, x = 1, x[:1, ..., :1, :1]
    out = model(x[:, :1] if x.dim() == 5 else x)
    assert out.shape == (1, model.num_classes)
    out.sum().backward()


def test_a_block_of_svmamba_couples_a_batch_as_published() -> None:
    model, x = build("svmamba_test")
    quirk = create_model("svmamba_test", published_quirks=True).eval()
    quirk.load_state_dict(model.state_dict())
    assert not torch.equal(quirk(x), model(x))
    torch.testing.assert_close(quirk(x[:1]), model(x[:1]))


def test_attention_of_svmamba_couples_a_batch_as_published() -> None:
    torch.manual_seed(0)
    model, quirk = SpikeLinearAttention(8, 2), SpikeLinearAttention(8, 2, published_quirks=True)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4)
    quirk.load_state_dict(model.state_dict())
    x = torch.rand(3, 2, 8, 3, 5)
    assert model(x).shape == x.shape
    assert not torch.equal(quirk(x), model(x))
    torch.testing.assert_close(quirk(x[:, :1]), model(x[:, :1]))
    with pytest.raises(ValueError, match=r"^SpikeLinearAttention: 8 channels cannot be split into 3 heads$"):
        SpikeLinearAttention(8, 3)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("added", [False, True])
def test_a_norm_within_the_neuron_is_the_norm_before_it(training: bool, added: bool) -> None:
    """Spikes, gradients and running statistics, repeated images too; hooks see the neuron either way."""
    torch.manual_seed(0)
    layers, neuron = conv_bn(3, 4, 3).train(training).double(), PLIF().double()
    nn.init.constant_(layers[1].bias, 1.0)
    other = copy.deepcopy(layers)
    other.register_forward_hook(lambda *_: None)  # watched, so called
    seen: list[Tensor] = []
    neuron.register_forward_hook(lambda m, args, out: seen.append(out))
    image = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    for x in (image.expand(3, -1, -1, -1, -1), torch.randn(3, 2, 3, 5, 7, dtype=torch.float64)):
        residual = torch.randn(3, 2, 4, *x.shape[3:], dtype=torch.float64) if added else None
        found = []
        for chosen in (layers, other):
            s = fire(x, chosen, neuron, residual)
            weights = torch.linspace(-1, 1, s.numel(), dtype=torch.float64).view(s.shape)
            found.append((s, torch.autograd.grad((s * weights).sum(), [*chosen.parameters(), neuron.w])))
        assert found[0][0].any()
        torch.testing.assert_close(*found)
    assert len(seen) == 4
    assert all(torch.equal(seen[i], seen[i + 1]) for i in (0, 2))
    torch.testing.assert_close(layers.state_dict(), other.state_dict(), rtol=1e-3, atol=0)  # n / (n - 1), see over_time
    assert int(layers[1].num_batches_tracked) == 2 * training


def test_norms_over_ranks_and_watched_ones_are_called() -> None:
    called: list[str] = []
    layers, neuron, x = conv_bn(3, 4), LIF(), torch.rand(2, 2, 3, 4, 4)
    layers[1].register_forward_hook(lambda *_: called.append("norm"))
    fire(x, layers, neuron)
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(conv_bn(3, 4)).eval()
    synced[1].register_forward_pre_hook(lambda *_: called.append("synced"))
    fire(x, synced, neuron)
    assert called == ["norm", "synced"]


def test_drop_path() -> None:
    drop, x = DropPath(0.5), torch.ones(1000, 2, 1, 1)
    torch.manual_seed(0)
    y = drop(x)
    assert set(y.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(y[:, 0], y[:, 1])
    assert 400 < int(y[:, 0].count_nonzero()) < 600
    assert torch.equal(drop.eval()(x), x)
    rates = [b.drop_path.p for layer in create_model("vmamba_test", drop_path=0.3).layers for b in layer.blocks]
    assert rates == pytest.approx([0.0, 0.3])


def plain_spikformer(s: dict[str, Tensor], x: Tensor, T: int, heads: int) -> Tensor:
    """The paper's equations, from a state dict of the published names, without spikecore's layers."""

    def lif(x: Tensor, v_threshold: float = 1.0) -> Tensor:
        return lif_ref(x, v_threshold=v_threshold)[0]

    def layer(x: Tensor, conv: str, bn: str) -> Tensor:
        weight = s[f"{conv}.weight"]
        weight = weight if weight.dim() == 4 else weight[..., None]
        y = F.conv2d(x.flatten(0, 1), weight, s.get(f"{conv}.bias"), padding=weight.shape[-1] // 2)
        norm = (s[f"{bn}.{n}"] for n in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(y, *norm).unflatten(0, x.shape[:2])

    x = x.expand(T, *x.shape)
    for i in ("", 1, 2, 3):
        x = lif(layer(x, f"patch_embed.proj_conv{i}", f"patch_embed.proj_bn{i}"))
        x = F.max_pool2d(x.flatten(0, 1), 3, 2, 1).unflatten(0, x.shape[:2])
    x = x + lif(layer(x, "patch_embed.rpe_conv", "patch_embed.rpe_bn"))
    for i in range(2):
        p = f"block.{i}.attn"
        q, k, v = (lif(layer(x, f"{p}.{n}_conv", f"{p}.{n}_bn")).flatten(3).unflatten(2, (heads, -1)).mT for n in "qkv")
        y = lif(0.125 * (q @ k.mT) @ v, 0.5).mT.reshape(x.shape)
        x = x + lif(layer(y, f"{p}.proj_conv", f"{p}.proj_bn"))
        p = f"block.{i}.mlp"
        y = lif(layer(x, f"{p}.fc1_conv", f"{p}.fc1_bn"))
        x = x + lif(layer(y, f"{p}.fc2_conv", f"{p}.fc2_bn"))
    return F.linear(x.flatten(3).mean(3).mean(0), s["head.weight"], s["head.bias"])


def test_spikformer_is_the_paper() -> None:
    model, x = build("spikformer_test")
    model, x = model.double(), x.double()
    want = plain_spikformer(numbered_last(published(model.state_dict())), x, T=2, heads=2)
    torch.testing.assert_close(model(x), want)


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "line"),
    [
        ("sew_resnet_test", (2, 1, 32, 32), "SEWResNet: x must be [B, 3, H, W] or [B, 3, 3, H, W], got [2, 1, 32, 32]"),
        ("sew_resnet_test", (2, 5, 3, 32, 32), "SEWResNet: x must have T = 3 frames, got 5 in [2, 5, 3, 32, 32]"),
        ("sew_dvs_7b", (2, 2, 9, 9), "SEWDVS: an image needs T, the number of times it is shown; got [2, 2, 9, 9]"),
        ("sew_dvs_7b", (1, 2, 2, 256, 256), "SEWDVS: the head was built for 32 features, the frames give 128"),
        ("ecsnn_vgg_test", (2, 1, 18, 22),
         "ECSNN: the linear layers were built for maps [64, 4, 4], the input gives [64, 4, 5]"),
        ("vmamba_test", (2, 4, 3, 9, 9), "VMamba: x must be [B, 3, H, W], got [2, 4, 3, 9, 9]"),
        ("qkformer_test", (2, 1, 9, 9), "QKFormer: x must be [B, 3, H, W] or [B, 2, 3, H, W], got [2, 1, 9, 9]"),
        ("sma_vgg8_test", (2, 8, 2, 16, 16), "SMAVGG: frames must be at least 32 x 32 (five pools), got [16, 16]"),
        ("sma_vgg8_test", (2, 6, 2, 32, 32), "SMAVGG: x must have T = 8 frames, got 6 in [2, 6, 2, 32, 32]"),
    ],
)  # fmt: skip
def test_bad_input(name: str, shape: tuple[int, ...], line: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(line)}$"):
        build(name)[0](torch.zeros(shape))


@pytest.mark.parametrize(
    ("name", "settings", "line"),
    [
        ("qkformer_test", {"stem": "large"}, "QKFormer: stem must be imagenet, cifar or dvs, got 'large'"),
        ("qkformer_test", {"depth": 3}, "QKFormer: embed_dim must be a multiple of 16 and depth above 3, got 64 and 3"),
        ("spikingformer_test", {"pools": (True,)}, "Spikingformer: pools must be four, got 1"),
        (
            "spikformer_test",
            {"depth": 0},
            "Spikformer: embed_dim must be a multiple of 8 and depth at least 1, got 64 and 0",
        ),
        ("vmamba_test", {"forward_type": "v2"}, "SS2D: the form 'v2' is not known"),
        ("vmamba_test", {"forward_type": "v05_nozz"}, "SS2D: the form 'v05_nozz' is not known (['nozz'])"),
        (
            "vmamba_test",
            {"patches": "v3"},
            "VMamba: patches must be v1 or v2 and downsamples v1, v2 or v3, got 'v3' and 'v3'",
        ),
        ("sdt_test", {"embed_dim": 60}, "SDT: embed_dim must be a multiple of 8 and depth at least 1, got 60 and 2"),
        (
            "att_resnet_test",
            {"attention": {"dimensions": "CT"}},
            "MA: dimensions must be one or more of TCS, in this order, got 'CT'",
        ),
        (
            "att_resnet_test",
            {"T": 2, "attention": {"dimensions": "T"}},
            "MA: a width of 2 is too small for a reduction of 4 in ta",
        ),
        ("qkformer_test", {"heads": 5}, "TokenAttention: 16 channels cannot be split into 5 heads"),
    ],
)
def test_bad_settings(name: str, settings: dict, line: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(line)}$"):
        create_model(name, **settings)


def test_unknown_name_offers_the_nearest() -> None:
    with pytest.raises(ValueError, match="there is no model 'sew_resnet81'; did you mean sew_resnet18"):
        create_model("sew_resnet81")
    assert "sew_resnet152" in list_models("sew_*")


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def old_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As saved with the release of SpikingJelly that kept its layers in ``.module``, time constants of shape [1]."""
    state = {re.sub(r"\.(conv\d|downsample\.0)\.(\d)\.", r".\1.module.\2.", k): v for k, v in state.items()}
    return {k: v.reshape(1) if k.endswith(".w") else v for k, v in state.items()}


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s},
                                  lambda s: {"net": {f"module.{k}": v for k, v in s.items()}},
                                  lambda s: {f"module.{k}": v for k, v in s.items()},
                                  lambda s: {"model": old_keys(s)}], ids=range(6))  # fmt: skip
def test_checkpoints_as_authors_save_them(tmp_path, wrap) -> None:
    model, x = build("sew_resnet_test")
    torch.save(wrap(model.state_dict()), tmp_path / "model.pth")
    torch.manual_seed(1)
    other = create_model("sew_resnet_test", T=3, checkpoint=tmp_path / "model.pth").eval()
    assert torch.equal(other(x), model(x))


def published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As the published transformers save it: conv and norm side by side, an attention's convolutions 1-D."""
    names = {"0": "conv", "1": "bn"}
    state = {
        re.sub(r"\.([^.]+)\.([01])\.(\w+)$", lambda m: f".{m[1]}_{names[m[2]]}.{m[3]}", k): v for k, v in state.items()
    }
    return {k: v.squeeze(-1) if re.search(r"attn\.\w+_conv", k) and v.dim() == 4 else v for k, v in state.items()}


def test_keys_of_the_published_qkformer(tmp_path) -> None:
    model, x = build("qkformer_test")
    state = {re.sub(r"(stage[12]\.\d)\.attn", r"\1.tssa", k): v for k, v in published(model.state_dict()).items()}
    assert {"stage1.0.tssa.q_conv.weight", "patch_embed1.proj_res_bn.bias", "stage3.0.mlp.fc1_conv.bias"} < set(state)
    assert state["stage3.0.attn.proj_conv.weight"].dim() == 3
    torch.save({"model": state}, tmp_path / "m.pth")
    assert torch.equal(create_model("qkformer_test", checkpoint=tmp_path / "m.pth").eval()(x), model(x))


def test_keys_of_the_published_spikingformer(tmp_path) -> None:
    model, x = build("spikingformer_test")
    state = {k.replace(".fc", ".mlp"): v for k, v in published(model.state_dict()).items()}
    state |= {f"block.0.norm{i}.{kind}": torch.ones(64) for i in (1, 2) for kind in ("weight", "bias")}
    assert {"block.1.mlp.mlp2_bn.running_var", "patch_embed.proj4_conv.weight"} < set(state)
    torch.save(state, tmp_path / "m.pth")
    assert torch.equal(create_model("spikingformer_test", checkpoint=tmp_path / "m.pth").eval()(x), model(x))


def test_keys_of_the_official_vmamba(tmp_path) -> None:
    """Two weights with a dimension for the directions."""
    model, x = build("vmamba_test")
    state = dict(model.state_dict())
    for k in [k for k in state if k.endswith(("x_proj.weight", "dt_projs.weight"))]:
        state[k.replace(".weight", "_weight")] = state.pop(k).unflatten(0, (4, -1))
    assert state["layers.0.blocks.0.op.x_proj_weight"].shape == (4, 3, 16)
    torch.save({"model": state}, tmp_path / "m.pth")
    assert torch.equal(create_model("vmamba_test", checkpoint=tmp_path / "m.pth").eval()(x), model(x))


def numbered_last(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """proj1_conv to proj_conv1 in the tokenizer, as some have it."""
    return {re.sub(r"^(patch_embed\.proj)(\d)_(conv|bn)", r"\1_\3\2", k): v for k, v in state.items()}


def test_caption_encoder(tmp_path) -> None:
    torch.manual_seed(0)
    model, x = create_model("sdt_caption_test"), torch.rand(2, 3, 32, 48) * 2
    with torch.no_grad():
        warm_up(model, x)
    model.eval()
    assert model(x).shape == (2, 1 + 6, 12)
    assert torch.equal(model.codes(x), model(x).argmax(2))
    features = model.forward_features(x)
    assert torch.equal(model.tokens(features)[:, :, 0], features.mean((3, 4)))
    assert torch.equal(model.tokens(features)[:, :, 5], features[..., 1, 1])
    assert model.forward_head(features, pre_logits=True).shape == (2, 7, 64)
    assert model(torch.rand(1, 1, 3, 1, 1).expand(1, 2, 3, 1, 1)).shape == (1, 2, 12)
    state = numbered_last(published(model.state_dict()))
    assert {"cls_token", "patch_embed.proj_bn3.weight", "block.0.attn.talking_heads.weight"} < set(state)
    torch.save({"state_dict": state}, tmp_path / "m.pth")
    assert torch.equal(create_model("sdt_caption_test", checkpoint=tmp_path / "m.pth").eval()(x), model(x))


def test_keys_of_the_published_spikformer(tmp_path) -> None:
    """One of its files has linear layers, and biases in q, k and v, which the norm behind them takes."""
    model, x = build("spikformer_test")
    state = numbered_last(published(model.state_dict()))
    state = {k.replace("_conv", "_linear") if "block" in k else k: v for k, v in state.items()}
    state = {k: v.flatten(1) if "_linear.weight" in k else v for k, v in state.items()}
    for k in [k for k in state if re.search(r"\.[qkv]_bn\.running_mean", k)]:
        bias = torch.rand(64)
        state[k], state[k.replace("bn.running_mean", "linear.bias")] = state[k] + bias, bias
    assert {"patch_embed.proj_bn3.bias", "block.0.attn.q_linear.bias", "block.0.mlp.fc2_linear.weight"} < set(state)
    torch.save({"state_dict": state}, tmp_path / "m.pth")
    other = create_model("spikformer_test", checkpoint=tmp_path / "m.pth").eval()
    torch.testing.assert_close(other(x), model(x), rtol=1e-3, atol=1e-3)


@FAMILIES
def test_own_weights_load(name: str, tmp_path) -> None:
    model, x = build(name)
    torch.save(model.state_dict(), tmp_path / "m.pth")
    other = create_model(name, **SMALL[name][0], checkpoint=tmp_path / "m.pth").eval()
    assert torch.equal(other(x), model(x))


def test_event_checkpoint_of_an_old_release(tmp_path) -> None:
    model, x = build("sew_dvs_7b")
    torch.save({k: v.reshape(1) if k.endswith(".w") else v for k, v in model.state_dict().items()}, tmp_path / "m.pth")
    assert torch.equal(create_model("sew_dvs_7b", checkpoint=tmp_path / "m.pth").eval()(x), model(x))


def test_moving_average(tmp_path) -> None:
    model, x = build("sew_resnet_test")
    torch.save({"model": {}, "state_dict_ema": model.state_dict()}, tmp_path / "m.pth")
    other = build("sew_resnet_test")[0]
    assert torch.equal(load_checkpoint(other, tmp_path / "m.pth", ema=True)(x), model(x))


def test_safetensors(tmp_path) -> None:
    from safetensors.torch import save_file

    model, x = build("sew_resnet_test")
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    assert torch.equal(create_model("sew_resnet_test", T=3, checkpoint=tmp_path / "m.safetensors").eval()(x), model(x))


class Malicious:
    def __reduce__(self):
        return print, ("never",)


def test_bad_checkpoints(tmp_path, capsys) -> None:
    path = tmp_path / "m.pth"

    def refusal() -> str:
        with pytest.raises((ValueError, FileNotFoundError)) as e:
            create_model("sew_resnet_test", checkpoint=path)
        line = str(e.value)
        assert "\n" not in line
        return line

    assert refusal() == f"checkpoint: there is no file {path}"
    torch.save(Malicious(), path)
    assert "holds more than tensors" in refusal()
    assert capsys.readouterr().out == ""
    torch.save({"epoch": 3}, path)
    assert refusal() == f"checkpoint: {path} holds no state_dict, but dict"
    model, _ = build("sew_resnet_test", num_classes=7)
    torch.save(model.state_dict(), path)
    assert refusal().endswith("2 of another shape: fc.weight is [7, 128], not [10, 128], fc.bias is [7], not [10]")
    torch.save({k.replace("fc.", "head."): v for k, v in build("sew_resnet_test")[0].state_dict().items()}, path)
    assert refusal().endswith("2 missing: fc.bias, fc.weight; 2 unexpected: head.bias, head.weight")
    path.write_bytes(path.read_bytes()[:1000])
    assert "is no complete file of torch.save" in refusal()
