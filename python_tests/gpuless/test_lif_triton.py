"""lif's Triton kernels without a GPU: compiled ahead of time, and interpreted with the guard in another process."""

import re
from pathlib import Path

import pytest
import torch
from gpuless import aot
from gpuless.interpreted import passed, run_interpreted
from gpuless.lif_backends import triton_facts

pytest.importorskip("triton", reason="triton is not installed")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ARCHS = pytest.mark.parametrize("arch", aot.ARCHS)

# Registers a thread that leave 8 blocks of 128 threads on a multiprocessor of 65,536; in backward 3, and 2 in half
# precision, where a thread owns 8 neurons (16 bytes) instead of 4.
MOST = {("fwd", 4): 64, ("fwd", 2): 64, ("bwd", 4): 168, ("bwd", 2): 255}


def show(capsys, direction, dtype, facts):
    with capsys.disabled():
        name = f"{direction} {str(dtype).removeprefix('torch.')}".ljust(14)
        numbers = f"registers {facts.registers}, spills {facts.spills}, shared {facts.shared}"
        print(f"\n{name} sm_{facts.arch}: {numbers}, LDG.128 {facts.ldg128}, STG.128 {facts.stg128}", end="")


def check(facts, direction, dtype=torch.float32):
    assert (facts.spills, facts.stack, facts.local) == (0, 0, 0)
    assert facts.registers <= MOST[direction, dtype.itemsize]
    assert facts.ldg128
    assert facts.stg128


@ARCHS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiled_forward(dtype, arch, request, capsys):
    facts = triton_facts("fwd", dtype, arch)
    if request.config.getoption("capture") == "no":
        show(capsys, "forward", dtype, facts)
    check(facts, "fwd", dtype)
    assert not re.search(r"\bfma\.", facts.ptx)
    assert not re.search(r"\bFFMA\b", facts.sass)  # ptxas contracts nothing either


@ARCHS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiled_backward(dtype, arch, request, capsys):
    facts = triton_facts("bwd", dtype, arch)
    if request.config.getoption("capture") == "no":
        show(capsys, "backward", dtype, facts)
    check(facts, "bwd", dtype)


@pytest.mark.parametrize(
    "changes", [{"H": True, "V": True}, {"PACKED": True}, {"HARD": False, "PER_CHANNEL": False}], ids=str
)
def test_compiled_variants(changes):
    check(triton_facts("fwd", torch.float32, 80, **changes), "fwd")


@pytest.mark.parametrize("kind", range(1, 7))
def test_every_surrogate_compiles(kind):
    check(triton_facts("bwd", torch.float32, 90, KIND=kind, DETACH=False, HARD=False), "bwd")


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_rows_not_divisible_by_16_compile(direction):
    """They lose the 128-bit accesses, nothing else."""
    facts = triton_facts(direction, torch.float16, 80, aligned=False)
    assert (facts.spills, facts.stack, facts.local) == (0, 0, 0)
    assert facts.ldg128 < triton_facts(direction, torch.float16, 80).ldg128


# ---- interpreted


@pytest.mark.slow
def test_interpreted():
    assert passed(run_interpreted(Path(__file__).with_name("interpreted_lif.py"))) >= 7
