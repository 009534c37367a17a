"""What every image and event model promises, on the small variants; published sizes; checkpoints."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from spikecore.models import create_model, list_models, load_checkpoint
from spikecore.models._base import SpikingModel
from spikecore.models._transformer import Attention

# name: (settings, input of a batch of 2)
SMALL: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "sew_resnet_test": ({"T": 3}, (2, 3, 32, 32)),
    "sew_dvs_7b": ({"img_size": 128}, (2, 2, 2, 128, 128)),
    "sma_vgg8_test": ({}, (2, 8, 2, 32, 32)),
    "qkformer_test": ({}, (2, 3, 32, 40)),
    "qkformer_dvs_256": ({"embed_dim": 64, "heads": 2}, (2, 3, 2, 32, 24)),
}
FAMILIES = pytest.mark.parametrize("name", SMALL)


def build(name: str, **changes: Any) -> tuple[SpikingModel, Tensor]:
    settings, shape = SMALL[name]
    torch.manual_seed(0)
    model, x = create_model(name, **{**settings, **changes}), torch.rand(shape) * 2
    with torch.no_grad():  # so that neurons behind linear layers fire
        for m in (m for s in model.modules() if isinstance(s, nn.Sequential) for m in s):
            if isinstance(m, nn.Linear):
                m.weight.mul_(10)
        warm_up(model, torch.rand(*shape[:-3], model.in_chans, *shape[-2:]) * 2)
    return model.eval(), x


def warm_up(model: nn.Module, x: Tensor) -> None:
    """Batch norms of this batch, in transformers positive on average: those of fresh weights are silent."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for m in norms:
        m.bias.fill_(float(any(isinstance(a, Attention) for a in model.modules())))
        m.momentum = 1.0
    model(x)
    for m in norms:
        m.momentum = 0.1


@FAMILIES
def test_forward_is_head_of_features(name: str) -> None:
    model, x = build(name)
    features = model.forward_features(x)
    assert features.shape[1] == len(x)
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
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert [n for n, p in model.named_parameters() if n.endswith("weight") and p.dim() > 1 and not p.grad.any()] == []


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
    assert torch.equal(maps[-1], features.mean(0))
    last = model.forward_intermediates(x, 1, intermediates_only=True)
    assert len(last) == 1
    assert torch.equal(last[0], maps[-1])


@FAMILIES
def test_samples_do_not_see_one_another(name: str) -> None:
    model, x = build(name)
    torch.testing.assert_close(model(x)[:1], model(x[:1]))


@FAMILIES
def test_channels_last_and_autocast(name: str) -> None:
    model, x = build(name)
    want = model(x)
    last = model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(last(x), want, rtol=1e-3, atol=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        half = last(x)
    assert half.isfinite().all()
    assert torch.nn.functional.cosine_similarity(half.float().flatten(), want.flatten(), dim=0) > 0.9


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


@pytest.mark.parametrize("name", [n for n in SMALL if "former" in n or "sdt" in n])
def test_sizes_of_one(name: str) -> None:
    """One step, one sample, one pixel."""
    model, x = build(name)
    model.T, x = 1, x[:1, ..., :1, :1]
    out = model(x[:, :1] if x.dim() == 5 else x)
    assert out.shape == (1, model.num_classes)
    out.sum().backward()


# ---- published sizes -------------------------------------------------------------------------------------------------


def self_attention_flops(q: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Two products of [D, N] and [D, D] per step, sample and head, as k^T v and q (k^T v)."""
    T, B, H, D, N = q
    return 2 * 2 * T * B * H * D * D * N


def macs(model: nn.Module, shape: tuple[int, ...]) -> int:
    attention = {torch.ops.spikecore.spiking_self_attention_fwd: self_attention_flops}
    with FlopCounterMode(display=False, custom_mapping=attention) as counter, torch.no_grad():
        model(torch.empty(1, *shape, device="meta"))
    return counter.get_total_flops() // 2


# name, settings, parameters, MACs at an input (None: not published).
SIZES = [
    *[(f"{kind}_resnet{depth}", {}, parameters, count, (3, 224, 224))
      for kind in ("sew", "spiking")
      for depth, parameters, count in ((18, 11_689_512, 6_900_715_520), (34, 21_797_672, 14_299_467_776),
                                       (50, 25_557_032, 15_996_551_168), (101, 44_549_160, 30_845_435_904),
                                       (152, 60_192_808, 45_694_320_640))],
    ("sew_dvs_wide", {}, 1_192_218, 26_107_446_528, (16, 2, 128, 128)),
    *[("sew_dvs_7b", {"kind": kind}, 130_426, 6_458_835_296, (16, 2, 128, 128)) for kind in ("sew", "plain", "basic")],
    ("qkformer_10_384", {}, 16_473_688, 23_593_540_608, (4, 3, 224, 224)),
    ("qkformer_10_512", {}, 29_079_336, 41_708_408_832, (4, 3, 224, 224)),
    ("qkformer_10_768", {}, 64_962_760, 93_313_677_312, (4, 3, 224, 224)),
    ("qkformer_10_768", {}, 64_962_760, 154_252_720_128, (4, 3, 288, 288)),
    ("qkformer_10_768", {}, 64_962_760, 274_226_460_672, (4, 3, 384, 384)),
    ("qkformer_10_768", {"T": 1}, 64_962_760, 23_328_995_328, (1, 3, 224, 224)),
    ("qkformer_4_384", {}, 6_706_234, 6_063_984_384, (4, 3, 32, 32)),
    ("qkformer_4_384", {"num_classes": 100}, 6_740_884, 6_064_018_944, (4, 3, 32, 32)),
    ("qkformer_dvs_256", {}, 1_504_138, 8_120_175_104, (16, 2, 128, 128)),
    ("qkformer_dvs_256", {"mlp_ratio": 4, "num_classes": 11}, 1_999_371, 8_925_481_728, (16, 2, 128, 128)),
    ("sma_vgg8", {}, 22_452_531, 197_788_418_688, (16, 2, 128, 128)),
    ("sma_vgg8", {"T": 10, "num_classes": 10, "channel_drop": 4}, 22_451_014, 123_617_751_240, (10, 2, 128, 128)),
    ("sma_vgg8", {"T": 14, "num_classes": 101, "channel_drop": 24}, 22_544_543, 455_686_175_140, (14, 2, 180, 240)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "settings", "parameters", "count", "shape"), SIZES, ids=lambda v: str(v))
def test_published_sizes(name: str, settings: dict, parameters: int, count: int, shape: tuple[int, ...]) -> None:
    with torch.device("meta"):
        model = create_model(name, **settings).eval()
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert macs(model, shape) == count


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "line"),
    [
        ("sew_resnet_test", (2, 1, 32, 32), "SEWResNet: x must be [B, 3, H, W] or [B, 3, 3, H, W], got [2, 1, 32, 32]"),
        ("sew_resnet_test", (2, 5, 3, 32, 32), "SEWResNet: x must have T = 3 frames, got 5 in [2, 5, 3, 32, 32]"),
        ("sew_dvs_7b", (2, 2, 9, 9), "SEWDVS: an image needs T, the number of times it is shown; got [2, 2, 9, 9]"),
        ("sew_dvs_7b", (1, 2, 2, 256, 256), "SEWDVS: the head was built for 32 features, the frames give 128"),
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


def test_keys_of_the_published_transformers(tmp_path) -> None:
    """One- and two-dimensional 1x1 convolutions, conv and norm side by side, other names of one block."""
    model, x = build("qkformer_test")
    names = {0: "conv", 1: "bn"}
    state = {re.sub(r"\.([^.]+)\.([01])\.(\w+)$", lambda m: f".{m[1]}_{names[int(m[2])]}.{m[3]}", k): v
             for k, v in model.state_dict().items()}  # fmt: skip
    state = {re.sub(r"(stage[12]\.\d)\.attn", r"\1.tssa", k): v for k, v in state.items()}
    state = {
        k: v.squeeze(-1) if re.search(r"(attn|tssa)\.\w+_conv", k) and v.dim() == 4 else v for k, v in state.items()
    }
    assert "stage1.0.tssa.q_conv.weight" in state
    assert state["stage3.0.attn.proj_conv.weight"].dim() == 3
    torch.save({"model": state}, tmp_path / "m.pth")
    assert torch.equal(create_model("qkformer_test", checkpoint=tmp_path / "m.pth").eval()(x), model(x))


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
