"""The samples of `qk_attention` and `spike_driven_attention`: modes, neurons, layouts, sizes; spikes and currents."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from spikecore.ops.lif import LIFParams
from spikecore.ops.qk_attention import (
    qk_attention,
    qk_attention_ref,
    spike_driven_attention,
    spike_driven_attention_ref,
)
from spikecore.surrogate import Sigmoid
from spikecore.testing.cases._case import LAYOUTS, Case, Sample, as_tuple, values
from spikecore.testing.cases.lif import SURROGATES

_SHAPE = (4, 2, 3, 5, 7)  # [T, B, H, D, N]


def _neuron(dtype: torch.dtype, grid: bool, seed: int, H: int, **p: Any) -> LIFParams:
    """decay and gain: numbers, "scalar" or "heads"."""
    state = torch.float64 if dtype == torch.float64 else torch.float32
    p = {"decay": 0.5, "gain": 0.5, "v_threshold": 0.5, **p}
    for i, arg in enumerate(("decay", "gain")):
        if isinstance(p[arg], str):
            size = () if p[arg] == "scalar" else (H,)
            t = torch.randint(1, 4, size, generator=torch.Generator().manual_seed(seed + i)) / 4
            p[arg] = t.to(state) if grid else (t * 0.9).to(state)
        elif not grid and p[arg] == 0.5:  # constants that round, too
            p[arg] = 1 / 3
    return LIFParams(**p)


def _tokens_of_channels(x: Tensor) -> Tensor:
    """Heads of a [T, B, N, C]: channels innermost, then heads."""
    return x.permute(0, 1, 4, 2, 3).contiguous().permute(0, 1, 3, 4, 2)


def _heads_of_more(x: Tensor) -> Tensor:
    """A part of the channels of a projection to q, k and v at once."""
    return torch.cat([torch.full_like(x, torch.nan), x], 2)[:, :, x.shape[2] :]


_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "tokens of channels": _tokens_of_channels,
    "heads of more": _heads_of_more,
    **{name: LAYOUTS[name] for name in ("slice of T", "expanded T", "batch first", "every other channel", "unaligned")},
    "reversed dims": LAYOUTS["reversed dims"],
    "time innermost": LAYOUTS["time innermost"],
}


def _sample(
    name: str, operands: str, dtype: torch.dtype, grid: bool, shape: tuple[int, ...] = _SHAPE,
    layout: str = "contiguous", spikes: bool = False, attn: dict[str, Any] | None = None,
    qkv: dict[str, Any] | None = None, **arguments: Any,
) -> Sample:  # fmt: skip
    seed = sum(map(ord, name))  # other numbers in each sample, the same in every process
    tensors: dict[str, Any] = {}
    for i, arg in enumerate(operands):
        x = values(shape, dtype, grid, seed + i)
        if spikes:
            x = (x >= 1).to(dtype)
        tensors[arg] = _LAYOUTS[layout](x) if layout in _LAYOUTS else x
    arguments |= {"attn": _neuron(dtype, grid, seed + 10, shape[2], **(attn or {}))}
    if qkv is not None:
        arguments |= {"qkv": _neuron(dtype, grid, seed + 20, shape[2], **{"v_threshold": 1.0, **qkv})}
    return Sample(name, tensors | arguments)


def _samples(operands: str, modes: tuple[str, ...]) -> Callable[[torch.dtype, bool], Iterator[Sample]]:
    def samples(dtype: torch.dtype, grid: bool) -> Iterator[Sample]:
        for mode in modes:
            for title, changes in _calls():
                arguments: dict[str, Any] = {"mode": mode} if mode else {}
                yield _sample(f"{mode} {title}".strip(), operands, dtype, grid, **changes, **arguments)

    return samples


def _calls() -> Iterator[tuple[str, dict[str, Any]]]:
    learnt: dict[str, Any] = {"decay": "heads", "gain": "scalar"}
    every: dict[str, Any] = {"attn": {**learnt, "v_threshold": 1.0}, "qkv": {"decay": "scalar", "gain": "heads"}}
    yield "spikes", {"spikes": True}
    yield "floats", {"shape": (4, 2, 3, 16, 33), "attn": {"v_threshold": 8.0}}
    yield "currents", {"qkv": {}}
    yield "learnable", {"spikes": True, "attn": {"decay": "scalar", "gain": "heads", "detach_reset": False}}
    yield "currents, learnable", every
    yield "currents, attached", {k: {**v, "detach_reset": False} for k, v in every.items()}
    soft: dict[str, Any] = {"v_reset": None, "detach_reset": False}
    yield "currents, soft, attached", {k: {**v, **soft, "reset_by": 0.75} for k, v in every.items()}
    yield "currents, strict", {"attn": {"strict": True, "gain": 1.0}, "qkv": {"strict": True, "gain": 1.0}}
    rest: dict[str, Any] = {"v_reset": -0.25, "decay": "heads", "detach_reset": False}
    yield "currents, hard reset below zero", {"attn": rest, "qkv": {**rest, "v_threshold": 0.75}}
    for s in SURROGATES:
        yield f"currents, {type(s).__name__}", {"attn": {"surrogate": s, "v_threshold": 2.0}, "qkv": {"surrogate": s}}
    for layout in _LAYOUTS:
        if layout in ("tokens of channels", "heads of more", "time innermost"):
            yield layout, {"layout": layout, "spikes": True, "attn": learnt}
        yield f"{layout}, currents", {"layout": layout, **every}
    for D, N in ((1, 1), (1, 7), (7, 1), (48, 63), (17, 33), (3, 500), (20, 1000)):
        yield f"D={D} N={N}", {"shape": (2, 1, 2, D, N), "spikes": True, "attn": {"v_threshold": 4.0}}
        if D * N > 100:
            continue
        yield f"D={D} N={N}, currents", {"shape": (3, 1, 2, D, N), **every}
    yield "wide, currents", {"shape": (2, 1, 2, 20, 300), "attn": {"v_threshold": 6.0}, "qkv": {"decay": "heads"}}
    yield "wide, tokens of channels", {"shape": (2, 1, 2, 300, 20), "layout": "tokens of channels", "spikes": True}
    yield "one head", {"shape": (4, 3, 1, 5, 7), "spikes": True, "attn": learnt}
    yield "T=1", {"shape": (1, *_SHAPE[1:]), **every}
    yield "T=17, currents", {"shape": (17, 1, 2, 3, 5), **every}
    for empty in ((4, 0, 3, 5, 7), (4, 2, 0, 5, 7), (4, 2, 3, 0, 7), (4, 2, 3, 5, 0)):
        yield f"empty {list(empty)}", {"shape": empty, **every}


def _bytes(operands: int) -> Callable[[Sample], tuple[int, int]]:
    def moved(sample: Sample) -> tuple[int, int]:
        each = sample.arguments["q"].numel() * sample.arguments["q"].element_size()
        return (operands + 1) * each, (2 * operands + 1) * each

    return moved


def _large(operands: str) -> Callable[[torch.dtype], Iterator[Sample]]:
    def large(dtype: torch.dtype) -> Iterator[Sample]:
        learnt: dict[str, Any] = {"decay": torch.full((3,), 0.6), "gain": torch.full((), 0.7)}
        q: dict[str, Any] = {arg: values((4, 5, 3, 37, 291), dtype, False, i) for i, arg in enumerate(operands)}
        neurons = {"attn": LIFParams(**learnt, v_threshold=4.0), "qkv": LIFParams(**learnt, surrogate=Sigmoid(4.0))}
        yield Sample("currents", {**q, **neurons})
        turned = {arg: _tokens_of_channels(x) for arg, x in q.items()}
        yield Sample("floats, tokens of channels", {**turned, "attn": neurons["attn"]})

    return large


def _case(name: str, op: Any, ref: Any, operands: str, modes: tuple[str, ...], few: tuple[str, ...]) -> Case:
    return Case(
        name=name,
        op=as_tuple(op),
        ref=as_tuple(ref),
        registered=("qk_attention_fwd", "qk_attention_bwd"),
        dtypes=(torch.float32, torch.bfloat16, torch.float16, torch.float64),
        samples=_samples(operands, modes),
        outputs=lambda sample: ("out",),
        discrete=frozenset({"out"}),
        bytes_moved=_bytes(len(operands)),
        few=few,
        large=_large(operands),
    )


CASE = _case(
    "qk_attention", qk_attention, qk_attention_ref, "qk", ("token", "channel"),
    ("token currents, learnable", "channel spikes", "token tokens of channels", "channel empty [4, 2, 3, 0, 7]"),
)  # fmt: skip
SPIKE_DRIVEN = _case(
    "spike_driven_attention", spike_driven_attention, spike_driven_attention_ref, "qkv", ("",),
    ("currents, learnable", "spikes", "tokens of channels, currents"),
)  # fmt: skip
