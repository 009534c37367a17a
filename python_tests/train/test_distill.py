import pathlib
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

pytest.importorskip("safetensors.torch")

from spikecore.models import create_model
from spikecore.train.distill import (
    KDSNN,
    WSLD,
    Blurred,
    LaSNN,
    build_distiller,
    cache,
    create_teacher,
)
from spikecore.train.distill.features import observe

IMAGE = (1, 8, 8)
X, Y = torch.rand(4, *IMAGE, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 1, 4, 1])


def student(**settings):
    return create_model("ecsnn_vgg_test", **settings)


def teacher(**settings):
    """The ReLU twin, wider."""
    return create_model(
        "ecsnn_vgg_test", **{"layers": "32 32 P 96 96 P", "spiking": False, "T": 1, "dropout": 0.5, **settings}
    )


def distiller(loss="mixed", student_settings=None, **settings):
    features = {} if loss == "wsld" else {"student_feature": "conv_fc.12", "teacher_feature": "conv_fc.12"}
    torch.manual_seed(0)
    return build_distiller(
        student(**(student_settings or {})),
        F.cross_entropy,
        IMAGE,
        **{"teacher": teacher(), "loss": loss, **features, **settings},
    )


# ---- student and teacher ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["blurred", "wsld", "mixed", "kdsnn"])
def test_gradients_reach_the_student_and_the_losses_alone(loss):
    d = distiller(loss)
    before = {k: v.clone() for k, v in d.teacher.state_dict().items()}
    optimizer = torch.optim.SGD(d.parameters(), 0.01)
    logits, total = d.train()(X, Y)
    total.backward()
    optimizer.step()
    assert logits.shape == (4, 10)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in d.parameters())
    assert not any(m.training for m in d.teacher.modules())
    assert all(p.grad is None and not p.requires_grad for p in d.teacher.parameters())
    assert all(torch.equal(v, before[k]) for k, v in d.teacher.state_dict().items())
    assert {k.split(".")[0] for k in d.state_dict()} <= {"student", "losses"}
    assert d.student.state_dict().keys() == student().state_dict().keys()
    assert {id(p) for p in d.parameters()}.isdisjoint({id(p) for p in d.teacher.parameters()})


def test_the_loss_is_the_sum_of_its_parts():
    d = distiller("mixed", mask=0.0, weight=0.5, temperature=3.0, alpha=0.01).eval()
    logits, total = d(X, Y)
    _, [ours] = observe(d.student, ["conv_fc.12"], X)
    soft, [theirs] = observe(d.teacher, ["conv_fc.12"], X)
    want = {
        "task": F.cross_entropy(logits, Y),
        "blurred": 0.01 * (d.losses["blurred"].generation(d.losses["blurred"].align(ours)) - theirs).square().sum() / 4,
        "wsld": 0.5 * WSLD(temperature=3.0)(logits, soft, Y),
    }
    assert d.parts.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(d.parts[name], value.detach())
        assert value > 0
    torch.testing.assert_close(total, sum(want.values()))
    probabilities = 0.7 * F.one_hot(Y, 10) + 0.3 * F.one_hot(Y.flip(0), 10)
    mixed = d(X, probabilities)[1]
    assert mixed.isfinite()
    assert mixed != total


def test_several_layers():
    names = ["conv_fc.6", "conv_fc.13"]
    d = distiller("lasnn", student_feature=names, teacher_feature=names, alpha=0.01)
    assert [k for k, _ in d.losses.named_parameters()] == ["lasnn.layers.1.align.weight", "lasnn.layers.1.align.bias"]
    total = d.eval()(X, Y)[1]
    _, ours = observe(d.student, names, X)
    _, theirs = observe(d.teacher, names, X)
    squares = (ours[0] - theirs[0]).square().sum() + (
        d.losses["lasnn"].layers[1].align(ours[1]) - theirs[1]
    ).square().sum()
    torch.testing.assert_close(total, F.cross_entropy(d.student(X), Y) + 0.01 * squares / 4)


def test_training_brings_the_student_nearer():
    d = distiller("blurred", alpha=0.01)
    optimizer, parts = torch.optim.Adam(d.parameters(), 3e-3), []
    for _ in range(15):
        optimizer.zero_grad()
        d(X, Y)[1].backward()
        optimizer.step()
        parts.append(float(d.parts["blurred"]))
    assert parts[-1] < 0.5 * parts[0]


def gradients(d, rank=0, ranks=1):
    """Of half the batch, or all of it; norms in evaluation, and biased, so that neurons fire."""
    for m in d.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eval()
            nn.init.constant_(m.bias, 0.5)
    model = d if ranks == 1 else DistributedDataParallel(d)
    model(X[rank::ranks], Y[rank::ranks])[1].backward()
    return {name: p.grad for name, p in d.named_parameters()}


def one_rank_of_two(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(
        gradients(distiller("mixed", mask=0.0, student_settings={"dropout": 0.0}), rank, 2), f"{folder}/{rank}.pt"
    )
    dist.destroy_process_group()


def test_two_ranks_are_one_batch(tmp_path):
    running = [subprocess.Popen([sys.executable, __file__, str(rank), tmp_path]) for rank in range(2)]
    assert [process.wait(timeout=300) for process in running] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, g in gradients(distiller("mixed", mask=0.0, student_settings={"dropout": 0.0})).items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], g, rtol=1e-4, atol=1e-5 * float(g.abs().max()))


def test_a_compiled_distiller_gives_the_same():
    d = distiller("mixed", mask=0.0).eval()
    want = d(X, Y)
    torch.testing.assert_close(torch.compile(d, backend="eager")(X, Y), want)
    compiled = student()
    compiled.compile(backend="eager")
    for model in (compiled, torch.compile(student(), backend="eager")):
        with pytest.raises(ValueError, match="compile the distiller"):
            build_distiller(model, F.cross_entropy, IMAGE, teacher=teacher(), loss="wsld")


def test_the_teacher_follows_its_student_and_its_type():
    seen = []
    d = distiller("mixed", teacher_amp="bfloat16")
    d.teacher.conv_fc[12].register_forward_hook(lambda m, args, out: seen.append((out.dtype, torch.is_grad_enabled())))
    total = d(X, Y)[1]
    assert total.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        logits, total = d(X, Y)
    assert logits.dtype == torch.bfloat16
    assert total.dtype == torch.float32
    assert total.isfinite()
    d.teacher_amp = None
    d(X, Y)
    assert [s[0] for s in seen] == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert not any(s[1] for s in seen)
    assert d.to("meta").teacher.conv_fc[0].weight.is_meta


def test_what_the_teacher_sees():
    seen = []
    d = distiller(
        "wsld", teacher=teacher(img_size=12), teacher_size=12, mean=[0.5], std=[0.25], teacher_mean=[0.3],
        teacher_std=[0.2],
    )  # fmt: skip
    d.teacher.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    flat = torch.full((2, *IMAGE), 2.0)  # 1.0 before the student's normalisation
    d(flat, Y[:2])
    d(flat, Y[:2], teacher_x=torch.zeros(2, 1, 12, 12))
    torch.testing.assert_close(seen[0], torch.full((2, 1, 12, 12), (1.0 - 0.3) / 0.2))
    assert not seen[1].any()
    assert d.prepare(torch.rand(2, 3, *IMAGE)).shape == (2, 3, 1, 12, 12)


def test_frames_of_another_number_of_steps():
    d = build_distiller(
        student(T=2), F.cross_entropy, (2, *IMAGE), teacher=student(T=6), teacher_input_shape=(6, *IMAGE),
        loss="blurred", student_feature="conv_fc.13", teacher_feature="conv_fc.13",
    )  # fmt: skip
    assert d(torch.rand(3, 2, *IMAGE), Y[:3], teacher_x=torch.rand(3, 6, *IMAGE))[1].isfinite()


# ---- features --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["spikingformer_test", "sew_resnet_test", "qkformer_test", "ecsnn_vgg_test"])
def test_features_of_our_models(name):
    model = create_model(name).eval()
    x = torch.rand(3, model.in_chans, *((8, 8) if name == "ecsnn_vgg_test" else (32, 32)))
    with torch.no_grad():
        want = model.forward_intermediates(x, intermediates_only=True)
        out, got = observe(model, model.stages, x)
        torch.testing.assert_close(out, model(x))
    torch.testing.assert_close(got, want)


def test_features_inside_a_layer_that_knows_no_time():
    model = create_model("spikingformer_test").eval()
    x = torch.rand(3, 3, 32, 32)
    _, [inside, whole] = observe(model, ["block.0.mlp.fc2.1", "block.0.mlp.fc2"], x)
    torch.testing.assert_close(inside, whole)


def test_a_later_layer_in_place_changes_no_feature():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(inplace=True), nn.Flatten())
    _, [got] = observe(model, ["0"], X)
    torch.testing.assert_close(got, model[0](X))
    assert (got < 0).any()
    _, [vector] = observe(model, ["2"], X)
    assert vector.shape == (4, 2 * 64, 1, 1)


def test_features_of_timm():
    timm = pytest.importorskip("timm")
    x = torch.rand(2, 3, 32, 32)
    vit = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=12, depth=2, num_heads=2, num_classes=5, reg_tokens=3
    ).eval()
    tokens, [inside] = vit.forward_intermediates(x, 1)
    _, [block, normed, pooled] = observe(vit, ["blocks.1", "norm", "fc_norm"], x)
    torch.testing.assert_close(block, inside)
    torch.testing.assert_close(normed.flatten(2).transpose(1, 2), tokens[:, 4:])
    torch.testing.assert_close(pooled[:, :, 0, 0], tokens[:, 0])
    oblong = timm.models.VisionTransformer(  # 15 patches and one more token are no square
        img_size=(24, 40), patch_size=8, embed_dim=12, depth=1, num_heads=2, num_classes=5
    ).eval()
    wide = torch.rand(2, 3, 24, 40)
    want = oblong.forward_intermediates(wide, 1, intermediates_only=True)
    torch.testing.assert_close(observe(oblong, ["blocks.0"], wide)[1], want)
    assert block.shape == (2, 12, 4, 4)
    swin = timm.models.SwinTransformer(
        img_size=32, patch_size=4, window_size=4, embed_dim=12, depths=(1, 1), num_heads=(2, 2), num_classes=5
    ).eval()
    want = swin.forward_intermediates(x, intermediates_only=True)
    torch.testing.assert_close(observe(swin, ["layers.0", "layers.1"], x)[1], want)
    resnet = timm.create_model("resnet10t", num_classes=5).eval()
    torch.testing.assert_close(
        observe(resnet, ["layer4"], x)[1], resnet.forward_intermediates(x, 1, intermediates_only=True)
    )


def test_features_of_torchvision():
    models = pytest.importorskip("torchvision.models")
    x = torch.rand(2, 3, 32, 32)
    vit = models.VisionTransformer(32, 8, 1, 2, 12, 12, num_classes=5).eval()
    _, [tokens] = observe(vit, ["encoder.ln"], x)
    flat = vit.encoder(torch.cat([vit.class_token.expand(2, -1, -1), vit._process_input(x)], 1))
    torch.testing.assert_close(tokens.flatten(2).transpose(1, 2), flat[:, 1:])
    swin = models.SwinTransformer([4, 4], 12, [1, 1], [2, 2], [4, 4], num_classes=5).eval()
    _, [norm, permuted] = observe(swin, ["norm", "permute"], x)
    torch.testing.assert_close(norm, permuted)
    assert norm.shape == (2, 24, 4, 4)


def test_a_teacher_by_name(tmp_path):
    timm = pytest.importorskip("timm")
    torchvision = pytest.importorskip("torchvision")
    for name, model in (
        ("timm/resnet18", timm.create_model("resnet18", num_classes=10)),
        ("torchvision/resnet18", torchvision.models.resnet18(num_classes=10)),
        ("ecsnn_vgg_test", student(in_chans=3)),
    ):
        torch.save({"state_dict": model.state_dict()}, tmp_path / "w.pth")
        got = create_teacher(name, tmp_path / "w.pth", num_classes=10)
        assert type(got) is type(model)
        assert all(torch.equal(v, got.state_dict()[k]) for k, v in model.state_dict().items())


def test_a_librarys_own_weights(monkeypatch):
    timm = pytest.importorskip("timm")
    torchvision = pytest.importorskip("torchvision")
    asked = []
    monkeypatch.setattr(timm, "create_model", lambda name, **kw: asked.append((name, kw)) or nn.Identity())
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, **kw: asked.append((name, kw)) or nn.Identity())
    create_teacher("vit_small_patch16_224", "pretrained", num_classes=10)
    create_teacher("torchvision/resnet18", "pretrained", num_classes=1000)
    assert asked == [
        ("vit_small_patch16_224", {"pretrained": True, "num_classes": 10, "in_chans": 3}),
        ("resnet18", {"weights": "DEFAULT", "num_classes": 1000}),
    ]


# ---- losses ----------------------------------------------------------------------------------------------------------


def test_the_finer_grid_is_averaged_down():
    coarse, fine = torch.rand(2, 3, 2, 2), torch.rand(2, 3, 4, 4)
    for a, b in ((coarse, fine), (fine, coarse)):
        want = (F.avg_pool2d(fine, 2) - coarse).square().sum() / 2
        torch.testing.assert_close(KDSNN(3, 3, alpha=1.0)(a, b), want)
    with pytest.raises(ValueError, match="4x2 and 2x4 pixels cannot be aligned"):
        KDSNN(3, 3)(torch.rand(2, 3, 4, 2), torch.rand(2, 3, 2, 4))


def test_the_mask_takes_channels_of_single_samples_in_training_alone():
    loss = Blurred(64, 64, mask=0.25)
    seen = []
    loss.generation = nn.Identity()
    loss.generation.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    ones = torch.ones(32, 64, 2, 2)
    torch.manual_seed(0)
    loss(ones, ones)
    loss.eval()(ones, ones)
    kept = seen[0].amax((2, 3))
    assert torch.equal(kept[:, :, None, None].expand_as(ones), seen[0])
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    assert abs(kept.mean() - 0.75) < 4 * (0.25 * 0.75 / kept.numel()) ** 0.5
    assert torch.equal(seen[1], ones)


def test_published_quirks():
    """CIFAR10-DVS: student and teacher change places, channels go in evaluation too; LaSNN's convolutions stay."""
    torch.manual_seed(0)
    loss = Blurred(3, 5, published_quirks=True).eval()
    ours, theirs = torch.rand(2, 3, 4, 4), torch.rand(2, 5, 4, 4)
    assert loss.align.weight.shape[:2] == (3, 5)
    right = Blurred(5, 3, mask=0.15)
    right.load_state_dict(loss.state_dict())
    torch.manual_seed(1)
    got = loss(ours, theirs)
    torch.manual_seed(1)
    torch.testing.assert_close(got, right(theirs, ours))
    assert not any(p.requires_grad for p in LaSNN([3], [5], published_quirks=True).parameters())
    assert all(p.requires_grad for p in LaSNN([3], [5]).parameters())


def test_a_dead_teacher_gives_no_nan():
    loss = Blurred(3, 3, clip=True)
    ours = torch.rand(2, 3, 4, 4, requires_grad=True)
    loss(ours, torch.zeros(2, 3, 4, 4)).backward()
    assert ours.grad.isfinite().all()


def test_soft_labels_weigh_what_the_student_has_to_learn():
    sure, y = 9.0 * F.one_hot(Y, 10), Y
    assert WSLD()(sure, torch.zeros(4, 10), y) < 1e-2 * WSLD()(torch.zeros(4, 10), sure, y)


# ---- cache -----------------------------------------------------------------------------------------------------------


def calls_of(d):
    seen = []
    d.teacher.register_forward_pre_hook(lambda m, args: seen.append(len(args[0])))
    return seen


def test_a_cache_answers_for_samples_it_has_seen(tmp_path):
    d = distiller("mixed", mask=0.0, cache=tmp_path / "a" / "b").eval()
    seen = calls_of(d)
    want = d(X, Y)[1]
    first = d(X[:2], Y[:2], ids=torch.tensor([7, 5]))[1]
    whole = d(X, Y, ids=["7", "5", "x/1", "x/2"])[1]
    again = d(X.flip(0), Y.flip(0), ids=["x/2", "x/1", "5", "7"])[1]
    assert seen == [4, 2, 2]
    torch.testing.assert_close(torch.stack([whole, again]), torch.stack([want, want]))
    torch.testing.assert_close(first, d(X[:2], Y[:2])[1])

    other = distiller("mixed", mask=0.0, cache=tmp_path / "a" / "b")  # the same weights: another process
    seen = calls_of(other)
    other(X, Y, ids=["7", "5", "x/1", "x/2"])
    assert seen == []
    changed = teacher()
    torch.nn.init.zeros_(changed.conv_fc[0].bias)
    other = distiller("mixed", teacher=changed, cache=tmp_path / "a" / "b")
    seen = calls_of(other)
    other(X, Y, ids=["7", "5", "x/1", "x/2"])
    assert seen == [4]
    assert len(list((tmp_path / "a" / "b").iterdir())) == 2


@pytest.mark.parametrize(
    "change", [lambda x: x.flip(-1), lambda x: 0.99 * x, lambda x: x.roll(1, 0), lambda x: x.roll(1, -1)]
)
def test_a_cache_refuses_a_sample_that_has_changed(tmp_path, change):
    d = distiller("wsld", cache=tmp_path)
    d(X, Y, ids=torch.arange(4))
    with pytest.raises(ValueError, match="sample 0 is not what the cache"):
        d(change(X), Y, ids=torch.arange(4))
    with pytest.raises(ValueError, match="ids must be 4, one for each sample, got 3"):
        d(X, Y, ids=torch.arange(3))


def test_a_batch_is_kept_whole_or_not_at_all(tmp_path):
    store = cache.Cache(tmp_path, "key")
    good = {"logits": torch.arange(3.0)}

    def outputs():
        yield "0", good
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.put(outputs())
    assert store.get(["0"]) == {}
    with pytest.raises(OSError, match="cannot be used"):
        store.put([("0", good), (object(), good)])
    assert store.get(["0"]) == {}
    store.put([("0", good)])
    assert torch.equal(store.get(["0", "1"])["0"]["logits"], good["logits"])


def test_a_broken_cache_is_named(tmp_path):
    (tmp_path / "key.sqlite").write_bytes(b"no database " * 100)
    with pytest.raises(OSError, match=r"the cache .*key\.sqlite cannot be used: file is not a database"):
        cache.Cache(tmp_path, "key")


# ---- mistakes --------------------------------------------------------------------------------------------------------

MISTAKES = {
    "teacher is missing": {"teacher": ""},
    "no teacher 'ecsnn_vgg_tst'; did you mean ecsnn_vgg_test": {"teacher": "ecsnn_vgg_tst", "teacher_checkpoint": "x"},
    "teacher_checkpoint is missing": {"teacher": "ecsnn_vgg_test"},
    "spikecore has no pretrained weights": {"teacher": "ecsnn_vgg_test", "teacher_checkpoint": "pretrained"},
    "does not take these teacher_settings": {
        "teacher": "ecsnn_vgg_test",
        "teacher_checkpoint": "x",
        "teacher_settings": {"sise": 3},
    },
    "loss must be one of blurred, wsld, mixed, kdsnn, lasnn, got 'bkd'": {"loss": "bkd"},
    "'alfa' is no setting of the loss mixed; did you mean alpha": {"alfa": 1.0},
    "'temperature' is no setting of the loss blurred": {"loss": "blurred", "temperature": 1.0},
    "alpha must be a number .YAML": {"alpha": "2e-3"},
    "clip must be true or false, got 1": {"clip": 1},
    "mask must be in .0, 1., got 1": {"mask": 1},
    "temperature must be above 0": {"temperature": 0},
    "student_feature 'conv_fc.99' is no module of ECSNN; did you mean conv_fc.9": {"student_feature": "conv_fc.99"},
    "mixed needs teacher_feature": {"teacher_feature": ()},
    "as many features, got 1 and 2": {"loss": "lasnn", "teacher_feature": ["conv_fc.1", "conv_fc.2"]},
    "the teacher ECSNN does not take .2, 1, 12, 12.|linear layers were built for maps": {"teacher_size": 12},
    "as many logits, got 10 and 7": {"teacher": teacher(num_classes=7)},
    "needs the student's mean and std|belong together": {"teacher_mean": [0.5]},
    "teacher_amp must be float16 or bfloat16": {"teacher_amp": "int8"},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_give_one_line(message):
    with pytest.raises(ValueError, match=message) as e:
        distiller(**MISTAKES[message])
    assert "\n" not in str(e.value)


def test_an_output_that_is_no_map_or_never_comes():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Identity(), nn.LSTM(64, 3, batch_first=True)

        def forward(self, x):
            return self.b(x.flatten(2))[0][:, 0]

    with pytest.raises(ValueError, match="a of Odd was not called"):
        observe(Odd(), ["a"], X)
    assert observe(Odd(), ["b"], X)[1][0].shape == (4, 3, 1, 1)  # the first of its outputs, one token
    with pytest.raises(ValueError, match=r"expected \[4, \.\.\.\], got \[1, 4, 1, 64\]"):
        observe(nn.Sequential(nn.Flatten(2), nn.Unflatten(0, (1, 4)), nn.Flatten(0, 1)), ["1"], X)


if __name__ == "__main__":
    one_rank_of_two(int(sys.argv[1]), pathlib.Path(sys.argv[2]))
