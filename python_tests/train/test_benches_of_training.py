"""The benches of training: the plan's arithmetic by hand, the loader's timeline, equal contestants."""

import importlib
import json
import pathlib
import sys

import pytest
import torch

for module in ("timm", "torchmetrics", "tensorboard", "yaml", "matplotlib"):
    pytest.importorskip(module)

from spikecore.train.recipe import load_recipe  # noqa: E402

BENCHES = pathlib.Path(__file__).parents[2] / "benches"


@pytest.fixture
def bench(monkeypatch):
    """A bench by name; the allocator stays as it is."""
    monkeypatch.syspath_prepend(str(BENCHES))

    def load(name):
        found = importlib.import_module(name)
        monkeypatch.setattr(found.timing, "steady_memory", lambda: "allocator as it is")
        return found

    return load


def test_plan_by_hand(bench):
    module = bench("scale_plan")
    recipe = load_recipe("sew_resnet18_imagenet")  # 256 samples an update, 128 at once, SGD, 320 epochs
    card = module.Card(operations=1e15, memory_rate=1e12, link=100e9, network=10e9, memory=80e9)
    facts = {"parameters": 10_000_000, "image": 1e8, "fixed": 6e7, "calls": 1000, "decoded": 20.0}
    step = module.Step(operations=4e12, moved=7e9, **facts)
    row = module.plan(recipe, step, card, 8)
    assert (row["batch"], row["turns"]) == (32, 1)
    assert row["memory"] == pytest.approx(10e6 * (4 + 4) + 6e7 + 32e8)  # weights, momentum; gradients; images
    assert row["sent"] == pytest.approx(2 * 7 / 8 * 40e6)
    assert row["seconds"] == pytest.approx(32 * (0.01 + 0.01))  # 70 MB over 70 GB/s hide behind two thirds of it
    assert row["rate"] == pytest.approx(256 / 0.64)
    assert row["cores"] == pytest.approx(256 / 0.64 / 8 / 20)
    assert row["hours"] == pytest.approx(320 * 1281167 / 400 / 3600)
    assert module.plan(recipe, step, card, 1)["turns"] == 2
    row = module.plan(
        recipe, module.Step(operations=0, moved=0, **facts), card, 64
    )  # 10 ms of calls, an all-reduce of 78.75 MB at 7 GB/s
    assert row["seconds"] == pytest.approx(0.01 + 0.01125 - 0.02 / 3)


def test_timeline_of_the_loader(bench, monkeypatch, tmp_path, capsys):
    module = bench("bench_loader")
    settings = ["model_kwargs.embed_dim=32", "batch_size=8", "workers=1"]
    files = ["--plot", str(tmp_path / "t.png"), "--json", str(tmp_path / "t.json")]
    argv = ["bench_loader.py", "qkformer_small_cifar10", *settings, "--updates", "5", *files]
    monkeypatch.setattr(sys, "argv", argv)
    module.main()
    assert "qkformer_small_cifar10" in capsys.readouterr().out
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")
    (row,) = json.loads((tmp_path / "t.json").read_text())
    times = [t for update in row["updates"] for t in update]
    assert len(row["updates"]) == 5
    assert times == sorted(times)
    assert row["alone"] > 0


def test_contestants_are_equal(bench):
    pytest.importorskip("spikingjelly")
    module = bench("accuracy_over_time")
    recipe = load_recipe(module.RECIPE, ["model_kwargs.embed_dim=64"])
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    models = module.contestants(recipe, x)
    module.parity(models, x)
    with torch.no_grad():
        next(models["spikingjelly"].parameters()).mul_(1.5)
    with pytest.raises(AssertionError):
        module.parity(models, x)
