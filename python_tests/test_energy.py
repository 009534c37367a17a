import csv

import pytest
import torch
from torch import nn

from spikecore.energy import EnergyModel, energy_pj, estimate_energy
from spikecore.models import create_model
from spikecore.models._transformer import SelfAttention
from spikecore.models.qkformer import TokenAttention
from spikecore.models.sdt import SpikeDrivenAttention
from spikecore.neurons import IF
from spikecore.ops import lif_ref


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
    assert report.synops == 0.5 * 8 + 12
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


class Residual(nn.Module):
    """Two neurons added: the linear layer reads 0, 1 and 2."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = IF(), IF(), nn.Linear(4, 5)

    def forward(self, x):
        return self.fc(self.a(x[None]) + self.b(2 * x[None]))


def test_sums_of_spikes_are_accumulated_one_by_one():
    report = estimate_energy(Residual(), torch.tensor([[1.0, 0.5, 0.25, 2.0]]))  # 1 + 1, 0 + 1, 0 + 0, 1 + 1
    (fc,) = report.layers
    assert (fc.rate, fc.macs, fc.acs, fc.synops) == (5 / 4, 0, 5 * 5, 5 * 5)
    assert report.firing_rates == {"a": 2 / 4, "b": 3 / 4}


def test_another_model_of_energy():
    report = estimate_energy(Tiny(), torch.ones(1, 1, 2, 2) * 1.1, EnergyModel("mine", 2.0, 1.0))
    assert report.energy_pj == 2 * report.macs + report.acs == sum(layer.energy_pj for layer in report.layers)
    assert report.energy_model.name == "mine"


@pytest.mark.parametrize("kind", [TokenAttention, SelfAttention, SpikeDrivenAttention])
def test_inside_a_fused_attention(kind):
    torch.manual_seed(0)
    attn, x = kind(8, 2).eval(), (torch.rand(3, 2, 8, 4, 5) > 0.5).float()  # T=3, B=2, H=2, D=4, N=20
    given = {}
    with torch.no_grad():
        for name in attn.operands:
            module = getattr(attn, name)
            module[1].bias.fill_(1.2)
            module.register_forward_hook(lambda m, args, out, name=name: given.__setitem__(name, out))
        attn.proj.register_forward_pre_hook(lambda m, args: given.__setitem__("proj", args[0]))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = attn

        def forward(self, x):
            return self.attn(x.transpose(0, 1))

    report = estimate_energy(Net(), x.transpose(0, 1))
    s = {n: lif_ref(t.flatten(3).unflatten(2, (2, 4)))[0] for n, t in given.items() if n != "proj"}
    spikes = {n: int(t.sum()) for n, t in s.items()}
    if kind is TokenAttention:
        current = s["q"].sum(3, keepdim=True)
        acs = spikes["q"]
    elif kind is SelfAttention:
        current = 0.125 * (s["q"].mT @ s["k"] @ s["v"].mT).mT
        acs = 4 * (spikes["q"] + spikes["k"])
    else:
        current = (s["k"] * s["v"]).sum(4, keepdim=True)
        acs = int((s["k"] * s["v"]).sum())
    a = lif_ref(current, v_threshold=0.5)[0]
    out = {TokenAttention: a * s["k"], SelfAttention: a}.get(kind, a * s["q"])
    assert torch.equal(out.reshape(x.shape), given["proj"])  # so these are the attention's own spikes
    rates = {f"attn.{n}_lif": t.mean().item() for n, t in {**s, "attn": a}.items()}
    assert {n: r for n, r in report.firing_rates.items() if n in rates} == pytest.approx(rates)
    assert all(0 < r < 1 for r in rates.values())
    rows = {layer.name: layer for layer in report.layers}
    assert rows["attn"].acs == pytest.approx(acs / 2)  # a sample
    assert rows["attn.proj.0"].acs == pytest.approx(given["proj"].sum().item() * 8 / 2)
    assert all(layer.macs == 0 for layer in report.layers if layer.name != "attn")


@pytest.mark.parametrize("name", ["sew_resnet_test", "qkformer_test"])
def test_only_image_and_mean_are_multiplied(name):
    torch.manual_seed(0)
    model = create_model(name)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.bias, 0.0, 3.0)
    report = estimate_energy(model, torch.rand(2, 3, 48, 48))
    first, *inner, last = report.layers
    assert first.macs > 0 < last.macs
    assert {layer.name for layer in inner if layer.macs} == set()
    assert max(layer.rate for layer in inner) > 1  # sums of spikes


def test_table_and_chart(tmp_path):
    pytest.importorskip("matplotlib")
    report = estimate_energy(Tiny(), torch.tensor([[1.1, 0.55], [0.0, 0.0]]).view(1, 1, 2, 2))
    report.to_csv(tmp_path / "energy.csv")
    rows = list(csv.DictReader((tmp_path / "energy.csv").open()))
    assert [row["name"] for row in rows] == ["conv", "fc", "total", "lif"]
    assert (float(rows[1]["acs"]), float(rows[2]["energy_pj"]), float(rows[3]["rate"])) == (
        12.0, pytest.approx(8 * 4.6 + 12 * 0.9), 0.25,
    )  # fmt: skip
    report.plot(tmp_path / "energy.png")
    assert (tmp_path / "energy.png").read_bytes().startswith(b"\x89PNG")


def test_no_data():
    with pytest.raises(ValueError, match="no sample"):
        estimate_energy(nn.Linear(1, 1), [])
