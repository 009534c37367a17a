"""The samples of `bn_lif`: statistics taken and given, neurons, residuals, layouts, sizes."""

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from spikecore.ops.bn_lif import bn_lif, bn_lif_ref
from spikecore.surrogate import Rectangle, Sigmoid
from spikecore.testing.cases._case import LAYOUTS, Case, Sample, values
from spikecore.testing.cases.lif import SURROGATES

_SHAPE = (4, 2, 6, 3, 5)  # [T, B, C, H, W]
# Numbers of mean 0 whose squares have the mean 3/4, with eps = 1/4 a deviation of 1: exact in every precision.
_BLOCKS = {6: ((2, 2, 1), (3, 0, 0)), 8: ((3, 1, 1, 1), (2, 2, 2, 0)), 10: ((3, 2, 1, 1, 0),)}


def _exact(shape: tuple[int, ...], channel: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Halves whose channels have dyadic mean and variance 3/4; numbers a channel: even and at least 6."""
    g = torch.Generator().manual_seed(seed)
    sizes = [shape[channel], *(n for d, n in enumerate(shape) if d != channel)]
    count = torch.Size(sizes[1:]).numel()
    rows = []
    for _ in range(sizes[0]):
        row, left = [], count
        while left:
            size = next(n for n in (10, 8, 6) if left - n == 0 or left - n >= 6)
            kinds = _BLOCKS[size]
            kind = kinds[int(torch.randint(len(kinds), (), generator=g))]
            row += [x / 2 for x in kind] + [-x / 2 for x in kind]
            left -= size
        mean = int(torch.randint(-2, 3, (), generator=g)) / 2
        rows.append(torch.tensor(row)[torch.randperm(count, generator=g)] + mean)
    return torch.stack(rows).view(sizes).movedim(0, channel).contiguous().to(dtype)


def _sample(
    name: str, dtype: torch.dtype, grid: bool, shape: tuple[int, ...] = _SHAPE, layout: str = "contiguous",
    residual: str = "", v_init: bool = False, affine: bool = True, tracked: bool = True, **arguments: Any,
) -> Sample:  # fmt: skip
    state = torch.float64 if dtype == torch.float64 else torch.float32
    seed = sum(map(ord, name))  # other numbers in each sample, the same in every process
    arguments = {"training": True, "decay": 0.5, "gain": 0.75, "eps": 0.25 if grid else 1e-5, **arguments}
    channel = arguments.get("channel_dim", 2) % len(shape)
    C, n = shape[channel], torch.Size(shape).numel() // max(shape[channel], 1)

    def numbers(low: int, high: int, parts: int, offset: int, size: tuple[int, ...] = (C,)) -> Tensor:
        p = torch.randint(low, high, size, generator=torch.Generator().manual_seed(seed + offset)) / parts
        return (p if grid else p * 0.9).to(state)

    exact = grid and arguments["training"] and n >= 6 and n % 2 == 0 and layout != "expanded T"
    x = _exact(shape, channel, dtype, seed) if exact else values(shape, dtype, grid, seed)
    tensors: dict[str, Any] = {"x": LAYOUTS[layout](x)}
    tensors |= (
        {"weight": numbers(2, 9, 4, 1), "bias": numbers(-2, 5, 4, 2)} if affine else {"weight": None, "bias": None}
    )
    if tracked:
        var = numbers(0, 2, 1, 4) * 3 + 0.75  # with eps = 1/4 a square
        tensors |= {"running_mean": numbers(-2, 3, 4, 3), "running_var": var}
    else:
        tensors |= {"running_mean": None, "running_var": None}
    if residual:
        tensors["residual"] = LAYOUTS[residual](values(shape, dtype, grid, seed + 5))
    for i, arg in enumerate(("decay", "gain")):
        if isinstance(arguments[arg], str):
            arguments[arg] = numbers(1, 4, 4, 6 + i, () if arguments[arg] == "scalar" else (C,))
    if v_init:
        arguments["v_init"] = values(shape[1:], torch.float32, grid, seed + 8).to(state) / 2
    return Sample(name, tensors | arguments)


def _samples(dtype: torch.dtype, grid: bool) -> Iterator[Sample]:
    def sample(name: str, **changes: Any) -> Sample:
        return _sample(name, dtype, grid, **changes)

    learnt: dict[str, Any] = {"decay": "channels", "gain": "scalar"}
    every: dict[str, Any] = {"residual": "contiguous", "return_sum": True, "v_init": True, **learnt}
    yield sample("training")
    yield sample("given, every", training=False, **every)
    yield sample("given, plain", training=False)
    yield sample("training, every", **every)
    yield sample("training, attached, every", detach_reset=False, **every)
    yield sample("training, residual", residual="contiguous")
    yield sample("training, sum", return_sum=True)
    yield sample(
        "given, residual, attached", training=False, residual="contiguous", detach_reset=False, gain="channels"
    )
    yield sample("not affine", affine=False)
    yield sample("not affine, given", affine=False, training=False)
    yield sample("not tracked", tracked=False, momentum=0.5)
    yield sample("momentum 1", momentum=1.0)
    yield sample("soft", v_reset=None)
    yield sample("soft, attached, every", v_reset=None, reset_by=0.75, detach_reset=False, **every)
    yield sample("hard reset below zero", v_reset=-0.25, v_threshold=0.75, decay="scalar", detach_reset=False)
    yield sample("mem_update", decay=0.25, gain=1.0, v_threshold=0.5, strict=True, surrogate=Rectangle(1.0),
                 residual="contiguous", return_sum=True)  # fmt: skip
    for s in SURROGATES:
        yield sample(f"{type(s).__name__}", surrogate=s, detach_reset=False)
    for layout in list(LAYOUTS)[1:]:
        yield sample(layout, layout=layout, **every)
        yield sample(f"{layout}, given", layout=layout, training=False, residual=layout)
    maps = {"shape": (3, 2, 3, 6, 7)}
    yield sample("maps", **maps)
    yield sample("maps, every", **maps, **every, detach_reset=False)
    yield sample("maps, given, every", **maps, **every, training=False)
    yield sample("maps, residual expanded over T", **maps, residual="expanded T")
    yield sample("maps, channels-last", **maps, layout="channels-last", residual="channels-last", return_sum=True)
    yield sample("large maps", shape=(2, 1, 2, 33, 35), residual="contiguous", **learnt)
    yield sample("many channels", shape=(2, 2, 1100, 1, 1), decay="channels")
    yield sample("many channels of small maps", shape=(2, 2, 150, 3, 3), gain="channels", residual="contiguous")
    for dim, shape in ((1, (4, 6, 5)), (2, (4, 2, 6)), (-1, (4, 3, 6)), (3, (4, 2, 5, 6)), (2, (6, 2, 3, 34))):
        yield sample(f"channel_dim {dim} of {list(shape)}", shape=shape, channel_dim=dim, **every)
    yield sample("one channel", shape=(4, 3, 1, 5), **every)
    yield sample("one channel, maps", shape=(3, 2, 1, 40), **every)
    yield sample("T=1", shape=(1, *_SHAPE[1:]), **every)
    yield sample("T=17", shape=(17, 1, 2, 3, 4), **every)
    yield sample("T=9, maps", shape=(9, 1, 2, 6, 6), residual="contiguous")
    yield sample("one number a channel, given", shape=(1, 1, 6), training=False, **learnt)
    for empty in ((4, 0, 6, 3), (4, 2, 0, 3), (4, 2, 6, 0)):
        yield sample(f"empty {list(empty)}", shape=empty, **every)
        yield sample(f"empty {list(empty)}, given", shape=empty, training=False, residual="contiguous")


def _with_statistics(f: Callable) -> Callable[..., tuple[Tensor, ...]]:
    """The call, and the running statistics after it as results: those given stay as they were."""

    @wraps(f)
    def call(x, weight, bias, running_mean, running_var, residual=None, **arguments: Any) -> tuple[Tensor, ...]:
        running = [p if p is None else p.detach().clone() for p in (running_mean, running_var)]
        out = f(x, weight, bias, *running, residual, **arguments)
        return (*(out if isinstance(out, tuple) else (out,)), *(p for p in running if p is not None))

    return call


def _outputs(sample: Sample) -> tuple[str, ...]:
    a = sample.arguments
    running = ("running_mean", "running_var") if a["running_mean"] is not None else ()
    return ("s", *(["y"] if a.get("return_sum") else []), *running)


def _bytes(sample: Sample) -> tuple[int, int]:
    """Statistics and sums need a first look at what they are of: x is counted twice, g_x is written and read again."""
    a, x = sample.arguments, sample.arguments["x"]
    each = x.numel() * x.element_size()
    residual, y, training = "residual" in a, bool(a.get("return_sum")), a["training"]
    return each * (2 + training + residual + y), each * (3 + 2 * residual + y + training * (3 - residual))


def _large(dtype: torch.dtype) -> Iterator[Sample]:
    x, r = (values((4, 3, 37, 29, 31), dtype, False, i) for i in range(2))
    learnt = {"decay": torch.full((37,), 0.6), "gain": torch.full((), 0.7)}
    bn: dict[str, Any] = {"weight": torch.full((37,), 0.9), "bias": torch.full((37,), 0.1)}
    bn |= {"running_mean": torch.zeros(37), "running_var": torch.ones(37), "training": True}
    yield Sample("maps", {"x": x, **bn, "residual": r, **learnt, "return_sum": True})
    last = LAYOUTS["channels-last"]
    yield Sample("channels-last", {"x": last(x), **bn, "residual": last(r), **learnt, "surrogate": Sigmoid(4.0)})


CASE = Case(
    name="bn_lif",
    op=_with_statistics(bn_lif),
    ref=_with_statistics(bn_lif_ref),
    registered=("bn_lif_fwd", "bn_lif_bwd"),
    dtypes=(torch.float32, torch.bfloat16, torch.float16, torch.float64),
    samples=_samples,
    outputs=_outputs,
    discrete=frozenset({"s"}),
    bytes_moved=_bytes,
    few=(
        "training, attached, every",
        "given, every",
        "maps, every",
        "channels-last, given",
        "batch first",
        "not tracked",
        "empty [4, 0, 6, 3]",
    ),
    large=_large,
)
