"""`bn_lif` in training mode (tau 2, ATan) against `nn.BatchNorm2d` + our lif, SpikingJelly's, torch.compile.

A peer is a function (x, norm) -> (x -> spikes) that raises ImportError where it is not installed.
"""

import importlib
import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from spikecore.ops import bn_lif, lif
from spikecore.ops.lif import lif_ref
from spikecore.testing.cases import CASES, LAYOUTS, Sample, values
from spikecore.testing.compare import assert_close
from spikecore.testing.timing import Problem, Scaling

DISTRIBUTIONS = ("spikingjelly",)
Spiking = Callable[[Tensor], Tensor]

# name: (shape, layout): what the networks for CIFAR have, early and late
SHAPES: dict[str, tuple[tuple[int, ...], str]] = {
    "4x32x64x32x32": ((4, 32, 64, 32, 32), "contiguous"),
    "4x16x128x32x32": ((4, 16, 128, 32, 32), "contiguous"),
    "4x16x256x16x16": ((4, 16, 256, 16, 16), "contiguous"),
    "4x32x384x8x8": ((4, 32, 384, 8, 8), "contiguous"),
    "4x8x384x4x4": ((4, 8, 384, 4, 4), "contiguous"),
    "4x16x128x32x32 channels-last": ((4, 16, 128, 32, 32), "channels-last"),
    "4x32x384x8x8 channels-last": ((4, 32, 384, 8, 8), "channels-last"),
}
# Of a GPU, beyond its caches.
LARGE: dict[str, tuple[tuple[int, ...], str]] = {
    "4x128x64x32x32": ((4, 128, 64, 32, 32), "contiguous"),
    "4x128x384x8x8": ((4, 128, 384, 8, 8), "contiguous"),
    "4x128x64x32x32 channels-last": ((4, 128, 64, 32, 32), "channels-last"),
}
QUICK: dict[str, tuple[tuple[int, ...], str]] = {
    "4x2x8x7x7": ((4, 2, 8, 7, 7), "contiguous"),
    "4x2x8x7x7 channels-last": ((4, 2, 8, 7, 7), "channels-last"),
}


def ours(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    return bn_lif(x, norm.weight, norm.bias, norm.running_mean, norm.running_var, training=True)


def pair(norm: nn.BatchNorm2d, fire: Spiking) -> Spiking:
    """Batch norm over [T*B, ...], then a neuron over T."""
    return lambda x: fire(norm(x.flatten(0, 1)).unflatten(0, x.shape[:2]))


def eager(x: Tensor, norm: nn.BatchNorm2d) -> Spiking:
    return pair(norm, lambda y: lif_ref(y)[0])


def with_lif(x: Tensor, norm: nn.BatchNorm2d) -> Spiking:
    return pair(norm, lambda y: lif(y)[0])


class _Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h):
        ctx.save_for_backward(h)
        return (h >= 1.0).to(h.dtype)

    @staticmethod
    def backward(ctx, g_s):
        (h,) = ctx.saved_tensors
        return g_s / (1 + (math.pi * (h - 1.0)) ** 2)


def _loop(x: Tensor) -> Tensor:
    v, ss = torch.zeros_like(x[0]), []
    for x_t in x.unbind():
        h = 0.5 * v + 0.5 * x_t
        s = _Spike.apply(h)
        v = torch.where(s.detach() > 0, 0.0, h)
        ss.append(s)
    return torch.stack(ss)


def compiled(x: Tensor, norm: nn.BatchNorm2d) -> Spiking:
    torch._dynamo.reset()
    options = {"cpp.threads": torch.get_num_threads()}
    return torch.compile(pair(norm, _loop), fullgraph=True, dynamic=False, options=options)


def spikingjelly(x: Tensor, norm: nn.BatchNorm2d) -> Spiking:
    neuron, surrogate = (importlib.import_module(f"spikingjelly.activation_based.{m}") for m in ("neuron", "surrogate"))
    node = neuron.LIFNode(tau=2.0, surrogate_function=surrogate.ATan(2.0), detach_reset=True, step_mode="m")
    node = node.to(x.device)

    def fire(y: Tensor) -> Tensor:
        node.reset()
        return node(y)

    return pair(norm, fire)


PEERS: dict[str, Callable[[Tensor, nn.BatchNorm2d], Spiking]] = {
    "BatchNorm2d + lif": with_lif,
    "eager": eager,
    "torch.compile": compiled,
    "spikingjelly": spikingjelly,
}
SLOW_START = ("torch.compile",)


def inputs(shape: tuple[int, ...], layout: str, device: str) -> tuple[Tensor, nn.BatchNorm2d]:
    x = LAYOUTS[layout](values(shape, torch.float32, grid=False)).to(device)
    norm = nn.BatchNorm2d(shape[2]).to(device)
    nn.init.constant_(norm.bias, 0.75)
    return x, norm


def train(f: Spiking, leaves: tuple[Tensor, ...], g_s: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(f(leaves[0]), leaves, g_s)


def parity(device: str) -> None:
    """Spikes those of BatchNorm2d + reference, and gradients as close as its own precision allows."""
    for shape, layout in (((4, 2, 6, 7, 7), "contiguous"), ((4, 3, 6, 7, 7), "channels-last")):
        x, norm = inputs(shape, layout, device)
        leaves = (x.requires_grad_(), norm.weight, norm.bias)
        g_s = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device)
        s, s_ref = ours(x, norm), eager(x, norm)(x)
        assert torch.equal(s, s_ref), f"{shape} {layout}: {int((s != s_ref).sum())} of {s.numel()} spikes differ"
        norm64 = nn.BatchNorm2d(shape[2]).to(device).double()
        norm64.load_state_dict(norm.state_dict())
        x64 = x.detach().double().requires_grad_()
        got = train(partial(ours, norm=norm), leaves, g_s)
        ref = train(eager(x, norm), leaves, g_s)
        exact = train(eager(x64, norm64), (x64, norm64.weight, norm64.bias), g_s.double())
        for name, *results in zip(("x", "weight", "bias"), got, ref, exact, strict=True):
            assert_close(*results, f"{shape} {layout}: gradient of {name}")


def problems(device: str, quick: bool) -> Iterator[Problem]:
    for name, (shape, layout) in (QUICK if quick else SHAPES if device == "cpu" else LARGE).items():
        for direction in ("forward", "training"):
            yield problem(name, shape, layout, direction, device, SLOW_START if quick else ())


def scaling(device: str, quick: bool) -> Iterator[Scaling]:
    """Time and memory over the pixels of a map."""
    B, C, sides = (2, 8, (2, 4)) if quick else (8, 64, (4, 8, 16, 32, 64))
    for direction in ("forward", "training"):
        shapes = {side * side: (4, B, C, side, side) for side in sides}
        points = {
            n: problem(f"{n} pixels", shape, "contiguous", direction, device, SLOW_START) for n, shape in shapes.items()
        }
        yield Scaling(f"{direction}, T=4 B={B} C={C}", "pixels", points)


def problem(
    name: str, shape: tuple[int, ...], layout: str, direction: str, device: str, leave_out: tuple[str, ...]
) -> Problem:
    x, norm = inputs(shape, layout, device)
    leaf, g_s, out = x.clone().requires_grad_(), torch.randn_like(x), torch.empty_like(x)
    leaves = (leaf, norm.weight, norm.bias)
    runs: dict[str, Spiking] = {"spikecore": partial(ours, norm=norm)}
    skipped = dict.fromkeys(leave_out, "compiles for too long here")
    for peer, make in PEERS.items():
        if peer in skipped:
            continue
        try:
            runs[peer] = make(x, norm)
        except ImportError as e:
            skipped[peer] = str(e)
    forward = direction == "forward"
    must_move = CASES["bn_lif"].bytes_moved(Sample(name, {"x": x, "training": True}))
    return Problem(
        name=name,
        direction=direction,
        calls={"copy": partial(out.copy_, x)}
        | {p: _inference(f, x) if forward else partial(train, f, leaves, g_s) for p, f in runs.items()},
        must_move=must_move[0] if forward else sum(must_move),
        copied=2 * x.nbytes,
        inputs=leaves,
        trained={} if forward else {p: partial(f, leaf) for p, f in runs.items()},
        bars={"BatchNorm2d + lif": 1.0} if shape in dict(SHAPES.values()) else {},
        skipped=skipped,
        kept=2 * x.shape[2] * 4,
    )


def _inference(f: Spiking, x: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.no_grad():
            return f(x)

    return run
