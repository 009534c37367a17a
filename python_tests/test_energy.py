import pytest
import torch
from torch import nn

from spikecore.energy import energy_pj, estimate_energy
from spikecore.models import create_model
from spikecore.neurons import IF


def test_constants_give_the_published_figure():
    # Spikformer family, 8-768 on ImageNet: 0.521 G MAC and 12.514 G AC are 13.659 mJ
    assert energy_pj(0.521e9, 12.514e9) * 1e-9 == pytest.approx(13.659, abs=5e-4)


class Tiny(nn.Module):
    """Conv 1 -> 2 (1x1), IF over two steps, flatten, linear 8 -> 3; the image is repeated before the convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 1, bias=False)
        self.lif = IF()
        self.fc = nn.Linear(8, 3)
        with torch.no_grad():
            self.conv.weight.copy_(torch.tensor([1.0, 0.5]).view(2, 1, 1, 1))

    def forward(self, x):
        B = len(x)
        current = self.conv(x.repeat(2, 1, 1, 1))
        s = self.lif(current.unflatten(0, (2, B)))
        return self.fc(s.flatten(2)).mean(0)


def test_by_hand():
    model = Tiny().train()
    # Pixels 1.1, 0.55, 0, 0. Channel 0 sees 1.1, 0.55: fires at steps 1 and 2; at step 2. Channel 1 sees 0.55, 0.275:
    # fires at step 2; never. So 4 spikes of 16.
    x = torch.tensor([[1.1, 0.55], [0.0, 0.0]]).view(1, 1, 2, 2)
    report = estimate_energy(model, x)
    conv, fc = report.layers
    assert (conv.name, conv.layer, conv.rate) == ("conv", "Conv2d", 0.5)
    assert (conv.macs, conv.acs) == (2 * 4, 0)  # repeated image: once, not once a step
    assert (fc.macs, fc.rate, fc.acs) == (0, 4 / 16, 4 / 16 * 2 * 8 * 3)
    assert report.firing_rates == {"lif": 4 / 16}
    assert report.energy_pj == pytest.approx(8 * 4.6 + 12 * 0.9)
    assert model.training
    assert model.fc.training

    both = estimate_energy(model, [x, x.repeat(3, 1, 1, 1)])  # per sample: batches change nothing
    assert both == report


def test_pooled_spikes_accumulate_and_analog_inputs_multiply():
    fc = nn.Sequential(nn.Linear(4, 2, bias=False))
    assert estimate_energy(fc, torch.tensor([[0.25, 0.0, 1.0, 0.75]])).acs == 0.75 * 8
    assert estimate_energy(fc, torch.tensor([[0.3, 0.0, 1.0, 0.0]])).macs == 8
    assert estimate_energy(fc, torch.tensor([[2.0, 0.0, 1.0, 0.0]])).macs == 8  # a count is not a spike
    assert estimate_energy(fc, torch.tensor([[-1.0, 0.0, 1.0, 0.0]])).macs == 8


def test_grouped_convolution():
    conv = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=2))
    assert estimate_energy(conv, torch.full((2, 4, 5, 5), 0.3)).macs == 4 * 25 * 2 * 9


def test_direct_coded_network():
    model = create_model("ecsnn_vgg_test")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, 5.0)  # or a fresh network hardly fires
            nn.init.constant_(module.bias, 0.5)
    report = estimate_energy(model, torch.rand(3, 1, 8, 8))
    first, *spiking, last = report.layers
    assert first.macs == 32 * 64 * 9
    assert last.macs == 4 * 128 * 10  # it reads the linear layer before it, not spikes
    dense = [4 * n for n in (64 * 32 * 9 * 32, 16 * 32 * 9 * 64, 16 * 64 * 9 * 64, 256 * 128)]
    expected = [layer.rate * n for layer, n in zip(spiking, dense, strict=True)]
    assert [layer.acs for layer in spiking] == pytest.approx(expected)
    assert all(layer.macs == 0 and 0 < layer.rate < 1 for layer in spiking)
    assert spiking[0].rate == report.firing_rates["conv_fc.2"]
    assert report.macs == first.macs + last.macs
    assert report.acs == sum(layer.acs for layer in spiking)


def test_no_data():
    with pytest.raises(ValueError, match="no sample"):
        estimate_energy(nn.Linear(1, 1), [])
