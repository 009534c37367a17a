"""What every image and event model promises, on the small variants; published sizes; checkpoints."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from spikecore.models import create_model, list_models, load_checkpoint
from spikecore.models._base import SpikingModel

# name: (settings, input of a batch of 2)
SMALL: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "sew_resnet_test": ({"T": 3}, (2, 3, 32, 32)),
    "sew_dvs_7b": ({"img_size": 128}, (2, 2, 2, 128, 128)),
    "sma_vgg8_test": ({}, (2, 8, 2, 32, 32)),
    "ms_resnet_test": ({}, (2, 3, 64, 64)),
}
FAMILIES = pytest.mark.parametrize("name", SMALL)


def build(name: str, **changes: Any) -> tuple[SpikingModel, Tensor]:
    settings, shape = SMALL[name]
    torch.manual_seed(0)
    model = create_model(name, **{**settings, **changes}).eval()
    with torch.no_grad():  # so that neurons behind linear layers fire
        for m in (m for s in model.modules() if isinstance(s, nn.Sequential) for m in s):
            if isinstance(m, nn.Linear):
                m.weight.mul_(10)
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d) and not m.weight.any():  # branches that start as zero take part
                m.weight.fill_(0.5)
    return model, torch.rand(shape) * 2


@FAMILIES
def test_forward_is_head_of_features(name: str) -> None:
    model, x = build(name)
    features = model.forward_features(x)
    assert features.shape[1] == len(x)
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


# ---- published sizes -------------------------------------------------------------------------------------------------


def macs(model: nn.Module, shape: tuple[int, ...]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
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
    ("ms_resnet18", {}, 11_693_736, 10_958_950_400, (3, 224, 224)),
    ("ms_resnet34", {}, 21_801_896, 22_057_078_784, (3, 224, 224)),
    ("ms_resnet104", {}, 77_350_504, 75_582_427_136, (3, 224, 224)),
    ("ms_resnet18_sma", {}, 71_087_400, None, (3, 224, 224)),
    ("ms_resnet34_sma", {}, 129_065_112, None, (3, 224, 224)),
    ("ms_resnet104_sma", {}, 447_363_348, None, (3, 224, 224)),
    ("sma_vgg8", {}, 22_452_531, 197_788_418_688, (16, 2, 128, 128)),
    ("sma_vgg8", {"T": 10, "num_classes": 10, "channel_drop": 4}, 22_451_014, 123_617_751_240, (10, 2, 128, 128)),
    ("sma_vgg8", {"T": 14, "num_classes": 101, "channel_drop": 24}, 22_544_543, 455_686_175_140, (14, 2, 180, 240)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "settings", "parameters", "count", "shape"), SIZES, ids=lambda v: str(v))
def test_published_sizes(name: str, settings: dict, parameters: int, count: int, shape: tuple[int, ...]) -> None:
    with torch.device("meta"):
        model = create_model(name, **settings).eval()
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert count is None or macs(model, shape) == count


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "line"),
    [
        ("sew_resnet_test", (2, 1, 32, 32), "SEWResNet: x must be [B, 3, H, W] or [B, 3, 3, H, W], got [2, 1, 32, 32]"),
        ("sew_resnet_test", (2, 5, 3, 32, 32), "SEWResNet: x must have T = 3 frames, got 5 in [2, 5, 3, 32, 32]"),
        ("sew_dvs_7b", (2, 2, 9, 9), "SEWDVS: an image needs T, the number of times it is shown; got [2, 2, 9, 9]"),
        ("sew_dvs_7b", (1, 2, 2, 256, 256), "SEWDVS: the head was built for 32 features, the frames give 128"),
        ("sma_vgg8_test", (2, 8, 2, 16, 16), "SMAVGG: frames must be at least 32 x 32 (five pools), got [16, 16]"),
        ("sma_vgg8_test", (2, 6, 2, 32, 32), "SMAVGG: x must have T = 8 frames, got 6 in [2, 6, 2, 32, 32]"),
    ],
)  # fmt: skip
def test_bad_input(name: str, shape: tuple[int, ...], line: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(line)}$"):
        build(name)[0](torch.zeros(shape))


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
