"""`spikecore quickstart`: a small QKFormer on real handwritten digits, trained and measured in a minute."""

import copy
import csv
import functools
import hashlib
import io
import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikecore._backend import backend_info
from spikecore.data.digits import Digits, load_digits
from spikecore.energy import PJ_PER_AC, PJ_PER_MAC, EnergyReport, estimate_energy
from spikecore.models import create_model
from spikecore.models._base import fire, over_time
from spikecore.models._transformer import SelfAttention
from spikecore.models.qkformer import TokenAttention
from spikecore.neurons import Neuron
from spikecore.ops import lif_ref, qk_attention_ref, spiking_self_attention_ref
from spikecore.train.files import prepare_folder, replace_file

try:
    import safetensors.torch
    from tqdm import tqdm

    from spikecore.train.report import draw_report
except ImportError as e:
    raise ImportError(f'quickstart: {e.name} is missing; pip install "spikecore[train]"') from e

__all__ = ["Outcome", "Recipe", "quickstart"]

MODEL = "qkformer_test"
MODEL_KWARGS: dict[str, Any] = {"stem": "cifar", "depth": 3, "embed_dim": 96, "T": 2, "in_chans": 1, "num_classes": 10}


@dataclass(frozen=True)
class Recipe:
    """Chosen by cross-validation within the training part; the test part only ever gave the numbers reported."""

    epochs: int = 25
    batch: int = 64
    lr: float = 4e-2  # peak of a one-cycle schedule
    weight_decay: float = 1e-2
    label_smoothing: float = 0.1
    shift: int = 1  # training images are moved by up to so many pixels either way


@dataclass(frozen=True)
class Run:
    """One seed after its last finished epoch: a row of metrics per epoch, and the weights as a safetensors file."""

    seed: int
    rows: list[dict[str, float]]
    weights: bytes

    @property
    def file(self) -> str:
        return "model.safetensors" if self.seed == 0 else f"model_seed{self.seed}.safetensors"


@dataclass(frozen=True)
class Outcome:
    """What to print, and whether it ran to the end (False: stopped by Ctrl-C)."""

    lines: list[str]
    finished: bool


def quickstart(out: str | os.PathLike, seeds: int = 1, epochs: int = Recipe.epochs) -> Outcome:
    """Train seeds 0 .. `seeds` - 1, measure, and write weights, config.json, metrics.csv and report.png to `out`.

    Files are replaced whole after every epoch, so that whatever stops the program leaves the last finished one. Runs on
    the GPU where its kernels are live. Seeds torch's global generator.

    Raises:
        ImportError: the extra `train` is not installed.
        OSError: `out` cannot be written; the message says what and why.
    """
    out, recipe = Path(out), Recipe(epochs=epochs)
    prepare_folder(out)
    digits = load_digits()
    device = torch.device("cuda" if backend_info()["gpu_backend"] else "cpu")
    runs: dict[int, Run] = {}
    try:
        started = time.perf_counter()
        steps = seeds * recipe.epochs * -(-len(digits.y_train) // recipe.batch)
        with tqdm(total=steps, desc="training", unit="batch", dynamic_ncols=True) as bar:
            for seed in range(seeds):
                rows: list[dict[str, float]] = []
                for trained, row in _train(digits, recipe, seed, device, bar.update):
                    rows = [*rows, row]
                    runs[seed] = Run(seed, rows, safetensors.torch.save(trained.state_dict()))
                    _write(out, list(runs.values()), recipe, digits, device)
                    bar.set_postfix_str(f"seed {seed}, loss {row['train_loss']:.3f}, test {row['test_accuracy']:.1%}")
                if seed == 0:
                    net = trained
        seconds = time.perf_counter() - started
        measured = _measure(net, digits, recipe, device)
        measured["training_seconds"] = seconds
        weights = _write(out, list(runs.values()), recipe, digits, device, measured)
        image = draw_report([run.rows for run in runs.values()], net, digits)
        replace_file(out / "report.png", image)
    except KeyboardInterrupt:
        if not runs:
            return Outcome(["stopped before the first epoch was finished: nothing was written"], finished=False)
        _write(out, list(runs.values()), recipe, digits, device)
        last = list(runs.values())[-1]
        where = f"epoch {len(last.rows)} of {recipe.epochs}" + (f" of seed {last.seed}" if seeds > 1 else "")
        return Outcome([f"stopped; {out} holds the weights and metrics up to {where}"], finished=False)
    return Outcome(_table(out, list(runs.values()), measured, weights, n_test=len(digits.y_test)), finished=True)


# ---- training ------------------------------------------------------------------------------------------------------


def _train(
    digits: Digits, recipe: Recipe, seed: int, device: torch.device, tick: Callable[[], Any]
) -> Iterator[tuple[nn.Module, dict[str, float]]]:
    """Yields the network and its metrics after each epoch; `tick` is called after each batch."""
    torch.manual_seed(seed)
    random = torch.Generator().manual_seed(seed)
    net = create_model(MODEL, **MODEL_KWARGS).to(device)
    x, y = digits.x_train.to(device), digits.y_train.to(device)
    optimizer, scheduler = _optimizer(net, recipe, steps=recipe.epochs * -(-len(y) // recipe.batch))
    for epoch in range(1, recipe.epochs + 1):
        started = time.perf_counter()
        loss_sum, correct = 0.0, 0
        for index in torch.randperm(len(y), generator=random).split(recipe.batch):
            index = index.to(device)
            logits = _step(net, optimizer, _shift(x[index], recipe.shift, random), y[index], recipe)
            scheduler.step()
            loss_sum += F.cross_entropy(logits, y[index], reduction="sum").item()  # unsmoothed, as in the test
            correct += int((logits.argmax(1) == y[index]).sum())
            tick()
        seconds = time.perf_counter() - started
        test = predict(net, digits.x_test)
        yield (
            net,
            {
                "seed": seed,
                "epoch": epoch,
                "train_loss": loss_sum / len(y),
                "train_accuracy": correct / len(y),
                "test_loss": F.cross_entropy(test, digits.y_test).item(),
                "test_accuracy": (test.argmax(1) == digits.y_test).double().mean().item(),
                "seconds": seconds,
            },
        )


def _optimizer(net: nn.Module, recipe: Recipe, steps: int) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.AdamW(net.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=steps)


def _step(net: nn.Module, optimizer: Any, x: Tensor, y: Tensor, recipe: Recipe) -> Tensor:
    net.train()
    logits = net(x)
    loss = F.cross_entropy(logits, y, label_smoothing=recipe.label_smoothing)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return logits.detach()


def _shift(x: Tensor, pixels: int, random: torch.Generator) -> Tensor:
    """Move each image ``[B, 1, H, W]`` by its own random number of pixels; black comes in at the border."""
    B, _, H, W = x.shape
    padded = F.pad(x, (pixels,) * 4)
    down, right = torch.randint(0, 2 * pixels + 1, (2, B, 1, 1), generator=random).to(x.device)
    rows, columns = down + torch.arange(H, device=x.device).view(-1, 1), right + torch.arange(W, device=x.device)
    return padded[torch.arange(B, device=x.device).view(-1, 1, 1), 0, rows, columns].unsqueeze(1)


@torch.no_grad()
def predict(net: nn.Module, x: Tensor) -> Tensor:
    """Logits ``[n, K]`` on the CPU, in evaluation mode."""
    net.eval()
    return net(x.to(next(net.parameters()).device)).cpu()


# ---- measuring -----------------------------------------------------------------------------------------------------


def _measure(net: nn.Module, digits: Digits, recipe: Recipe, device: torch.device) -> dict[str, Any]:
    fused, loop = _throughput(net, digits, recipe, device)
    info = backend_info()
    return {
        "energy": estimate_energy(net, digits.x_test.to(device)),
        "fused": fused,
        "loop": loop,
        "backend": f"{info['gpu_backend']} on {torch.cuda.get_device_name()}"
        if device.type == "cuda"
        else f"cpu ({info['isa']}, {torch.get_num_threads()} threads)",
    }


def _throughput(net: nn.Module, digits: Digits, recipe: Recipe, device: torch.device) -> tuple[float, float]:
    """Training samples/s with the fused operators and with the same formulas in plain PyTorch, measured in turns."""
    contestants = [(n, _optimizer(n, recipe, steps=1)[0]) for n in (copy.deepcopy(net), _with_loops(net))]
    x, y = digits.x_train[: recipe.batch].to(device), digits.y_train[: recipe.batch].to(device)
    seconds: list[list[float]] = [[], []]
    for i in range(12):
        for (contestant, optimizer), times in zip(contestants, seconds, strict=True):
            started = time.perf_counter()
            _step(contestant, optimizer, x, y, recipe)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if i >= 2:
                times.append(time.perf_counter() - started)
    fused, reference = (len(x) / statistics.median(times) for times in seconds)
    return fused, reference


def _with_loops(net: nn.Module) -> nn.Module:
    """A copy in plain PyTorch: neurons are loops over time behind batch norms of their own, attentions matrix products
    between such neurons."""
    net = copy.deepcopy(net)
    for m in net.modules():
        if isinstance(m, Neuron):
            m.forward = functools.partial(_loop, m)  # type: ignore[method-assign]
        elif isinstance(m, TokenAttention):
            m.forward = functools.partial(_token_attention, m)  # type: ignore[method-assign]
        elif isinstance(m, SelfAttention):
            m.attend = functools.partial(_attend, m)  # type: ignore[method-assign]
    return net


def _loop(neuron: Neuron, x: Tensor, norm: nn.Module | None = None, residual: Tensor | None = None) -> Tensor:
    if norm is not None:
        x = over_time(norm, x)
    return lif_ref(x if residual is None else x + residual, **neuron.constants())[0]


def _token_attention(attention: TokenAttention, x: Tensor) -> Tensor:
    q, k = attention.currents(x)
    y = qk_attention_ref(q, k, "token", attention.attn_lif, attention.qkv_lif)
    return fire(y.reshape(x.shape), attention.proj, attention.lif)


def _attend(attention: SelfAttention, x: Tensor) -> Tensor:
    q, k, v = attention.currents(x)
    return spiking_self_attention_ref(q, k, v, 0.125, attention.attn_lif, attention.qkv_lif).reshape(x.shape)


# ---- files ---------------------------------------------------------------------------------------------------------


def _write(
    out: Path, runs: list[Run], recipe: Recipe, digits: Digits, device: torch.device,
    measured: dict[str, Any] | None = None,
) -> dict[str, str]:  # fmt: skip
    """Weights, metrics.csv and config.json of the epochs finished; returns the weights' sha256 by file."""
    ours = {run.file for run in runs} | ({"report.png"} if measured else set())
    for stale in (*out.glob("model*.safetensors"), out / "report.png"):  # of an earlier run in this folder
        if stale.name not in ours:
            stale.unlink(missing_ok=True)
    for run in runs:
        replace_file(out / run.file, run.weights)
    table = io.StringIO()
    writer = csv.DictWriter(table, fieldnames=list(runs[0].rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: round(v, 6) for k, v in row.items()} for run in runs for row in run.rows)
    replace_file(out / "metrics.csv", table.getvalue().encode())
    weights = {run.file: hashlib.sha256(run.weights).hexdigest() for run in runs}
    config = {
        "model": MODEL,
        "model_kwargs": MODEL_KWARGS,
        "recipe": asdict(recipe),
        "data": {
            "name": "scikit-learn digits",
            "train": len(digits.y_train),
            "test": len(digits.y_test),
            "split_sha256": digits.split_sha256,
        },
        "finished": measured is not None,
        "metrics": _metrics(runs, measured),
        "versions": _versions(device),
        "weights_sha256": weights,
    }
    replace_file(out / "config.json", (json.dumps(config, indent=2) + "\n").encode())
    return weights


def _metrics(runs: list[Run], measured: dict[str, Any] | None) -> dict[str, Any]:
    accuracies = [run.rows[-1]["test_accuracy"] for run in runs]
    metrics: dict[str, Any] = {
        "epochs_finished": {run.seed: len(run.rows) for run in runs},
        "test_accuracy": {run.seed: a for run, a in zip(runs, accuracies, strict=True)},
        "test_accuracy_mean": statistics.mean(accuracies),
        "test_accuracy_spread": max(accuracies) - min(accuracies),
    }
    if measured:
        energy: EnergyReport = measured["energy"]
        metrics |= {
            "firing_rates": energy.firing_rates,
            "macs": energy.macs,
            "acs": energy.acs,
            "energy_nj": energy.energy_pj * 1e-3,
            "samples_per_s_fused": measured["fused"],
            "samples_per_s_pytorch_loop": measured["loop"],
            "training_seconds": measured["training_seconds"],
        }
    return metrics


def _versions(device: torch.device) -> dict[str, Any]:
    info = backend_info()
    return {
        "spikecore": info["version"],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "device": device.type,
        "isa": info["isa"],
        "gpu_backend": info["gpu_backend"],
        "threads": torch.get_num_threads(),
    }


# ---- the table -----------------------------------------------------------------------------------------------------


def _table(out: Path, runs: list[Run], measured: dict[str, Any], weights: dict[str, str], n_test: int) -> list[str]:
    energy: EnergyReport = measured["energy"]
    accuracies = [run.rows[-1]["test_accuracy"] for run in runs]
    wrong = [round((1 - a) * n_test) for a in accuracies]
    names = [f"{layer.name} {layer.layer}" for layer in energy.layers]
    width = max(map(len, names)) + 1
    head = f"{'layer':<{width}}{'input rate':>11}{'fires':>8}{'MACs':>11}{'ACs':>11}{'nJ':>9}"
    lines = ["", "per test image, summed over the time steps", "", head, "-" * len(head)]
    # Behind every layer but the last stands one neuron layer; both are listed in the order in which they run.
    for name, layer, rate in itertools.zip_longest(names, energy.layers, energy.firing_rates.values()):
        fires = "" if rate is None else f"{rate:.1%}"
        lines.append(
            f"{name:<{width}}{layer.rate:>11.1%}{fires:>8}{layer.macs:>11,.0f}{layer.acs:>11,.0f}"
            f"{layer.energy_pj * 1e-3:>9.1f}"
        )
    lines += [
        "-" * len(head),
        f"{'total':<{width}}{'':>19}{energy.macs:>11,.0f}{energy.acs:>11,.0f}{energy.energy_pj * 1e-3:>9.1f}",
        f"energy: {PJ_PER_MAC} pJ per MAC, {PJ_PER_AC} pJ per AC (45 nm, Horowitz 2014)",
        "",
    ]
    for run, accuracy, errors in zip(runs, accuracies, wrong, strict=True):
        lines.append(f"test accuracy     {accuracy:.2%}   (seed {run.seed}, {errors} of {n_test} wrong, last epoch)")
    if len(runs) > 1:
        spread = (max(accuracies) - min(accuracies)) * 100
        lines.append(f"                  {statistics.mean(accuracies):.2%}   mean, spread {spread:.2f} points")
    fused, loop = measured["fused"], measured["loop"]
    return [
        *lines,
        f"training          {measured['training_seconds']:.1f} s, {len(runs)} x {len(runs[0].rows)} epochs",
        f"throughput        {fused:,.0f} samples/s fused, {loop:,.0f} with neurons and attentions as PyTorch loops"
        f" ({fused / loop:.2f}x)",
        f"backend           {measured['backend']}",
        f"written           {out}/: {', '.join(weights)}, config.json, metrics.csv, report.png",
    ]
