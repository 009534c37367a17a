"""The samples of `lif`: every neuron, reset, surrogate, layout and size."""

from collections.abc import Iterator
from typing import Any

import torch

from spikecore.ops.lif import lif, lif_ref
from spikecore.surrogate import ATan, Erf, FastSigmoid, LeakyReLU, Rectangle, Sigmoid, Surrogate, Triangle
from spikecore.testing.cases._case import LAYOUTS, Case, Sample, values

SURROGATES: tuple[Surrogate, ...] = (
    ATan(2.0), Sigmoid(4.0), Rectangle(1.0), Triangle(1.0), FastSigmoid(25.0), Erf(2.0), LeakyReLU(1.0, 0.125),
)  # fmt: skip

_NEURONS: dict[str, dict[str, Any]] = {
    "IF": {"decay": 1.0, "gain": 1.0},
    "LIF": {"decay": 0.5, "gain": 0.5},
    "LIF undivided": {"decay": 0.75, "gain": 1.0},
    "PLIF": {"decay": "scalar", "gain": "scalar"},
    "PLIF undivided": {"decay": "scalar", "gain": 1.0},
    "PLIF channels": {"decay": "channels", "gain": "channels"},
    "PLIF channels, one gain": {"decay": "channels", "gain": "scalar"},
    "gain channels": {"decay": 0.5, "gain": "channels"},
    "mem_update": {"decay": 0.25, "gain": 1.0, "v_threshold": 0.5, "strict": True, "surrogate": Rectangle(1.0)},
    "Leaky subtract": {"decay": 0.5, "gain": 1.0, "strict": True, "v_reset": None, "reset_by": 2.0},
    "Leaky zero": {"decay": 0.5, "gain": 1.0, "strict": True},
}
_SHAPE = (4, 2, 6, 3, 5)  # [T, B, C, H, W]


def _lif_sample(
    name: str, dtype: torch.dtype, grid: bool, shape: tuple[int, ...] = _SHAPE, layout: str = "contiguous",
    v_init: bool = False, **arguments: Any,
) -> Sample:  # fmt: skip
    state = torch.float64 if dtype == torch.float64 else torch.float32
    seed = sum(map(ord, name))  # other numbers in each sample, the same in every process
    arguments = {"decay": 0.5, "gain": 0.5, **arguments}
    channels = shape[arguments.get("channel_dim", 2)] if "channels" in arguments.values() else 0
    for i, arg in enumerate(("decay", "gain")):
        if isinstance(arguments[arg], str):
            size = () if arguments[arg] == "scalar" else (channels,)
            p = torch.randint(1, 4, size, generator=torch.Generator().manual_seed(seed + 1 + i)) / 4
            arguments[arg] = p.to(state) if grid else (p * 0.9).to(state)
    if not grid:  # constants that round, too
        arguments |= {k: 1 / 3 for k in ("decay", "gain") if isinstance(arguments[k], float) and arguments[k] == 0.5}
    if v_init:
        arguments["v_init"] = values(shape[1:], torch.float32, grid, seed + 3).to(state) / 2
    return Sample(name, {"x": LAYOUTS[layout](values(shape, dtype, grid, seed)), **arguments})


def _lif_samples(dtype: torch.dtype, grid: bool) -> Iterator[Sample]:
    def sample(name: str, **changes: Any) -> Sample:
        return _lif_sample(name, dtype, grid, **changes)

    every = {"return_h": True, "return_v": True, "v_init": True}
    for neuron, constants in _NEURONS.items():
        yield sample(neuron, **constants)
        yield sample(f"{neuron}, attached, v_init, h, v", **constants, detach_reset=False, **every)
        if "v_reset" not in constants:
            yield sample(f"{neuron}, soft, v_init, h, v", **constants, v_reset=None, **every)
            yield sample(f"{neuron}, soft, attached", **constants, v_reset=None, detach_reset=False)
    rest = {"v_reset": -0.25, "v_threshold": 0.75}
    yield sample("hard reset below zero", **rest, decay="channels", gain=0.5, detach_reset=False, return_v=True)
    yield sample("reset_by 0", v_reset=None, reset_by=0.0, detach_reset=False)
    for s in SURROGATES:
        name = type(s).__name__
        yield sample(f"{name}, attached", surrogate=s, detach_reset=False, decay="scalar")
        yield sample(f"{name}, soft, h", surrogate=s, v_reset=None, return_h=True, gain="channels")
    for layout in list(LAYOUTS)[1:]:
        yield sample(layout, layout=layout, decay="channels", gain="channels", **every)
        yield sample(f"{layout}, packed", layout=layout, v_init=True, packed=True)
    for dim, shape in ((1, (4, 6, 5)), (2, (4, 2, 6)), (-1, (4, 3, 6)), (-2, (4, 2, 6, 5)), (3, (4, 2, 3, 6))):
        yield sample(f"channel_dim {dim}", shape=shape, channel_dim=dim, decay="channels", gain="channels", v_init=True)
    yield sample("one channel", shape=(4, 3, 1, 5), decay="channels", gain="scalar")
    yield sample("one channel, last", shape=(4, 3, 1), decay="channels", gain="channels", channel_dim=-1)
    for n in (1, 63, 500, 1000):
        yield sample(f"N={n}", shape=(4, n), channel_dim=1, decay="channels", gain="scalar", **every)
        yield sample(f"N={n}, packed", shape=(11, n), packed=True)
    yield sample("[T]", shape=(4,), decay="scalar", gain="scalar", **every)
    yield sample("T=1", shape=(1, *_SHAPE[1:]), decay="scalar", gain="channels", detach_reset=False, **every)
    yield sample("T=1, packed, expanded", shape=(1, *_SHAPE[1:]), packed=True, layout="expanded T")
    yield sample("T=1, batch first", shape=(1, *_SHAPE[1:]), layout="batch first", **every)
    yield sample("T=16, packed", shape=(16, 2, 9), packed=True, return_h=True)
    for empty, dim in (((4, 0), 1), ((4, 0, 6, 3), 2), ((4, 2, 0, 3), 2), ((4, 2, 6, 0), 2)):
        yield sample(f"empty {list(empty)}", shape=empty, channel_dim=dim, decay="channels", gain="scalar", **every)
    yield sample("empty, packed", shape=(9, 0, 6), packed=True)


def _lif_outputs(sample: Sample) -> tuple[str, ...]:
    a = sample.arguments
    return ("s", "v_last", *(["h"] if a.get("return_h") else []), *(["v"] if a.get("return_v") else []))


def _lif_bytes(sample: Sample) -> tuple[int, int]:
    a, x = sample.arguments, sample.arguments["x"]
    slice_, state = x[0].numel(), 8 if x.dtype == torch.float64 else 4
    x_bytes = len(x) * slice_ * x.element_size()
    sequences = len(x) * slice_ * state * (bool(a.get("return_h")) + bool(a.get("return_v")))
    ends = slice_ * state * (1 + ("v_init" in a))
    spikes = (len(x) + 7) // 8 * slice_ if a.get("packed") else x_bytes
    return x_bytes + spikes + sequences + ends, x_bytes * (2 if a.get("packed") else 3) + sequences


def _lif_large(dtype: torch.dtype) -> Iterator[Sample]:
    yield Sample("plain", {"x": values((4, 3, 32, 992), dtype, False)})
    for size in ((), (37,)):
        parameters = {"decay": torch.full(size, 0.6), "gain": torch.full(size, 0.7)}
        x = values((4, 3, 37, 991), dtype, False)
        yield Sample(f"parameters {list(size)}", {"x": x, **parameters, "return_h": True})


CASE = Case(
    name="lif",
    op=lif,
    ref=lif_ref,
    registered=("lif_fwd", "lif_bwd"),
    dtypes=(torch.float32, torch.bfloat16, torch.float16, torch.float64),
    samples=_lif_samples,
    outputs=_lif_outputs,
    discrete=frozenset({"s"}),
    bytes_moved=_lif_bytes,
    few=(
        "PLIF channels, attached, v_init, h, v",
        "LIF, soft, attached",
        "mem_update",
        "channels-last",
        "batch first",
        "expanded T, packed",
        "channel_dim -1",
        "T=1",
        "empty [4, 0, 6, 3]",
    ),
    large=_lif_large,
)
