"""selective_scan alone: steps by hand, overflow, streaming, bad input, export, long sequences, and mambapy's block."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from spikecore.ops import selective_scan, selective_scan_ref, selective_scan_step
from spikecore.testing.cases.selective_scan import scan_sample
from spikecore.testing.compare import assert_close
from spikecore.testing.timing import bytes_kept, bytes_peak

LN2 = 0.6931471805599453


def inputs(dtype: torch.dtype = torch.float32, **changes: Any) -> dict[str, Any]:
    return scan_sample("alone", dtype, False, **changes).arguments


# ---- by hand ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", [selective_scan, selective_scan_ref], ids=["kernel", "reference"])
def test_by_hand(op: Any) -> None:
    """One channel, one state, decay 1/2 a step: h = 1, 2.5, 5.25; y = C h + D u; loss = y0 + 2 y1 + y2."""

    def leaf(*values: float, shape: tuple[int, ...] = (1, 1, 3)) -> Tensor:
        return torch.tensor(values, dtype=torch.float64).reshape(shape).requires_grad_()

    u, delta, B, C = leaf(1, 2, 4), leaf(1, 1, 1), leaf(1, 1, 1), leaf(1, 2, 1)
    A, D, h_init = leaf(-LN2, shape=(1, 1)), leaf(0.5, shape=(1,)), leaf(0, shape=(1, 1, 1))
    y, h = op(u, delta, A, B, C, D, return_last_state=True, h_init=h_init)
    assert y.flatten().tolist() == pytest.approx([1.5, 6, 7.25], abs=1e-14)
    assert h.item() == pytest.approx(5.25, abs=1e-14)
    (y * torch.tensor([1.0, 2.0, 1.0])).sum().backward()
    # The gradients of h: g2 = 1, g1 = 2 * 2 + 1/2 = 4.5, g0 = 1 + 4.5 / 2 = 3.25.
    assert u.grad.flatten().tolist() == pytest.approx([3.25 + 0.5, 4.5 + 1, 1 + 0.5], abs=1e-14)
    assert B.grad.flatten().tolist() == pytest.approx([3.25, 9, 4], abs=1e-14)
    assert C.grad.flatten().tolist() == pytest.approx([1, 5, 5.25], abs=1e-14)
    assert D.grad.item() == pytest.approx(1 + 4 + 4, abs=1e-14)
    assert h_init.grad.item() == pytest.approx(3.25 / 2, abs=1e-14)
    assert A.grad.item() == pytest.approx(4.5 * 0.5 * 1 + 1 * 0.5 * 2.5, abs=1e-14)
    want = [3.25, 9 - LN2 * 4.5 / 2 * 1, 4 - LN2 / 2 * 2.5]
    assert delta.grad.flatten().tolist() == pytest.approx(want, abs=1e-14)


def test_gradcheck() -> None:
    arguments = inputs(torch.float64, B=1, C=3, S=2, L=5)
    names = [n for n, t in arguments.items() if isinstance(t, Tensor)]
    leaves = [arguments[n].requires_grad_() for n in names]
    flags = {n: v for n, v in arguments.items() if n not in names}
    assert torch.autograd.gradcheck(lambda *t: selective_scan(**dict(zip(names, t, strict=True)), **flags), leaves)


def test_second_backward_is_refused() -> None:
    arguments = inputs(C=2)
    u = arguments["u"].requires_grad_()
    (g,) = torch.autograd.grad(selective_scan(**arguments)[0].sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="selective_scan: a second backward"):
        g.sum().backward()


# ---- streaming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 16, 64, 90])
def test_two_calls_are_one(cut: int) -> None:
    arguments = inputs(L=100)
    y, h = selective_scan(**arguments)
    first = {k: v[..., :cut] if k in ("u", "delta", "B", "C", "z") else v for k, v in arguments.items()}
    then = {k: v[..., cut:] if k in ("u", "delta", "B", "C", "z") else v for k, v in arguments.items()}
    y1, h1 = selective_scan(**first)
    y2, h2 = selective_scan(**then | {"h_init": h1})
    assert torch.equal(torch.cat([y1, y2], -1), y)
    assert torch.equal(h2, h)


@pytest.mark.parametrize("G", [None, 3])
def test_steps_are_the_sequence(G: int | None) -> None:
    arguments = inputs(C=6, L=7, G=G)
    y, h_last = selective_scan(**arguments)
    h, ys = arguments.pop("h_init"), []
    arguments.pop("return_last_state")
    for l in range(7):
        at = {k: v[..., l] if k in ("u", "delta", "B", "C", "z") else v for k, v in arguments.items()}
        y_l, h = selective_scan_step(h, **at)
        ys.append(y_l)
    assert torch.equal(torch.stack(ys, -1), y)
    assert torch.equal(h, h_last)


# ---- special values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_overflow(dtype: torch.dtype) -> None:
    """exp(dt A) saturates: a state of 0 stays 0, another one grows to infinity, and NaN comes from neither."""
    u = torch.zeros(1, 1, 6, dtype=dtype)
    one, A = torch.ones_like(u), torch.full((1, 1), 1e4, dtype=dtype)
    assert torch.equal(selective_scan(u, one, A, one, one), u)
    u[..., 2] = 1
    y = selective_scan(u, one, A, one, one)
    assert y[..., :3].flatten().tolist() == [0, 0, 1]
    assert y[..., 3] > torch.finfo(dtype).max / 2
    assert y[..., 4:].isposinf().all()
    assert selective_scan(-u, one, A, one, one)[..., 4:].isneginf().all()


def test_nan_and_infinity_go_where_the_formula_has_them() -> None:
    arguments = inputs(C=4, L=20, options="softplus D")
    arguments["u"][0, 1, 5] = torch.nan
    arguments["delta"][1, 2, 7] = torch.nan
    got, want = selective_scan(**arguments), selective_scan_ref(**arguments)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.isnan().nonzero()[:, 1].unique(), torch.tensor([1, 2]))


# ---- bad input -------------------------------------------------------------------------------------------------------

BAD = {
    "u of integers": ({"u": torch.ones(2, 4, 8, dtype=torch.int64)}, "u must be float32, bfloat16, float16 or float64"),
    "u of two dimensions": ({"u": torch.ones(4, 8)}, "u must be \\[B, C, L\\], got float32 \\[4, 8\\] on cpu"),
    "delta shorter": ({"delta": torch.ones(2, 4, 7)}, "delta must be float32 \\[2, 4, 8\\] on cpu, got float32"),
    "integer delta": ({"delta": torch.ones(2, 4, 8).int()}, "delta must be float32 .* got int32"),
    "complex A": ({"A": torch.ones(4, 3, dtype=torch.complex64)}, "A must be .*complex A is not supported.*complex64"),
    "A of other channels": ({"A": torch.ones(5, 3)}, "A must be \\[4, S\\], float32 on cpu"),
    "B constant": ({"B": torch.ones(4, 3)}, "B must be \\[B, S, L\\] or \\[B, G, S, L\\] \\(constant in L"),
    "C constant": ({"C": torch.ones(4, 3)}, "C must be \\[B, S, L\\] or \\[B, G, S, L\\] \\(constant in L"),
    "B of other steps": ({"B": torch.ones(2, 3, 9)}, "B must be float32 \\[2, 1, 3, 8\\] on cpu"),
    "B of other states": ({"B": torch.ones(2, 5, 8)}, "B must be float32 \\[2, 1, 3, 8\\] on cpu"),
    "three groups": ({"B": torch.ones(2, 3, 3, 8)}, "B must have a number of groups that divides the 4 channels"),
    "no groups": ({"B": torch.ones(2, 0, 3, 8)}, "B must have a number of groups that divides the 4 channels"),
    "groups differ": ({"C": torch.ones(2, 2, 3, 8)}, "C must be float32 \\[2, 1, 3, 8\\] on cpu"),
    "D of other channels": ({"D": torch.ones(3)}, "D must be float32 \\[4\\] on cpu, got float32 \\[3\\]"),
    "integer D": ({"D": torch.ones(4, dtype=torch.int32)}, "D must be float32 \\[4\\] on cpu, got int32"),
    "z shorter": ({"z": torch.ones(2, 4, 7)}, "z must be float32 \\[2, 4, 8\\] on cpu"),
    "bias of two dimensions": ({"delta_bias": torch.ones(4, 1)}, "delta_bias must be float32 \\[4\\] on cpu"),
    "h_init of other states": ({"h_init": torch.ones(2, 4, 2)}, "h_init must be float32 \\[2, 4, 3\\] on cpu"),
    "half h_init": ({"h_init": torch.ones(2, 4, 3).half()}, "h_init must be float32 .* got float16"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_bad_input(bad: str) -> None:
    """One clear line, the same from the kernel's checks and while tracing."""
    changes, message = BAD[bad]
    arguments = inputs(C=4, S=3, L=8) | changes
    with pytest.raises(RuntimeError, match=f"^selective_scan: {message}") as real:
        selective_scan(**arguments)
    with FakeTensorMode() as mode, pytest.raises(RuntimeError) as fake:
        selective_scan(**{k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in arguments.items()})
    assert str(fake.value) == str(real.value)


def test_no_tensor() -> None:
    with pytest.raises(TypeError, match="selective_scan: u must be a tensor, got list"):
        selective_scan([1.0], None, None, None, None)


# ---- precision -------------------------------------------------------------------------------------------------------


def test_autocast_brings_all_to_the_widest() -> None:
    """A convolution leaves bfloat16, softplus float32: the scan runs in float32 and answers in the dtype of u."""
    torch.manual_seed(0)
    project, x = torch.nn.Linear(6, 4), torch.randn(2, 9, 6)
    arguments = inputs(C=4, S=3, L=9) | {"z": None}
    with torch.autocast("cpu", torch.bfloat16):
        u = project(x).mT
        assert u.dtype == torch.bfloat16
        y, h = selective_scan(**arguments | {"u": u, "return_last_state": True})
        y.float().sum().backward()
    assert (y.dtype, h.dtype) == (torch.bfloat16, torch.float32)
    want = selective_scan(**arguments | {"u": u.detach().float(), "return_last_state": True})
    assert torch.equal(y, want[0].bfloat16())
    assert torch.equal(h, want[1])
    assert project.weight.grad.abs().sum() > 0


def test_parameters_of_a_half_model_are_converted() -> None:
    arguments = inputs(torch.float16)
    half = {k: arguments[k].half() for k in ("A", "D", "delta_bias")}
    y, h = selective_scan(**arguments | half)
    want = selective_scan(**arguments | {k: v.float() for k, v in half.items()})
    assert torch.equal(y, want[0])
    assert (y.dtype, h.dtype) == (torch.float16, torch.float32)


def test_long_sequences_train_in_linear_memory() -> None:
    """L = 65,536: backward keeps nothing but inputs, and at its peak little more than the gradients."""

    def run(L: int) -> tuple[int, int]:
        arguments = inputs(B=1, C=16, S=4, L=L, options="softplus")
        leaves = [t.requires_grad_() for t in arguments.values() if isinstance(t, Tensor)]

        def train() -> tuple[Tensor, ...]:
            return torch.autograd.grad(selective_scan(**arguments).sum(), leaves)

        assert all(g.isfinite().all() for g in train())
        return bytes_kept(lambda: selective_scan(**arguments), *leaves), bytes_peak(train) // leaves[0].nbytes

    (kept, peak), (kept_long, peak_long) = run(4096), run(65536)
    assert kept == kept_long == 0
    assert peak_long <= peak <= 8  # times u: y, g_y, gradients, and partial sums of those of B and C


def test_against_a_long_reference() -> None:
    arguments = inputs(B=1, C=8, S=2, L=3000)
    exact = {k: v.double() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    for got, want, want64 in zip(
        selective_scan(**arguments), selective_scan_ref(**arguments), selective_scan_ref(**exact), strict=True
    ):
        assert_close(got, want, want64)


def test_export() -> None:
    class Scan(torch.nn.Module):
        def forward(self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
            return selective_scan(u, delta, A, B, C, delta_softplus=True)

    arguments = tuple(inputs(options="softplus")[k] for k in ("u", "delta", "A", "B", "C"))
    exported = torch.export.export(Scan(), arguments).module()
    assert torch.equal(exported(*arguments), Scan()(*arguments))


# ---- a published block around it -------------------------------------------------------------------------------------


@pytest.mark.peers
def test_mambapy_block(tmp_path: Path) -> None:
    """mambapy's MambaBlock gives the same outputs and gradients after its scan is replaced by ours."""
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target", str(tmp_path)]
    subprocess.run([*install, "mambapy==1.2.0"], check=True, capture_output=True)
    script = Path(__file__).with_name("mambapy_block.py")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "same" in done.stdout
