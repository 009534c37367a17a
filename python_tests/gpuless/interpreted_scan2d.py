"""selective_scan_2d's Triton kernels on the CPU, run by test_selective_scan_2d_triton.py in an interpreting process."""

from dataclasses import replace

import pytest
import torch
from backends import through
from gpuless import interp_guard
from gpuless.planted import planted

interp_guard.install()

from test_ops import check_gradients  # noqa: E402

from spikecore.testing.cases import CASES  # noqa: E402
from spikecore.testing.cases.selective_scan_2d import sample  # noqa: E402
from spikecore.testing.compare import assert_close  # noqa: E402
from spikecore.triton import selective_scan_2d as module  # noqa: E402

CASE = CASES["selective_scan_2d"]
# One of each option; the interpreter takes seconds for each.
NAMES = ("bare", "2 directions", "direction 4", "one column", "one place", "every other row", "H=0")


def check(drawn, op):
    case = replace(CASE, op=op)
    got, want = case.op(**drawn.arguments)[0], CASE.ref(**drawn.arguments)[0]
    assert_close(got, want, CASE.ref(**drawn.to(torch.float64).arguments)[0], str(drawn))
    check_gradients(case, drawn)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_reference(name):
    check(CASE.sample(name, torch.float32, False), through("selective_scan_2d", module))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype):
    drawn = sample("half", dtype, False, B=1, C=5, H=3, W=5, directions=(0, 1))
    check(drawn, through("selective_scan_2d", module))


def test_chunks():
    drawn = sample("chunks", torch.float32, False, B=1, C=17, H=7, W=11, S=2, directions=(3,))
    check(drawn, through("selective_scan_2d", module))


# ---- planted defects

DEFECTS = {
    "load without mask": ("within = l < L\n", "within = l <= L\n", "out of bounds load|race"),
    "a channel too many": ("live = c < C", "live = c <= C", "out of bounds|race"),
    "a state too many": ("for s in range(S)", "for s in range(S + 1)", "out of bounds load|race"),
    "columns of another height": ("(l - column * H) * W + w", "(l - column * H) * W + w + 1", "out of bounds|race"),
    "programs overlap": ("(tl.program_id(0) % blocks) * BC", "(tl.program_id(0) % blocks) * (BC - 1)", "race: program"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_defect_is_found(tmp_path, defect):
    old, new, message = DEFECTS[defect]
    wrong = planted(module, tmp_path, (old, new))
    drawn = sample(defect, torch.float32, False, B=1, C=5, H=3, W=5, S=1, directions=(1,))
    with pytest.raises(Exception, match=message):
        through("selective_scan_2d", wrong)(**drawn.arguments)
