"""Public functions of `spikecore.ops` through another backend's launchers: the same checks and autograd formula."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from spikecore.testing.cases import CASES, Case, Sample


@contextlib.contextmanager
def _ops(**launchers: Callable) -> Iterator[None]:
    """torch.ops.spikecore.NAME replaced by the given callables."""
    originals = {name: getattr(torch.ops.spikecore, name) for name in launchers}
    try:
        for name, launcher in launchers.items():
            setattr(torch.ops.spikecore, name, launcher)
        yield
    finally:
        for name, original in originals.items():
            setattr(torch.ops.spikecore, name, original)


def through(op: str, launchers: Any) -> Callable:
    """A callable with the signature and gradients of operator `op`, by the kernels registered for it, of `launchers`.

    The operator's module must hold its autograd formula as `_setup_context` and `_backward`.
    """
    module = importlib.import_module(CASES[op].op.__module__)
    fwd, bwd = CASES[op].registered

    class Through(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = getattr(launchers, fwd)(*inputs)
            module._setup_context(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            with _ops(**{bwd: getattr(launchers, bwd)}):
                return module._backward(ctx, *grads)

    def call(*args: Any, **kwargs: Any) -> Any:
        with _ops(**{fwd: Through.apply}):
            return CASES[op].op(*args, **kwargs)

    return call


def results(case: Case, op: Callable, sample: Sample, seed: int = 0, grid: bool = False) -> dict[str, Tensor | None]:
    """Outputs and the gradients of every differentiable input, under random gradients of every output.

    grid: these are multiples of 1/64, so that sums of them are exact in any order.
    """
    sample, leaves = sample.leaves()
    outputs = op(**sample.arguments)
    g = torch.Generator().manual_seed(seed)
    ends = [o for o in outputs if o.requires_grad]
    randoms = [torch.randn(o.shape, generator=g) for o in ends]
    upstream = [((64 * r).round() / 64 if grid else r).to(o.dtype) for o, r in zip(ends, randoms, strict=True)]
    gradients = torch.autograd.grad(ends, list(leaves.values()), upstream, allow_unused=True)
    named = dict(zip(case.outputs(sample), (o.detach() for o in outputs), strict=True))
    return named | {f"grad {name}": g for name, g in zip(leaves, gradients, strict=True)}


def assert_same(name: str, op: Callable, sample: Sample, grid: bool = False) -> None:
    """`op` gives the numbers of `CASES[name].op`, every output and gradient, without tolerance; and their strides."""
    case = CASES[name]
    got, want = results(case, op, sample, grid=grid), results(case, case.op, sample, grid=grid)
    assert got.keys() == want.keys()
    for what, w in want.items():
        g = got[what]
        if w is None or g is None:
            assert w is g, f"{sample}: {what}"
            continue
        assert (g.dtype, g.shape, g.stride()) == (w.dtype, w.shape, w.stride()), f"{sample}: {what}"
        differing = int((g != w).sum())
        assert torch.equal(g, w), f"{sample}: {differing} of {w.numel()} differ in {what}"
