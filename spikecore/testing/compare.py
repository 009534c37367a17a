"""How results are compared: floats by what their own precision costs, spikes bit for bit. No tolerance is picked."""

import torch
from torch import Tensor

__all__ = ["assert_close", "assert_spikes_close"]

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
    assert actual.shape == reference64.shape, f"{name}: {list(actual.shape)} for {list(reference64.shape)}"
    eps, factor, roundings = torch.finfo(actual.dtype).eps, 2, 1
    reference64 = reference64.double()
    special = ~reference64.isfinite()
    same = torch.allclose(actual[special].double(), reference64[special], rtol=0, atol=0, equal_nan=True)
    assert same, f"{name}: NaN or infinity differ"
    error, allowed = (torch.where(special, 0, (t.double() - reference64).abs()) for t in (actual, reference))
    if actual.dtype == torch.float64 and reference.dtype != torch.float64:
        allowed = allowed * (eps / torch.finfo(torch.float32).eps)
        factor, roundings = 3, 2  # reference64 errs as much itself
    # The largest error of the tensor is the measure: that of one element is chance.
    bound = factor * allowed.max() if allowed.numel() else allowed.new_zeros(())
    bound = bound + roundings * eps * torch.where(special, 0, reference64.abs())
    worst = (error - bound).max().item() if error.numel() else 0.0
    assert worst <= 0, (
        f"{name}: {int((error > bound).sum())} of {error.numel()} err more than {factor} times the reference and "
        f"{roundings} rounding(s): at most {error.max():.3g}, the reference {allowed.max():.3g}; excess {worst:.3g}"
    )


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
