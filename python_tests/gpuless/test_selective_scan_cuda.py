"""selective_scan's CUDA source without a GPU: run on the checked shim against the reference, and compiled by nvcc."""

import math
import re

import pytest
import torch
from gpuless import aot, ops_on_shim, shim
from gpuless.selective_scan_backends import assert_near, scan_samples

from spikecore.ops import selective_scan
from spikecore.testing.cases.selective_scan import scan_sample

SCAN = ops_on_shim.on_shim("selective_scan")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SOURCE = shim.CSRC / "selective_scan/selective_scan_cuda.cu"


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
        "const double total = warp_sum(double(g_A));\n        __syncthreads();",
        "const double total = warp_sum(double(g_A));",
        "race: (read|write) of shared memory",
    ),
    "no barrier after the sums": (
        "*to + sum;\n        }\n        __syncthreads();",
        "*to + sum;\n        }",
        "race: (read|write) of shared memory",
    ),
    "one step too many": ("l + i < L ? load_float", "l + i <= L ? load_float", "out of bounds read"),
    "state to the wrong channel": (
        "static_cast<float*>(q.h_last)[k.at * p.S + s]",
        "static_cast<float*>(q.h_last)[(k.at + 1) * p.S + s]",
        "out of bounds write",
    ),
    "carried without a barrier": (
        "        y[i] += h * out[i];\n      }\n      __syncwarp();",
        "        y[i] += h * out[i];\n      }",
        "race: (read|write) of shared memory",
    ),
    "starts too few": ("stretches * p.S;\n  float* const g_Bs", "(stretches + 1) * p.S;\n  float* const g_Bs", "out of bounds write"),
}


@pytest.mark.slow
@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_defect_is_found(tmp_path, monkeypatch, defect):
    old, new, message = DEFECTS[defect]
    text = SOURCE.read_text()
    assert old in text, f"{SOURCE.name} no longer contains {old!r}"
    raise NotImplementedError
