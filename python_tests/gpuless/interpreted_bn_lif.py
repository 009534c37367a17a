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
    "the residual left out": ("    if RESIDUAL:\n", "    if False:\n", "differ in s"),
}  # fmt: skip


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_defect_is_found(tmp_path, defect):
    old, new, message = DEFECTS[defect]
    sample = CASE.sample("T=17" if defect != "the residual left out" else "training, residual")
    with pytest.raises(Exception, match=message):
        assert_equal_but_for_sums(through("bn_lif", planted(module, tmp_path, (old, new))), sample)
    assert_equal_but_for_sums(BN_LIF, sample)
