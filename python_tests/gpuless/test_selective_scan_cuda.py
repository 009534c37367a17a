"""selective_scan's CUDA source without a GPU: run on the checked shim against the reference, and compiled by nvcc."""

import math
import re

import pytest
import torch
from gpuless import aot, ops_on_shim, shim
from gpuless.selective_scan_backends import assert_near, scan_samples
from gpuless.selective_scan_on_shim import SOURCE, run, source
from gpuless.shim import Shim, build

from spikecore.ops import selective_scan
from spikecore.testing.cases.selective_scan import scan_sample

SCAN = ops_on_shim.on_shim("selective_scan")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.slow
@pytest.mark.parametrize("order", [0, 7], ids=["natural", "random"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_selective_scan_on_shim(shim_library, dtype, order):
    """No fault of any thread; `order` is that of threads and blocks."""
    samples = scan_samples(dtype)
    ops_on_shim.set_order(shim_library, order)
    try:
        for sample in samples if order == 0 and dtype == torch.float32 else samples[:4]:
            assert_near(SCAN, sample)
    finally:
        ops_on_shim.set_order(shim_library, 0)


def test_results_do_not_depend_on_the_order_of_threads(shim_library):
    sample = scan_sample("orders", torch.float32, False, C=20, S=2, L=140)
    results = []
    try:
        for order in (0, 1, 7):
            ops_on_shim.set_order(shim_library, order)
            leaves = sample.leaves()
            outputs = SCAN(**leaves[0].arguments)
            total = sum(o.square().sum() for o in outputs)
            results.append([*outputs, *torch.autograd.grad(total, list(leaves[1].values()))])
    finally:
        ops_on_shim.set_order(shim_library, 0)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_silence_stays_silent(shim_library):
    """Products of decays saturate: however long a growing stretch of zeros, there is no infinity times 0."""
    one = torch.ones(1, 1, 300)
    y, h = selective_scan(one * 0, one * 3, torch.tensor([[40.0]]), one, one, return_last_state=True)
    shim_y, shim_h = SCAN(one * 0, one * 3, torch.tensor([[40.0]]), one, one, return_last_state=True)
    for t in (y, h, shim_y, shim_h):
        assert torch.equal(t, torch.zeros_like(t))
    u = one.clone()
    u[..., :200] = 0
    late = SCAN(u, one * 0.5, torch.tensor([[2.0]]), one, one)[0]
    assert late[..., 199].item() == 0
    assert late[..., 201].item() == pytest.approx(0.5 + 0.5 * math.e)


# ---- planted defects: (text, its replacement, what the shim says)

DEFECTS = {
    "no barrier before the sums": (
        "g_A = warp_sum(g_A);\n        __syncthreads();",
        "g_A = warp_sum(g_A);",
        "race: (read|write) of shared memory",
    ),
    "one tile for all states": (
        "tile = 1 - tile",
        "tile = 0",
        "race: (read|write) of shared memory",
    ),
    "one step too many": ("i < left ? load_float", "i <= left ? load_float", "out of bounds read"),
    "state to the wrong channel": (
        "static_cast<float*>(q.h_last)[k.at * p.S + s]",
        "static_cast<float*>(q.h_last)[(k.at + 1) * p.S + s]",
        "out of bounds write",
    ),
    "carried without a barrier": (
        "        y[i] = mul_add(h, out[i], y[i]);\n      }\n      __syncwarp();",
        "        y[i] = mul_add(h, out[i], y[i]);\n      }",
        "race: (read|write) of shared memory",
    ),
    "starts too far apart": (
        "stretches * p.S;\n  const int64_t partial",
        "(stretches + 1) * p.S;\n  const int64_t partial",
        "out of bounds write",
    ),
}


@pytest.fixture(scope="module")
def defect_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("defects")


@pytest.mark.slow
@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_defect_is_found(defect_folder, defect):
    old, new, message = DEFECTS[defect]
    path = defect_folder / f"{defect.replace(' ', '_')}.cu"
    path.write_text(source((old, new)))
    planted = Shim(build([path], defect_folder))
    for L in (140, 131):  # by vectors, and not
        run(planted, L=L)
        if planted.error:
            break
    assert re.search(message, planted.error), planted.error


def test_without_a_defect_there_is_no_fault(shim_cache):
    kernels = Shim(build([SOURCE], shim_cache))
    for L in (140, 131):  # by vectors, and not
        run(kernels, L=L)
        assert not kernels.error
        assert bool(kernels.count(False, 16)) == (L % 4 == 0)


# ---- compiled by nvcc


@pytest.fixture(scope="module")
def facts():
    return aot.nvcc_facts(SOURCE, include_dirs=[shim.CSRC], extra=["-fmad=false"])


@pytest.mark.slow
@pytest.mark.parametrize("arch", aot.ARCHS)
def test_compiled_kernels(facts, arch):
    """Nothing spills; vector kernels read and write 16 bytes at a time."""
    facts = [f for f in facts if f.arch == arch]
    assert len(facts) == 6 + 6 + 4
    assert [f.name for f in facts if f.spills or f.stack or f.local] == []
    for f in facts:
        # bwd: two blocks of 256 threads on a multiprocessor in float32, one in half precision
        assert f.registers <= (255 if "bwd" in f.name and "IfL" not in f.name else 128), f.name
        if "Lb1E" in f.name:
            assert f.ldg128, f.name
            assert f.stg128, f.name
