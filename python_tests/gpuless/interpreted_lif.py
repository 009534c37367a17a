"""lif's Triton kernels on the CPU, run by test_lif_triton.py in an interpreting process; the guard watches each access.

Outputs and gradients are those of the CPU kernel without tolerance: one rounding everywhere.
"""

import pytest
import torch
from backends import assert_same, through
from gpuless import interp_guard
from gpuless.lif_backends import lif_samples
from gpuless.planted import planted

interp_guard.install()

from spikecore.testing.cases import Sample, values  # noqa: E402
from spikecore.triton import lif as module  # noqa: E402

LIF = through("lif", module)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_lif_is_the_cpu_kernel(dtype):
    """Half precision, which differs in loads and stores alone, over every fourth sample."""
    samples = lif_samples(dtype, (1, 9, 17))
    for sample in samples if dtype == torch.float32 else samples[::4]:
        assert_same("lif", LIF, sample)


def test_a_difference_is_seen():
    sample = Sample("strict", {"x": torch.ones(2, 8), "decay": 1.0, "gain": 1.0})
    assert_same("lif", LIF, sample)
    with pytest.raises(AssertionError, match="16 of 16 differ in s"):
        assert_same("lif", lambda **a: LIF(**a, v_threshold=2.5), sample)


def test_offsets_pass_32_bits(monkeypatch):
    """Three time steps 2^30 elements apart, in memory whose gaps are never touched.

    Without the guard, whose shadow would be as long: a wrapped offset ends this process.
    """
    monkeypatch.setattr(interp_guard, "_register", lambda *_: None)
    monkeypatch.setattr(interp_guard, "_check", lambda *_: None)
    step = 2**30 + 8
    try:
        storage = torch.empty(2 * step + 16, dtype=torch.float16)
    except RuntimeError:
        pytest.skip("no address space for 4 GiB")
    x = storage.as_strided((3, 16), (step, 1)).copy_(values((3, 16), torch.float16, True))
    assert_same("lif", LIF, Sample("far apart", {"x": x}))


# ---- planted defects

DEFECTS = {
    "load without mask": (
        "b_x = tl.load(p_x + t * x_step + i, mask=mask, other=0.0)",
        "b_x = tl.load(p_x + t * x_step + i)",
        r"out of bounds load: \d+ lane\(s\) of program \(1, 0, 0\), nearest 'p_x'|race: program",
    ),
    "store without mask": (
        "tl.store(p_v_last + i, b_v, mask=mask)",
        "tl.store(p_v_last + i, b_v)",
        "out of bounds store: .* nearest 'p_v_last'|race: program",
    ),
    "wrong row stride": ("tl.store(p_s + t * N + i", "tl.store(p_s + t * BN + i", "race: program .* stores 'p_s'"),
    "two lanes to one address": (
        "tl.store(p_v_last + i,",
        "tl.store(p_v_last + i // 2,",
        "race: lanes of program .* store to one address of 'p_v_last'",
    ),
    "programs overlap": (
        "tl.program_id(0).to(tl.int64) * BN",
        "tl.program_id(0).to(tl.int64) * (BN // 2)",
        "race: program .* where another program",
    ),
    "one step too many": (
        "live = mask & (t < T)",
        "live = mask & (t <= T)",
        "out of bounds load: .* nearest 'p_g_s'|race: program",
    ),
    "starts of segments left out": (
        "tl.store(p_starts + (t // SEG) * N + i",
        "tl.store(p_starts + (t // SEG + 1) * N + i",
        "out of bounds store: .* nearest 'p_starts'|race: program",
    ),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_defect_is_found(tmp_path, defect):
    old, new, message = DEFECTS[defect]
    wrong = planted(module, tmp_path, (old, new))
    sample = Sample(defect, {"x": torch.randn(9, 1000)})
    with pytest.raises(Exception, match=message):
        assert_same("lif", through("lif", wrong), sample)
    assert_same("lif", LIF, sample)
