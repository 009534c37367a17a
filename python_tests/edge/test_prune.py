import json

import pytest
import torch
from torch import nn

pytest.importorskip("safetensors.torch")

from spikecore.edge.prune import (
    load_pruned,
    measure_apoz,
    prune,
    save_pruned,
    select_filters,
)
from spikecore.models import create_model

NETS = {
    "spiking": {"layers": "6 P 8 8 P"},
    "relu": {"layers": "6 P 8 8 P", "spiking": False, "T": 1},
}


def net(kind="spiking", **settings):
    torch.manual_seed(0)
    model = create_model("ecsnn_vgg_test", **{"in_chans": 2, **NETS[kind], **settings})
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.weight.data.uniform_(0.5, 2)
            m.bias.data.uniform_(-1, 1)
            m.running_mean.uniform_(-0.1, 0.1)
            m.running_var.uniform_(0.1, 0.3)
    return model


def data(n=10, T=None):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, *((T,) if T else ()), 2, 8, 8, generator=generator), torch.arange(n) % 3


@pytest.mark.parametrize("T", [None, 3])
@pytest.mark.parametrize("kind", NETS)
def test_shares_of_zeros_by_class(kind, T):
    model = net(kind, **({"T": None} if T else {}))
    x, y = data(T=T)
    seen = []
    hooks = [m.register_forward_hook(lambda m, a, out: seen.append(out)) for m in (model.conv_fc[2], model.conv_fc[6])]
    model.eval()(x)
    for hook in hooks:
        hook.remove()
    model.train()
    got = measure_apoz(model, zip(x.split(4), y.split(4), strict=True))
    assert model.training
    assert got.counts.tolist() == [4, 3, 3, 0, 0, 0, 0, 0, 0, 0]
    assert len(got.sums) == 3
    for classes in (None, [0], [2, 1]):
        rows = [i for i in range(10) if classes is None or int(y[i]) in classes]
        for layer, out in enumerate(seen):
            steps = out if out.dim() == 5 else out.unflatten(0, (-1, 10))  # ReLU sees [T*B, ...]
            want = (steps[:, rows] == 0).double().mean((0, 1, 3, 4))
            torch.testing.assert_close(got.of(classes)[layer], want)
    assert 0 < got.of()[0].min() < got.of()[0].max() < 1


def test_batches_change_nothing_but_as_published():
    model = net()
    x, y = data()
    by = {size: measure_apoz(model, zip(x.split(size), y.split(size), strict=True)).of() for size in (1, 4, 10)}
    for size in (1, 4):
        torch.testing.assert_close(by[size], by[10])
    published = measure_apoz(model, zip(x.split(4), y.split(4), strict=True), published_quirks=True).of()
    chunks = [measure_apoz(model, [pair]).of() for pair in zip(x.split(4), y.split(4), strict=True)]
    for layer, shares in enumerate(published):
        torch.testing.assert_close(shares, torch.stack([c[layer] for c in chunks]).mean(0))
        assert (shares - by[10][layer]).abs().max() > 1e-4


def test_which_filters_go():
    shares = [torch.tensor([0.91, 0.5, 0.9, 0.99]), torch.tensor([0.895, 0.885, 0.95, 0.5])]
    assert select_filters(shares, 90, min_filters=1) == [[1, 2], [1, 3]]
    assert select_filters(shares, 90, min_filters=3) == [[1, 2, 3], [1, 2, 3]]
    assert select_filters(shares, 0, min_filters=1) == [[3], [3]]
    assert select_filters(shares, 0, min_filters=9) == [[0, 1, 2, 3]] * 2
    with pytest.raises(ValueError, match="min_filters must be at least 1"):
        select_filters(shares, 90, min_filters=0)


@pytest.mark.parametrize("kind", NETS)
def test_without_dead_filters_everything_else_stays(kind):
    """Filters that never answer can go without a trace in what is left."""
    model = net(kind).eval()
    keep = [[0, 2, 5], [1, 2, 3, 6], [0, 7]]
    with torch.no_grad():
        for i, filters in zip((0, 4, 7), keep, strict=True):
            dead = [f for f in range(len(model.conv_fc[i].weight)) if f not in filters]
            model.conv_fc[i + 1].weight[dead] = 0
            model.conv_fc[i + 1].bias[dead] = -1
            model.conv_fc[i + 1].bias[filters] = 2
        x, y = data()
        assert select_filters(measure_apoz(model, [(x, y)]).of(), 99.99, 1) == keep
        small = prune(model, keep, num_classes=4).eval()
        assert [type(m) for m in small.conv_fc][:11] == [type(m) for m in model.conv_fc][:11]
        features, whole = small.forward_features(x), model.forward_features(x)
        torch.testing.assert_close(features, whole[:, :, keep[-1]])
        assert features.any()
        assert small(x).shape == (10, 4)
    assert [m.out_features for m in small.conv_fc if isinstance(m, nn.Linear)] == [384, 192, 4]
    assert sum(p.numel() for m in [*small.conv_fc][:10] for p in m.parameters()) < 400


def test_as_published_norms_and_biases_are_fresh():
    model = net("relu")
    right, published = (prune(model, [[1, 4], [0, 1], [6]], 3, published_quirks=quirks) for quirks in (False, True))
    assert torch.equal(right.conv_fc[0].weight, published.conv_fc[0].weight)
    assert torch.equal(right.conv_fc[0].bias, model.conv_fc[0].bias[[1, 4]])
    assert not torch.equal(published.conv_fc[0].bias, model.conv_fc[0].bias[[1, 4]])
    assert torch.equal(right.conv_fc[1].running_var, model.conv_fc[1].running_var[[1, 4]])
    assert torch.equal(published.conv_fc[1].running_var, torch.ones(2))
    assert torch.equal(published.conv_fc[1].weight, torch.ones(2))


def test_it_trains_on_and_is_kept(tmp_path):
    x, y = data(12)
    model = net()
    small = prune(model, select_filters(measure_apoz(model, [(x, y)]).of([0, 2]), 60, 4), 3, hidden=(16,), dropout=0.0)
    optimizer = torch.optim.Adam(small.parameters(), 1e-2)
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(small(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    card = save_pruned(small, tmp_path / "a" / "small.safetensors", classes=[0, 2])
    got = load_pruned(tmp_path / "a" / "small.safetensors")
    torch.testing.assert_close(got.eval()(x), small.eval()(x))
    said = json.loads(card.read_text())
    assert said["classes"] == [0, 2]
    assert said["parameters"] == sum(p.numel() for p in small.parameters())
    assert {p.name for p in card.parent.iterdir()} == {"small.safetensors", "small.json"}
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        save_pruned(small, tmp_path / "small.pth")
    (tmp_path / "a" / "small.safetensors").write_bytes(b"other")
    with pytest.raises(ValueError, match=r"is not the file that small\.json describes"):
        load_pruned(tmp_path / "a" / "small.safetensors")
    with pytest.raises(FileNotFoundError):
        load_pruned(tmp_path / "none.safetensors")


def test_mistakes():
    model = net()
    x, y = data()
    with pytest.raises(ValueError, match=r"classes must be 0 to 9, got 0 to 12"):
        measure_apoz(model, [(x, y + 10 * (y == 2))])
    apoz = measure_apoz(model, [(x, y)])
    for classes in ([0, 5], [10], [-1]):
        with pytest.raises(ValueError, match=rf"no sample was of class {classes[-1]}"):
            apoz.of(classes)
    with pytest.raises(ValueError, match="no samples"):
        measure_apoz(model, []).of()
    with pytest.raises(ValueError, match="keep must be of 3 convolutions, got 2"):
        prune(model, [[0], [0]], 3)
    for filters in ([], [8], [-1], [0, 0]):
        with pytest.raises(ValueError, match=r"keep\[1\] must be different numbers from 0 to 7"):
            prune(model, [[0], filters, [0]], 3)
