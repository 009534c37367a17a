"""Autograd for a pair of operators NAME_fwd and NAME_bwd: `torch.library.register_autograd` at half its cost a call.

That one serves every schema: on each call it looks up defaults, hands dispatch keys around and counts gradients, which
takes as long as a small layer's kernels.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import _C

__all__ = ["register"]

_library = torch.library.Library("spikecore", "IMPL")


def register(
    name: str, setup_context: Callable[[Any, tuple, Any], None], backward: Callable[..., tuple], double: str
) -> None:
    """Make ``torch.ops.spikecore.NAME_fwd`` differentiable, once.

    Args:
        name: of the pair.
        setup_context: ``(ctx, inputs, output)``, keeps what backward needs.
        backward: ``(ctx, *grads)`` -> a gradient or None for each input; calls NAME_bwd.
        double: ends the message of a second backward: "is not defined for surrogate gradients".
    """

    def refuse(ctx: Any, *grads: Any) -> tuple:
        raise RuntimeError(f"{name}: a second backward (double backward) {double}")

    _differentiable(f"{name}_fwd", setup_context, backward)
    _differentiable(f"{name}_bwd", lambda ctx, inputs, output: None, refuse)


def _differentiable(name: str, setup_context: Callable, backward: Callable) -> None:
    op = getattr(torch.ops.spikecore, name).default

    def forward(ctx: Any, *inputs: Any) -> Any:
        with _C._AutoDispatchBelowAutograd():
            output = op(*inputs)
        setup_context(ctx, inputs, output)
        return output

    # Its name is what grad_fn shows.
    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    formula: Any = type(f"{name}_formula", (torch.autograd.Function,), methods)

    def kernel(*inputs: Any) -> Any:
        if torch.is_grad_enabled() and _C._any_requires_grad(*inputs):
            return formula.apply(*inputs)
        with _C._AutoDispatchBelowAutograd():
            return op(*inputs)

    _library.impl(name, kernel, "Autograd")
