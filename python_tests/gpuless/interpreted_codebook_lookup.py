"""codebook_lookup's Triton kernels on the CPU, run by test_codebook_lookup_triton.py in an interpreting process; the
guard watches each access. Indices, values and gradients are those of the CPU kernel without tolerance.
"""

import pytest
import torch
from backends import assert_same, through
from gpuless import interp_guard
from gpuless.planted import planted

interp_guard.install()

from spikecore.testing.cases import CASES, Sample  # noqa: E402
from spikecore.triton import codebook_lookup as module  # noqa: E402

LOOKUP = through("codebook_lookup", module)
SAMPLES = {d: list(CASES["codebook_lookup"].samples(d, False)) for d in (torch.float32, torch.float16, torch.bfloat16)}


def problem(n=70, K=600, D=40, **arguments):
    g = torch.Generator().manual_seed(0)
    return Sample(
        "problem", {"z": torch.randn(n, D, generator=g), "codebook": torch.randn(K, D, generator=g), **arguments}
    )


@pytest.mark.parametrize("dtype", SAMPLES, ids=str)
def test_codebook_lookup_is_the_cpu_kernel(dtype):
    for sample in SAMPLES[dtype][:: 2 if dtype == torch.float32 else 7]:
        assert_same("codebook_lookup", LOOKUP, sample)


@pytest.mark.parametrize("metric", ["dot", "l2", "cosine"])
def test_several_parts_of_the_codes(monkeypatch, metric):
    """As a small batch has them, to fill a GPU."""
    monkeypatch.setattr(module, "SPLIT_CODES", 70)
    sample = problem(n=20, K=350, metric=metric)
    sample.arguments["codebook"][150:] = sample.arguments["codebook"][:200].clone()  # a tie for every row
    assert module.splits_of(20, 350) == 5
    assert_same("codebook_lookup", LOOKUP, sample)


def test_what_is_not_finite():
    sample = problem(n=5, K=9, check_nan=False)
    sample.arguments["z"][3, 7] = torch.nan
    sample.arguments["codebook"][4] = torch.inf
    indices, values = LOOKUP(**sample.arguments)
    want = CASES["codebook_lookup"].op(**sample.arguments)
    assert torch.equal(indices, want[0])
    torch.testing.assert_close(values, want[1], rtol=0, atol=0, equal_nan=True)
    assert indices[3] == -1
    with pytest.raises(RuntimeError, match="z must be finite"):
        LOOKUP(**sample.arguments | {"check_nan": True})


def test_a_difference_is_seen():
    sample = problem(n=8, K=20)
    with pytest.raises(AssertionError, match="of 8 differ in indices"):
        assert_same("codebook_lookup", lambda **a: LOOKUP(**a, metric="l2"), sample)


# ---- planted defects

DEFECTS = {
    "rows without mask": (
        "norm = tl.load(p_z_norm + i, mask=i < n, other=0.0)",
        "norm = tl.load(p_z_norm + i)",
        r"out of bounds load: .* nearest 'p_z_norm'|race: program",
    ),
    "one code too many": (
        "(k[None, :] < K) & (d[:, None] < D)",
        "(k[None, :] <= K) & (d[:, None] < D)",
        "nearest 'p_codes'|race: program .* loads",
    ),
    "parts overlap": (
        "(split.to(tl.int64) * n + i) * 3",
        "(split.to(tl.int64) * 0 + i) * 3",
        "race: program .* 'p_found'",
    ),
    "values of the wrong row": (
        "tl.store(p_values + i * v_step",
        "tl.store(p_values + i * v_step // 2",
        "race: program .* 'p_values'",
    ),
    "columns without mask": (
        "tl.store(p_g_codes + k * D + d, acc.to(p_g_codes.dtype.element_ty), mask=d < D)",
        "tl.store(p_g_codes + k * D + d, acc.to(p_g_codes.dtype.element_ty))",
        "'p_g_codes'",
    ),
    "one row too many": ("tl.load(p_starts + k + 1))", "tl.load(p_starts + k + 1) + 1)", "nearest 'p_order'"),
    "no bound": ("error = gamma * norm * weight + tiny", "error = -4.0 * norm * weight", "differ in indices"),
    "ties to the last": ("chosen = tl.where(top > best", "chosen = tl.where(top >= best", "differ in indices"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_defect_is_found(tmp_path, monkeypatch, defect):
    old, new, message = DEFECTS[defect]
    smaller = ("BLOCKS, SPLIT_CODES = 264, 512", "BLOCKS, SPLIT_CODES = 264, 64")
    wrong = planted(module, tmp_path, (old, new), smaller)
    sample = problem(n=70, K=200)
    sample.arguments["codebook"][100:] = sample.arguments["codebook"][:100].clone()
    with pytest.raises(Exception, match=message):
        assert_same("codebook_lookup", through("codebook_lookup", wrong), sample)
