"""The operators on a GPU, called with CPU tensors: they go there as they lie, results and gradients come back."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import torch
from backends import through
from torch import Tensor
from torch.utils import _pytree as pytree

from spikecore._backend import gpu_backend
from spikecore.testing.cases import CASES, Case

# The compiled kernels where they are live, and Triton's beside them.
BACKENDS = ["cuda", "triton"] if gpu_backend == "cuda" else ["triton"]


def kernels(op: str, backend: str) -> Callable:
    """`spikecore.ops.<op>` for CUDA tensors by the kernels of one backend."""
    if backend == gpu_backend:
        return CASES[op].op
    name = CASES[op].registered[0].removesuffix("_fwd")
    return through(op, importlib.import_module(f"spikecore.triton.{name}"))


def case_on(case: Case, backend: str) -> Case:
    """The case with its operator on the GPU."""
    op = kernels(case.name, backend)

    def call(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        args, kwargs = pytree.tree_map_only(Tensor, _There.apply, (args, kwargs))
        return tuple(t.cpu() for t in op(*args, **kwargs))

    return dataclasses.replace(case, op=call)


class _There(torch.autograd.Function):
    """A tensor on the GPU with its strides, gaps, offset and overlaps."""

    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        return there(t)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.cpu()


def there(t: Tensor) -> Tensor:
    if not t.numel():
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")
    end = t.storage_offset() + 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    memory = t.detach().as_strided((end,), (1,), 0).cuda()
    return memory.as_strided(t.shape, t.stride(), t.storage_offset())
