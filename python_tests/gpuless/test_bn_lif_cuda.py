"""bn_lif's CUDA source without a GPU: run on the checked shim against the CPU kernel, and compiled by nvcc."""

import re

import pytest
import torch
from gpuless import aot, ops_on_shim, shim
from gpuless.bn_lif_backends import assert_equal_but_for_sums
from gpuless.bn_lif_on_shim import (
    MANY,
    MANY_PERIODS,
    MAPS,
    PERIODS,
    SOURCE,
    prepared_forward,
    run_backward,
    run_forward,
    run_stats,
    source,
)

from spikecore.testing.cases import CASES
from spikecore.testing.cases.bn_lif import CASE

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


# ---- launches without torch: memory accesses, planted defects


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sources")


@pytest.fixture(scope="module")
def library(folder):
    path = folder / "float.cu"
    path.write_text(source())
    return shim.Shim(shim.build([path], folder))


@pytest.fixture(scope="module")
def every_type(shim_cache):
    return shim.Shim(shim.build([SOURCE], shim_cache))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_accesses_are_coalesced(every_type, dtype):
    """x, s and y by 16 bytes a thread, a warp's in 16 sectors."""
    launch = prepared_forward((3, 8, 4, 64), dtype)
    launch.run(every_type, "bn_lif_fwd_cuda", coalescing=True)
    assert not every_type.error
    bytes_, constants = 3 * launch.N * dtype.itemsize, 5 * launch.C
    assert every_type.count(False, 16) == bytes_ // 16
    assert [every_type.count(True, b) for b in (1, 2, 4, 8, 16)] == [0, 0, constants, 0, 2 * bytes_ // 16]
    # The constants' kernel writes 5 rows of 4 channels: a request and a sector each.
    assert every_type.coalescing(True) == (2 * bytes_ // 512 + 5, 2 * bytes_ // 32 + 5)


def test_without_a_defect_there_is_no_fault(library):
    for size in (MAPS, PERIODS, (2, 3, 5, 33), (2, 3, 7, 3), MANY, MANY_PERIODS):
        assert [run(library, size) for run in (run_stats, run_forward, run_backward)] == ["", "", ""], size
    assert run_backward(library) == ""


DEFECTS = {
    "no barrier before the sum over threads": (
        ("shared[tid] = sum;\n    __syncthreads();", "shared[tid] = sum;"),
        run_stats,
        "race: (read|write) of shared memory shared byte",
    ),
    "no barrier in that sum": (
        ("shared[tid] += shared[tid + n];\n      __syncthreads();", "shared[tid] += shared[tid + n];"),
        run_stats,
        "race: (read|write) of shared memory shared byte",
    ),
    "parts in one place": (
        ("sums[blockIdx.y * g.places + place]", "sums[place]"),
        lambda shim: run_stats(shim, MANY),
        "race: write of sums byte",
    ),
    "a row beyond its part": (
        ("rows_end = rows * (blockIdx.y + 1) / gridDim.y;", "rows_end = rows * (blockIdx.y + 1) / gridDim.y + 1;"),
        run_stats,
        "out of bounds read of 16 bytes at byte 13824 of ro_x",
    ),
    "statistics of one time step": (
        ("x + t * p.x_step + o * g.period", "x + o * g.period"),
        run_stats,
        "differ in mean; .* differ in var",
    ),
    "squares about another centre": (
        ("squares[j] += d * d;", "squares[j] += in[j] * in[j];"),
        run_stats,
        "^3 of 3 differ in var",
    ),
    "no bounds check": (
        ("if (i >= N) return;\n  const T* __restrict__ x", "const T* __restrict__ x"),
        lambda shim: run_forward(shim, (1, *MAPS[1:])),
        "out of bounds read of 16 bytes at byte 4608 of ro_x",
    ),
    "vectors whatever N": (
        ("p.shape.N % V == 0 && p.x_step % V == 0", "p.x_step >= 0"),
        lambda shim: run_forward(shim, (2, 3, 5, 33)),
        "misaligned 16-byte access to ro_x",
    ),
    "one time step too many": (
        ("t < p.shape.T; ++t) {\n    float y[V]", "t <= p.shape.T; ++t) {\n    float y[V]"),
        run_forward,
        "out of bounds read of 16 bytes at byte 13824 of ro_x",
    ),
    "rounded in another order": (
        ("normalise(y[k], mean[k], scale[k], bias[k]);", "y[k] * scale[k] + (bias[k] - mean[k] * scale[k]);"),
        run_forward,
        "of 3456 differ in y",
    ),
    "neighbours in other warps": (
        ("+ threadIdx.x) * V, N = p.shape.N", "+ threadIdx.x % 32 * 4 + threadIdx.x / 32) * V, N = p.shape.N"),
        run_forward,
        "uncoalesced",
    ),
    "two threads to a slot": (
        ("kBlock + threadIdx.x) * V; };", "kBlock + threadIdx.x / 2) * V; };"),
        run_backward,
        "race: write of shared memory held byte",
    ),
    "too little shared memory": (
        ("size_t(p.steps) * 2 * kBlock", "size_t(p.steps - 1) * 2 * kBlock"),
        run_backward,
        "out of bounds write of 16 bytes at byte 32768 of shared memory held",
    ),
    "a checkpoint too far": (
        ("store(p.checkpoints + t / p.steps * N + i, v)", "store(p.checkpoints + (t / p.steps + 1) * N + i, v)"),
        run_backward,
        "out of bounds write of 16 bytes at byte 9216 of checkpoints",
    ),
    "always from the first checkpoint": (
        ("load(start, p.checkpoints + (k - 1) * N + i);", "load(start, p.checkpoints + i);"),
        run_backward,
        "differ in g_x",
    ),
    "the mean of g left out": (
        ("kGMean * C + c] = float(double(g_bias) / count)", "kGMean * C + c] = 0"),
        run_backward,
        "differ in g_x$",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_defect_is_found(folder, defect):
    edit, run, message = DEFECTS[defect]
    path = folder / f"{defect.replace(' ', '_')}.cu"
    path.write_text(source([edit]))
    complaint = run(shim.Shim(shim.build([path], folder)))
    assert re.search(message, complaint), complaint


# ---- compiled by nvcc


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
