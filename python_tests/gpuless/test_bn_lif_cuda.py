"""bn_lif's CUDA source without a GPU: run on the checked shim against the CPU kernel, and compiled by nvcc."""

import re

import pytest
import torch
from gpuless import aot, ops_on_shim, shim
from gpuless.bn_lif_backends import assert_equal_but_for_sums

from spikecore.testing.cases import CASES
from spikecore.testing.cases.bn_lif import CASE

SOURCE = shim.CSRC / "bn_lif/bn_lif_cuda.cu"
BN_LIF = ops_on_shim.on_shim("bn_lif")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.slow
@pytest.mark.parametrize("order", [0, 7], ids=["natural", "random"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bn_lif_is_the_cpu_kernel(shim_library, dtype, order):
    """`order` is that of threads and blocks."""
    samples = list(CASES["bn_lif"].samples(dtype, True))
    ops_on_shim.set_order(shim_library, order)
    try:
        for sample in samples if order == 0 and dtype == torch.float32 else samples[::6]:
            assert_equal_but_for_sums(BN_LIF, sample)
    finally:
        ops_on_shim.set_order(shim_library, 0)


def test_a_difference_is_seen(shim_library):
    sample = CASE.sample("training")
    assert_equal_but_for_sums(BN_LIF, sample)
    with pytest.raises(AssertionError, match="differ in s"):
        assert_equal_but_for_sums(lambda **a: BN_LIF(**{**a, "v_threshold": 1.5}), sample)


@pytest.mark.slow
def test_compiled_kernels():
    """Nothing spills, vector accesses where rows allow them, no contraction."""
    facts = aot.nvcc_facts(SOURCE, aot.ARCHS, [shim.CSRC], ["-fmad=false"])
    assert len(facts) == len(aot.ARCHS) * (3 * (4 * 2 + 1) + 2)  # types, kernels, widths; and those of one type
    for f in facts:
        assert (f.spills, f.stack, f.local) == (0, 0, 0), f.name
        assert f.registers <= 168, f.name  # three blocks of 128 threads on a multiprocessor
        if re.search("(fwd|stats)_kernelI.*Li[48]E", f.name):
            assert f.ldg128, f.name
        if re.search("fwd_kernelI", f.name):
            assert not re.search(r"\bFFMA\b", f.sass), f.name
