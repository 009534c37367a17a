"""The attentions' Triton kernels on the CPU, run by test_qk_attention_triton.py in an interpreting, guarded process.

On the grid, where sums are exact in any order, outputs and gradients are those of the CPU kernel without tolerance.
"""

import pytest
import torch
from backends import assert_same, through
from gpuless import interp_guard
from gpuless.planted import planted

interp_guard.install()

from gpuless.qk_on_shim import packed_calls  # noqa: E402

from spikecore.testing.cases import CASES  # noqa: E402
from spikecore.triton import qk_attention as module  # noqa: E402

OPS = ("qk_attention", "spike_driven_attention")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_attention_is_the_cpu_kernel(op, dtype):
    """Half precision, which differs in loads and stores alone, over fewer samples."""
    samples = list(CASES[op].samples(dtype, True))
    for sample in samples[:: 5 if dtype == torch.float32 else 20]:
        assert_same(op, through(op, module), sample, grid=True)


def test_packed_is_the_cpu_kernel():
    for op, arguments in list(packed_calls())[::7]:
        assert torch.equal(through(op, module)(**arguments)[0], CASES[op].op(**arguments)[0]), (op, arguments["T"])


# ---- planted defects

DEFECTS = {
    "load without mask": (
        "b_y = tl.load(at_y + t * y_t, mask=mask, other=0.0)",
        "b_y = tl.load(at_y + t * y_t)",
        "out of bounds load: .* nearest 'p_y'|race: program",
    ),
    "store without mask": (
        "tl.store(at_out + t * o_t, b_out.to(p_out.dtype.element_ty), mask=mask)",
        "tl.store(at_out + t * o_t, b_out.to(p_out.dtype.element_ty))",
        "race: .*'p_out'|out of bounds store: .* nearest 'p_out'",
    ),
    "tiles overlap": (
        "r = tile // across * BR + tl.arange(0, BR)",
        "r = tile // across * (BR // 2) + tl.arange(0, BR)",
        "race: program .* where another program",
    ),
    "one step too many": (
        "live = mask & (t < T)",
        "live = mask & (t <= T)",
        "out of bounds (load|store): .* nearest|race: program",
    ),
    "sums of another part": ("at = p_sums + bh * parts + part", "at = p_sums + bh + part", "differ in grad attn.decay"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_defect_is_found(tmp_path, defect):
    old, new, message = DEFECTS[defect]
    wrong = planted(module, tmp_path, (old, new))
    names = {"one step too many": "token T=17, currents", "sums of another part": "token currents, learnable"}
    sample = CASES["qk_attention"].sample(names.get(defect, "channel wide, currents"))
    with pytest.raises(Exception, match=message):
        assert_same("qk_attention", through("qk_attention", wrong), sample, grid=True)
    assert_same("qk_attention", through("qk_attention", module), sample, grid=True)
