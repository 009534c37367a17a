"""spiking_self_attention by lif's Triton kernels; test_spiking_self_attention_triton.py runs it interpreting."""

from dataclasses import replace

import pytest
import torch
from backends import through
from gpuless import interp_guard
from test_ops import check_gradients

interp_guard.install()

from spikecore.testing.cases import CASES  # noqa: E402
from spikecore.triton import spiking_self_attention as module  # noqa: E402

CASE = CASES["spiking_self_attention"]
TRITON = replace(CASE, op=through("spiking_self_attention", module))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_it_is_the_operator(dtype):
    """Half precision over fewer samples."""
    for sample in list(CASE.samples(dtype, True))[:: 2 if dtype == torch.float32 else 6]:
        got, want = TRITON.op(**sample.arguments)[0], CASE.op(**sample.arguments)[0]
        assert torch.equal(got, want), sample
        assert got.stride() == want.stride(), sample
        check_gradients(TRITON, sample)


def test_a_difference_is_seen():
    sample = CASE.sample("currents, heads")
    wrong = replace(CASE, op=lambda **a: TRITON.op(**a | {"scale": 2 * a["scale"]}))
    assert not torch.equal(wrong.op(**sample.arguments)[0], CASE.op(**sample.arguments)[0])
    with pytest.raises(AssertionError, match="gradient of"):
        check_gradients(wrong, sample)
