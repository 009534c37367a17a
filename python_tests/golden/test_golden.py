"""Parity with published code: the cases beside this file, and those of any folder (``pytest --golden=DIR``)."""

import importlib
import os
import pathlib

import pytest
import torch
from backends import through
from golden import harness, kinds  # noqa: F401  (registers the runners)

from spikecore.testing.cases import CASES

HERE = pathlib.Path(__file__).parent / "cases"

OPS = [op for op in harness.backends if op]
if os.environ.get("TRITON_INTERPRET") == "1":  # run by gpuless/test_golden_triton.py
    from gpuless import interp_guard

    interp_guard.install()
    for op in OPS:
        kernels = CASES[op].registered[0].removesuffix("_fwd")
        launchers = importlib.import_module(f"spikecore.triton.{kernels}")
        harness.backends[op] = {"triton": through(op, launchers)}
else:
    from gpuless.ops_on_shim import on_shim

    for op in OPS:
        harness.backends[op]["shim"] = on_shim(op)  # built at its first call
        if torch.cuda.is_available():
            from gpu.on_gpu import BACKENDS, case_on

            harness.backends[op] |= {f"{b} on a GPU": case_on(CASES[op], b).op for b in BACKENDS}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    folders = [HERE, metafunc.config.getoption("--golden")]
    cases = [c for folder in folders if folder for c in harness.load(folder)]
    if "backend" in metafunc.fixturenames:
        pairs = [(c, b) for c in cases for b in (harness.backends[c.runner[1]] if c.runner else ["-"])]
        metafunc.parametrize(("case", "backend"), pairs, ids=[f"{c.name}-{b}" for c, b in pairs])
    else:
        metafunc.parametrize("case", cases, ids=[c.name for c in cases])


def test_parity(case: harness.Case, backend: str, record_property) -> None:
    if case.runner is None:
        record_property("golden", harness.row(case, backend, None))
        pytest.skip(f"no runner yet: {', '.join(case.key)}")
    run, op = case.runner
    report = run(case, harness.backends[op][backend])
    record_property("golden", harness.row(case, backend, report))
    assert not (report.failures and case.target), "; ".join(report.failures)


def test_inputs_follow_the_fill_rule(case: harness.Case) -> None:
    stored = {n: t for n in case.data.get("inputs", {}) for t in [case.tensors.get(f"input.{n}", case.tensors.get(n))]}
    for name, tensor in stored.items():
        if tensor is not None:
            assert torch.equal(case.input(name), tensor.float()), name


def test_every_kept_case_has_a_runner() -> None:
    assert all(case.runner for case in harness.load(HERE))


def test_a_report_sees_every_difference() -> None:
    one, nan = torch.ones(3), torch.full((3,), torch.nan)
    for check in (
        lambda r, t: r.spikes(t, one),
        lambda r, t: r.counts("layer", int(t.nan_to_num().sum()), 3),
        lambda r, t: r.output("out", t, one),
        lambda r, t: r.gradients({"g": t}, {"g": one}),
        lambda r, t: r.values("loss", t, one),
        lambda r, t: r.rates("layer", float(t.mean()), 1.0),
    ):
        for t, fails in ((one, False), (one.clone().index_fill_(0, torch.tensor(1), 0), True), (nan, True)):
            report = harness.Report()
            check(report, t)
            assert bool(report.failures) == fails, (check, t, report)
    near = harness.Report()
    near.counts("layer", 5, 3, near=2)
    near.output("out", 50 * one + 4e-4, 50 * one)
    near.gradients({"bias": one * 1e-7, "w": one}, {"bias": one * 0, "w": one})
    assert not near.failures
    assert near.spikes_differing == 2
