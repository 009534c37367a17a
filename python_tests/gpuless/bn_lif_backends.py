"""How another backend's bn_lif is held against the CPU kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch
from backends import results

from spikecore.testing.cases import Sample
from spikecore.testing.cases.bn_lif import CASE


def assert_equal_but_for_sums(op: Callable, sample: Sample) -> None:
    """Spikes, y, g of the residual and v_init bit for bit; what hangs on sums over a channel, which double precision
    takes in another order, to one rounding of its largest number."""
    got, want = results(CASE, op, sample, grid=True), results(CASE, CASE.op, sample, grid=True)
    assert got.keys() == want.keys()
    for what, w in want.items():
        g = got[what]
        if w is None or g is None:
            assert w is g, f"{sample}: {what}"
            continue
        assert (g.dtype, g.shape, g.stride()) == (w.dtype, w.shape, w.stride()), f"{sample}: {what}"
        if what in ("s", "y", "grad residual", "grad v_init"):
            assert torch.equal(g, w), f"{sample}: {int((g != w).sum())} of {w.numel()} differ in {what}"
        elif w.numel():
            step = torch.finfo(w.dtype).eps * w.abs().max().double()
            assert (g.double() - w.double()).abs().max() <= step, f"{sample}: {what}"
