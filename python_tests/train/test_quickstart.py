import csv
import errno
import hashlib
import json
import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
load_file = pytest.importorskip("safetensors.torch").load_file
pytest.importorskip("tqdm")

from spikecore.data import load_digits  # noqa: E402
from spikecore.energy import estimate_energy  # noqa: E402
from spikecore.models import create_model  # noqa: E402
from spikecore.train import quickstart as module  # noqa: E402
from spikecore.train.quickstart import quickstart  # noqa: E402

FILES = {"model.safetensors", "config.json", "metrics.csv", "report.png"}


@pytest.fixture
def few_digits(monkeypatch):
    """64 images to train on, 32 to test on: an epoch is one batch."""
    d = load_digits()
    few = module.Digits(d.x_train[:64], d.y_train[:64], d.x_test[:32], d.y_test[:32], d.split_sha256)
    monkeypatch.setattr(module, "load_digits", lambda: few)
    return few


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def rows_of(folder):
    with (folder / "metrics.csv").open(newline="") as f:
        return list(csv.DictReader(f))


def check_weights(folder):
    for name, sha256 in config_of(folder)["weights_sha256"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == sha256


def test_digits_are_split_as_documented():
    d = load_digits()
    assert d.x_train.shape == (1437, 1, 8, 8)
    assert d.x_test.shape == (360, 1, 8, 8)
    assert d.x_train.min() == 0
    assert d.x_train.max() == 1
    share = d.y_test.bincount() / (d.y_test.bincount() + d.y_train.bincount())
    assert (share - 0.2).abs().max() < 0.005


def test_four_epochs_learn_and_leave_everything(tmp_path):
    outcome = quickstart(tmp_path / "a" / "b", epochs=4)
    folder = tmp_path / "a" / "b"
    assert outcome.finished
    assert {p.name for p in folder.iterdir()} == FILES
    config, rows = config_of(folder), rows_of(folder)
    assert config["finished"]
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
    assert config["data"]["split_sha256"] == load_digits().split_sha256
    assert config["versions"]["torch"] == torch.__version__
    check_weights(folder)
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")

    # the weights of the file are those the accuracy was measured with
    model = create_model(config["model"], **config["model_kwargs"])
    model.load_state_dict(load_file(folder / "model.safetensors"))
    d = load_digits()
    accuracy = (module.predict(model, d.x_test).argmax(1) == d.y_test).double().mean().item()
    assert accuracy == pytest.approx(config["metrics"]["test_accuracy"]["0"])
    assert accuracy == pytest.approx(float(rows[-1]["test_accuracy"]), abs=1e-6)
    assert accuracy > 0.5

    text = "\n".join(outcome.lines)
    for expected in ("fires", "4.6 pJ per MAC", "0.9 pJ per AC", "fused", "PyTorch loop", "backend", f"{accuracy:.2%}"):
        assert expected in text


def test_seeds_and_rerun(tmp_path, few_digits):
    outcome = quickstart(tmp_path, seeds=2, epochs=1)
    assert {p.name for p in tmp_path.iterdir()} == FILES | {"model_seed1.safetensors"}
    assert "mean" in "\n".join(outcome.lines)
    assert [row["seed"] for row in rows_of(tmp_path)] == ["0", "1"]
    check_weights(tmp_path)
    first = config_of(tmp_path)["weights_sha256"]
    assert first["model.safetensors"] != first["model_seed1.safetensors"]

    quickstart(tmp_path, epochs=1)  # nothing of the larger run is left to mislead
    assert {p.name for p in tmp_path.iterdir()} == FILES
    assert config_of(tmp_path)["weights_sha256"] == {"model.safetensors": first["model.safetensors"]}


def test_interrupt_keeps_finished_epochs(tmp_path, few_digits, monkeypatch):
    quickstart(tmp_path, epochs=1)
    steps, real = [], module._step

    def third_step_is_interrupted(*args):
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(module, "_step", third_step_is_interrupted)
    outcome = quickstart(tmp_path, epochs=5)
    assert not outcome.finished
    assert "epoch 2 of 5" in outcome.lines[0]
    assert {p.name for p in tmp_path.iterdir()} == FILES - {"report.png"}  # that one was the earlier run's
    assert not config_of(tmp_path)["finished"]
    assert len(rows_of(tmp_path)) == 2
    check_weights(tmp_path)

    monkeypatch.setattr(module, "_step", real)
    assert quickstart(tmp_path, epochs=1).finished


def test_interrupt_before_the_first_epoch_leaves_the_folder(tmp_path, few_digits, monkeypatch):
    quickstart(tmp_path, epochs=1)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_step", interrupted)
    assert "nothing was written" in quickstart(tmp_path, epochs=1).lines[0]
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_full_disk(tmp_path, few_digits, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match=r"cannot write .*: No space left on device"):
        quickstart(tmp_path, epochs=1)
    assert list(tmp_path.iterdir()) == []  # nor a half-written file


def test_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "taken").write_text("")
    for out in (tmp_path / "taken", tmp_path / "taken" / "below"):
        with pytest.raises(OSError, match=f"cannot create the folder {out}: "):
            quickstart(out, epochs=1)


class Launched(TorchDispatchMode):
    """The operators of this package that ran."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "spikecore":
            self.names.add(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def firing():
    """The network in float64, with shifts that let every layer fire."""
    torch.manual_seed(0)
    net = create_model(module.MODEL, **module.MODEL_KWARGS).double()
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(m.bias, 0.0, 2.0)
    return net


def test_small_enough():
    assert sum(p.numel() for p in create_model(module.MODEL, **module.MODEL_KWARGS).parameters()) < 1_000_000


def test_throughput_is_of_kernels_and_of_loops(few_digits):
    net = create_model(module.MODEL, **module.MODEL_KWARGS)
    fused, loop = module._throughput(net, few_digits, module.Recipe(), torch.device("cpu"))
    assert fused > 0
    assert loop > 0


@pytest.mark.parametrize("training", [True, False])
def test_loops_compute_what_the_kernels_do(few_digits, firing, training):
    loops, x = module._with_loops(firing), few_digits.x_train[:4].double()
    with Launched() as of_kernels:
        out = firing.train(training)(x)
        out.square().sum().backward()
    assert {name.split(".")[0] for name in of_kernels.names} == {
        f"{op}_{way}"
        for op in ("bn_lif", "lif", "qk_attention", "spiking_self_attention")
        for way in ("fwd", "bwd")
    }  # fmt: skip
    with Launched() as of_loops:
        again = loops.train(training)(x)
        again.square().sum().backward()
    assert not of_loops.names
    torch.testing.assert_close(again, out)
    assert all(rate > 0 for rate in estimate_energy(firing, x).firing_rates.values())
    for (name, p), q in zip(firing.named_parameters(), loops.parameters(), strict=True):
        # a bias before a norm of the batch has no gradient but rounding
        torch.testing.assert_close(q.grad, p.grad, atol=1e-10, rtol=1e-7, msg=lambda text, name=name: f"{name}: {text}")


def test_each_layer_of_the_table_has_its_own_neurons_rate(few_digits, firing):
    report = estimate_energy(firing, few_digits.x_test.double())
    *layers, head = [layer.name for layer in report.layers]
    assert head == "head"

    def behind(layer):
        if layer.endswith(".attn"):
            return f"{layer}.attn_lif"
        return layer.replace(".proj.0", ".lif") if ".attn.proj." in layer else f"{layer.removesuffix('.0')}_lif"

    assert [behind(layer) for layer in layers] == list(report.firing_rates)


def test_shift_moves_by_at_most_one_pixel():
    x = torch.zeros(200, 1, 8, 8)
    x[:, 0, 3, 5] = 1
    places = module._shift(x, 1, torch.Generator().manual_seed(0)).nonzero()
    assert len(places) == 200
    assert set(places[:, 2].tolist()) == {2, 3, 4}
    assert set(places[:, 3].tolist()) == {4, 5, 6}
