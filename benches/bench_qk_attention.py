"""`qk_attention` and `spike_driven_attention` (tau 2, ATan, hard reset) against the composition of torch's operators
with a plain loop as neuron (eager and compiled), and with SpikingJelly's. Packed spikes: ours alone, peers get floats.

A peer makes, for a number of neurons, the functions LIF(v_threshold) that a composition calls.
"""

import importlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from spikecore.ops import (
    LIFParams,
    pack_spikes,
    qk_attention,
    qk_attention_ref,
    spike_driven_attention,
    spike_driven_attention_ref,
)
from spikecore.ops.lif import lif_ref
from spikecore.testing.cases import values
from spikecore.testing.compare import assert_close
from spikecore.testing.timing import Problem, Scaling

DISTRIBUTIONS = ("spikingjelly",)
SHAPE, QUICK, LARGE = (4, 8, 8, 48, 196), (4, 1, 2, 4, 9), (4, 64, 8, 48, 196)  # LARGE: of a GPU, beyond its caches
LIF = Callable[[Tensor], Tensor]
MakeLIF = Callable[[float, torch.device], LIF]

ATTN, QKV = LIFParams(v_threshold=0.5), LIFParams()


def token(lif: LIF, *_: LIF) -> Callable[..., Tensor]:
    return lambda q, k: lif(q.sum(3, keepdim=True)) * k


def channel(lif: LIF, *_: LIF) -> Callable[..., Tensor]:
    return lambda q, k: lif(q.sum(4, keepdim=True)) * k


def spike_driven(lif: LIF, *_: LIF) -> Callable[..., Tensor]:
    return lambda q, k, v: lif((k * v).sum(4, keepdim=True)) * q


def token_of_currents(lif: LIF, q_lif: LIF, k_lif: LIF) -> Callable[..., Tensor]:
    return lambda q, k: lif(q_lif(q).sum(3, keepdim=True)) * k_lif(k)


# name: (ours, its reference, the composition of torch's operators, operands, {direction: times SpikingJelly must take})
Row = tuple[Callable, Callable, Callable, int, dict[str, float]]
ROWS: dict[str, Row] = {
    "token": (qk_attention, qk_attention_ref, token, 2, {"forward": 4.0, "training": 5.0}),
    "channel": (
        partial(qk_attention, mode="channel"), partial(qk_attention_ref, mode="channel"), channel, 2, {},
    ),
    "spike-driven": (
        spike_driven_attention, spike_driven_attention_ref, spike_driven, 3, {"forward": 4.0, "training": 5.0},
    ),
    "token of currents": (
        partial(qk_attention, qkv=QKV), partial(qk_attention_ref, qkv=QKV), token_of_currents, 2,
        {"forward": 20.0, "training": 12.0},
    ),
    "token, packed": (qk_attention, qk_attention_ref, token, 2, {}),
    "spike-driven, packed": (spike_driven_attention, spike_driven_attention_ref, spike_driven, 3, {}),
}  # fmt: skip


def loop(v_threshold: float, device: torch.device) -> LIF:
    return lambda x: lif_ref(x, v_threshold=v_threshold)[0]


def spikingjelly(v_threshold: float, device: torch.device) -> LIF:
    neuron, surrogate = (importlib.import_module(f"spikingjelly.activation_based.{m}") for m in ("neuron", "surrogate"))
    node = neuron.LIFNode(
        tau=2.0, v_threshold=v_threshold, surrogate_function=surrogate.ATan(2.0), detach_reset=True, step_mode="m"
    ).to(device)

    def run(x: Tensor) -> Tensor:
        node.reset()
        return node(x)

    return run


def compose(composition: Callable, make: MakeLIF, device: torch.device) -> Callable[..., Tensor]:
    return composition(*(make(v_threshold, device) for v_threshold in (0.5, 1.0, 1.0)))


def compiled(composition: Callable, device: torch.device) -> Callable[..., Tensor]:
    torch._dynamo.reset()
    # The number of threads is written into the code; naming it keeps the compiler's cache from mixing them up.
    options = {"cpp.threads": torch.get_num_threads()}
    return torch.compile(compose(composition, loop, device), dynamic=False, options=options)


def operands(name: str, shape: tuple[int, ...], count: int, device: str) -> list[Tensor]:
    """Currents, or the spikes of about a third of the neurons."""
    x = [values(shape, torch.float32, False, seed).to(device) for seed in range(count)]
    return x if "currents" in name else [(t >= 1).float() for t in x]


def train(f: Callable[..., Tensor], x: list[Tensor], g_out: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(f(*x), x, g_out)


def parity(device: str) -> None:
    """Outputs equal to the reference's and gradients as close as its own precision allows."""
    for name, (ours, ref, _, count, _) in ROWS.items():
        x = [t.requires_grad_() for t in operands(name, (4, 1, 2, 24, 49), count, device)]
        assert torch.equal(ours(*x), ref(*x)), name
        if "packed" in name:
            bits = [pack_spikes(t) for t in x]
            assert torch.equal(ours(*bits, T=4), pack_spikes(ref(*x))), name
            continue
        g_out = torch.randn(x[0].shape, generator=torch.Generator().manual_seed(1)).to(device)
        x64 = [t.detach().double().requires_grad_() for t in x]
        for got, want, want64 in zip(
            train(ours, x, g_out), train(ref, x, g_out), train(ref, x64, g_out.double()), strict=True
        ):
            assert_close(got, want, want64, name)


def problem(name: str, direction: str, shape: tuple[int, ...], device: str, quick: bool) -> Problem:
    ours, _, composition, count, bars = ROWS[name]
    x = operands(name, shape, count, device)
    leaves, g_out, out = [t.clone().requires_grad_() for t in x], torch.randn_like(x[0]), torch.empty_like(x[0])
    runs, skipped = {"spikecore": ours, "eager": compose(composition, loop, x[0].device)}, {}
    if quick:
        skipped["torch.compile"] = "compiles for too long for --quick"
    else:
        runs["torch.compile"] = compiled(composition, x[0].device)
    try:
        runs["spikingjelly"] = compose(composition, spikingjelly, x[0].device)
    except ImportError as e:
        skipped["spikingjelly"] = str(e)
    moved = out.nbytes
    if direction == "forward":
        calls = {peer: partial(_inference, f, x) for peer, f in runs.items()}
        if "packed" in name:
            bits = [pack_spikes(t) for t in x]
            calls["spikecore"] = partial(_inference, partial(ours, T=shape[0]), bits)
            moved = bits[0].nbytes
    else:
        calls = {peer: partial(train, f, leaves, g_out) for peer, f in runs.items()}
    return Problem(
        name=name,
        direction=direction,
        calls={"copy": partial(out.copy_, x[0]), **calls},
        must_move=(count + 1 + (2 * count + 1) * (direction == "training")) * moved,
        copied=2 * out.nbytes,
        inputs=tuple(leaves),
        trained={p: partial(f, *leaves) for p, f in runs.items()} if direction == "training" else {},
        bars={"spikingjelly": bars[direction]} if device == "cpu" and bars and not quick else {},
        skipped=skipped,
    )


def problems(device: str, quick: bool) -> Iterator[Problem]:
    for name in ROWS:
        for direction in ("forward",) if "packed" in name else ("forward", "training"):
            yield problem(name, direction, QUICK if quick else SHAPE if device == "cpu" else LARGE, device, quick)


def scaling(device: str, quick: bool) -> Iterator[Scaling]:
    """Over the tokens."""
    T, B, H, D, _ = QUICK if quick else (4, 1, 8, 48, 0)
    tokens = (4, 9) if quick else (64, 256, 1024, 4096, 16384)
    for direction in ("forward", "training"):
        at = {N: problem("token of currents", direction, (T, B, H, D, N), device, True) for N in tokens}
        yield Scaling(f"token of currents, {direction}", "N", at)


def _inference(f: Callable[..., Tensor], x: list[Tensor]) -> Tensor:
    with torch.no_grad():
        return f(*x)
