"""The samples of `selective_scan_2d`: directions, states, channels in and across blocks, maps of every form."""

from collections.abc import Iterator
from typing import Any

import torch

from spikecore.ops.cross_scan import SCANS, direction_codes
from spikecore.ops.selective_scan_2d import selective_scan_2d, selective_scan_2d_ref
from spikecore.testing.cases._case import Case, Sample, as_tuple

_FLAT = {"flat": True, "softplus": True}


def _channels_innermost(t: torch.Tensor) -> torch.Tensor:
    return t.movedim(-3, -1).contiguous().movedim(-1, -3)


def _every_other_row(t: torch.Tensor) -> torch.Tensor:
    return torch.stack([t, torch.full_like(t, torch.nan)], -2).flatten(-3, -2)[..., ::2, :]


def sample(
    name: str, dtype: torch.dtype, grid: bool, *, B: int = 2, C: int = 9, H: int = 4, W: int = 5, S: int = 2,
    directions: Any = 4, softplus: bool = True, D: bool = True, bias: bool = True, flat: bool = False,
    layout: Any = None, wide: tuple[str, ...] = (), seed: int = 0,
) -> Sample:  # fmt: skip
    """One call.

    `wide`: maps that come in float32 whatever `dtype`, as under autocast. `seed`: other numbers, where those of 0 make
    the largest error of a small tensor a matter of chance: a reference that happens to be right sets no bound.
    """
    seed, K = seed + sum(map(ord, name)), len(direction_codes("sample", directions))
    state = torch.float64 if dtype == torch.float64 else torch.float32

    def drawn(shape: tuple[int, ...], i: int) -> torch.Tensor:
        # Even in [-1, 1): where a few large numbers make a result, its error is theirs alone, which is chance.
        g = torch.Generator().manual_seed(seed + i)
        return torch.randint(-64, 64, shape, generator=g) / 64 if grid else 2 * torch.rand(shape, generator=g) - 1

    delta = drawn((B, K, C, H, W), 1)
    maps = {
        "x": drawn((B, C, H, W), 0),
        "delta": delta - 1 if softplus else delta.abs() / 4,
        "B": drawn((B, K, S, H, W), 2),
        "C": drawn((B, K, S, H, W), 3),
    }
    arguments: dict[str, Any] = {}
    for arg, t in maps.items():
        t = t.to(torch.promote_types(dtype, torch.float32) if arg in wide else dtype)
        arguments[arg] = layout(t) if layout else t
    parameters = {"A": -drawn((K, C, S), 4).abs() - 0.125}
    if D:
        parameters["D"] = drawn((K, C), 5)
    if bias:
        b = drawn((K, C), 6) / 2
        parameters["delta_bias"] = b if softplus else b.abs()  # negative steps would make the state grow
    for arg, t in parameters.items():
        arguments[arg] = (t.flatten(0, 1) if flat else t).to(state)
    order = ("x", "delta", "A", "B", "C", "D", "delta_bias")
    arguments = {arg: arguments[arg] for arg in order if arg in arguments}
    return Sample(name, {**arguments, "delta_softplus": softplus, "directions": directions})


def _samples(dtype: torch.dtype, grid: bool) -> Iterator[Sample]:
    def one(name: str, **changes: Any) -> Sample:
        return sample(name, dtype, grid, **changes)

    yield one("plain")
    yield one("one state", S=1, **_FLAT, seed=1)
    yield one("no softplus", softplus=False)
    yield one("bare", softplus=False, D=False, bias=False)
    yield one("no D", D=False)
    yield one("no bias", bias=False)
    yield one("1 direction", directions=1, C=20)
    yield one("2 directions", directions=2, S=1, C=20)
    for i, codes in enumerate(SCANS):
        yield one(f"scans {i}", directions=codes, seed=int(i == 3))
    for code in range(6):
        yield one(f"direction {code}", directions=(code,), C=20, seed=int(code in (0, 4)))
    yield one("8 directions", directions=(5, 4, 3, 2, 1, 0, 3, 3))
    yield one("C=1", C=1, B=1, H=3, W=5, directions=(0, 1, 2, 3, 4, 5, 3, 2), seed=1)
    for channels in (16, 17, 70):
        yield one(f"C={channels}", C=channels, H=3)
    for S in (16, 17, 64):
        yield one(f"S={S}", S=S, H=3, W=5)
    yield one("square", H=5, W=5, C=8, seed=1)
    yield one("long", H=17, W=19, S=1)
    yield one("long, 3 states", H=13, W=11, S=3, directions=(1, 2))
    yield one("one row", H=1, W=9)
    yield one("one column", H=9, W=1)
    yield one("one place", H=1, W=1, S=5, C=20)
    yield one("16 places a row", H=2, W=16, C=16)
    yield one("channels innermost", layout=_channels_innermost)
    yield one("every other row", layout=_every_other_row)
    yield one("wide delta", wide=("delta",))
    yield one("wide x", wide=("x",), S=1)
    for size in "BCHW":
        yield one(f"{size}=0", **{"B": 1, size: 0})


def _bytes(s: Sample) -> tuple[int, int]:
    maps = [s.arguments[arg] for arg in ("x", "delta", "B", "C")]
    once = sum(t.nbytes for t in maps)
    y = maps[0].nbytes
    return once + y, 2 * once + y


def _large(dtype: torch.dtype) -> Iterator[Sample]:
    yield sample("large", dtype, False, B=2, C=150, H=20, W=21, S=3)
    yield sample("large, one state", dtype, False, B=2, C=150, H=20, W=21, S=1)


CASE = Case(
    name="selective_scan_2d",
    op=as_tuple(selective_scan_2d),
    ref=as_tuple(selective_scan_2d_ref),
    registered=("selective_scan_2d_fwd", "selective_scan_2d_bwd"),
    dtypes=(torch.float32, torch.bfloat16, torch.float16, torch.float64),
    samples=_samples,
    outputs=lambda sample: ("y",),
    discrete=frozenset(),
    bytes_moved=_bytes,
    few=("plain", "one state", "bare", "2 directions", "C=70", "channels innermost", "H=0"),
    large=_large,
)
