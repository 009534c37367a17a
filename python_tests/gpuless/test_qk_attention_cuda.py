"""The attentions' CUDA source without a GPU: run on the checked shim against the CPU kernel, and compiled by nvcc."""

import pytest
import torch
from backends import assert_same
from gpuless import ops_on_shim
from gpuless.qk_on_shim import packed_calls

from spikecore.testing.cases import CASES

OPS = ("qk_attention", "spike_driven_attention")
ON_SHIM = {op: ops_on_shim.on_shim(op) for op in OPS}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.slow
@pytest.mark.parametrize("order", [0, 1, 7], ids=["natural", "reversed", "random"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_attention_is_the_cpu_kernel(shim_library, op, dtype, order):
    """On the grid, where sums are exact in any order: without tolerance; `order` is that of threads and blocks."""
    samples = list(CASES[op].samples(dtype, True))
    ops_on_shim.set_order(shim_library, order)
    try:
        for sample in samples if order == 0 and dtype == torch.float32 else samples[:: 3 if order == 0 else 8]:
            assert_same(op, ON_SHIM[op], sample, grid=True)
    finally:
        ops_on_shim.set_order(shim_library, 0)


def test_packed_is_the_cpu_kernel(shim_library):
    for op, arguments in packed_calls():
        assert torch.equal(ON_SHIM[op](**arguments)[0], CASES[op].op(**arguments)[0]), (op, arguments["T"])
