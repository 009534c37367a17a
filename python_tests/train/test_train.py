"""The loop and the commands around it, on a tiny network and scikit-learn's digits."""

import errno
import json
import os
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F

for module in ("timm", "torchmetrics", "tensorboard", "yaml", "sklearn"):
    pytest.importorskip(module)

import yaml  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from training_runs import TINY, tiny  # noqa: E402

from spikecore.cli import main  # noqa: E402
from spikecore.models import create_model  # noqa: E402
from spikecore.train import loop  # noqa: E402
from spikecore.train.batches import Order, open_samples, seed_all, train_batches  # noqa: E402
from spikecore.train.build import FewerFrames, Objective, SquaredError, build  # noqa: E402
from spikecore.train.distill import Distiller  # noqa: E402
from spikecore.train.evaluate import class_names  # noqa: E402
from spikecore.train.loop import DivergedError, train  # noqa: E402
from spikecore.train.ranks import Ranks  # noqa: E402
from spikecore.train.recipe import RecipeError  # noqa: E402

ALONE = Ranks(0, 1, torch.device("cpu"))
PLAIN = {"mixup": 0.0, "cutmix": 0.0, "model_ema": False, "epochs": 1, "val_interval": 1, "recovery_interval": 0}
FILES = {
    "recipe.yaml", "metrics.csv", "model.safetensors", "model.json", "best.safetensors", "best.json", "curves.png",
    "confusion.png", "energy.csv", "state.pt", "tensorboard",
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "run"
    lines = train(tiny(**{**PLAIN, "epochs": 4, "lr": 1e-2, "val_interval": 2}), out)
    assert lines[0].startswith("test accuracy")
    return out


# ---- what is left ----------------------------------------------------------------------------------------------------


def test_files(trained):
    assert {path.name for path in trained.iterdir()} == FILES
    card = json.loads((trained / "model.json").read_text())
    assert card["classes"] == [str(i) for i in range(10)]
    assert card["metrics"]["test_accuracy"] > 0.3
    assert card["parameters"] == sum(
        p.numel() for p in create_model(TINY["model"], **TINY["model_kwargs"]).parameters()
    )
    assert yaml.safe_load((trained / "recipe.yaml").read_text()) == card["recipe"]
    table = (trained / "metrics.csv").read_text().splitlines()
    assert len(table) == 5
    assert {"epoch", "lr", "train_loss", "test_accuracy", "firing_rate", "energy_uj"} <= set(table[0].split(","))
    for image in ("curves.png", "confusion.png"):
        assert (trained / image).read_bytes().startswith(b"\x89PNG")


def test_test_gives_the_card_s_numbers(trained, capsys, tmp_path):
    card = json.loads((trained / "model.json").read_text())
    assert main(["test", str(trained), "--out", str(tmp_path / "out"), "workers=0"]) == 0
    out = capsys.readouterr().out
    assert f"{card['metrics']['test_accuracy']:.2%}" in out
    assert "360 test samples" in out
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"confusion.png", "energy.csv"}


def test_predict(trained, capsys, tmp_path):
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    names = {str(i): [f"n{i}", word] for i, word in enumerate(words)}
    (tmp_path / "names.json").write_text(json.dumps(names))
    samples = open_samples(tiny(), training=False)
    net = create_model(TINY["model"], **TINY["model_kwargs"]).eval()
    net.load_state_dict(load_file(trained / "model.safetensors"))
    with torch.no_grad():
        expected = net(torch.stack([samples[i][0] for i in range(12)])).argmax(1).tolist()
    assert len(set(expected)) > 2
    folder = tmp_path / "images"
    folder.mkdir()
    samples.transform = None
    for i in range(12):
        samples[i][0].save(folder / f"{i:02d}.png")
    assert main(["predict", str(trained), str(folder), "--classes", str(tmp_path / "names.json"), "--top", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12
    assert [line.partition(": ")[2].split()[0] for line in lines] == [words[i] for i in expected]
    assert main(["predict", str(trained / "best.safetensors"), str(folder / "00.png")]) == 0
    assert capsys.readouterr().out.count("%") == 5


def test_class_names(tmp_path):
    file = tmp_path / "names.json"
    for content in (["a", "b"], {"0": "a", "1": "b"}, {"a": 0, "b": 1}, {"1": ["n1", "b"], "0": ["n0", "a"]}):
        file.write_text(json.dumps(content))
        assert class_names(file, 2) == ["a", "b"]
    for content, message in (("{", "no JSON"), ("3", "expected a list of names"), ('["a"]', "names 1 classes")):
        file.write_text(content)
        with pytest.raises(ValueError, match=message):
            class_names(file, 2)


# ---- mistakes --------------------------------------------------------------------------------------------------------


def said(capsys, *argv):
    assert main([str(x) for x in argv]) == 1
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("spikecore: error: ")]
    assert captured.err.count("Traceback") == 0
    assert len(lines) == 1
    return lines[0]


def test_mistakes_are_one_line_each(trained, capsys, tmp_path):
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(yaml.safe_dump({k: v for k, v in TINY.items() if k != "name"}))
    out = tmp_path / "run"
    assert "did you mean epochs" in said(capsys, "train", recipe, "epoch=3")
    assert "there is no recipe 'qkformer'" in said(capsys, "train", "qkformer")
    assert "Say data.root=FOLDER" in said(capsys, "train", "qkformer_cifar10", "--out", out)
    missing = said(capsys, "train", "qkformer_cifar10", f"data.root={tmp_path}/none", "--out", out)
    assert f"{tmp_path}/none" in missing
    assert "no such folder" in missing
    mismatch = said(capsys, "train", recipe, "model_kwargs.num_classes=7", "--out", out)
    assert "has 10 classes, the model 7" in mismatch
    assert "do not fit ecsnn_vgg_test" in said(capsys, "train", recipe, "model_kwargs.depth=3", "--out", out)
    assert "multiple of batch_size x ranks" in said(capsys, "train", recipe, "batch_size=48", "--out", out)
    assert "only 1437 samples" in said(capsys, "train", recipe, "effective_batch=2048", "--out", out)
    assert "opt=adamv" in said(capsys, "train", recipe, "opt=adamv", "--out", out)
    assert "need an even batch" in said(capsys, "train", recipe, "batch_size=1", "--out", out)
    assert "there is no file none.pth" in said(capsys, "train", recipe, "initial_checkpoint=none.pth", "--out", out)
    (tmp_path / "file").write_text("")
    assert f"cannot create the folder {tmp_path / 'file'}" in said(capsys, "train", recipe, "--out", tmp_path / "file")
    assert "cannot write /proc/self/" in said(capsys, "train", recipe, "--out", "/proc/self")  # not even as root
    other = "model_kwargs.layers=16 P 12 P"
    weights = f"initial_checkpoint={trained / 'model.safetensors'}"
    assert "does not fit ECSNN" in said(capsys, "train", recipe, other, weights, "--out", out)
    changed = said(capsys, "train", trained / "recipe.yaml", other, "--out", trained, "--resume")
    assert "has model_kwargs={'layers': '8 P 12 P'" in changed
    assert "it can only go on as it began" in changed
    assert "does not fit ECSNN" in said(capsys, "test", trained, other)
    assert "does not fit QKFormer" in said(capsys, "test", trained, "--recipe", "qkformer_test_digits")
    assert "there is no file" in said(capsys, "test", tmp_path / "none.safetensors")
    assert "its weights are" in said(capsys, "test", trained / "state.pt")
    (tmp_path / "bare.safetensors").write_bytes((trained / "model.safetensors").read_bytes())
    assert "say what it is by --recipe" in said(capsys, "test", tmp_path / "bare.safetensors")
    assert "there is no class-index file" in said(capsys, "predict", trained, recipe, "--classes", tmp_path / "no.json")
    assert "is no image" in said(capsys, "predict", trained, recipe)
    assert "there is no image" in said(capsys, "predict", trained, tmp_path / "none.png")
    Image.new("L", (8, 8)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:40])
    assert "is no " in said(capsys, "predict", trained, tmp_path / "cut.png")


@pytest.mark.parametrize("where", ["loss", "weights"])
def test_no_number_stops_the_run_and_keeps_the_last_good_one(tmp_path, monkeypatch, where):
    out, real_forward, real_step = tmp_path / "run", Objective.forward, loop._Run.step
    now = []

    def forward(self, x, targets):
        logits, loss = real_forward(self, x, targets)
        return logits, loss * float("nan") if where == "loss" and now == [8] else loss

    def step(self, number, batches):
        now[:] = [number]
        loss = real_step(self, number, batches)
        if where == "weights" and number == 8:
            torch.nn.init.constant_(self.parts.net.conv_fc[0].weight, float("inf"))
        return loss

    monkeypatch.setattr(Objective, "forward", forward)
    monkeypatch.setattr(loop._Run, "step", step)  # a checkpoint is written after six updates
    with pytest.raises(DivergedError, match=r"in step 9 \(epoch 1, update 9 of 11\).*keeps the last good"):
        train(tiny(clip_grad=None, mixup=0.0, cutmix=0.0, epochs=1), out)
    monkeypatch.undo()
    state = torch.load(out / "state.pt", weights_only=True)
    assert state["progress"]["update"] == 6
    assert all(bool(torch.isfinite(v).all()) for v in state["objective"].values())


def test_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    out, real, written = tmp_path / "run", os.replace, []

    def full(a, b):
        if str(b).endswith("state.pt"):
            written.append(1)
            if len(written) > 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(a, b)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match=r"cannot write .*state\.pt: No space left on device"):
        train(tiny(epochs=1), out)
    assert torch.load(out / "state.pt", weights_only=True)["progress"]["update"] == 3
    assert not list(out.glob(".*.part"))


def test_a_broken_sample_is_one_line_from_a_worker_too(tmp_path):
    folder = tmp_path / "data"
    for part in ("train", "test"):
        for label in "ab":
            (folder / part / label).mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (8, 8)).save(folder / part / label / f"{i}.png")
    (folder / "train" / "a" / "1.png").write_bytes(b"no image")
    kwargs = {**TINY["model_kwargs"], "in_chans": 3, "num_classes": 2}
    data = {"name": "image_folder", "root": str(folder)}
    recipe = tiny(
        **{**PLAIN, "model_kwargs": kwargs, "data": data, "workers": 1, "batch_size": 8, "effective_batch": 8}
    )
    with pytest.raises(ValueError, match=r"^[^\n]*1\.png: expected an image that can be read[^\n]*$"):
        train(recipe, tmp_path / "run")
    data["on_error"] = "skip"
    recipe = tiny(**{**PLAIN, "model_kwargs": kwargs, "data": data, "batch_size": 4, "effective_batch": 4})
    with pytest.warns(UserWarning, match=r"left out 1 of 8 samples that cannot be read; first .*1\.png"):
        train(recipe, tmp_path / "skipped")
    with pytest.raises(ValueError, match="on_error must be 'raise' or 'skip', got 'ignore'"):
        train(tiny(**{**recipe.to_dict(), "data": {**data, "on_error": "ignore"}}), tmp_path / "ignored")


def test_ctrl_c_writes_the_state_first(tmp_path, monkeypatch):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    recipe = tiny(**PLAIN)
    train(recipe, straight)
    real, steps = loop._Run.step, []

    def interrupted(self, *args):
        loss = real(self, *args)
        steps.append(1)
        if len(steps) == 4:
            signal.raise_signal(signal.SIGTERM)
        return loss

    monkeypatch.setattr(loop._Run, "step", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, stopped)
    assert signal.getsignal(signal.SIGTERM) is before
    monkeypatch.undo()
    assert torch.load(stopped / "state.pt", weights_only=True)["progress"]["update"] == 4
    train(recipe, stopped, resume=True)
    assert (stopped / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()


# ---- parts -----------------------------------------------------------------------------------------------------------


def test_losses():
    seed_all(0)
    net = create_model(TINY["model"], **TINY["model_kwargs"]).eval()
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            torch.nn.init.constant_(m.bias, 1.0)  # so that neurons fire
    x, y = torch.rand(6, 1, 8, 8) * 3, torch.arange(6)
    steps, logits = net.steps(x), net(x)
    assert steps.shape == (2, 6, 10)
    assert not torch.equal(steps[0], steps[1])
    found, loss = Objective(net, torch.nn.CrossEntropyLoss(label_smoothing=0.1), by_step=True)(x, y)
    torch.testing.assert_close(found, logits)
    torch.testing.assert_close(loss, sum(F.cross_entropy(s, y, label_smoothing=0.1) for s in steps) / 2)
    soft = F.one_hot(y, 10) * 0.7 + 0.03
    torch.testing.assert_close(Objective(net, torch.nn.CrossEntropyLoss(), by_step=True)(x, soft)[1],
                               sum(F.cross_entropy(s, soft) for s in steps) / 2)  # fmt: skip
    mse = SquaredError()
    torch.testing.assert_close(mse(logits, y), ((logits - F.one_hot(y, 10)) ** 2).mean())
    torch.testing.assert_close(mse(logits, soft), ((logits - soft) ** 2).mean())


@pytest.mark.parametrize("name", ["sma_vgg8_test", "sdt_test", "qkformer_test", "ms_resnet_test", "sew_resnet_test"])
def test_steps_are_what_the_output_is_the_mean_of(name):
    seed_all(0)
    net = create_model(name).eval()
    x = torch.rand(2, *((8, 2) if "sma" in name else (3,)), 32, 32) * 4
    with torch.no_grad():
        steps = net.steps(x)
        assert steps.shape[:2] == (net.T, 2)
        torch.testing.assert_close(steps.mean(0), net(x))


def test_every_rank_and_start_sees_the_same_updates():
    def seen(world, batch, accumulate, first=0):
        updates = []
        orders = [Order(103, batch, accumulate, Ranks(r, world, torch.device("cpu")), seed=1) for r in range(world)]
        for order in orders:
            order.start(3, first)
            assert len(order) == (order.updates - first) * accumulate
        streams = [list(order) for order in orders]
        for u in range(orders[0].updates - first):
            part = [k for s in streams for b in s[u * accumulate : (u + 1) * accumulate] for k in b]
            updates.append(sorted(part))
        return updates

    alone = seen(1, 12, 2)
    assert len(alone) == 4
    assert len({key for update in alone for key in update}) == 96  # each sample once
    assert alone == seen(2, 12, 1) == seen(2, 6, 2) == seen(4, 3, 2)
    assert seen(2, 6, 2, first=3) == alone[3:]
    order, single = Order(103, 12, 2, ALONE, seed=1), []
    for epoch, first in ((3, 1), (4, 0), (5, 0)):
        order.start(epoch, first)
        single += list(order)
    order.start(3, 1, 6)
    assert len(order) == len(single) == 22
    assert list(order) == single


def test_augmentation_depends_on_the_sample_and_epoch_alone():
    recipe = tiny(reprob=1.0)
    samples = open_samples(recipe, training=True)
    batches, _ = train_batches(recipe, samples, ALONE)

    def first(recipe, epoch):
        batches, order = train_batches(recipe, samples, ALONE)
        order.start(epoch)
        seed_all(epoch)
        return next(iter(batches))[0]

    a = first(recipe, 1)
    assert torch.equal(a, first(recipe, 1))
    assert torch.equal(a, first(tiny(reprob=1.0, workers=1), 1))
    keyed = batches.dataset
    i = 5
    assert torch.equal(keyed[(i, 1, True)][0], keyed[(i, 1, True)][0])
    assert not torch.equal(keyed[(i, 1, True)][0], keyed[(i, 2, True)][0])
    before = torch.get_rng_state()
    keyed[(i, 1, True)]
    assert torch.equal(before, torch.get_rng_state())


def test_schedules():
    def rates(**changes):
        recipe = tiny(**{**PLAIN, "lr": 1.0, "epochs": 10, **changes})
        parts = build(recipe, ALONE, 4, torch.zeros(1, 8, 8))
        found = []
        for epoch in range(recipe.epochs + recipe.cooldown_epochs):
            parts.scheduler.step(epoch)
            for update in range(4):
                parts.scheduler.step_update(epoch * 4 + update)
                found.append(parts.optimizer.param_groups[0]["lr"])
        return torch.tensor(found)

    t = torch.arange(40) / 4
    prefix = rates(warmup_epochs=2, warmup_prefix=True, warmup_lr=0.0, min_lr=0.1)
    torch.testing.assert_close(prefix, torch.where(t < 2, t / 2, 0.1 + 0.45 * (1 + torch.cos(torch.pi * (t - 2) / 8))))
    by_epoch = rates(warmup_epochs=0, sched_on_updates=False, cooldown_epochs=1)
    assert by_epoch.view(11, 4).std(1).max() == 0
    torch.testing.assert_close(by_epoch[:40], 0.5 * (1 + torch.cos(torch.pi * t.floor() / 10)))
    assert by_epoch[-1] == 0
    stepped = rates(sched="step", decay_epochs=4, decay_rate=0.5, sched_on_updates=False, warmup_epochs=0)
    torch.testing.assert_close(stepped.view(10, 4)[:, 0], 0.5 ** (torch.arange(10) // 4).float())


def test_optimizers():
    def build_with(**changes):
        return build(tiny(**{**PLAIN, **changes}), ALONE, 4, torch.zeros(1, 8, 8)).optimizer

    sgd = build_with(opt="momentum", momentum=0.8, filter_bias_and_bn=False, weight_decay=0.1)
    assert isinstance(sgd, torch.optim.SGD)
    assert (sgd.defaults["nesterov"], sgd.defaults["momentum"], len(sgd.param_groups)) == (False, 0.8, 1)
    adam = build_with(opt="adamw", weight_decay=0.1, opt_eps=1e-5, opt_betas=[0.8, 0.9])
    assert {group["weight_decay"] for group in adam.param_groups} == {0.0, 0.1}
    assert (adam.defaults["eps"], adam.defaults["betas"]) == (1e-5, (0.8, 0.9))
    for opt, settings in (("lamb", {}), ("nadam", {"momentum_decay": 1e-3}), ("adam", {})):
        build_with(opt=opt, opt_kwargs=settings)


def test_average_and_half_precision_and_compiler(tmp_path):
    average, plain = tmp_path / "average", tmp_path / "plain"
    train(tiny(**{**PLAIN, "model_ema": True}), average)
    train(tiny(**PLAIN), plain)
    state = torch.load(average / "state.pt", weights_only=True)
    kept, weights = load_file(average / "model.safetensors"), load_file(plain / "model.safetensors")
    assert all(torch.equal(kept[k], v) for k, v in state["ema"].items())
    assert all(torch.equal(weights[k], state["objective"][f"net.{k}"]) for k in weights)
    assert not torch.equal(kept["conv_fc.0.weight"], weights["conv_fc.0.weight"])

    train(tiny(**{**PLAIN, "torchcompile": "eager"}), tmp_path / "compiled")
    compiled = load_file(tmp_path / "compiled" / "model.safetensors")
    torch.testing.assert_close(compiled, weights, rtol=1e-3, atol=1e-4)
    train(tiny(**{**PLAIN, "amp": True}), tmp_path / "half")
    half = load_file(tmp_path / "half" / "model.safetensors")
    assert all(bool(torch.isfinite(v).all()) for v in half.values())
    assert not torch.equal(half["conv_fc.0.weight"], weights["conv_fc.0.weight"])


def test_impossible_recipes():
    for changes, message in (
        ({"model": "vmamba_test", "model_kwargs": {"num_classes": 10}, "loss": "tet"}, "needs a model with time steps"),
        ({"sync_bn": True}, "sync_bn needs GPUs"),
        (
            {"parallel": "fsdp", "model": "sew_dvs_7b", "model_kwargs": {"num_classes": 10}},
            r"fsdp cannot shard .*, a parameter without dimensions; say parallel=ddp$",
        ),
        ({"warmup_epochs": 5, "warmup_prefix": True}, "warmup_epochs must be below epochs"),
    ):
        ranks = Ranks(0, 2, torch.device("cpu")) if {"sync_bn", "parallel"} & set(changes) else ALONE
        with pytest.raises(RecipeError, match=message):
            build(tiny(**{**PLAIN, **changes}), ranks, 4, torch.zeros(1, 8, 8))
    with pytest.raises(RecipeError, match="cutmix is for images"):
        build(tiny(), ALONE, 4, torch.zeros(2, 1, 8, 8))


def test_distillation(trained, tmp_path):
    section = {
        "loss": "mixed", "teacher": TINY["model"], "teacher_checkpoint": str(trained / "model.safetensors"),
        "teacher_settings": TINY["model_kwargs"], "student_feature": "conv_fc.7", "teacher_feature": "conv_fc.7",
        "alpha": 1e-2, "mask": 0.15, "temperature": 2.0, "weight": 1.0,
    }  # fmt: skip
    student = {**TINY["model_kwargs"], "layers": "8 P 6 P"}
    recipe = tiny(**{**PLAIN, "model_kwargs": student, "mixup": 0.5, "distill": section})
    out = tmp_path / "run"
    train(recipe, out)
    weights = load_file(out / "model.safetensors")
    create_model(TINY["model"], **student).load_state_dict(weights)
    state = torch.load(out / "state.pt", weights_only=True)["objective"]
    assert {key.split(".")[0] for key in state} == {"student", "losses"}  # never the teacher
    train(recipe, out, resume=True)
    bare = {k: v for k, v in section.items() if k != "teacher_checkpoint"}
    with pytest.raises(ValueError, match="teacher_checkpoint is missing"):
        train(tiny(**{**PLAIN, "distill": bare}), tmp_path / "bare")
    with pytest.raises(RecipeError, match="does not go with loss=tet"):
        train(tiny(**{**PLAIN, "distill": section, "loss": "tet"}), tmp_path / "tet")


def test_a_teacher_is_asked_once_for_each_sample(tmp_path, monkeypatch):
    """With a cache the weights become the same over several epochs; where samples would change it is refused."""
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for label in "ab":
            (tmp_path / "data" / part / label).mkdir(parents=True)
            for i in range(8):
                image = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
                image.save(tmp_path / "data" / part / label / f"{i}.png")
    kwargs = {**TINY["model_kwargs"], "in_chans": 3, "num_classes": 2}
    save_file(create_model(TINY["model"], **kwargs).state_dict(), tmp_path / "teacher.safetensors")
    section = {
        "loss": "mixed", "teacher": TINY["model"], "teacher_checkpoint": str(tmp_path / "teacher.safetensors"),
        "teacher_settings": kwargs, "student_feature": "conv_fc.7", "teacher_feature": "conv_fc.7",
    }  # fmt: skip
    settings = {
        **PLAIN, "data": {"name": "image_folder", "root": str(tmp_path / "data")}, "crop_padding": 0, "reprob": 0.0,
        "hflip": 0.0, "model_kwargs": {**kwargs, "layers": "8 P 6 P"}, "batch_size": 4, "effective_batch": 8,
        "epochs": 3, "val_interval": 3,
    }  # fmt: skip
    asked, real = [], Distiller._ask

    def one_by_one(self, x, teacher_x):  # a convolution's rounding depends on the batch
        asked.append(len(x))
        found = [real(self, row[None], teacher_x) for row in x]
        maps = [torch.cat(rows) for rows in zip(*(m for _, m in found), strict=True)]
        return torch.cat([logits for logits, _ in found]), maps

    monkeypatch.setattr(Distiller, "_ask", one_by_one)
    counts = {}
    for name, cache in (("with", {"cache": str(tmp_path / "cache")}), ("without", {})):
        asked.clear()
        train(tiny(**settings, distill={**section, **cache}), tmp_path / name)
        counts[name] = sum(asked)
    assert counts == {"with": 16, "without": 3 * 16}
    ours, plain = (load_file(tmp_path / name / "model.safetensors") for name in counts)
    assert all(torch.equal(ours[key], value) for key, value in plain.items())
    section["cache"] = str(tmp_path / "cache")
    for changes, named in (
        ({"crop_padding": 1, "mixup": 0.5}, "mixup=0.5, crop_padding=1"),
        ({"crop_padding": None, "scale": [0.5, 1.0], "hflip": 0.5}, r"hflip=0.5, scale=\[0.5, 1.0\]"),
    ):
        with pytest.raises(RecipeError, match=f"distill.cache keeps .* but {named} would change them$"):
            train(tiny(**{**settings, "distill": section, **changes}), tmp_path / "refused")


def test_a_student_of_fewer_frames():
    class Distiller(torch.nn.Module):
        def forward(self, x, targets, teacher_x, ids):
            return x, teacher_x

    x = torch.arange(2 * 8 * 3.0).view(2, 8, 3, 1, 1)
    student, teacher = FewerFrames(Distiller(), 4)(x, torch.zeros(2))
    assert torch.equal(student, x[:, ::2] + x[:, 1::2])
    assert teacher is x
    with pytest.raises(ValueError, match="student_frames must divide"):
        FewerFrames(Distiller(), 3)(x, torch.zeros(2))


def test_events(tmp_path):
    """Frames of a data set of one's own, augmented, mixed, and read by a student of fewer frames when it is tested."""
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for label in range(2):
            folder = tmp_path / "data" / "frames_number_4_split_by_number" / part / str(label)
            folder.mkdir(parents=True)
            for i in range(8):
                np.savez(folder / f"{i}.npz", frames=rng.integers(0, 3 + label, (4, 2, 32, 32)).astype(np.uint8))
    options = {"frames": 4, "by": "number", "height": 32, "width": 32}
    data = {"name": "event_folder", "root": str(tmp_path / "data"), "options": options}
    kwargs = {"T": 4, "widths": [4, 4, 4, 4, 4], "hidden": [8, 8], "num_classes": 2}
    recipe = {
        **PLAIN, "model": "sma_vgg8_test", "model_kwargs": kwargs, "data": data, "img_size": None, "event_aug": "nda",
        "mixup": 0.5, "loss": "tet", "batch_size": 8, "effective_batch": 8,
    }  # fmt: skip
    lines = train(tiny(**recipe), tmp_path / "run")
    assert lines[0].startswith("test accuracy")
    assert json.loads((tmp_path / "run" / "model.json").read_text())["kind"] == "events"
    assert main(["predict", str(tmp_path / "run"), "x.png"]) == 1
    samples = open_samples(tiny(**{**recipe, "img_size": 16}), training=False)
    assert samples[0][0].shape == (4, 2, 16, 16)
