"""`spiking_self_attention` against the composition of torch's matrix products with a neuron: SpikingJelly's, the plain
loop's, and that compiled. Spikes as floats, packed spikes (peers unpack nothing: they get floats), and currents.
"""

import importlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from spikecore.ops import LIFParams, pack_spikes, spiking_self_attention, spiking_self_attention_ref
from spikecore.surrogate import Sigmoid
from spikecore.testing.cases import CASES, Sample, values
from spikecore.testing.compare import assert_close
from spikecore.testing.timing import Problem, Scaling

DISTRIBUTIONS = ("spikingjelly",)
Attention = Callable[..., Tensor]
ATTN, QKV = LIFParams(v_threshold=0.5, surrogate=Sigmoid(4.0)), LIFParams(surrogate=Sigmoid(4.0))
SCALE = 0.125

# name: ([T, B, H, D, N], what comes in, {direction: times the composition with SpikingJelly must take on a CPU})
SHAPES: dict[str, tuple[tuple[int, ...], str, dict[str, float]]] = {
    "4x8x8x48x196 floats": ((4, 8, 8, 48, 196), "floats", {"forward": 5.0, "training": 4.0}),
    "4x8x8x48x196 packed": ((4, 8, 8, 48, 196), "packed", {}),
    "4x8x8x48x196 currents": ((4, 8, 8, 48, 196), "currents", {}),
}
# Of a GPU, beyond its caches.
LARGE: dict[str, tuple[tuple[int, ...], str, dict[str, float]]] = {
    f"4x64x8x48x196 {kind}": ((4, 64, 8, 48, 196), kind, {}) for kind in ("floats", "packed", "currents")
}
QUICK: dict[str, tuple[tuple[int, ...], str, dict[str, float]]] = {
    "4x1x2x8x20 floats": ((4, 1, 2, 8, 20), "floats", {}),
    "4x1x2x8x20 packed": ((4, 1, 2, 8, 20), "packed", {}),
    "4x1x2x8x20 currents": ((4, 1, 2, 8, 20), "currents", {}),
}


def ours(q: Tensor, k: Tensor, v: Tensor, *, currents: bool) -> Tensor:
    return spiking_self_attention(q, k, v, SCALE, ATTN, QKV if currents else None)


def eager() -> Attention:
    def run(q: Tensor, k: Tensor, v: Tensor, *, currents: bool) -> Tensor:
        return spiking_self_attention_ref(q, k, v, SCALE, ATTN, QKV if currents else None)

    return run


def compiled() -> Attention:
    torch._dynamo.reset()
    options = {"cpp.threads": torch.get_num_threads()}
    return torch.compile(eager(), dynamic=False, options=options)


def spikingjelly(device: str) -> Attention:
    neuron, surrogate = (importlib.import_module(f"spikingjelly.activation_based.{m}") for m in ("neuron", "surrogate"))

    def node(v_threshold: float) -> torch.nn.Module:
        return neuron.LIFNode(
            tau=2.0,
            v_threshold=v_threshold,
            surrogate_function=surrogate.Sigmoid(4.0),
            detach_reset=True,
            step_mode="m",
        ).to(device)

    attn, qkv = node(0.5), [node(1.0) for _ in range(3)]

    def run(q: Tensor, k: Tensor, v: Tensor, *, currents: bool) -> Tensor:
        for n in (attn, *qkv):
            n.reset()
        if currents:
            q, k, v = (n(x) for n, x in zip(qkv, (q, k, v), strict=True))
        return attn(SCALE * ((k @ v.transpose(-1, -2)).transpose(-1, -2) @ q))

    return run


def inputs(shape: tuple[int, ...], kind: str, device: str) -> list[Tensor]:
    x = [values(shape, torch.float32, False, i) for i in range(3)]
    return [(t if kind == "currents" else (t > 1.5).float()).to(device) for t in x]


def train(f: Attention, x: list[Tensor], g: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(f(*x), x, g)


def parity(device: str) -> None:
    """Spikes equal to the reference's and gradients as close as its own precision allows, on inputs as timed below."""
    shape = (4, 2, 2, 48, 196)
    g = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device)
    for kind in ("floats", "currents"):
        f, ref = (partial(h, currents=kind == "currents") for h in (ours, eager()))
        x = [t.requires_grad_() for t in inputs(shape, kind, device)]
        x64 = [t.detach().double().requires_grad_() for t in x]
        assert torch.equal(f(*x), ref(*x)), f"{kind}: spikes differ"
        got, want, exact = train(f, x, g), train(ref, x, g), train(ref, x64, g.double())
        for arg, a, b, c in zip("qkv", got, want, exact, strict=True):
            assert_close(a, b, c, f"{kind}: g_{arg}")


def _problem(
    name: str, shape: tuple[int, ...], kind: str, direction: str, peers: dict[str, Attention], bars: dict[str, float],
    skipped: dict[str, str], device: str,
) -> Problem:  # fmt: skip
    currents = kind == "currents"
    x = inputs(shape, kind, device)
    leaves, g, out = [t.clone().requires_grad_() for t in x], torch.randn_like(x[0]), torch.empty_like(x[0])
    runs = {n: partial(f, currents=currents) for n, f in {"spikecore": ours, **peers}.items()}
    given, extra = x, {}
    if direction == "training":
        calls = {n: partial(train, f, leaves, g) for n, f in runs.items()}
    else:
        calls = {n: partial(_inference, f, x) for n, f in runs.items()}
        if kind == "packed":
            given, extra = [pack_spikes(t) for t in x], {"T": shape[0]}
            calls["spikecore"] = partial(
                _inference, partial(spiking_self_attention, scale=SCALE, attn=ATTN, **extra), given
            )
    must = CASES["spiking_self_attention"].bytes_moved(Sample(name, {"q": given[0], **extra}))
    return Problem(
        name=name,
        direction=direction,
        calls={"copy": partial(out.copy_, x[0]), **calls},
        must_move=must[0] + must[1] * (direction == "training"),
        copied=2 * x[0].nbytes,
        inputs=tuple(leaves),
        trained={n: partial(f, *leaves) for n, f in runs.items()} if direction == "training" else {},
        bars=bars if device == "cpu" else {},
        skipped=skipped,
    )


def _peers(device: str, quick: bool) -> tuple[dict[str, Attention], dict[str, str]]:
    peers, skipped = {"eager": eager()}, {}
    if quick:
        skipped["torch.compile"] = "compiles for too long for --quick"
    else:
        peers["torch.compile"] = compiled()
    try:
        peers["spikingjelly"] = spikingjelly(device)
    except ImportError as e:
        skipped["spikingjelly"] = str(e)
    return peers, skipped


def problems(device: str, quick: bool) -> Iterator[Problem]:
    for name, (shape, kind, jelly) in (QUICK if quick else SHAPES if device == "cpu" else LARGE).items():
        for direction in ("forward",) if kind == "packed" else ("forward", "training"):
            peers, skipped = _peers(device, quick)
            bars = {"spikingjelly": jelly[direction]} if jelly else {}
            yield _problem(name, shape, kind, direction, peers, bars, skipped, device)


def scaling(device: str, quick: bool) -> Iterator[Scaling]:
    """Time and memory over the number of tokens: linear."""
    T, B, H, D = (4, 1, 2, 8) if quick else (4, 1, 8, 48)
    lengths = (16, 64) if quick else (64, 256, 1024, 4096)
    for direction in ("forward", "training"):
        by_length = {}
        for N in lengths:
            peers, skipped = _peers(device, True)
            name = f"{T}x{B}x{H}x{D}x{N} floats"
            by_length[N] = _problem(name, (T, B, H, D, N), "floats", direction, peers, {}, skipped, device)
        yield Scaling(f"spiking_self_attention {direction}", "N", by_length)


def _inference(f: Attention, x: list[Tensor]) -> Tensor:
    with torch.no_grad():
        return f(*x)
