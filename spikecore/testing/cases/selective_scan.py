"""The samples of `selective_scan`: every option, sizes around the kernels' chunks and lanes, groups, layouts."""

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from spikecore.ops.selective_scan import selective_scan, selective_scan_ref
from spikecore.testing.cases._case import Case, Sample


def _flat(f: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
    """A scan, whose result is y or (y, h_last), as a Case wants it."""

    @wraps(f)
    def call(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        y = f(*args, **kwargs)
        return y if isinstance(y, tuple) else (y,)

    return call


# The same numbers lying otherwise; of [..., L].
SCAN_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels innermost": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "slice of a longer sequence": lambda x: torch.cat([torch.full_like(x, torch.nan), x], -1)[..., x.shape[-1] :],
    "every other step": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], -1).flatten(-2)[..., ::2],
    "half of the channels": lambda x: torch.cat([x, torch.full_like(x, torch.nan)], 1)[:, : x.shape[1]],
    "expanded batch": lambda x: x[:1].expand_as(x),
    "expanded steps": lambda x: x[..., :1].expand_as(x),
}


def scan_sample(
    name: str, dtype: torch.dtype, grid: bool, B: int = 2, C: int = 33, S: int = 5, L: int = 37, G: int | None = None,
    layout: str = "", options: str = "D z bias softplus h_init last", A: tuple[float, float] = (-1.5, -0.5),
    steps: tuple[float, float] = (-2.0, 1.0),
) -> Sample:  # fmt: skip
    """`G` None: B and C without groups. `A`, `steps`: ranges of A and delta, by default narrow: where a few channels
    that hardly decay outgrow all others, the largest error of a gradient is that of one element, which is chance.
    """
    g = torch.Generator().manual_seed(sum(map(ord, name)))
    state = torch.float64 if dtype == torch.float64 else torch.float32

    def uniform(low: float, high: float, *shape: int, dtype: torch.dtype = dtype) -> Tensor:
        x = low + (high - low) * torch.rand(shape, generator=g)
        return (torch.round(x * 64) / 64 if grid else x).to(dtype)

    lie = SCAN_LAYOUTS[layout] if layout else lambda x: x
    matrix = (B, S, L) if G is None else (B, G, S, L)
    arguments: dict[str, Any] = {
        "u": lie(uniform(-2, 2, B, C, L)),
        "delta": lie(uniform(*steps, B, C, L)),
        # Off the grid even there: a reference whose dt A happens to be exact errs less than the formula costs.
        "A": (uniform(*A, C, S, dtype=state) * 0.9),
        "B": lie(uniform(-1, 1, *matrix)),
        "C": lie(uniform(-1, 1, *matrix)),
    }
    chosen = options.split()
    if "D" in chosen:
        arguments["D"] = uniform(-1, 1, C, dtype=state)
    if "z" in chosen:
        arguments["z"] = lie(uniform(-3, 3, B, C, L))
    if "bias" in chosen:
        arguments["delta_bias"] = uniform(-1, 1, C, dtype=state)
    if "h_init" in chosen:
        arguments["h_init"] = uniform(-1, 1, B, C, S, dtype=state)
    flags = {"delta_softplus": "softplus" in chosen, "return_last_state": "last" in chosen}
    return Sample(name, arguments | {k: v for k, v in flags.items() if v})


def _samples(dtype: torch.dtype, grid: bool) -> Iterator[Sample]:
    def sample(name: str, **changes: Any) -> Sample:
        return scan_sample(name, dtype, grid, **changes)

    yield sample("everything")
    raw = {"steps": (-0.1, 1.0)}  # without softplus a step may be negative
    yield sample("plain", options="", **raw)
    for option in ("D", "z", "bias", "h_init", "last"):
        yield sample(option, options=option, steps=(1.0, 2.0) if option == "bias" else (-0.1, 1.0))
    for options in ("softplus", "softplus bias", "softplus D z", "h_init last"):
        yield sample(options, options=options, steps=(-2.0, 1.0) if "softplus" in options else (-0.1, 1.0))
    yield sample("softplus beyond its threshold", options="softplus bias D", steps=(10.0, 25.0), A=(-0.1, 0.0))
    for S in (1, 2, 4, 16, 64):
        yield sample(f"S={S}", S=S, L=20 if S > 4 else 37, C=33 if S > 4 else 70)
    yield sample("S=16, ungated", S=16, options="softplus D bias", L=17)
    for L in (1, 2, 16, 63, 64, 65, 130):
        yield sample(f"L={L}", L=L)
    for C in (1, 15, 16, 17):
        yield sample(f"C={C}", C=C, L=20)
    for G, C in ((1, 20), (2, 14), (12, 12), (2, 60)):
        yield sample(f"G={G}, C={C}", G=G, C=C)
    for layout in SCAN_LAYOUTS:
        yield sample(layout, layout=layout)
        yield sample(f"{layout}, groups", layout=layout, G=2, C=64, L=64)
    yield sample("B=1", B=1, C=34, L=70)
    yield sample("no decay", A=(0.0, 0.0))
    yield sample("growth", A=(0.2, 0.4), steps=(-2.0, 0.0), L=10)
    yield sample("fast decay", A=(-60.0, -20.0))
    for empty in ({"B": 0}, {"C": 0, "L": 5}, {"L": 0}, {"S": 0}, {"L": 0, "options": "D z"}, {"S": 0, "options": "z"}):
        yield sample(f"empty {empty}", **empty)


def _outputs(sample: Sample) -> tuple[str, ...]:
    return ("y", "h_last") if sample.arguments.get("return_last_state") else ("y",)


def _bytes(sample: Sample) -> tuple[int, int]:
    """Forward reads the inputs and writes y and the last state; backward reads both again as gradients, and the inputs,
    and writes a gradient for each of them.
    """
    u, A = sample.arguments["u"], sample.arguments["A"]
    inputs = sum(t.nbytes for t in sample.tensors().values())
    y, last = u.nbytes, u.shape[0] * A.nbytes
    return inputs + y + last, 2 * inputs + y


def _large(dtype: torch.dtype) -> Iterator[Sample]:
    yield scan_sample("many blocks", dtype, False, B=2, C=200, S=5, L=300)
    yield scan_sample("groups", dtype, False, B=1, C=192, S=1, L=500, G=4)


CASE = Case(
    name="selective_scan",
    op=_flat(selective_scan),
    ref=_flat(selective_scan_ref),
    registered=("selective_scan_fwd", "selective_scan_bwd"),
    dtypes=(torch.float32, torch.bfloat16, torch.float16, torch.float64),
    samples=_samples,
    outputs=_outputs,
    discrete=frozenset(),
    bytes_moved=_bytes,
    few=("everything", "plain", "z", "G=2, C=14", "channels innermost", "L=1", "empty {'B': 0}"),
    large=_large,
)
