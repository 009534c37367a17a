"""Triton compiles an integer argument that is 1 into the kernel: there it is a constant, not a tensor with methods."""

import importlib

import pytest
import torch
from backends import results, through
from gpuless import on_ptx

from spikecore.testing.cases import CASES, Case

pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_every_size_of_one_compiles(case: Case) -> None:
    """Each launch of the sweep whose integers are 1 in a combination that was not seen before."""
    seen, found = set(), []

    def keep(launch: on_ptx.Launch) -> None:
        own = {p.name for p in launch.fn.params if p.is_constexpr}
        ones = frozenset(n for n, v in launch.constants.items() if v is not None and n not in own)
        if ones and (launch.fn.__name__, ones) not in seen:
            seen.add((launch.fn.__name__, ones))
            found.append(launch)

    module = importlib.import_module(f"spikecore.triton.{case.registered[0].removesuffix('_fwd')}")
    function = through(case.name, module)
    unchecked = {"check_nan": False} if case.name == "codebook_lookup" else {}  # what is launched computes nothing
    with on_ptx.of_triton("lif", keep), on_ptx.of_triton(module.__name__.rpartition(".")[2], keep):
        for sample in case.samples(torch.float32, True):
            results(case, lambda **arguments: function(**arguments | unchecked), sample)
    assert found
    for launch in found:
        launch.facts(90)
