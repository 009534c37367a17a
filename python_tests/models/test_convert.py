"""Weights as safetensors with a card; `spikecore convert`; timm's registry; names at top level."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

import spikecore
from spikecore.cli import main
from spikecore.models import create_model

NAME = "ecsnn_vgg_test"


def test_weights_and_card(tmp_path, capsys) -> None:
    model, x = create_model(NAME, num_classes=7).eval(), torch.rand(2, 1, 8, 8)
    source, out = tmp_path / "m.pth", tmp_path / "new" / "m.safetensors"
    torch.save({"net": {f"module.{k}": v for k, v in model.state_dict().items()}}, source)
    assert main(["convert", str(source), NAME, "--out", str(out), "--set", "num_classes=7"]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{out}\n{out.with_suffix('.json')}\n"
    assert captured.err == ""
    card = json.loads(out.with_suffix(".json").read_text())
    assert (card["model"], card["settings"], card["source"]["file"]) == (NAME, {"num_classes": 7}, "m.pth")
    assert card["parameters"] == sum(p.numel() for p in model.parameters())
    again = spikecore.create_model(card["model"], checkpoint=out, **card["settings"]).eval()
    assert torch.equal(again(x), model(x))


def test_a_pickled_module_needs_the_flag(tmp_path, capsys) -> None:
    source, out = tmp_path / "m.pth", tmp_path / "m.safetensors"
    model = create_model(NAME)
    tensors = (nn.Conv2d, nn.BatchNorm2d, nn.Linear)
    whole = nn.Module()  # as another package has it: other classes, the same keys
    whole.conv_fc = nn.Sequential(*(m if isinstance(m, tensors) else nn.Identity() for m in model.conv_fc))
    torch.save(whole, source)
    command = ["convert", str(source), NAME, "--out", str(out)]
    assert main(command) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "spikecore convert --trust-pickle" in err
    assert not out.exists()
    assert main([*command, "--trust-pickle"]) == 0
    assert "may run code of its author" in capsys.readouterr().err
    state = create_model(NAME, checkpoint=out).state_dict()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"model": "ecsnn_vgg6"}, "create_model: there is no model 'ecsnn_vgg6'; did you mean ecsnn_vgg"),
        ({"model": "ecsnn_vgg5"}, "does not fit ECSNN"),
        ({"out": "m.bin"}, "convert: out must end in .safetensors, got m.bin"),
        ({"file": "nothing.pth"}, "checkpoint: there is no file nothing.pth"),
        ({"file": "cut.safetensors"}, "checkpoint: cut.safetensors is no complete safetensors file"),
        ({"set": "widths=3"}, "unexpected keyword argument 'widths'"),
    ],
)
def test_errors_are_one_line(tmp_path, capsys, monkeypatch, change, line) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(create_model(NAME).state_dict(), "m.pth")
    (tmp_path / "cut.safetensors").write_bytes(b"\x08")
    options = {"file": "m.pth", "model": NAME, "out": "m.safetensors", "set": "T=4", **change}
    assert main(["convert", options["file"], options["model"], "--out", options["out"], "--set", options["set"]]) == 1
    err = capsys.readouterr().err
    assert line in err
    assert err.startswith("spikecore: error: ")
    assert err.count("\n") == 1
    assert not list(tmp_path.glob("m.json"))


def test_top_level_names() -> None:
    assert "qkformer_10_384" in spikecore.list_models("qkformer*")
    assert isinstance(spikecore.create_model("qkformer_test"), nn.Module)
    with pytest.raises(AttributeError, match="module 'spikecore' has no attribute 'nothing'"):
        _ = spikecore.nothing


def test_timm_knows_the_names(tmp_path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("qkformer_test", num_classes=4)
    torch.manual_seed(0)
    ours = create_model("qkformer_test", num_classes=4)
    assert all(torch.equal(v, ours.state_dict()[k]) for k, v in model.state_dict().items())
    assert model.pretrained_cfg["architecture"] == "qkformer_test"
    assert set(spikecore.list_models()) <= set(timm.list_models())
    assert not hasattr(timm.create_model("resnet18"), "T")
    torch.save(model.state_dict(), tmp_path / "m.pth")
    timm.create_model("qkformer_test", num_classes=4, checkpoint_path=str(tmp_path / "m.pth"))
    with pytest.raises(ValueError, match="qkformer_test: there are no weights to download"):
        timm.create_model("qkformer_test", pretrained=True)


def test_without_timm(tmp_path) -> None:
    script = "import sys; sys.modules['timm'] = None; import spikecore.models as m; assert m.list_models('qkformer*')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
