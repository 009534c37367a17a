"""codebook_lookup's Triton kernels without a GPU: compiled ahead of time, and interpreted with the guard."""

from pathlib import Path

import pytest
import torch
from gpuless import aot
from gpuless.codebook_backends import triton_facts
from gpuless.interpreted import passed, run_interpreted

pytest.importorskip("triton", reason="triton is not installed")

MOST = {"norm": 64, "screen": 255, "settle": 168, "bwd": 64}  # registers a thread: 16, 4, 6, 16 blocks of 128


def check(facts, kernel):
    assert (facts.spills, facts.stack, facts.local) == (0, 0, 0), (kernel, facts.registers)
    assert facts.registers <= MOST[kernel], facts.registers


@pytest.mark.parametrize(
    ("dtype", "arch"),
    [(torch.float32, 80), (torch.float32, 90), (torch.bfloat16, 90), *((torch.float16, arch) for arch in aot.ARCHS)],
    ids=str,
)
def test_screening_runs_on_tensor_cores_in_half_precision(dtype, arch):
    facts = triton_facts("screen", dtype, arch)
    check(facts, "screen")
    instruction = {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}[arch]
    assert (instruction in facts.ptx) == (dtype != torch.float32)
    assert "tf32" not in facts.ptx
    if dtype != torch.float32:
        assert facts.ldg128 or "cp.async" in facts.ptx


def test_other_kernels_compile_without_spills():
    check(triton_facts("screen", torch.float32, 90, metric=1, aligned=False), "screen")
    check(triton_facts("settle", torch.bfloat16, 90, metric=2), "settle")
    check(triton_facts("norm", torch.float16, 90, INVERSE=True), "norm")
    check(triton_facts("bwd", torch.float32, 90), "bwd")


def test_scores_are_not_contracted():
    """l2's squares round twice, as everywhere."""
    facts = triton_facts("settle", torch.float32, 80, metric=1)
    check(facts, "settle")
    assert "fma.rn.f64" not in facts.ptx


# ---- interpreted


@pytest.mark.slow
def test_interpreted():
    assert passed(run_interpreted(Path(__file__).with_name("interpreted_codebook_lookup.py"))) >= 16
