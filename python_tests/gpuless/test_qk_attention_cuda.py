"""The attentions' CUDA source without a GPU: run on the checked shim against the CPU kernel, and compiled by nvcc."""

import ctypes
import re

import pytest
import torch
from backends import assert_same
from gpuless import aot, ops_on_shim, shim
from gpuless.qk_on_shim import SOURCE, QkBwd, QkFwd, packed_calls, parameters
from gpuless.shim import Shim, build

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


# ---- planted defects: two blocks (b, h), rows of 72 columns, five steps


def run_forward(library, columns=True):
    x = {name: (torch.rand(5, 1, 2, 6, 72) < 0.3).float() for name in ("y", "s")}
    x |= {"out": torch.full_like(x["y"], torch.nan), "potentials": torch.full((5, 2, 72 if columns else 6), torch.nan)}
    x = shim.apart(x)
    launch(library, "qk_fwd_cuda", parameters(QkFwd, x, columns), x)


def run_backward(library, columns=True):
    names = ("y", "s", "g_out", "g_y", "g_s")
    x = {name: torch.rand(5, 1, 2, 6, 72) for name in names}
    J = 72 if columns else 6
    x |= {"potentials": torch.full((2, 5, 2, J), torch.nan), "g_attn": torch.full((5, 2, J), torch.nan)}
    x = shim.apart(x)
    launch(library, "qk_bwd_cuda", parameters(QkBwd, x, columns, currents=True), x)


def launch(library, symbol, p, buffers):
    read_only = {"y", "s", "g_out"}
    library.reset(0, False, **{("ro_" if n in read_only else "") + n: t for n, t in buffers.items()})
    assert library.call(f"spk::{symbol}", ctypes.byref(p), None) == 0


DEFECTS = {
    "no barrier before the sum over warps": (
        "if (COLUMNS) {\n      __syncthreads();",
        "if (COLUMNS) {",
        run_forward,
        "race: (read|write) of shared memory held",
    ),
    "no bounds check": ("if (!own.live) return;", "", run_forward, "out of bounds|race"),
    "one time step too many": (
        "for (int64_t t = 0; t < s.T; ++t) {\n    own.neurons(in,",
        "for (int64_t t = 0; t <= s.T; ++t) {\n    own.neurons(in,",
        run_forward,
        "out of bounds read",
    ),
    "two threads to a slot": (
        "kBlock + threadIdx.x) * W + k % W] = h[k];",
        "kBlock + threadIdx.x / 2) * W + k % W] = h[k];",
        run_backward,
        "race: write of shared memory held",
    ),
    "too little shared memory": (
        "s.currents ? size_t(steps) * kBlock",
        "s.currents ? size_t(steps - 1) * kBlock",
        run_backward,
        "out of bounds (read|write) of .* of shared memory held",
    ),
    "gradient to the wrong step": (
        "store(out + (t0 + t) * to.t, g_x)",
        "store(out + (t0 + t + 1) * to.t, g_x)",
        run_backward,
        "out of bounds write of .* of g_",
    ),
}


@pytest.fixture(scope="module")
def defect_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("defects")


@pytest.mark.slow
@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_defect_is_found(defect_folder, defect):
    old, new, run, message = DEFECTS[defect]
    source = SOURCE.read_text()
    assert old in source, f"{SOURCE.name} no longer contains {old!r}"
    path = defect_folder / f"{defect.replace(' ', '_')}.cu"
    path.write_text(source.replace(old, new))
    planted = Shim(build([path], defect_folder))
    run(planted)
    assert re.search(message, planted.error), planted.error


@pytest.mark.slow
def test_without_a_defect_there_is_no_fault(shim_cache):
    library = Shim(build([SOURCE], shim_cache))
    for run in (run_forward, run_backward):
        for columns in (True, False):
            run(library, columns)
            assert not library.error


# ---- compiled by nvcc


@pytest.mark.slow
def test_compiled_kernels():
    """Nothing spills, 16-byte accesses where elements are owned by vectors, no contraction in forward."""
    facts = aot.nvcc_facts(SOURCE, aot.ARCHS, [shim.CSRC], ["-fmad=false"])
    assert len(facts) == len(aot.ARCHS) * (3 * 2 * 4 + 4)  # types, widths, kernels; and those of one type
    for f in facts:
        assert (f.spills, f.stack, f.local) == (0, 0, 0), f.name
        assert f.registers <= 168, f.name  # three blocks of 128 threads on a multiprocessor
        if re.search("(sum|gate)_kernel", f.name):
            assert not re.search(r"\bFFMA", f.sass), f.name
        if re.search("(gate|operand_bwd)_kernelI.*Li[48]E", f.name):
            assert f.ldg128, f.name
            assert f.stg128, f.name
