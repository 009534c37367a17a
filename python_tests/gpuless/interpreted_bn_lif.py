"""bn_lif's Triton kernels on the CPU, run by test_bn_lif_triton.py in an interpreting process; the guard watches each
access.
"""

import pytest
import torch
from backends import through
from gpuless import interp_guard
from gpuless.bn_lif_backends import assert_equal_but_for_sums
from gpuless.planted import planted

interp_guard.install()

from spikecore.testing.cases.bn_lif import CASE  # noqa: E402
from spikecore.triton import bn_lif as module  # noqa: E402

BN_LIF = through("bn_lif", module)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_bn_lif_is_the_cpu_kernel(dtype):
    """Half precision, which differs in loads and stores alone, over every fourth sample."""
    samples = list(CASE.samples(dtype, True))
    for sample in samples if dtype == torch.float32 else samples[::4]:
        assert_equal_but_for_sums(BN_LIF, sample)


DEFECTS = {
    "store without mask": (
        "tl.store(p_s + t * N + i, (b_h >= fire_at).to(tl.float32).to(p_s.dtype.element_ty), mask=mask)",
        "tl.store(p_s + t * N + i, (b_h >= fire_at).to(tl.float32).to(p_s.dtype.element_ty))",
        "out of bounds store|race: program",
    ),
    "one step too many": ("live = mask & (t < T)", "live = mask & (t <= T)", "out of bounds|race: program"),
    "sums beyond the neurons": (
        "tl.store(p_sum_g + i, sum_g, mask=mask)", "tl.store(p_sum_g + i, sum_g)", "out of bounds store|race: program",
    ),
    "programs overlap": (
        "tl.program_id(0).to(tl.int64) * BN +", "tl.program_id(0).to(tl.int64) * (BN // 2) +",
        "race: program .* where another program",
    ),
    "the start of another segment": (
        "tl.load(p_starts + (k - 1) * N + i, mask=mask, other=0.0)",
        "tl.load(p_starts + k * N + i, mask=mask, other=0.0)",
        "out of bounds load: .* nearest 'p_starts'",
    ),
    "squares about another centre": (
        "b_squares += d * d", "b_squares += (d + k) * (d + k)", "differ in s|: running_var",
    ),
    "the residual left out": ("    if RESIDUAL:\n", "    if False:\n", "differ in s"),
}  # fmt: skip


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_defect_is_found(tmp_path, defect):
    old, new, message = DEFECTS[defect]
    names = {"programs overlap": "many channels", "the residual left out": "training, residual"}
    sample = CASE.sample(names.get(defect, "T=17"))
    with pytest.raises(Exception, match=message):
        assert_equal_but_for_sums(through("bn_lif", planted(module, tmp_path, (old, new))), sample)
    assert_equal_but_for_sums(BN_LIF, sample)
