"""lif's CUDA source without a GPU: run on the checked shim against the CPU kernel, and compiled by nvcc."""

import ctypes
import re

import pytest
import torch
from backends import assert_same
from gpuless import lif_on_shim, ops_on_shim
from gpuless.lif_backends import lif_samples
from gpuless.lif_on_shim import LifBwd, LifFwd, LifReduce, parameters
from gpuless.shim import Shim, build

from spikecore.ops import lif
from spikecore.testing.cases import Sample, values

LIF = ops_on_shim.on_shim("lif")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


# ---- the kernels' source on the shim


@pytest.mark.slow
@pytest.mark.parametrize("order", [0, 1, 7], ids=["natural", "reversed", "random"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lif_is_the_cpu_kernel(shim_library, dtype, order):
    """Outputs and gradients without tolerance, no fault of any thread; `order` is that of threads and blocks."""
    ops_on_shim.set_order(shim_library, order)
    try:
        for sample in lif_samples(dtype, (1, 4, 9, 50, 100) if order == 0 else (50,)):
            assert_same("lif", LIF, sample)
    finally:
        ops_on_shim.set_order(shim_library, 0)


def test_a_difference_is_seen(shim_library):
    sample = Sample("strict", {"x": torch.ones(2, 8), "decay": 1.0, "gain": 1.0})
    assert_same("lif", LIF, sample)
    with pytest.raises(AssertionError, match="16 of 16 differ in s"):
        assert_same("lif", lambda **a: LIF(**a, v_threshold=2.5), sample)
    with pytest.raises(AssertionError, match="differ in grad x"):
        assert_same("lif", lambda **a: lif(**a | {"x": a["x"] + 0.25}), sample)


# ---- memory accesses


def forward_buffers(dtype, T=3, N=1024):
    x = values((T, N), dtype, False)
    return {"x": x, "s": torch.full_like(x, torch.nan), "v_last": torch.full((N,), torch.nan)}


def backward_buffers(dtype, T=3, N=1024, checkpoints=0):
    x = values((T, N), dtype, False)
    buffers = {"x": x, "g_s": torch.randn(T, N).to(dtype), "g_x": torch.full_like(x, torch.nan)}
    return buffers | ({"checkpoints": torch.full((checkpoints, N), torch.nan)} if checkpoints else {})


def launch(shim, kind, symbol, buffers, coalescing=False, **values):
    p = parameters(kind, **buffers, **values)
    shim.reset(0, coalescing, **{("ro_" if n in ("x", "g_s") else "") + n: t for n, t in buffers.items()})
    assert shim.call(f"spk::{symbol}", ctypes.byref(p), None) == 0
    return buffers


def launch_backward(shim, buffers, steps, coalescing=False):
    constants = {"detach": True, "surrogate": 0, "a": 2.0, "steps": steps}
    return launch(shim, LifBwd, "lif_bwd_cuda", buffers, coalescing, **constants)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_accesses_are_coalesced(lif_shim, dtype):
    """x and s by 16 bytes a thread, a warp's in 16 sectors; v_last, float32, in two parts beside half precision."""
    T, N, size = 3, 1024, dtype.itemsize
    launch(lif_shim, LifFwd, "lif_fwd_cuda", forward_buffers(dtype, T, N), coalescing=True)
    assert not lif_shim.error
    assert [lif_shim.count(w, b) for w in (False, True) for b in (1, 2, 4, 8)] == [0] * 8
    assert lif_shim.count(False, 16) == T * N * size // 16
    assert lif_shim.coalescing(False) == (T * N * size // 512, T * N * size // 32)
    last = N * 4 // 512
    assert lif_shim.coalescing(True) == (
        T * N * size // 512 + last,
        T * N * size // 32 + last * (16 if size == 4 else 32),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_accesses_are_coalesced(lif_shim, dtype):
    """One segment: x and g_s read once, g_x written once, by 16 bytes a thread in 16 sectors a warp."""
    T, N, size = 3, 1024, dtype.itemsize
    launch_backward(lif_shim, backward_buffers(dtype, T, N), T, coalescing=True)
    assert not lif_shim.error
    assert [lif_shim.count(w, b) for w in (False, True) for b in (1, 2, 4, 8)] == [0] * 8
    sequence = (T * N * size // 512, T * N * size // 32)
    assert lif_shim.coalescing(False) == tuple(2 * n for n in sequence)
    assert lif_shim.coalescing(True) == sequence


def test_unaligned_rows_take_the_scalar_kernel(lif_shim):
    launch(lif_shim, LifFwd, "lif_fwd_cuda", forward_buffers(torch.float32, 3, 1022))
    assert not lif_shim.error
    assert (lif_shim.count(False, 16), lif_shim.count(False, 4)) == (0, 3 * 1022)


# ---- planted defects


def run_forward(shim, N=1024, T=3):
    launch(shim, LifFwd, "lif_fwd_cuda", forward_buffers(torch.float32, T, N))


def run_backward(shim, checkpoints=1):
    """50 steps in two segments of 25, hence one row of checkpoints."""
    launch_backward(shim, backward_buffers(torch.float32, 50, 256, checkpoints), 25)


def run_reduce(shim):
    buffers = {"in_": torch.randn(1000), "out": torch.zeros(1), "partial": torch.zeros(1, dtype=torch.float64)}
    p = LifReduce(0, 1000, 1, 1000, *(t.data_ptr() for t in buffers.values()))
    shim.reset(0, ro_in=buffers["in_"], out=buffers["out"], partial=buffers["partial"])
    shim.call("spk::lif_reduce_cuda", ctypes.byref(p), None)


DEFECTS = {
    "no barrier before the tree": (
        (
            "+ j % p.inner];\n  sums[threadIdx.x] = sum;\n  __syncthreads();",
            "+ j % p.inner];\n  sums[threadIdx.x] = sum;",
        ),
        run_reduce,
        "race: (read|write) of shared memory sums byte",
    ),
    "no barrier in the tree": (
        ("sums[threadIdx.x + width];\n    __syncthreads();", "sums[threadIdx.x + width];"),
        run_reduce,
        "race: (read|write) of shared memory sums byte",
    ),
    "no bounds check": (
        ("if (i >= p.N) return;", ""),
        lambda shim: run_forward(shim, 1000, 1),
        r"out of bounds read of 16 bytes at byte 4000 of ro_x \(4000 bytes\)",
    ),
    "vectors whatever N": (
        ("p.N % V == 0 && p.x_step % V == 0 &&", ""),
        lambda shim: run_forward(shim, 1022),
        "misaligned 16-byte access to ro_x",
    ),
    "v_last one vector off": (
        ("store(static_cast<float*>(p.v_last) + i, v)", "store(static_cast<float*>(p.v_last) + i + V, v)"),
        run_forward,
        r"out of bounds write of 16 bytes at byte 4096 of v_last \(4096 bytes\)",
    ),
    "v_last not scaled": (
        ("store(static_cast<float*>(p.v_last) + i, v)", "store(static_cast<float*>(p.v_last) + i / V * 2, v)"),
        run_forward,
        "race: write of v_last byte|misaligned 16-byte access to v_last",
    ),
    "one time step too many": (
        ("for (int64_t t = 0; t < p.T; ++t)", "for (int64_t t = 0; t <= p.T; ++t)"),
        run_forward,
        r"out of bounds read of 16 bytes at byte 12288 of ro_x \(12288 bytes\)",
    ),
    "two threads to a slot": (
        ("kBwdBlock + threadIdx.x) * W", "kBwdBlock + threadIdx.x / 2) * W"),
        run_backward,
        "race: write of shared memory held byte",
    ),
    "too little shared memory": (
        ("size_t(p.steps) * kBwdBlock", "size_t(p.steps - 1) * kBwdBlock"),
        run_backward,
        r"out of bounds write of 16 bytes at byte 24576 of shared memory held \(24576 bytes\)",
    ),
    "gradient to the wrong row": (
        ("store(g_x + row, out)", "store(g_x + row + p.N, out)"),
        run_backward,
        r"out of bounds write of 16 bytes at byte 51200 of g_x \(51200 bytes\)",
    ),
}


@pytest.fixture(scope="module")
def defect_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("defects")


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_defect_is_found(defect_folder, defect):
    edit, run, message = DEFECTS[defect]
    path = defect_folder / f"{defect.replace(' ', '_')}.cu"
    path.write_text(lif_on_shim.source(["float"], ["atan"], [edit]))
    planted = Shim(build([path], defect_folder))
    run(planted)
    assert re.search(message, planted.error), planted.error


def test_without_a_defect_there_is_no_fault(lif_shim):
    for run in (run_forward, run_backward, run_reduce):
        run(lif_shim)
        assert not lif_shim.error


def test_checkpoints_too_small_are_found(lif_shim):
    buffers = backward_buffers(torch.float32, 50, 256, checkpoints=2)
    launch_backward(lif_shim, buffers, 20)
    assert not lif_shim.error
    launch_backward(lif_shim, backward_buffers(torch.float32, 50, 256, checkpoints=1), 20)
    assert "out of bounds write of 16 bytes at byte 1024 of checkpoints (1024 bytes)" in lif_shim.error


# ---- compiled by nvcc

# Registers a thread: of 65,536 on a multiprocessor, in portions of 8.
MOST = {"lif_fwd": 80, "lif_bwd": 128, "lif_reduce": 80, "lif_reduce_parts": 80}  # 6 blocks of 128, 8 of 64, 3 of 256


@pytest.fixture(scope="module")
def facts():
    """Two surrogates: the default one and the one that takes the most registers."""
    found = lif_on_shim.lif_facts(surrogates=["atan", "sigmoid"])
    print("\n" + lif_on_shim.facts_table(found))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("arch", lif_on_shim.aot.ARCHS)
def test_compiled_kernels(facts, arch):
    facts = [f for f in facts if f.arch == arch]
    assert len(facts) == 6 + 2 * 6 + 2
    for f in facts:
        assert f.registers <= MOST[f.name.split()[0]], f.name
        if f.name.startswith("lif_fwd"):
            assert not re.search(r"\bFFMA", f.sass), f.name  # HFMA2 only sets constants
        if re.search(" x [48]", f.name):
            assert f.ldg128, f.name
            assert f.stg128, f.name


@pytest.mark.slow
@pytest.mark.parametrize("arch", lif_on_shim.aot.ARCHS)
def test_nothing_spills(facts, arch):
    assert [f.name for f in facts if f.arch == arch and (f.spills or f.stack or f.local)] == []
