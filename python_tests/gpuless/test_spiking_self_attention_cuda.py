"""spiking_self_attention's CUDA source without a GPU: on the checked shim, spikes and gradients of the operator and
planted defects; and as nvcc compiles it.
"""

import ctypes
import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from gpuless import aot, ops_on_shim, shim
from gpuless.shim import Shim, build
from gpuless.ssa_on_shim import SOURCE, SpikingSelfAttentionBwd, SpikingSelfAttentionFwd, parameters
from test_ops import check_gradients

from spikecore.ops.lif import LIFParams
from spikecore.testing.cases import CASES, Sample, values

CASE = CASES["spiking_self_attention"]
ON_SHIM = ops_on_shim.on_shim("spiking_self_attention")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def across_tiles(dtype: torch.dtype) -> Iterator[Sample]:
    """Heads and sequences that cross the tiles of 64 by 64, and steps that cross a byte."""
    heads = {"decay": torch.tensor([0.5]), "gain": torch.tensor([0.75])}
    for T, D, N in ((2, 66, 70), (9, 5, 68)):
        operands = {arg: values((T, 1, 1, D, N), dtype, True, i) for i, arg in enumerate("qkv")}
        neurons = {"attn": LIFParams(**heads, v_threshold=0.5), "qkv": LIFParams(**heads)}
        yield Sample(f"T={T} D={D} N={N} currents", {**operands, **neurons, "scale": 1 / 64})
        spikes = {arg: (x > 1.5).to(dtype) for arg, x in operands.items()}
        yield Sample(f"T={T} D={D} N={N}", {**spikes, "attn": neurons["attn"], "scale": 1 / 64})


@pytest.mark.slow
@pytest.mark.parametrize("order", [0, 1, 7], ids=["natural", "reversed", "random"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_cuda_source_is_the_operator(shim_library, dtype, order):
    """No fault of any thread; `order` is that of threads and blocks."""
    ops_on_shim.set_order(shim_library, order)
    case = replace(CASE, op=ON_SHIM)
    few = order != 0 or dtype != torch.float32
    samples = [*([] if order else across_tiles(dtype)), *list(CASE.samples(dtype, True))[order :: 12 if few else 4]]
    try:
        for sample in samples:
            got, want = case.op(**sample.arguments), CASE.op(**sample.arguments)
            assert torch.equal(got[0], want[0]), sample
            assert got[0].stride() == want[0].stride(), sample
            check_gradients(case, sample)
    finally:
        ops_on_shim.set_order(shim_library, 0)


def test_a_difference_is_seen(shim_library):
    sample = CASE.sample("currents, heads")
    wrong = replace(CASE, op=lambda **a: ON_SHIM(**a | {"scale": 2 * a["scale"]}))
    assert not torch.equal(wrong.op(**sample.arguments)[0], CASE.op(**sample.arguments)[0])
    with pytest.raises(AssertionError, match="gradient of"):
        check_gradients(wrong, sample)


# ---- planted defects: two heads of 66 rows and 70 columns, which cross the tiles, over two steps

T, HEADS, D, N = 2, 2, 66, 70


def spikes() -> torch.Tensor:
    return (torch.rand(T, 1, HEADS, D, N) < 0.3).float()


def run_forward(library):
    x = {name: spikes() for name in ("q", "k", "v")}
    x |= {"out": torch.full_like(x["q"], torch.nan), "scratch": torch.full((T * HEADS * D * D,), torch.nan)}
    launch(library, "spiking_self_attention_fwd_cuda", SpikingSelfAttentionFwd, shim.apart(x))


def run_backward(library):
    x = {name: spikes() for name in ("q", "k", "v")} | {"g_out": torch.randn(T, 1, HEADS, D, N)}
    x |= {f"g_{name}": torch.full_like(x["q"], torch.nan) for name in "qkv"}
    x |= {name: torch.full((HEADS,), torch.nan) for name in ("g_decay", "g_gain")}
    partials = 2 * HEADS * 2 * 2  # decay and gain, of a head's tiles; doubles
    x["scratch"] = torch.full((2 * partials + T * HEADS * D * (2 * D + N),), torch.nan)
    launch(library, "spiking_self_attention_bwd_cuda", SpikingSelfAttentionBwd, shim.apart(x))


def launch(library, symbol, kind, buffers):
    read_only = {"q", "k", "v", "g_out"}
    library.reset(0, False, **{("ro_" if n in read_only else "") + n: t for n, t in buffers.items()})
    assert library.call(f"spk::{symbol}", ctypes.byref(parameters(kind, buffers)), None) == 0


DEFECTS = {
    "no barrier before the product": (
        "b[c][n + j] = in[j];\n    __syncthreads();",
        "b[c][n + j] = in[j];",
        run_forward,
        "race: (read|write) of shared memory [ab]",
    ),
    "no barrier after the product": (
        "c0 += kDepth) {\n    __syncthreads();",
        "c0 += kDepth) {",
        run_forward,
        "race: (read|write) of shared memory [ab]",
    ),
    "no barrier between sums": (
        "sums[threadIdx.x + width];\n      __syncthreads();",
        "sums[threadIdx.x + width];",
        run_backward,
        "race: (read|write) of shared memory sums",
    ),
    "rows past the last": ("r < s.D ? s.N - n : 0", "s.N - n", run_forward, "out of bounds read of .* of ro_[qkv]"),
    "columns past the last": (
        "n * x.column, left = s.N - n;",
        "n * x.column, left = s.N - n + 1;",
        run_forward,
        "(race: write of|out of bounds write of .*) out",
    ),
    "one time step too many": (
        "for (int64_t t = 0; t < s.T; ++t) {\n    Own y;\n    matrix_times(y, static_cast",
        "for (int64_t t = 0; t <= s.T; ++t) {\n    Own y;\n    matrix_times(y, static_cast",
        run_forward,
        "out of bounds read",
    ),
    "kv of another size": (
        "if (r < s.D && c < s.D) base[r * s.D + c]",
        "if (r < s.D && c <= s.D) base[r * s.D + c]",
        run_forward,
        "race: write of .*scratch|out of bounds write of .*scratch",
    ),
    "sums of other blocks": (
        "gridDim.z + blockIdx.z] = sums[0]",
        "gridDim.z] = sums[0]",
        run_backward,
        "race: write of .*scratch",
    ),
    "gradient to the wrong step": (
        "store(out, dtype, s, at, t, r0",
        "store(out, dtype, s, at, t + 1, r0",
        run_backward,
        "out of bounds write of .* g_",
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
        run(library)
        assert not library.error


# ---- compiled by nvcc


def short(f):
    return re.search(r"ssa_(\w+?)_kernel", f.name)[1]


@pytest.mark.slow
def test_compiled_kernels():
    """Nothing spills; 16-byte accesses of operands and of shared memory; no contraction before the spikes."""
    most = {"dots": 80, "fwd": 128, "bwd_neuron": 168, "bwd_product": 80, "bwd_sum": 40}  # registers
    facts = aot.nvcc_facts(SOURCE, aot.ARCHS, [shim.CSRC], ["-fmad=false"])
    assert sorted((short(f), f.arch) for f in facts) == sorted((name, arch) for name in most for arch in aot.ARCHS)
    for f in facts:
        what = f"{short(f)} sm_{f.arch}"
        assert (f.spills, f.stack, f.local) == (0, 0, 0), what
        assert f.registers <= most[short(f)], what
        if short(f) == "bwd_sum":
            continue
        assert f.ldg128, what
        assert re.search(r"\bLDS\.128", f.sass), what
        assert bool(f.stg128) == (short(f) in ("fwd", "bwd_product")), what
        if short(f) in ("dots", "fwd"):
            assert not re.search(r"\bFFMA", f.sass), what
