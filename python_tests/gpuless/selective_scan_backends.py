"""selective_scan for the backends' checks: what their results are held against, and samples that cross their blocks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from backends import results

from spikecore.testing.cases import CASES, Sample
from spikecore.testing.cases.selective_scan import scan_sample
from spikecore.testing.compare import assert_close

CASE = CASES["selective_scan"]


def assert_near(op: Callable, sample: Sample) -> None:
    """Outputs and gradients err as the formula in float32 does; backends add in other orders, so bits may differ."""
    got, want = results(CASE, op, sample), results(CASE, CASE.ref, sample)
    exact = results(CASE, CASE.ref, sample.to(torch.float64))
    assert got.keys() == want.keys()
    for name, g in got.items():
        assert g is not None, f"{sample}: {name}"
        assert (g.dtype, g.shape) == (want[name].dtype, want[name].shape), f"{sample}: {name}"
        assert_close(g, want[name], exact[name], f"{sample}: {name}")


def scan_samples(dtype: torch.dtype) -> list[Sample]:
    """Sequences within, at and beyond a warp's stretch (128 steps, 256 in half precision), full and partial blocks."""

    def sample(name: str, **changes) -> Sample:
        return scan_sample(name, dtype, False, **changes)

    return [
        sample("everything", C=9, S=3, L=300),
        sample("whole stretch", C=8, S=2, L=256),
        sample("plain", C=20, S=2, L=40, options="softplus"),
        sample("unaligned", C=15, S=2, L=131),
        sample("groups", B=1, C=36, G=2, S=2, L=32),
        sample("steps", C=17, S=5, L=1),
        sample("strides", C=6, S=3, L=64, layout="channels innermost"),
        sample("rows with gaps", C=6, S=3, L=64, layout="slice of a longer sequence"),
        sample("fast decay", C=12, S=3, L=200, A=(-60.0, -20.0)),
        sample("empty", C=4, S=0, L=5),
        sample("nothing", B=0),
    ]
