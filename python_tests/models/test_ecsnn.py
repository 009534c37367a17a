import importlib.util

import pytest
import torch
from torch import nn

import spikecore.models
from spikecore.models import Fusion, create_model, list_models, register_model
from spikecore.models.ecsnn import published_counts
from spikecore.neurons import LIF


def test_test_variant_is_small():
    assert sum(p.numel() for p in create_model("ecsnn_vgg_test").parameters()) == 99_232


def test_published_keys():
    with torch.device("meta"):
        keys = create_model("ecsnn_vgg5").state_dict()
    weights = [int(key.split(".")[1]) for key in keys if key.startswith("conv_fc.") and key.endswith(".weight")]
    assert weights == [0, 1, 4, 5, 7, 8, 13, 15]


def test_shapes_and_image_as_frames():
    model = create_model("ecsnn_vgg_test").eval()
    image = torch.rand(2, 1, 8, 8)
    frames = image.unsqueeze(1).expand(-1, model.T, -1, -1, -1)
    assert model(image).shape == (2, 10)
    assert model.steps(image).shape == (4, 2, 10)
    torch.testing.assert_close(model(image), model(frames))
    assert create_model("ecsnn_vgg_test", T=None)(torch.rand(2, 7, 1, 8, 8)).shape == (2, 10)
    assert model(torch.rand(0, 1, 8, 8)).shape == (0, 10)


def test_image_as_frames_in_training():
    torch.manual_seed(0)
    image = torch.rand(16, 1, 8, 8)
    one, two = create_model("ecsnn_vgg_test", dropout=0.0), create_model("ecsnn_vgg_test", dropout=0.0)
    two.load_state_dict(one.state_dict())
    torch.testing.assert_close(one(image), two(image.unsqueeze(1).repeat(1, 4, 1, 1, 1)))
    mine, theirs = one.conv_fc[1], two.conv_fc[1]
    torch.testing.assert_close(mine.running_mean, theirs.running_mean)
    torch.testing.assert_close(mine.running_var, theirs.running_var)


@pytest.mark.parametrize("training", [False, True])
def test_step_by_step_equals_all_at_once(training):
    """The published code's order of computation: all layers of step 0, then of step 1, ..."""
    torch.manual_seed(0)
    model, other = (
        create_model("ecsnn_vgg_test", T=None, dropout=0.0, step_norm=True).train(training) for _ in range(2)
    )
    other.load_state_dict(model.state_dict())
    frames = torch.rand(2, 3, 1, 8, 8) * 3
    state: dict[nn.Module, torch.Tensor] = {}
    total = 0
    for x in frames.unbind(1):
        for layer in other.conv_fc:
            if isinstance(layer, LIF):
                x, state[layer] = layer.step(x, state.get(layer))
            else:
                x = layer(x)
        total = total + x
    torch.testing.assert_close(model(frames), total / 3)
    torch.testing.assert_close(model.state_dict(), other.state_dict())


def test_steps_of_a_repeated_image_have_norms_of_their_own():
    torch.manual_seed(0)
    one, two = (create_model("ecsnn_vgg_test", dropout=0.0, step_norm=True) for _ in range(2))
    two.load_state_dict(one.state_dict())
    image = torch.rand(4, 1, 8, 8)
    torch.testing.assert_close(one(image), two(image.unsqueeze(1).repeat(1, 4, 1, 1, 1)))
    torch.testing.assert_close(one.state_dict(), two.state_dict())


def test_twin_is_relu_with_biases_and_max_pools():
    model = create_model("ecsnn_vgg5_ann", img_size=8)
    kinds = [type(m) for m in model.modules()]
    assert kinds.count(nn.ReLU) == 3
    assert kinds.count(nn.MaxPool2d) == 2
    assert LIF not in kinds
    assert all(m.bias is not None for m in model.conv_fc if isinstance(m, nn.Conv2d | nn.Linear))


def test_counts_as_published():
    """Two convolutions of a 4 x 4 image with a pool between: both are given 4 x 4; the linear layer gets the batch."""
    model = spikecore.models.ECSNN("2 P 3", (), img_size=4, T=2, in_chans=1, num_classes=5).eval()
    with torch.no_grad():
        for layer in model.conv_fc:
            if isinstance(layer, nn.Conv2d):
                layer.weight.fill_(1.0)
    x = torch.zeros(3, 1, 4, 4)
    x[0, 0, 0, 0] = 9.0  # fires at once on the 2 x 2 places it reaches, in both channels, then wherever it is pooled to
    operations, spikes = published_counts(model, x, activity=0.5)
    first, second = 2 * 4 / (3 * 2 * 16), 3 * 4 / (3 * 3 * 4)
    assert spikes.tolist() == [2 * 4 + 3 * 4] * 2
    linear = 3 * 12 * 5 * second
    assert operations.tolist() == pytest.approx([9 * 2 * 16 * 0.5 + 9 * 6 * 16 * first + linear] * 2)


def test_fusion():
    net = Fusion(96, 3, num_classes=7)
    assert net(torch.rand(5, 2, 96)).shape == (5, 2, 7)
    assert [tuple(p.shape) for p in net.parameters()] == [(1152, 96), (576, 1152), (21, 576), (7, 21)]
    with pytest.raises(ValueError, match="Fusion: features, parts and num_classes must be at least 1, got 96, 0, 7"):
        Fusion(96, 0, num_classes=7)


def test_every_parameter_learns():
    model = create_model("ecsnn_vgg_test")
    model(torch.rand(8, 1, 8, 8)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"img_size": 3}, "too small for the 2 pools"),
        ({"layers": "64 Q"}, "numbers and P"),
        ({"layers": "P 64"}, "begin with a convolution"),
        ({"layers": ""}, "begin with a convolution"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        spikecore.models.ECSNN(**{"layers": "8 P 8 P", "hidden": (), **kwargs})


def test_bad_input():
    with pytest.raises(ValueError, match=r"got \[1, 8, 8\]"):
        create_model("ecsnn_vgg_test")(torch.rand(1, 8, 8))


def test_registry():
    assert "ecsnn_vgg9" in list_models("ecsnn_*")
    assert list_models("nothing*") == []
    with pytest.raises(ValueError, match="did you mean ecsnn_vgg"):
        create_model("ecsnn_vgg6")
    with pytest.raises(ValueError, match="list_models"):
        create_model("zzz")

    def ecsnn_vgg5(): ...

    with pytest.raises(ValueError, match="is taken"):
        register_model(ecsnn_vgg5)


def test_bare_models_is_refused():
    spec = importlib.util.spec_from_file_location("models", spikecore.models.__file__)
    with pytest.raises(ImportError, match="this package is"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
