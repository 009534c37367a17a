"""What the sweep cannot ask of every operator: lif's spikes step by step, its derivatives, its long sequences."""

from typing import Any

import pytest
import torch
from test_ops import check_gradients, gradients, upstream
from torch import Tensor

from spikecore.testing.cases import CASES, SURROGATES, Sample, values
from spikecore.testing.compare import assert_spikes_close

CASE = CASES["lif"]


@pytest.mark.parametrize("dtype", CASE.dtypes, ids=str)
@pytest.mark.parametrize("name", CASE.names())
def test_random_spikes_by_the_band_rule(name: str, dtype: torch.dtype) -> None:
    """Each step from the kernel's own state: flips only within a few ulps, and none where formulas round alike."""
    sample = CASE.sample(name, dtype, grid=False)
    a = {**sample.arguments, "packed": False, "return_h": True, "return_v": True}
    s, _, h, v = CASE.op(**a)
    rest = v.new_full(v.shape[1:], a.get("v_reset", 0.0) or 0.0)
    starts = torch.cat([a.get("v_init", rest).unsqueeze(0), v[:-1]])
    flips = 0
    for t in range(len(s)):
        s_ref, _, h_ref = CASE.ref(**{**a, "x": a["x"][t : t + 1], "v_init": starts[t], "return_v": False})
        flips += assert_spikes_close(s[t], s_ref[0], h_ref[0], a.get("v_threshold", 1.0))
        assert torch.equal(h[t], h_ref[0])  # one rounding per operation, as in the reference
    assert flips == 0


@pytest.mark.parametrize("which", [("x",), ("decay",), ("gain",), ("v_init",), ("decay", "v_init")], ids=str)
def test_gradients_of_some_inputs_only(which: tuple[str, ...]) -> None:
    sample = CASE.sample("PLIF channels, attached, v_init, h, v")
    full = gradients(CASE.op, sample)
    a = {k: v.detach().requires_grad_(k in which) if isinstance(v, Tensor) else v for k, v in sample.arguments.items()}
    outputs = CASE.op(**a)
    got = torch.autograd.grad(outputs, [a[k] for k in which], upstream(outputs, "dense"))
    for arg, g in zip(which, got, strict=True):
        assert torch.equal(g, full[arg]), arg


@pytest.mark.parametrize("v_reset", [0.0, -0.25, None], ids=["hard", "hard below zero", "soft"])
@pytest.mark.parametrize("surrogate", SURROGATES, ids=lambda s: type(s).__name__)
def test_gradcheck_of_the_smoothed_reference(surrogate: Any, v_reset: float | None) -> None:
    """The backward formula is the true gradient of the smoothed path; the kernels follow the reference elsewhere."""
    g = torch.Generator().manual_seed(1)
    x, decay, gain, v = (
        torch.rand(size, generator=g, dtype=torch.float64).add_(low).requires_grad_()
        for size, low in (((4, 2, 3), 0.2), ((3,), 0.1), ((), 0.3), ((2, 3), 0.1))
    )

    def f(x: Tensor, decay: Tensor, gain: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return CASE.ref(
            x, decay, gain, v_init=v, v_reset=v_reset, detach_reset=False, surrogate=surrogate,
            return_h=True, return_v=True, smooth=True,
        )  # fmt: skip

    assert torch.autograd.gradcheck(f, (x, decay, gain, v))


@pytest.mark.parametrize("surrogate", SURROGATES, ids=lambda s: type(s).__name__)
def test_derivative_of_the_primitive(surrogate: Any) -> None:
    u = (torch.linspace(-3, 3, 241, dtype=torch.float64) + 0.0021).requires_grad_()
    (g,) = torch.autograd.grad(surrogate.primitive(u).sum(), u)
    torch.testing.assert_close(g, surrogate(u.detach()))


@pytest.mark.parametrize("reset", [{}, {"v_reset": None, "detach_reset": False}], ids=["hard", "soft"])
@pytest.mark.parametrize("T", [63, 64, 65, 128, 300])
def test_long_sequences_cross_segments(T: int, reset: dict) -> None:
    arguments: dict[str, Any] = {
        "x": values((T, 2, 3), torch.float32, False, T) * 0.5,
        "decay": torch.tensor([0.9, 0.5, 0.99]), "gain": torch.tensor(0.4), "v_init": torch.full((2, 3), 0.3),
        "return_h": True, "return_v": True, **reset,
    }  # fmt: skip
    sample = Sample(f"T={T}", arguments)
    actual, reference = CASE.op(**arguments), CASE.ref(**arguments)
    exact = CASE.ref(**sample.to(torch.float64).arguments)
    assert torch.equal(reference[0], exact[0].float()), "seed: a spike differs between float32 and float64"
    for got, want in zip(actual, reference, strict=True):
        assert torch.equal(got, want)
    check_gradients(CASE, sample)


def test_one_dynamic_graph_serves_all_sizes() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    f = torch.compile(lambda x, d: CASE.op(x, d, channel_dim=1), fullgraph=True, backend="aot_eager")
    graphs = torch._dynamo.utils.counters["stats"]
    for T, N in ((3, 5), (4, 7), (9, 513), (33, 11)):
        x, d = values((T, N), torch.float32, True), torch.full((N,), 0.5)
        assert torch.equal(f(x, d)[0], CASE.op(x, d, channel_dim=1)[0])
    assert graphs["unique_graphs"] == 2  # the first sizes, then symbolic ones


def test_bytes_moved() -> None:
    """Float32 forward reads x and writes s (and the last potential); backward reads x and g_s, writes g_x."""
    x = torch.zeros(4, 1000)
    assert CASE.bytes_moved(Sample("", {"x": x})) == (2 * 16000 + 4000, 3 * 16000)
    assert CASE.bytes_moved(Sample("", {"x": x.bfloat16(), "packed": True})) == (8000 + 1000 + 4000, 16000)
