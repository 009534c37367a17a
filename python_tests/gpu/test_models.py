"""Models and training on a card: each family's rates are those of the CPU, mixed precision trains, quickstart runs."""

import json

import pytest
import torch
from golden.harness import Report
from models.test_training import VARIANTS
from models.test_training import build as firing
from torch import nn

from spikecore import cli
from spikecore.energy import estimate_energy
from spikecore.models import create_model

EACH = pytest.mark.parametrize("name", VARIANTS)


def build(name: str) -> tuple[nn.Module, torch.Tensor]:
    settings, shape = VARIANTS[name]
    torch.manual_seed(0)
    return create_model(name, **settings), torch.rand(shape) * 2


@EACH
def test_firing_rates_are_those_of_the_cpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions sum in other orders, so a spike may differ and what follows it; rates hold."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model, x = firing(name)
    model, x, report = model.float(), x.float(), Report()
    with torch.no_grad():
        logits, rates = model(x), estimate_energy(model, x).firing_rates
        model, x = model.cuda(), x.cuda()
        on_gpu, rates_on_gpu = model(x).cpu(), estimate_energy(model, x).firing_rates
    assert rates.keys() == rates_on_gpu.keys()
    for layer, rate in rates.items():
        report.rates(layer, rates_on_gpu[layer], rate)
    if not any(rates.values()):  # VMamba has no neurons, those of SVMamba are silent at first
        report.values("logits", on_gpu, logits)
    else:
        assert sum(rate > 0.01 for rate in rates.values()) > len(rates) / 2
    assert not report.failures


@EACH
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
def test_it_trains(name: str, dtype: torch.dtype | None) -> None:
    model, x = build(name)
    model, x = model.cuda().train(), x.cuda()
    optimizer, scaler = (
        torch.optim.AdamW(model.parameters(), 1e-3),
        torch.amp.GradScaler(enabled=dtype == torch.float16),
    )
    losses = []
    for _ in range(20):
        with torch.autocast("cuda", dtype, enabled=dtype is not None):
            out = model(x)
            loss = nn.functional.cross_entropy(out.float().flatten(1), torch.arange(len(out), device="cuda"))
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert all(p.isfinite().all() for p in model.parameters())
    assert losses[-1] < losses[0]


def test_quickstart(tmp_path) -> None:
    assert cli.main(["quickstart", "--out", str(tmp_path)]) == 0
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["versions"]["device"] == "cuda"
    assert config["metrics"]["test_accuracy_mean"] > 0.97
