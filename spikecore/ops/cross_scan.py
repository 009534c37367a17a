"""The orders in which a state space model reads a map, and back: `cross_scan` and `cross_merge`.

A direction is a number: how the positions ``(h, w)`` of a map ``[H, W]`` follow one another in a sequence of
``L = H * W``:

    0  rows, left to right, top to bottom          2  0 backwards
    1  columns, top to bottom, left to right       3  1 backwards
    4  columns, top to bottom, right to left       5  4 backwards

``cross_scan`` copies a map once per direction, each copy in that order; ``cross_merge`` puts the sequences back on the
map and adds them up. Each is the other's adjoint. The four directions 0, 1, 2, 3 are VMamba's (Liu et al. 2024), its
further scans are in `SCANS`. `selective_scan_2d` needs neither.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["SCANS", "cross_merge", "cross_scan", "direction_codes"]

# VMamba's ``scans``: four directions; four copies; two copies and two backwards; the map turned by 0 to 3 quarters.
SCANS: tuple[tuple[int, ...], ...] = ((0, 1, 2, 3), (0, 0, 0, 0), (0, 0, 2, 2), (0, 4, 2, 5))

_COUNTS = {1: (0,), 2: (0, 2), 4: (0, 1, 2, 3)}
_FORWARDS = {2: 0, 3: 1, 5: 4}  # of a direction that walks backwards


def direction_codes(op: str, directions: int | Sequence[int]) -> tuple[int, ...]:
    """`directions` as numbers of directions; `op` opens the message of the ValueError where they are none."""
    if isinstance(directions, int) and directions in _COUNTS:
        return _COUNTS[directions]
    codes = () if isinstance(directions, int) else tuple(directions)
    if not 1 <= len(codes) <= 8 or not all(isinstance(d, int) and 0 <= d <= 5 for d in codes):
        raise ValueError(f"{op}: directions must be 1, 2, 4 or up to 8 numbers from 0 to 5, got {directions!r}")
    return codes


def cross_scan(
    x: Tensor, directions: int | Sequence[int] = 4, *, channels_last: bool = False, out_channels_last: bool = False
) -> Tensor:
    """Copies of a map as sequences, one per direction (see the module's docstring).

    Args:
        x: ``[B, C, H, W]``, or ``[B, H, W, C]`` with `channels_last`; any dtype, any strides.
        directions: 1 (rows), 2 (rows and back), 4 (rows, columns, and both back), or the directions' numbers.
        channels_last: how `x` lies.
        out_channels_last: how the result lies.

    Returns:
        ``[B, K, C, H * W]``, or ``[B, H * W, K, C]`` with `out_channels_last`, of K directions.

    Raises:
        ValueError: directions or `x` of another form.
    """
    codes = direction_codes("cross_scan", directions)
    if x.dim() != 4:
        raise ValueError(f"cross_scan: x must have 4 dimensions, got {list(x.shape)}")
    out = _Scan.apply(x.movedim(-1, 1) if channels_last else x, codes, out_channels_last)
    return out.permute(0, 3, 1, 2) if out_channels_last else out


def cross_merge(
    ys: Tensor,
    H: int,
    W: int,
    directions: int | Sequence[int] = 4,
    *,
    channels_last: bool = False,
    out_channels_last: bool = False,
) -> Tensor:
    """The sum over directions of sequences, each put back on the map (see the module's docstring).

    Args:
        ys: ``[B, K, C, H * W]``, or ``[B, H * W, K, C]`` with `channels_last`; any floating dtype, any strides.
        H, W: sizes of the map.
        directions: as in `cross_scan`; K of them.
        channels_last: how `ys` lies.
        out_channels_last: how the result lies.

    Returns:
        ``[B, C, H * W]`` in the order of rows, or ``[B, H * W, C]`` with `out_channels_last`.

    Raises:
        ValueError: directions or `ys` of another form.
    """
    codes = direction_codes("cross_merge", directions)
    if ys.dim() != 4:
        raise ValueError(f"cross_merge: ys must have 4 dimensions, got {list(ys.shape)}")
    if channels_last:
        ys = ys.permute(0, 2, 3, 1)
    if ys.shape[1] != len(codes) or ys.shape[3] != H * W:
        raise ValueError(
            f"cross_merge: ys must have {len(codes)} directions and {H} * {W} positions, got {list(ys.shape)}"
        )
    out = _Merge.apply(ys, H, W, codes, out_channels_last).flatten(2)
    return out.transpose(1, 2) if out_channels_last else out


def _put(out: Tensor, x: Tensor, forwards: int) -> None:
    """Copy the map x: [B, C, H, W] into a sequence out: [B, C, L], in the order of a direction of `_FORWARDS`."""
    H, W = x.shape[2:]
    if forwards == 0:
        out.unflatten(2, (H, W)).copy_(x)
    else:
        out.unflatten(2, (W, H)).transpose(2, 3).copy_(x if forwards == 1 else x.flip(3))


def _scan(x: Tensor, codes: tuple[int, ...], channels_last: bool) -> Tensor:
    B, C, H, W = x.shape
    K, L = len(codes), H * W
    out = x.new_empty((B, L, K, C)).permute(0, 2, 3, 1) if channels_last else x.new_empty((B, K, C, L))
    for k, code in enumerate(codes):
        forwards = _FORWARDS.get(code, code)
        if code in codes[:k]:
            out[:, k] = out[:, codes.index(code)]
        elif code == forwards:
            _put(out[:, k], x, code)
        elif forwards in codes[:k]:  # flipping a sequence is the faster copy
            out[:, k] = out[:, codes.index(forwards)].flip(2)
        else:
            _put(out[:, k], x.flip(2, 3), forwards)
    return out


def _merge(ys: Tensor, H: int, W: int, codes: tuple[int, ...], channels_last: bool) -> Tensor:
    B, _, C, _ = ys.shape
    out = ys.new_empty((B, H, W, C)).permute(0, 3, 1, 2) if channels_last else ys.new_empty((B, C, H, W))
    written = False
    for forwards in (0, 1, 4):
        there = [ys[:, k] for k, code in enumerate(codes) if code == forwards]
        back = [ys[:, k] for k, code in enumerate(codes) if code != forwards == _FORWARDS.get(code)]
        if not there + back:
            continue
        total = _sum(there)
        if back:
            total = _sum(back).flip(2) if total is None else total + _sum(back).flip(2)
        y = total.unflatten(2, (W, H)).transpose(2, 3) if forwards else total.unflatten(2, (H, W))
        if forwards == 4:
            y = y.flip(3)
        out = out.add_(y) if written else out.copy_(y)
        written = True
    return out


def _sum(ys: list[Tensor]) -> Any:
    return sum(ys[1:], ys[0]) if ys else None


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: tuple[int, ...], channels_last: bool) -> Tensor:  # type: ignore[override]
        ctx.codes, ctx.sizes, ctx.channels_last = codes, x.shape[2:], x.stride(1) == 1
        return _scan(x, codes, channels_last)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _Merge.apply(g, *ctx.sizes, ctx.codes, ctx.channels_last), None, None


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, ys: Tensor, H: int, W: int, codes: tuple[int, ...], channels_last: bool
    ) -> Tensor:
        ctx.codes, ctx.channels_last = codes, ys.stride(2) == 1
        return _merge(ys, H, W, codes, channels_last)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _Scan.apply(g, ctx.codes, ctx.channels_last), None, None, None, None
