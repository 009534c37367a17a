"""`selective_scan_2d`: hand values, gradcheck, dtypes under autocast, export, memory, bad input."""

import math

import pytest
import torch

from spikecore.ops import selective_scan_2d, selective_scan_2d_ref
from spikecore.testing import timing
from spikecore.testing.cases.selective_scan_2d import sample


def test_hand_values():
    """Two places, decay 1/2 a step: along a row 1 then 2, and back."""
    x = torch.tensor([[[[1.0, 2.0]]]])
    delta, B, C = torch.ones(1, 2, 1, 1, 2), torch.ones(1, 2, 1, 1, 2), torch.full((1, 2, 1, 1, 2), 3.0)
    A = torch.full((2, 1), -math.log(2.0))
    y = selective_scan_2d(x, delta, A, B, C, directions=2)
    # There: h = 1, 2.5; back: h = 2 + ... at the right 2, at the left 1 + 2 / 2.
    torch.testing.assert_close(y, 3 * torch.tensor([[[[1.0 + 2.0, 2.5 + 2.0]]]]))
    y = selective_scan_2d(x, delta, A, B, C, D=torch.tensor([1.0, 10.0]), directions=2)
    torch.testing.assert_close(y, 3 * torch.tensor([[[[3.0, 4.5]]]]) + 11 * x)


def test_columns_are_rows_of_the_turned_map():
    a = sample("turned", torch.float32, False, directions=(1,), H=6, W=3).arguments
    turned = {k: t.mT if k in ("x", "delta", "B", "C") else t for k, t in a.items()} | {"directions": (0,)}
    torch.testing.assert_close(selective_scan_2d(**a), selective_scan_2d(**turned).mT)


def test_gradcheck():
    a = sample("gradcheck", torch.float64, False, B=1, C=3, H=2, W=3, S=2).leaves()[0].arguments
    names = [k for k, t in a.items() if isinstance(t, torch.Tensor)]

    def f(*tensors):
        return selective_scan_2d(**a | dict(zip(names, tensors, strict=True)))

    assert torch.autograd.gradcheck(f, tuple(a[k] for k in names))


def test_autocast_dtypes():
    a = sample("autocast", torch.bfloat16, False).leaves()[0].arguments
    assert a["A"].dtype == torch.float32
    y = selective_scan_2d(**a | {"x": a["x"].float()})
    assert y.dtype == torch.float32
    y = selective_scan_2d(**a)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert (a["delta"].grad.dtype, a["A"].grad.dtype) == (torch.bfloat16, torch.float32)
    half_A = selective_scan_2d(**a | {"A": a["A"].bfloat16()})
    assert torch.equal(half_A, selective_scan_2d(**a | {"A": a["A"].bfloat16().float()}))


def test_export():
    class Scan(torch.nn.Module):
        def forward(self, x, delta, A, B, C):
            return selective_scan_2d(x, delta, A, B, C, directions=4)

    a = list(sample("export", torch.float32, False).tensors().values())[:5]
    exported = torch.export.export(Scan(), tuple(a))
    assert torch.equal(exported.module()(*a), Scan()(*a))


def test_keeps_nothing_but_its_inputs():
    """And allocates, beside what comes out, less than the permuted copies alone would take."""
    drawn, leaves = sample("memory", torch.float32, False, B=1, C=64, H=20, W=20, S=4).leaves()
    kept = timing.bytes_kept(lambda: selective_scan_2d(**drawn.arguments), *leaves.values())
    assert kept == 0
    results = sum(t.nbytes for t in leaves.values()) + drawn.arguments["x"].nbytes
    peak = timing.bytes_peak(
        lambda: torch.autograd.grad(selective_scan_2d(**drawn.arguments).sum(), list(leaves.values()))
    )
    assert peak - results < 4 * drawn.arguments["x"].nbytes


def test_double_backward_is_refused():
    drawn, leaves = sample("twice", torch.float32, False).leaves()
    y = selective_scan_2d(**drawn.arguments)
    (g,) = torch.autograd.grad(y.sum(), leaves["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="selective_scan_2d: a second backward"):
        g.sum().backward()


def test_extremes_are_those_of_the_reference():
    a = sample("extremes", torch.float32, False, B=1, C=3, H=2, W=3).arguments
    for name, value in (("x", math.nan), ("delta", 200.0), ("delta", -200.0), ("x", 0.0)):
        changed = {**a, name: a[name].clone()}
        changed[name][..., 0, 1] = value
        got, want = selective_scan_2d(**changed), selective_scan_2d_ref(**changed)
        torch.testing.assert_close(got, want, equal_nan=True, rtol=1e-4, atol=1e-4)


BAD = {
    "x must be float32, bfloat16, float16 or float64, got int64 [2, 9, 4, 5] on cpu": {"x": lambda t: t.long()},
    "x must be [B, C, H, W], got float32 [2, 9, 20] on cpu": {"x": lambda t: t.flatten(2)},
    "delta must be float32 [2, 4, 9, 4, 5] on cpu, got float32 [2, 4, 9, 5, 4] on cpu": {"delta": lambda t: t.mT},
    "A must be [K, C, S] with S from 1 to 64, got float32 [4, 9, 0] on cpu": {"A": lambda t: t[..., :0]},
    "A must be float32 [4, 9, 2] on cpu, got float32 [4, 8, 2] on cpu": {"A": lambda t: t[:, :8]},
    "B must be float32 [2, 4, 2, 4, 5] on cpu, got float32 [2, 4, 1, 4, 5] on cpu": {"B": lambda t: t[:, :, :1]},
    "C must be float32 [2, 4, 2, 4, 5] on cpu, got float32 [2, 3, 2, 4, 5] on cpu": {"C": lambda t: t[:, :3]},
    "D must be float32 [4, 9] on cpu, got float32 [4] on cpu": {"D": lambda t: t[:, 0]},
    "delta_bias must be float32 [4, 9] on cpu, got float32 [2, 9] on cpu": {"delta_bias": lambda t: t[:2]},
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_bad_tensors(message):
    """The same words from C++ and from the checks of tracing and Triton."""
    a = sample("bad", torch.float32, True).arguments
    a |= {k: change(a[k]) for k, change in BAD[message].items()}
    for device in ("cpu", "meta"):
        moved = {k: t.to(device) if isinstance(t, torch.Tensor) else t for k, t in a.items()}
        with pytest.raises(RuntimeError) as error:
            selective_scan_2d(**moved)
        assert str(error.value).splitlines()[0] == f"selective_scan_2d: {message.replace('cpu', device)}"


def test_bad_arguments():
    a = sample("bad", torch.float32, True).arguments
    with pytest.raises(TypeError, match="selective_scan_2d: x must be a tensor, got float"):
        selective_scan_2d(**a | {"x": 1.0})
    with pytest.raises(ValueError, match="selective_scan_2d: directions must be"):
        selective_scan_2d(**a | {"directions": 3})
