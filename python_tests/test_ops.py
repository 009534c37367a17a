"""The sweep: every operator's Case against its reference, in autograd, under compilers, with threads and ISAs."""

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from spikecore import _backend
from spikecore.testing.cases import CASES, Case, Sample, values
from spikecore.testing.compare import assert_all_close, assert_close, assert_spikes_close

PAIRS = [(case, name) for case in CASES.values() for name in case.names()]
EACH = pytest.mark.parametrize(("case", "name"), PAIRS, ids=[f"{c.name}-{n}" for c, n in PAIRS])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)

# A few samples of every case, for what is slow.
FEW_PAIRS = [(case, name) for case in CASES.values() for name in case.few]
EACH_OF_FEW = pytest.mark.parametrize(("case", "name"), FEW_PAIRS, ids=[f"{c.name}-{n}" for c, n in FEW_PAIRS])


def upstream(outputs: tuple[Tensor, ...], kind: str) -> list[Tensor | None]:
    """Gradients for each output: dense, of another layout, or for some outputs alone."""
    grads: list[Tensor | None] = []
    for i, out in enumerate(outputs):
        g = values(tuple(out.shape), torch.float32, True, 100 + i).to(out)
        if not out.is_floating_point() or kind == f"all but {i}" or (kind.startswith("only") and kind != f"only {i}"):
            grads.append(None)
        elif kind == "expanded":
            grads.append(torch.tensor(0.7 - 0.3 * i, dtype=out.dtype, device=out.device).expand_as(out))
        elif kind == "transposed":
            dims = tuple(reversed(range(out.dim())))
            grads.append(g.permute(dims).contiguous().permute(dims))
        else:
            grads.append(torch.zeros_like(g) if kind == "zero" else g)
    return grads


def gradients(f: Callable, sample: Sample, kind: str = "dense") -> dict[str, Tensor]:
    """Gradients of one call by argument; an argument that got none is missing."""
    sample, leaves = sample.leaves()
    outputs = f(**sample.arguments)
    pairs = [(o, g) for o, g in zip(outputs, upstream(outputs, kind), strict=True) if g is not None and o.requires_grad]
    if not pairs:
        return {}
    targets, grads = zip(*pairs, strict=True)
    got = torch.autograd.grad(targets, list(leaves.values()), grads, allow_unused=True)
    return {k: g for k, g in zip(leaves, got, strict=True) if g is not None}


FEW_NUMBERS = 256  # gradients of fewer are judged together


def judged_as(arg: str, gradient: Tensor, dtype: torch.dtype) -> str:
    return f"parameters of {dtype}" if gradient.numel() < FEW_NUMBERS else arg


def reference_errors(case: Case, sample: Sample, kind: str, draw: int) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """(gradient, exact gradient) by the reference for the sample with each number moved by up to four roundings.

    Where there are spikes, numbers in half precision stay, and a draw that changes a spike tells nothing.
    """
    g = torch.Generator().manual_seed(draw)
    dtypes = {name: t.dtype for name, t in sample.tensors().items()}

    def moved(t: Tensor) -> Tensor:
        if not t.is_floating_point() or (case.discrete and t.dtype in (torch.bfloat16, torch.float16)):
            return t
        return t * (1 + torch.finfo(t.dtype).eps * torch.randint(-4, 5, t.shape, generator=g)).to(t.dtype)

    sample = sample.to(torch.float32) if sample.dtype == torch.float64 else sample
    near = sample.map(moved)
    for out, was, now in zip(
        case.outputs(sample), case.ref(**sample.arguments), case.ref(**near.arguments), strict=True
    ):
        if out in case.discrete and not torch.equal(was, now):
            return {}
    rough, exact = gradients(case.ref, near, kind), gradients(case.ref, near.to(torch.float64), kind)
    errors: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for arg, want in exact.items():
        errors.setdefault(judged_as(arg, want, dtypes[arg]), []).append((rough[arg], want))
    return errors


def check_gradients(case: Case, sample: Sample, kinds: tuple[str, ...] = ("dense",)) -> None:
    """Kernel against reference in the kernel's precision (float64: in float32, scaled) and in float64."""
    dtype = sample.dtype
    judged: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for kind in kinds:
        actual = gradients(case.op, sample, kind)
        reference = gradients(case.ref, sample.to(torch.float32) if dtype == torch.float64 else sample, kind)
        exact = gradients(case.ref, sample.to(torch.float64), kind)
        assert set(exact) == set(reference)
        if kind != "zero" and not kind.startswith(("only", "all but")):
            assert set(actual) == set(exact)
        for arg, want in exact.items():  # no gradient at all is as good as zeros
            given = sample.tensors()[arg].dtype
            got = actual.get(arg, torch.zeros_like(reference[arg], dtype=given))
            assert got.dtype == given, arg
            judged.setdefault(judged_as(arg, want, given), []).append((got, reference[arg], want))
    for arg, results in judged.items():
        try:
            assert_all_close(results, f"{case.name}: gradient of {arg}")
        except AssertionError:
            # Was the reference lucky? Its errors on inputs a few roundings away are as good a measure.
            more = [
                e
                for draw in range(4)
                for kind in kinds
                for e in reference_errors(case, sample, kind, draw).get(arg, [])
            ]
            assert_all_close(results, f"{case.name}: gradient of {arg}", more)


# ---- forward ---------------------------------------------------------------------------------------------------------


@EACH
@DTYPES
@pytest.mark.parametrize("grid", [True, False], ids=["grid", "random"])
def test_forward(case: Case, name: str, dtype: torch.dtype, grid: bool) -> None:
    if dtype not in case.dtypes:
        pytest.skip(f"{case.name} does not take {dtype}")
    check_forward(case, case.sample(name, dtype, grid), grid)


def check_forward(case: Case, sample: Sample, grid: bool) -> None:
    """Outputs against the reference in the kernel's precision and in float64; the inputs stay as they were."""
    before = sample.map(torch.clone)
    actual, names = case.op(**sample.arguments), case.outputs(sample)
    reference = case.ref(**sample.arguments)
    exact = case.ref(**sample.to(torch.float64).arguments)
    rough = case.ref(**sample.to(torch.float32).arguments) if sample.dtype == torch.float64 else reference
    assert len(actual) == len(names)
    for arg, was in before.tensors().items():
        torch.testing.assert_close(sample.tensors()[arg], was, rtol=0, atol=0, equal_nan=True, msg=f"{arg} changed")
    for out, got, want, want32, want64 in zip(names, actual, reference, rough, exact, strict=True):
        assert got.dtype == want.dtype, out
        if out in case.discrete and grid:
            assert torch.equal(got, want), out
            assert torch.equal(got, want64.to(got.dtype)), f"{out}: the grid is exact in every precision"
        elif out not in case.discrete:
            assert_close(got, want32, want64, out)


@EACH
@DTYPES
def test_outputs_lie_as_the_fake_says(case: Case, name: str, dtype: torch.dtype) -> None:
    if dtype not in case.dtypes:
        pytest.skip(f"{case.name} does not take {dtype}")
    calls = recorded(case, case.sample(name, dtype))
    # A call that returns nothing but bits has no backward.
    registered = case.registered if any(o.is_floating_point() for o in calls[0][2]) else case.registered[:1]
    assert [func.overloadpacket._qualified_op_name for func, _, _ in calls] == [f"spikecore::{op}" for op in registered]
    for func, args, real in calls:
        with FakeTensorMode() as mode:
            fake = func(*(mode.from_tensor(t) if isinstance(t, Tensor) else t for t in args))
        fake = fake if isinstance(fake, tuple) else (fake,)
        for i, (r, f) in enumerate(zip(real, fake, strict=True)):
            assert (r.shape, r.stride(), r.dtype) == (f.shape, f.stride(), f.dtype), (func, i)


def recorded(case: Case, sample: Sample) -> list[tuple[Any, tuple, Any]]:
    """Calls of spikecore operators in forward and backward: (operator, detached arguments, results)."""
    calls: list[tuple[Any, tuple, Any]] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if func.namespace == "spikecore":
                results = out if isinstance(out, tuple) else (out,)
                calls.append((func, tuple(t.detach() if isinstance(t, Tensor) else t for t in args), results))
            return out

    with Recorder():
        gradients(case.op, sample)
    return calls


@EACH
def test_every_output_element_is_written(case: Case, name: str) -> None:
    """The allocator hands out memory full of NaN bytes; nothing of it may be left in a result."""
    sample = case.sample(name)
    clean, want = case.op(**sample.arguments), gradients(case.op, sample)  # held right by the tests above and below
    sizes = {t.numel() * t.element_size() for t in (*clean, *want.values())} - {0}
    poisoned: set[tuple[int, int]] = set()  # where blocks began and ended

    def poison() -> None:
        blocks = [torch.full((n,), 0xFF, dtype=torch.uint8) for n in sizes for _ in range(24)]
        poisoned.update((b.data_ptr(), b.data_ptr() + b.numel()) for b in blocks)

    def reached(*results: Tensor) -> int:
        return sum(begin <= t.data_ptr() < end for begin, end in poisoned for t in results if t.numel())

    hits = 0
    for _ in range(4):
        poison()
        actual = case.op(**sample.arguments)
        hits += reached(*actual)
        assert all(torch.equal(got, expected) for got, expected in zip(actual, clean, strict=True))
        del actual
        poison()
        got = gradients(case.op, sample)
        hits += reached(*got.values())
        assert [arg for arg, g in got.items() if not torch.equal(g, want[arg])] == []
        del got
    if max(sizes, default=0) > 1024:  # smaller ones come from a pool of recent results
        assert hits, "the poison did not reach the kernel's memory"


# ---- backward --------------------------------------------------------------------------------------------------------


@EACH
@DTYPES
def test_gradients(case: Case, name: str, dtype: torch.dtype) -> None:
    if dtype not in case.dtypes:
        pytest.skip(f"{case.name} does not take {dtype}")
    check_gradients(case, case.sample(name, dtype, grid=True))
    check_gradients(case, case.sample(name, dtype, grid=False))


@EACH
def test_upstream_gradients(case: Case, name: str) -> None:
    sample = case.sample(name)
    outputs = len(case.outputs(sample))
    some = (f"{k} {i}" for k in ("only", "all but") for i in range(outputs))
    check_gradients(case, sample, ("expanded", "transposed", "zero", *some))


# ---- machine: threads, instruction sets ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_results_do_not_depend_on_threads(case: Case, dtype: torch.dtype) -> None:
    threads = torch.get_num_threads()
    for sample in case.large(dtype):
        results = []
        try:
            for n in (1, 2, 3):
                torch.set_num_threads(n)
                results.append((*case.op(**sample.arguments), *gradients(case.op, sample).values()))
        finally:
            torch.set_num_threads(threads)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True)), sample


_ISA_SCRIPT = """
import hashlib, json, sys, torch
import test_ops
from spikecore import _backend
from spikecore.testing.cases import CASES
torch.set_num_threads(1)
digests = {"isa": _backend._C.isa()}
for case in CASES.values():
    for dtype in case.dtypes:
        for sample in list(case.samples(dtype, False))[::2]:
            results = dict(zip(case.outputs(sample), case.op(**sample.arguments)))
            results |= {"g_" + k: g for k, g in test_ops.gradients(case.op, sample).items()}
            for k, t in results.items():
                data = t.contiguous().flatten().view(torch.uint8).numpy().tobytes()
                digests[f"{case.name} {dtype} {sample}: {k}"] = hashlib.sha256(data).hexdigest()
json.dump(digests, sys.stdout)
"""


def _start(isa: str, script: str = _ISA_SCRIPT) -> subprocess.Popen:
    path = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "SPIKECORE_ISA": isa, "PYTHONPATH": path}
    pipe = subprocess.PIPE
    # Not in the clone, whose bare source folder would stand before the installed package.
    here = tempfile.gettempdir()
    return subprocess.Popen([sys.executable, "-c", script], env=env, stdout=pipe, stderr=pipe, text=True, cwd=here)


@pytest.mark.slow
def test_every_isa_gives_the_same_bits() -> None:
    """Spikes, potentials and gradients; the levels share one rounding, so gradients need no rule either."""
    digests = {}
    for isa, process in [(isa, _start(isa)) for isa in _backend._C.isas()]:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        digests[isa] = json.loads(out)
        assert digests[isa].pop("isa") == isa
    first, *others = digests.values()
    assert len(first) > 800
    for isa, other in zip(list(digests)[1:], others, strict=True):
        assert [k for k in first if first[k] != other.get(k)] == [], isa


def test_unknown_isa_is_one_clear_line() -> None:
    for isa, process in [(isa, _start(isa, "import spikecore")) for isa in ("sse9", "AVX2 ")]:
        out, err = process.communicate(timeout=300)
        usable = ", ".join(_backend._C.isas())
        want = f"ValueError: SPIKECORE_ISA must be one of the instruction sets of this machine ({usable}), got '{isa}'"
        assert (process.returncode, out, err.strip("\n").splitlines()[-1]) == (1, "", want)


# ---- torch: opcheck, compile, dynamic shapes -------------------------------------------------------------------------


@EACH_OF_FEW
@pytest.mark.slow
def test_opcheck(case: Case, name: str) -> None:
    (forward, args, outputs), *rest = recorded(case, case.sample(name))
    for backward, backward_args, _ in rest:
        torch.library.opcheck(backward, backward_args)  # it has no derivative of its own
    if all(o.is_floating_point() for o in outputs):  # opcheck adds up all outputs, bits (uint8) too
        args = tuple(t.requires_grad_() if isinstance(t, Tensor) else t for t in args)
    torch.library.opcheck(forward, args)


def _compiled_equals_eager(case: Case, sample: Sample, **options: Any) -> None:
    torch._dynamo.reset()
    f = torch.compile(lambda **arguments: case.op(**arguments), fullgraph=True, **options)
    for got, want in zip(f(**sample.arguments), case.op(**sample.arguments), strict=True):
        assert torch.equal(got, want)
        assert got.stride() == want.stride()
    want_g = gradients(case.op, sample)
    got_g = gradients(f, sample)
    assert set(got_g) == set(want_g)
    assert [k for k in want_g if not torch.equal(got_g[k], want_g[k])] == []


@pytest.mark.parametrize(("case", "name"), PAIRS[::3], ids=[f"{c.name}-{n}" for c, n in PAIRS[::3]])
def test_full_graph_compile(case: Case, name: str) -> None:
    _compiled_equals_eager(case, case.sample(name), backend="aot_eager", dynamic=False)


@EACH_OF_FEW
def test_full_graph_compile_with_symbolic_sizes(case: Case, name: str) -> None:
    _compiled_equals_eager(case, case.sample(name), backend="aot_eager", dynamic=True)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_inductor(case: Case) -> None:
    _compiled_equals_eager(case, case.sample(case.few[0]), backend="inductor")


# ---- the rules themselves --------------------------------------------------------------------------------------------


def test_assert_close_refuses() -> None:
    exact = torch.linspace(0.1, 3, 50, dtype=torch.float64)
    assert_close(exact.float(), exact.float(), exact)
    for wrong in (
        exact.float() * (1 + 1e-6),
        exact.float().index_fill(0, torch.tensor(3), math.nan),
        exact.float()[1:],
    ):
        with pytest.raises(AssertionError):
            assert_close(wrong, exact.float(), exact)


def test_assert_spikes_close_refuses() -> None:
    h = torch.tensor([0.5, 1.0, 1 + 1e-7, 2.0])
    s = (h >= 1).float()
    assert assert_spikes_close(s, s, h, 1.0) == 0
    assert assert_spikes_close(torch.tensor([0.0, 0, 1, 1]), s, h, 1.0) == 1
    with pytest.raises(AssertionError, match="outside the band"):
        assert_spikes_close(torch.tensor([1.0, 1, 1, 1]), s, h, 1.0)
