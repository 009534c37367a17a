"""Times whole models against the same architecture of SpikingJelly's model zoo: python benches/bench_models.py

Training step (forward, backward, no optimiser) and inference (ours with folded norms), float32, equal weights, both
contestants taking turns in one run; ratios are medians over turns (spikecore.testing.timing), peaks are of tensors
beyond weights, input and what was there before. Behind them stands where ours spends its time. The zoo has no
Spikingformer: it is built of SpikingJelly's layers; its Spikformer pools before the neurons, ours behind them: another
model, so it is left out. First both must agree in float64, outputs and gradients: a model that does not gets no number.
Peer: pip install "spikecore[bench]".
"""

import argparse
import json
import math
import os
import pathlib
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from spikecore.models import create_model, fold_norms
from spikecore.testing import timing

# Least that ours should reach, as geometric means: speed in training and inference, at most so much of the peer's peak.
BARS = {"training": 1.2, "inference": 1.4, "memory": 0.7}
Peer = tuple[nn.Module, Callable[[Tensor], Tensor]]


def peers() -> dict[str, tuple[str, dict[str, Any], tuple[int, ...], Callable[[], nn.Module]]]:
    """Title: our name and settings, the input, and how SpikingJelly builds the same."""
    from spikingjelly.activation_based import neuron, surrogate
    from spikingjelly.activation_based.model import (
        ms_resnet,
        qkformer,
        sew_resnet,
        spike_driven_transformer,
    )
    from spikingjelly_spikingformer import spikingformer

    return {
        "QKFormer-4-384": (
            "qkformer_10_384", {"depth": 4, "num_classes": 10}, (2, 3, 64, 64),
            lambda: qkformer.QKFormer(
                num_classes=10, embed_dims=384, num_heads=(6, 6, 6), depths=(1, 2, 1), detach_reset=True
            ),
        ),
        "Spikingformer-4-384": (
            "spikingformer_4_384", {}, (2, 3, 32, 32), lambda: spikingformer(384, 12, 4, 10),
        ),
        "SDT-2-384": (
            "sdt_8_384", {"depth": 2, "num_classes": 10, "pools": (False, False, True, True)}, (2, 3, 32, 32),
            lambda: spike_driven_transformer.SpikeDrivenTransformer(
                num_classes=10, embed_dims=384, num_heads=8, depths=2, pooling_stat="0011", detach_reset=True
            ),
        ),
        "SEW-ResNet18": (
            "sew_resnet18", {"num_classes": 10}, (2, 3, 96, 96),
            lambda: sew_resnet.sew_resnet18(
                cnf="ADD", spiking_neuron=neuron.IFNode, detach_reset=True, surrogate_function=surrogate.ATan(),
                num_classes=10,
            ),
        ),
        "MS-ResNet18": (
            "ms_resnet18", {"T": 4, "num_classes": 10}, (2, 3, 96, 96),
            lambda: ms_resnet.MSResNet(T=4, num_classes=10, surrogate_function=surrogate.Rect(1.0)),
        ),
    }  # fmt: skip


def layers(model: nn.Module, call: Callable[[], Any]) -> list[list[nn.Module]]:
    """Convolutions and linear layers in the order of calls, each with the batch norm behind it."""
    found: list[list[nn.Module]] = []
    seen: set[nn.Module] = set()

    def note(m: nn.Module, *_: Any) -> None:
        if m in seen:
            return
        seen.add(m)
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            found[-1].append(m)
        else:
            found.append([m])

    kinds = (nn.Conv1d, nn.Conv2d, nn.Linear, nn.modules.batchnorm._BatchNorm)
    hooks = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, kinds)]
    call()
    for hook in hooks:
        hook.remove()
    return found


def counterparts(
    ours: nn.Module, run: Callable[[Tensor], Tensor], peer: nn.Module, x: Tensor
) -> list[tuple[nn.Module, nn.Module, int, int]]:
    """Our layer, the peer's, and which of how many parts of the latter's rows it is: queries, keys and values may be
    one layer of the peer's."""
    theirs, own = layers(peer, lambda: run(x)), layers(ours, lambda: ours(x))
    found = []
    for source in theirs:
        rows, columns = source[0].weight.flatten(1).shape
        options = [(1, rows)]
        if isinstance(source[0], nn.Conv1d):
            options += [(parts, columns) for parts in (2, 3) if rows == parts * columns]
        shapes = [tuple(t[0].weight.flatten(1).shape) for t in own]
        at, parts = min((shapes.index((r, columns)), p) for p, r in options if (r, columns) in shapes)
        for part, target in enumerate(own[at : at + parts]):
            found += [(layer, source[i], part, parts) for i, layer in enumerate(target)]
        del own[at : at + parts]
    assert not own, f"{len(own)} of our layers have no counterpart"
    return found


@torch.no_grad()
def equal_weights(ours: nn.Module, run: Callable[[Tensor], Tensor], peer: nn.Module, x: Tensor) -> None:
    """Ours from the peer's, layer by layer; where one side alone has a bias in front of a norm, it becomes 0."""
    for layer, given, part, parts in counterparts(ours, run, peer, x):
        for name, v in layer.state_dict().items():
            rows = getattr(given, name)
            if rows is not None:
                v.copy_(rows if not v.dim() else rows.chunk(parts)[part].reshape(v.shape))
            else:
                v.zero_()
        if layer.__class__ not in (nn.BatchNorm2d,) and layer.bias is None and given.bias is not None:
            given.bias.zero_()


def pair(title: str) -> tuple[nn.Module, Peer, Tensor]:
    """Both models with equal weights whose neurons fire, and their input."""
    from spikingjelly.activation_based import functional

    name, settings, shape, build = peers()[title]
    torch.manual_seed(0)
    ours, peer, x = create_model(name, **settings), build(), torch.rand(shape)
    functional.set_step_mode(peer, "m")
    frames = x.expand(4, *x.shape)

    def run(x: Tensor) -> Tensor:
        functional.reset_net(peer)
        y = peer(frames.to(x) if x.shape == frames.shape[1:] else x.expand(4, *x.shape))
        return y.mean(0) if y.dim() == 3 else y

    norms = [m for m in peer.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for m in norms:
        nn.init.ones_(m.weight)
        nn.init.constant_(m.bias, 0.5)
        m.momentum = 1.0
    with torch.no_grad():
        run(x)  # statistics of this batch
    for m in norms:
        m.momentum = 0.1
    peer.eval()
    equal_weights(ours.eval(), run, peer, x)
    return ours, (peer, run), x


def parity(title: str) -> None:
    """Outputs and the gradient of the first convolution in float64, training and evaluation; folded norms' outputs."""
    ours, (peer, run), x = pair(title)
    ours, peer, x = ours.double(), peer.double(), x.double()
    for train in (False, True):
        found = []
        for model, call in ((ours, ours), (peer, run)):
            model.train(train)
            first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
            for m in model.modules():
                if isinstance(m, nn.Dropout):
                    m.eval()
            y = call(x)
            found.append((y, torch.autograd.grad(y.square().sum(), first.weight)[0]))
        assert found[0][0].abs().max() > 0, "silent"
        torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-8)
        if not train:
            torch.testing.assert_close(fold_norms(ours)(x), found[1][0], rtol=1e-6, atol=1e-8)


def step(model: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> None:
    model.zero_grad(set_to_none=True)
    call(x).square().mean().backward()


def inference(call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.inference_mode():
        return call(x)


def measure(title: str, direction: str, quick: bool) -> dict[str, Any]:
    ours, (peer, run), x = pair(title)
    if direction == "inference":
        ours = fold_norms(ours)
    for m in (ours, peer):
        m.train(direction == "training")
    if direction == "training":
        calls = {"spikecore": partial(step, ours, ours, x), "spikingjelly": partial(step, peer, run, x)}
    else:
        calls = {"spikecore": partial(inference, ours, x), "spikingjelly": partial(inference, run, x)}
    times = timing.bench(calls, warmup=0.0, duration=0.0 if quick else 2.0, turn=0.0)
    return {
        "model": title,
        "direction": direction,
        "input": list(x.shape),
        "times": {n: {"median": t.median, "lower": t.lower, "upper": t.upper} for n, t in times.items()},
        "faster": times["spikecore"].over(times["spikingjelly"]) ** -1,
        "peak": {n: timing.bytes_peak(call) for n, call in calls.items()},
        "shares": shares(calls["spikecore"]),
    }


PARTS = {  # by names of operators, the first that fits
    "convolution": ("conv",),
    "attention": ("attention",),
    "neuron": ("spikecore",),  # with the norms in front of them
    "norm": ("batch_norm", "BatchNorm"),
    "pool": ("pool",),
}


def shares(call: Callable[[], Any], calls: int = 3) -> dict[str, float]:
    """Where the time goes, as shares of the operators' own times."""
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(calls):
            call()
    spent = dict.fromkeys((*PARTS, "rest"), 0.0)
    for event in profile.key_averages():
        part = next((p for p, names in PARTS.items() if any(n in event.key for n in names)), "rest")
        spent[part] += event.self_cpu_time_total
    return {part: t / sum(spent.values()) for part, t in spent.items()}


def line(row: dict[str, Any]) -> str:
    a, b = (row["times"][n] for n in ("spikecore", "spikingjelly"))
    p, q = (row["peak"][n] / 2**20 for n in ("spikecore", "spikingjelly"))
    return (
        f"{row['model']:<20}{row['direction']:<10}{a['median'] * 1e3:8.0f} [{a['lower'] * 1e3:.0f}, "
        f"{a['upper'] * 1e3:.0f}] ms {b['median'] * 1e3:8.0f} ms {row['faster']:6.2f}x   "
        f"{p:7.0f} MiB {q:7.0f} MiB {p / q:5.0%}   {', '.join(f'{k} {v:.0%}' for k, v in row['shares'].items())}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Exit status 1 where a model disagrees with its counterpart."""
    parser = argparse.ArgumentParser(description="Time whole models against SpikingJelly's.")
    parser.add_argument("--model", help="only this one, such as SEW-ResNet18")
    parser.add_argument("--threads", type=int, help="default: all")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="five turns each, the numbers mean little")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    titles = list(peers())
    if options.model and options.model not in titles:
        parser.error(f"--model must be one of {', '.join(titles)}")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler reports each start and stop on stderr
    memory = timing.steady_memory()
    here = timing.machine("spikingjelly")
    print(f"{timing.machine_line(here)}; {torch.get_num_threads()} threads\n{memory}; contestants take turns")
    print(f"{'':<30}spikecore [quartiles]  SpikingJelly   faster   peak: spikecore, SpikingJelly, share   of our time")
    rows, red = [], []
    for title in [options.model] if options.model else titles:
        try:
            parity(title)
        except AssertionError as e:
            print(f"{title}: disagrees with SpikingJelly's, so no numbers: {str(e).strip().splitlines()[0]}")
            red.append(title)
            continue
        for direction in ("training", "inference"):
            rows.append(measure(title, direction, options.quick))
            print(line(rows[-1]), flush=True)
    for direction in ("training", "inference"):
        mine = [row for row in rows if row["direction"] == direction]
        if mine:
            faster = math.exp(sum(math.log(row["faster"]) for row in mine) / len(mine))
            share = math.exp(
                sum(math.log(r["peak"]["spikecore"] / r["peak"]["spikingjelly"]) for r in mine) / len(mine)
            )
            bar = f" (bar {BARS['memory']:.0%})" if direction == "training" else ""
            print(f"{direction}: {faster:.2f}x as fast (bar {BARS[direction]:g}); {share:.0%} of the peak{bar}")
    if options.json:
        options.json.write_text(json.dumps({"machine": here, "memory": memory, "rows": rows}, indent=1))
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
