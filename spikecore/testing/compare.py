"""How results are compared: floats by what their own precision costs, spikes bit for bit. No tolerance is picked."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["assert_all_close", "assert_close", "assert_spikes_close"]

BAND_ULPS = 4  # a potential is the result of four roundings


def assert_close(actual: Tensor, reference: Tensor, reference64: Tensor, name: str = "result") -> None:
    """`actual` errs at most twice as much as the same formula in its own precision, plus one rounding of the output.

    Args:
        actual: from the kernel.
        reference: the formula in plain PyTorch in the precision of the kernel. Where the kernel runs in float64, the
            formula in float32: its error, scaled by the two precisions, stands for the rounding of float64.
        reference64: the formula in float64.
        name: opens the message.
    """
    assert_all_close([(actual, reference, reference64)], name)


def assert_all_close(
    results: Sequence[tuple[Tensor, Tensor, Tensor]],
    name: str = "result",
    more: Sequence[tuple[Tensor, Tensor]] = (),
) -> None:
    """`assert_close` for tensors judged together, all of one precision, errors in units of each one's largest value.

    The largest error of a tensor is the measure, as that of one element is chance; so it is with a tensor of few.
    `more`: the reference and float64 on other inputs of this kind, whose errors count as the reference's too.
    """
    shares, scales = [], []
    eps, factor, roundings = torch.finfo(results[0][0].dtype).eps, 2, 1
    for actual, reference, reference64 in results:
        assert actual.shape == reference64.shape, f"{name}: {list(actual.shape)} for {list(reference64.shape)}"
        reference64 = reference64.double()
        special = ~reference64.isfinite()
        same = torch.allclose(actual[special].double(), reference64[special], rtol=0, atol=0, equal_nan=True)
        assert same, f"{name}: NaN or infinity differ"
        exact = torch.where(special, 0, reference64.abs())
        error, allowed = (torch.where(special, 0, (t.double() - reference64).abs()) for t in (actual, reference))
        if actual.dtype == torch.float64 and reference.dtype != torch.float64:
            allowed = allowed * (eps / torch.finfo(torch.float32).eps)
            factor, roundings = 3, 2  # reference64 errs as much itself
        scale = float(exact.max()) if len(results) > 1 and exact.numel() else 1.0
        scales.append(scale or 1.0)
        shares.append((error, allowed, exact))
    largest = max(_max(allowed) / s for (_, allowed, _), s in zip(shares, scales, strict=True))
    for reference, reference64 in more:
        scale = float(reference64.abs().max()) if len(results) > 1 and reference64.numel() else 1.0
        precision = eps / torch.finfo(reference.dtype).eps if factor == 3 else 1.0
        largest = max(largest, _max((reference.double() - reference64.double()).abs()) * precision / (scale or 1.0))
    for (error, allowed, exact), scale in zip(shares, scales, strict=True):
        bound = factor * largest * scale + roundings * eps * exact
        worst = (error - bound).max().item() if error.numel() else 0.0
        assert worst <= 0, (
            f"{name}: {int((error > bound).sum())} of {error.numel()} err more than {factor} times the reference and "
            f"{roundings} rounding(s): at most {error.max():.3g}, the reference {allowed.max():.3g} here and "
            f"{largest * scale:.3g} in all; excess {worst:.3g}"
        )


def _max(errors: Tensor) -> float:
    return float(errors.max()) if errors.numel() else 0.0


def assert_spikes_close(kernel: Tensor, reference: Tensor, h: Tensor, v_threshold: float) -> int:
    """Spikes are the same wherever `h` lies farther from the threshold than `BAND_ULPS` ulps; returns the flips inside.

    Args:
        kernel, reference: spikes of one step from the same state (restart the reference from the kernel's state after
            a flip).
        h: the reference's potential before the reset, in the state dtype.
        v_threshold: firing threshold.
    """
    flips = kernel.double() != reference.double()
    scale = h.abs().clamp(min=max(abs(v_threshold), torch.finfo(h.dtype).tiny))
    outside = flips & ((h - v_threshold).abs() > BAND_ULPS * torch.finfo(h.dtype).eps * scale)
    assert not outside.any(), (
        f"{int(outside.sum())} of {flips.numel()} spikes differ outside the band of {BAND_ULPS} ulps, first at "
        f"{outside.nonzero()[0].tolist()}: h = {h[outside][0].item()!r}, v_threshold = {v_threshold}"
    )
    return int(flips.sum())
