"""`lif` (tau 2, ATan, hard reset) against a copy of its input, eager PyTorch, torch.compile, SpikingJelly, snnTorch.

A peer is a function x -> (x -> spikes) that raises ImportError where it is not installed.
"""

import importlib
import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from spikecore.ops import lif
from spikecore.ops.lif import lif_ref
from spikecore.testing.cases import CASES, LAYOUTS, Sample, values
from spikecore.testing.compare import assert_close
from spikecore.testing.timing import Problem, Scaling

DISTRIBUTIONS = ("spikingjelly", "snntorch")
Spiking = Callable[[Tensor], Tensor]

# name: (shape, layout, {direction: times over copy allowed on a CPU})
SHAPES: dict[str, tuple[tuple[int, ...], str, dict[str, float]]] = {
    "T=4 N=2^21": ((4, 1 << 21), "contiguous", {"forward": 1.3, "training": 4.0}),
    "T=4 N=2^18": ((4, 1 << 18), "contiguous", {"forward": 1.5, "training": 5.0}),
    "T=16 N=2^18": ((16, 1 << 18), "contiguous", {"forward": 2.0, "training": 5.5}),
    "T=64 N=2^16": ((64, 1 << 16), "contiguous", {"forward": 2.0, "training": 5.5}),
    "4x32x64x56x56": ((4, 32, 64, 56, 56), "contiguous", {}),
    "4x32x64x56x56 channels-last": ((4, 32, 64, 56, 56), "channels-last", {}),
}
# Of a GPU, beyond its caches.
LARGE: dict[str, tuple[tuple[int, ...], str, dict[str, float]]] = {
    "T=4 N=2^18": ((4, 1 << 18), "contiguous", {}),
    "T=4 N=2^23": ((4, 1 << 23), "contiguous", {}),
    "T=4 N=2^23 float16": ((4, 1 << 23), "contiguous", {}),
    "T=16 N=2^21": ((16, 1 << 21), "contiguous", {}),
    "T=32 N=2^20": ((32, 1 << 20), "contiguous", {}),
    "T=32 N=2^20 float16": ((32, 1 << 20), "contiguous", {}),
    "4x64x128x28x28 channels-last": ((4, 64, 128, 28, 28), "channels-last", {}),
}
QUICK: dict[str, tuple[tuple[int, ...], str, dict[str, float]]] = {
    "T=4 N=2^12": ((4, 1 << 12), "contiguous", {}),
    "4x2x8x7x7 channels-last": ((4, 2, 8, 7, 7), "channels-last", {}),
}


def ours(x: Tensor) -> Tensor:
    return lif(x)[0]


def eager(x: Tensor) -> Spiking:
    return lambda x: lif_ref(x)[0]


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


def compiled(x: Tensor) -> Spiking:
    if len(x) > 16:
        raise ImportError("unrolls the loop over T: minutes to compile at T > 16")
    torch._dynamo.reset()
    # The number of threads is written into the code; naming it keeps the compiler's cache from mixing them up.
    options = {"cpp.threads": torch.get_num_threads()}
    return torch.compile(_loop, fullgraph=True, dynamic=False, options=options)


def spikingjelly(x: Tensor) -> Spiking:
    neuron, surrogate = (importlib.import_module(f"spikingjelly.activation_based.{m}") for m in ("neuron", "surrogate"))
    # 2.0 chooses the backend from the device: on the CPU there is one.
    node = neuron.LIFNode(tau=2.0, surrogate_function=surrogate.ATan(2.0), detach_reset=True, step_mode="m")
    node = node.to(x.device)

    def run(x: Tensor) -> Tensor:
        node.reset()
        return node(x)

    return run


def snntorch(x: Tensor) -> Spiking:
    if x.numel() > 1 << 22:
        raise ImportError("slow: only shapes of up to 4 M values")
    snn, surrogate = (importlib.import_module(m) for m in ("snntorch", "snntorch.surrogate"))
    # Its input has no gain: twice the potential and threshold and half of alpha give the same spikes and gradient.
    node = snn.Leaky(beta=0.5, threshold=2.0, reset_mechanism="zero", spike_grad=surrogate.atan(1.0)).to(x.device)

    def run(x: Tensor) -> Tensor:
        mem, ss = torch.zeros_like(x[0]), []
        for x_t in x:
            s, mem = node(x_t, mem)
            ss.append(s)
        return torch.stack(ss)

    return run


PEERS: dict[str, Callable[[Tensor], Spiking]] = {
    "eager": eager,
    "torch.compile": compiled,
    "spikingjelly": spikingjelly,
    "snntorch": snntorch,
}
SLOW_START = ("torch.compile",)


def inputs(shape: tuple[int, ...], layout: str, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return LAYOUTS[layout](values(shape, dtype, grid=False)).to(device)


def train(f: Spiking, x: Tensor, g_s: Tensor) -> Tensor:
    return torch.autograd.grad(f(x), x, g_s)[0]


def parity(device: str) -> None:
    """Spikes equal to the reference's and gradients as close as its own precision allows, on inputs as timed below."""
    for shape, layout in (((4, 1000), "contiguous"), ((16, 500), "contiguous"), ((4, 2, 6, 7, 7), "channels-last")):
        x = inputs(shape, layout, device).requires_grad_()
        g_s = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device)
        s, s_ref = ours(x), lif_ref(x)[0]
        assert torch.equal(s, s_ref), f"{shape} {layout}: {int((s != s_ref).sum())} of {s.numel()} spikes differ"
        x64 = x.detach().double().requires_grad_()
        g_ref, g_64 = (train(lambda x: lif_ref(x)[0], y, g_s.to(y.dtype)) for y in (x, x64))
        assert_close(train(ours, x, g_s), g_ref, g_64, f"{shape} {layout}: g_x")


def bars(T: int, direction: str, over_copy: dict[str, float], device: str) -> dict[str, float]:
    if device != "cpu" or not over_copy:
        return {}
    jelly = {"forward": (15.0, 8.0), "training": (12.0, 6.0)}[direction][T > 4]
    return {"copy": over_copy[direction], "spikingjelly": jelly, "torch.compile": {"forward": 1.0}.get(direction, 5.0)}


def problems(device: str, quick: bool) -> Iterator[Problem]:
    for name, (shape, layout, over_copy) in (QUICK if quick else SHAPES if device == "cpu" else LARGE).items():
        for direction in ("forward", "training"):
            leave_out = SLOW_START if quick else ()
            yield problem(
                name, shape, layout, direction, device, bars(shape[0], direction, over_copy, device), leave_out
            )


def scaling(device: str, quick: bool) -> Iterator[Scaling]:
    N, lengths = (1 << 8, (2, 4)) if quick else (1 << 15, (1, 2, 4, 8, 16, 32, 64, 128, 256))
    for direction in ("forward", "training"):
        points = {T: problem(f"T={T}", (T, N), "contiguous", direction, device, {}, SLOW_START) for T in lengths}
        yield Scaling(f"{direction}, N=2^{N.bit_length() - 1}", "T", points)


def problem(
    name: str, shape: tuple[int, ...], layout: str, direction: str, device: str, bars: dict[str, float],
    leave_out: tuple[str, ...] = (),
) -> Problem:  # fmt: skip
    x = inputs(shape, layout, device, torch.float16 if "float16" in name else torch.float32)
    leaf, g_s, out = x.clone().requires_grad_(), torch.randn_like(x), torch.empty_like(x)
    runs, skipped = {"spikecore": ours}, dict.fromkeys(leave_out, "compiles for too long here")
    for peer, make in PEERS.items():
        if peer in skipped:
            continue
        try:
            runs[peer] = make(x)
        except ImportError as e:
            skipped[peer] = str(e)
    forward = direction == "forward"
    must_move = CASES["lif"].bytes_moved(Sample(name, {"x": x}))
    return Problem(
        name=name,
        direction=direction,
        calls={"copy": partial(out.copy_, x)}
        | {p: _inference(f, x) if forward else partial(train, f, leaf, g_s) for p, f in runs.items()},
        must_move=must_move[0] if forward else sum(must_move),
        copied=2 * x.nbytes,
        inputs=(leaf,),
        trained={} if forward else {p: partial(f, leaf) for p, f in runs.items()},
        bars=bars,
        skipped=skipped,
    )


def _inference(f: Spiking, x: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.no_grad():
            return f(x)

    return run
