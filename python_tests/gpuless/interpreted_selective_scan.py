"""selective_scan's Triton kernels on the CPU, run by test_selective_scan_triton.py in an interpreting process."""

import pytest
import torch
from backends import through
from gpuless import interp_guard
from gpuless.planted import planted
from gpuless.selective_scan_backends import assert_near

interp_guard.install()

from spikecore.testing.cases.selective_scan import scan_sample  # noqa: E402
from spikecore.triton import selective_scan as module  # noqa: E402

SCAN = through("selective_scan", module)


def samples(dtype):
    def sample(name, **changes):
        return scan_sample(name, dtype, False, **changes)

    yield sample("everything", C=17, S=3, L=20)
    yield sample("plain", C=16, S=2, L=9, options="softplus")
    yield sample("groups", B=1, C=36, G=2, S=5, L=6)
    yield sample("raw", C=12, S=4, L=1, options="D last", steps=(0.1, 1.0))
    yield sample("strides", C=6, S=3, L=8, layout="every other step")
    yield sample("nothing", B=0)
    yield sample("no steps", L=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_selective_scan_is_right(dtype):
    for sample in samples(dtype):
        assert_near(SCAN, sample)


def test_segments(monkeypatch):
    monkeypatch.setattr(module, "SEGMENT", 4)
    assert_near(SCAN, scan_sample("segments", torch.float32, False, C=9, S=3, L=11))


# ---- planted defects

DEFECTS = {
    "load without mask": (
        "b_u = tl.load(p_u + row * L + l, mask=mask, other=0.0)",
        "b_u = tl.load(p_u + row * L + l)",
        "race|out of bounds load",
    ),
    "store without mask": (
        "tl.store(p_last + states, b_h, mask=tile)",
        "tl.store(p_last + states, b_h)",
        "race|out of bounds store",
    ),
    "programs overlap": ("(pid % blocks) * BC +", "(pid % blocks) * (BC // 2) +", "race: program"),
    "one step too many": (
        "n = tl.minimum(L - first, SEG)",
        "n = tl.minimum(L - first + 1, SEG)",
        "race|out of bounds|err more",
    ),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_defect_is_found(tmp_path, defect):
    old, new, message = DEFECTS[defect]
    wrong = planted(module, tmp_path, (old, new))
    wrong.SEGMENT = 4
    sample = scan_sample(defect, torch.float32, False, B=1, C=20, S=3, L=6)
    with pytest.raises(Exception, match=message):
        assert_near(through("selective_scan", wrong), sample)
