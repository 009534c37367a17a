"""What a `Case` is, and what samples are made of: numbers and memory layouts."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["LAYOUTS", "Case", "Sample", "as_tuple", "values"]


@dataclass(frozen=True)
class Sample:
    """One call: its name and its arguments by name. Nothing in it requires a gradient."""

    name: str
    arguments: dict[str, Any]

    def __str__(self) -> str:
        return self.name

    def map(self, f: Callable[[Tensor], Tensor]) -> "Sample":
        """The same call with `f` applied to each tensor."""
        return replace(self, arguments=pytree.tree_map_only(Tensor, f, self.arguments))

    def to(self, dtype: torch.dtype) -> "Sample":
        """All of it in one dtype, as a reference of another precision takes it."""
        return self.map(lambda t: t.to(dtype) if t.is_floating_point() else t)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name: "x", or "attn.decay" where it is an attribute of an argument."""
        flat, _ = pytree.tree_flatten_with_path(self.arguments)
        return {
            ".".join(str(getattr(k, "key", getattr(k, "name", None))) for k in p): t
            for p, t in flat
            if isinstance(t, Tensor)
        }

    @property
    def dtype(self) -> torch.dtype:
        """That of the first floating-point tensor: the precision the kernel runs in."""
        return next(t.dtype for t in self.tensors().values() if t.is_floating_point())

    def leaves(self) -> tuple["Sample", dict[str, Tensor]]:
        """The same call on tensors that require gradients (strides kept), and these by name."""
        sample = self.map(lambda t: t.detach().requires_grad_(t.is_floating_point()))
        return sample, {name: t for name, t in sample.tensors().items() if t.requires_grad}


@dataclass(frozen=True)
class Case:
    """An operator as tests and benches see it.

    - `samples(dtype, grid)`: calls over the whole contract; `grid=True`: all inputs on a grid (x: multiples of 1/64,
      parameters dyadic), so that sums and spikes are exact in every precision.
    - `outputs(sample)`: names, in order, of what a call returns; `discrete`: those that are spikes, held to each bit.
    - `bytes_moved(sample)`: bytes that forward and backward must read and write at least.
    - `few`: names of the samples for checks that are slow (opcheck, compilers).
    - `large(dtype)`: calls of a size that several threads share, the plainest first.
    """

    name: str
    op: Callable[..., tuple[Tensor, ...]]
    ref: Callable[..., tuple[Tensor, ...]]
    registered: tuple[str, ...]  # in torch.ops.spikecore
    dtypes: tuple[torch.dtype, ...]
    samples: Callable[[torch.dtype, bool], Iterator[Sample]]
    outputs: Callable[[Sample], tuple[str, ...]]
    discrete: frozenset[str]
    bytes_moved: Callable[[Sample], tuple[int, int]]
    few: tuple[str, ...]
    large: Callable[[torch.dtype], Iterator[Sample]]

    def sample(self, name: str, dtype: torch.dtype = torch.float32, grid: bool = True) -> Sample:
        return _by_name(self, dtype, grid)[name]

    def names(self) -> list[str]:
        return list(_by_name(self, torch.float32, True))


def as_tuple(f: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """An operator of one result as a Case wants it."""

    @wraps(f)
    def call(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        return (f(*args, **kwargs),)

    return call


@cache
def _by_name(case: Case, dtype: torch.dtype, grid: bool) -> dict[str, Sample]:
    return {s.name: s for s in case.samples(dtype, grid)}


def values(shape: tuple[int, ...], dtype: torch.dtype, grid: bool, seed: int = 0) -> Tensor:
    """Currents that make about a third of the neurons fire: multiples of 1/64 in [-1, 3), or normal numbers.

    Both are exact in float32, so that every precision sees the same numbers (half precision: after rounding).
    """
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(-64, 192, shape, generator=g) / 64 if grid else torch.randn(shape, generator=g) + 0.75
    return x.to(dtype)


# ---- memory layouts: x contiguous -> the same numbers lying otherwise ------------------------------------------------


def _channels_last(x: Tensor) -> Tensor:
    """Slices [B, C, ...] with channels innermost."""
    return x.movedim(2, -1).contiguous().movedim(-1, 2)


def _slice_of_time(x: Tensor) -> Tensor:
    """Every other slice of a sequence twice as long."""
    return torch.stack([x, torch.full_like(x, torch.nan)], 1).flatten(0, 1)[::2]


def _expanded(x: Tensor) -> Tensor:
    """One slice seen T times."""
    return x[:1].expand_as(x)


def _batch_first(x: Tensor) -> Tensor:
    """A view of [B, T, ...]: its slices have gaps."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def _every_other_channel(x: Tensor) -> Tensor:
    return torch.stack([x, torch.full_like(x, torch.nan)], 3).flatten(2, 3)[:, :, ::2]


def _reversed_dims(x: Tensor) -> Tensor:
    """Dense slices, dimensions in reverse order; time outermost."""
    return x.permute(0, *range(x.dim() - 1, 0, -1)).contiguous().permute(0, *range(x.dim() - 1, 0, -1))


def _time_innermost(x: Tensor) -> Tensor:
    return x.movedim(0, -1).contiguous().movedim(-1, 0)


def _unaligned(x: Tensor) -> Tensor:
    """Contiguous, but one element off any alignment."""
    return torch.cat([x.new_full((1,), torch.nan), x.flatten()])[1:].view_as(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels-last": _channels_last,
    "slice of T": _slice_of_time,
    "expanded T": _expanded,
    "batch first": _batch_first,
    "every other channel": _every_other_channel,
    "reversed dims": _reversed_dims,
    "time innermost": _time_innermost,
    "unaligned": _unaligned,
}
