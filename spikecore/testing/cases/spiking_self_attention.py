"""The samples of `spiking_self_attention`: spikes, packed spikes, other numbers, currents; every neuron and layout."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from spikecore.ops.lif import LIFParams, pack_spikes
from spikecore.ops.spiking_self_attention import spiking_self_attention, spiking_self_attention_ref
from spikecore.surrogate import Rectangle, Sigmoid
from spikecore.testing.cases._case import LAYOUTS, Case, Sample, as_tuple, values
from spikecore.testing.cases.lif import SURROGATES

_SHAPE = (4, 2, 3, 6, 21)  # [T, B, H, D, N]


def _spikes(shape: tuple[int, ...], dtype: torch.dtype, grid: bool, seed: int) -> Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.3).to(dtype)


def _numbers(shape: tuple[int, ...], dtype: torch.dtype, grid: bool, seed: int) -> Tensor:
    """Anything: on the grid so coarse that all sums are exact."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(-1, 3, shape, generator=g) / 2 if grid else torch.randn(shape, generator=g)
    return x.to(dtype)


_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    name: LAYOUTS[name] for name in LAYOUTS if name not in ("contiguous", "expanded T")
} | {
    "heads split": lambda x: x.flatten(2, 3).clone().unflatten(2, x.shape[2:4]),
    "tokens first": lambda x: x.movedim(-1, 2).contiguous().movedim(2, -1),
    "every other token": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], -1).flatten(-2)[..., ::2],
}


def _ssa_sample(
    name: str, dtype: torch.dtype, grid: bool, *, shape: tuple[int, ...] = _SHAPE, kind: str = "spikes",
    layout: str | None = None, scale: float = 0.125, attn: dict[str, Any] | None = None,
    qkv: dict[str, Any] | None = None,
) -> Sample:  # fmt: skip
    state = torch.float64 if dtype == torch.float64 and kind != "packed" else torch.float32
    seed = sum(map(ord, name))  # other numbers in each sample, the same in every process
    make = {"spikes": _spikes, "packed": _spikes, "numbers": _numbers, "currents": values}[kind]
    operands = {arg: make(shape, dtype, grid, seed + i) for i, arg in enumerate("qkv")}
    arguments: dict[str, Any] = {}
    if kind == "packed":
        operands = {arg: pack_spikes(x) for arg, x in operands.items()}
        arguments["T"] = shape[0]
    if layout is not None:
        operands = {arg: _LAYOUTS[layout](x) for arg, x in operands.items()}

    def neuron(p: dict[str, Any], seed: int) -> LIFParams:
        p = {"decay": 0.5, "gain": 0.5} | p
        for i, arg in enumerate(("decay", "gain")):
            if isinstance(p[arg], str):
                size = () if p[arg] == "scalar" else (shape[2],)
                value = torch.randint(1, 4, size, generator=torch.Generator().manual_seed(seed + i)) / 4
                p[arg] = value.to(state) if grid else (value * 0.9).to(state)
            elif not grid and p[arg] == 0.5:
                p[arg] = 1 / 3
        return LIFParams(**p)

    arguments["attn"] = neuron({"v_threshold": 0.5} | (attn or {}), seed + 3)
    if qkv is not None:
        arguments["qkv"] = neuron(qkv, seed + 5)
    return Sample(name, {**operands, "scale": scale if grid else scale * 1.1, **arguments})


def _ssa_samples(dtype: torch.dtype, grid: bool) -> Iterator[Sample]:
    def sample(name: str, **changes: Any) -> Sample:
        return _ssa_sample(name, dtype, grid, **changes)

    scalars, heads = {"decay": "scalar", "gain": "scalar"}, {"decay": "heads", "gain": "heads"}
    soft = {"v_reset": None, "detach_reset": False}
    yield sample("spikes")
    yield sample("spikes, heads", attn=heads)
    yield sample("spikes, scalars, attached", attn={**scalars, "detach_reset": False})
    yield sample("spikes, soft", attn={**soft, "decay": "heads", "gain": "scalar"}, scale=0.25)
    yield sample("spikes, strict", attn={"strict": True, "v_threshold": 0.25, "surrogate": Rectangle(1.0)})
    yield sample("spikes, below zero", attn={"v_reset": -0.25, "detach_reset": False, "decay": "heads"})
    yield sample("numbers", kind="numbers", attn=heads)
    yield sample("numbers, soft", kind="numbers", attn={**soft, **scalars})
    yield sample("currents", kind="currents", qkv={})
    yield sample("currents, heads", kind="currents", qkv=heads, attn=heads)
    yield sample("currents, scalars, attached", kind="currents", qkv={**scalars, "detach_reset": False}, attn=scalars)
    yield sample("currents, soft", kind="currents", qkv={**soft, "decay": "heads", "reset_by": 0.5}, attn=soft)
    yield sample("currents, strict", kind="currents", qkv={"strict": True, "surrogate": Sigmoid(4.0)}, attn={})
    yield sample("currents, below zero", kind="currents", qkv={"v_reset": -0.25, "gain": "heads"}, attn=heads)
    for s in SURROGATES:
        name = type(s).__name__
        yield sample(name, kind="currents", qkv={"surrogate": s}, attn={"surrogate": s, "detach_reset": False})
    for layout in _LAYOUTS:
        yield sample(f"{layout}", layout=layout, attn=heads)
        if layout not in ("every other channel", "slice of T", "unaligned", "every other token"):  # NaN has no bits
            yield sample(f"{layout}, packed", layout=layout, kind="packed", attn=scalars)
        yield sample(f"{layout}, currents", layout=layout, kind="currents", qkv=heads)
    for T in (1, 8, 9):
        yield sample(f"T={T}, packed", kind="packed", shape=(T, *_SHAPE[1:]), attn=heads)
        yield sample(f"T={T}, currents", kind="currents", shape=(T, 1, 2, 5, 17), attn=heads, qkv=scalars)
    for D, N in ((1, 1), (1, 40), (40, 1), (19, 63), (8, 500), (3, 1000)):
        yield sample(f"D={D} N={N}", shape=(2, 1, 2, D, N), scale=1 / 64, attn=heads)
        yield sample(f"D={D} N={N}, currents", shape=(2, 1, 2, D, N), scale=1 / 64, kind="currents", qkv=heads)
    for empty in ((4, 0, 3, 6, 5), (4, 2, 0, 6, 5), (4, 2, 3, 0, 5), (4, 2, 3, 6, 0)):
        yield sample(f"empty {list(empty)}", shape=empty, kind="currents", attn=heads, qkv=scalars)
    yield sample("empty, packed", kind="packed", shape=(9, 0, 3, 6, 5), attn=scalars)


def _ssa_bytes(sample: Sample) -> tuple[int, int]:
    x = sample.arguments["q"]
    n = x.numel() * x.element_size()
    return 4 * n, 0 if "T" in sample.arguments else 7 * n


def _ssa_large(dtype: torch.dtype) -> Iterator[Sample]:
    for size in ((), (5,)):
        p: dict[str, Any] = {"decay": torch.full(size, 0.6), "gain": torch.full(size, 0.7)}
        operands = {arg: values((4, 3, 5, 24, 99), dtype, False, i) for i, arg in enumerate("qkv")}
        neurons = {"attn": LIFParams(**p, v_threshold=0.5), "qkv": LIFParams(**p)}
        yield Sample(f"parameters {list(size)}", {**operands, **neurons})


CASE = Case(
    name="spiking_self_attention",
    op=as_tuple(spiking_self_attention),
    ref=as_tuple(spiking_self_attention_ref),
    registered=("spiking_self_attention_fwd", "spiking_self_attention_bwd"),
    dtypes=(torch.float32, torch.bfloat16, torch.float16, torch.float64),
    samples=_ssa_samples,
    outputs=lambda sample: ("out",),
    discrete=frozenset({"out"}),
    bytes_moved=_ssa_bytes,
    few=(
        "spikes, scalars, attached",
        "currents, heads",
        "tokens first, currents",
        "T=9, packed",
        "empty [4, 2, 3, 6, 0]",
    ),
    large=_ssa_large,
)
