"""lif as nvcc and Triton compile it for sm_80, run by the PTX interpreter: every number is the CPU kernel's."""

import importlib.util

import pytest
import torch
from gpuless import aot, lif_on_shim, ptxvm
from gpuless.lif_backends import triton_facts
from gpuless.lif_on_shim import Constants, LifBwd, LifFwd, LifNeuron, parameters
from gpuless.shim import CSRC

from spikecore.ops.lif import encode
from spikecore.surrogate import ATan
from spikecore.testing.cases import values

DTYPES = [torch.float32, torch.float16]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
CPU = torch.ops.spikecore
T, N = 9, 528  # divisible by 16, and no multiple of what a block of threads owns
REST, THRESHOLD = -0.25, 0.75
NUMBERS = encode(torch.empty(0), 0.0, 0.0, THRESHOLD, REST, None, False, True, ATan(2.0))[2]


def tensors(dtype):
    """Inputs with a decay and a gain for each neuron, and empty outputs."""
    torch.manual_seed(0)
    x = values((T, N), dtype, False)
    state = {name: torch.rand(N) for name in ("decay", "gain", "v_init")}
    return x, *state.values()


def cpu_forward(x, decay, gain, v_init, packed=False):
    return CPU.lif_fwd(x, decay, gain, v_init, NUMBERS, 1, True, False, packed)


def cpu_backward(g_s, g_v_last, x, decay, gain, v_init):
    return CPU.lif_bwd(g_s, g_v_last, None, None, x, decay, gain, v_init, NUMBERS, 1, True, True, True)


def poisoned(*like):
    return [torch.full_like(t, torch.nan if t.is_floating_point() else 255) for t in like]


def assert_equal(got, want):
    for name, g in got.items():
        assert torch.equal(g, want[name]), f"{int((g != want[name]).sum())} of {g.numel()} differ in {name}"


def read_only(x, **tensors):
    return {f"ro_{name}": t for name, t in {"x": x, **tensors}.items()}


# ---- nvcc


@pytest.fixture(scope="module")
def ptx(tmp_path_factory):
    path = tmp_path_factory.mktemp("ptx") / lif_on_shim.SOURCE.name
    path.write_text(lif_on_shim.source(["float", "__half"], ["atan"]))
    return aot.nvcc_ptx(path, [CSRC], lif_on_shim.NVCC)


def neuron(decay, gain):
    return LifNeuron(0.0, 0.0, decay.data_ptr(), gain.data_ptr(), N, 1, THRESHOLD, REST, THRESHOLD, True, False)


CONSTANTS = Constants(REST, THRESHOLD, THRESHOLD, THRESHOLD)
KERNEL = {torch.float32: "If", torch.float16: "I6__half"}


@pytest.mark.parametrize("V", ["vector", 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nvcc_forward(ptx, dtype, V):
    V = 16 // dtype.itemsize if V == "vector" else V
    x, decay, gain, v_init = tensors(dtype)
    s, v_last, h, _ = cpu_forward(x, decay, gain, v_init)
    out = dict(zip(("s", "v_last", "h"), poisoned(s, v_last, h), strict=True))
    p = parameters(LifFwd, x, neuron(decay, gain), v_init=v_init, **out)
    kernel = ptxvm.Kernel(ptx, f"lif_fwd_kernel{KERNEL[dtype]}Li{V}E")
    buffers = read_only(x, decay=decay, gain=gain, v_init=v_init) | out
    ptxvm.launch(kernel, -(-N // V // 128), 128, [p, CONSTANTS], buffers=buffers)
    assert_equal(out, {"s": s, "v_last": v_last, "h": h})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nvcc_backward(ptx, dtype):
    """Two segments: five steps and four."""
    V, steps = 16 // dtype.itemsize, 5
    x, decay, gain, v_init = tensors(dtype)
    g_s, g_v_last = torch.randn(T, N).to(dtype), torch.randn(N)
    names = ("g_x", "g_decay", "g_gain", "g_v_init")
    want = dict(zip(names, cpu_backward(g_s, g_v_last, x, decay, gain, v_init), strict=True))
    out = dict(zip(names, poisoned(*want.values()), strict=True)) | {"checkpoints": torch.full((1, N), torch.nan)}
    inputs = {"v_init": v_init, "g_s": g_s, "g_v_last": g_v_last}
    constants = {"detach": True, "surrogate": 0, "a": 2.0, "steps": steps}
    p = parameters(LifBwd, x, neuron(decay, gain), **inputs, **out, **constants)
    kernel = ptxvm.Kernel(ptx, f"lif_bwd_kernel{KERNEL[dtype]}Li{V}E")
    buffers = read_only(x, decay=decay, gain=gain, **inputs) | out
    ptxvm.launch(kernel, -(-N // V // 64), 64, [p, CONSTANTS], shared=steps * 64 * V * 4, buffers=buffers)
    del out["checkpoints"]
    assert_equal(out, want)


def test_nvcc_ptx_holds_no_contraction(ptx):
    for name in ptxvm.entries(ptx):
        if "lif_fwd" in name:
            assert not [i.text for i in ptxvm.Kernel(ptx, name).code if i.op == "fma"]


# ---- Triton


def triton_lif():
    pytest.importorskip("triton", reason="triton is not installed")
    from spikecore.triton import lif

    return lif


@pytest.mark.parametrize("packed", [False, True], ids=["spikes", "packed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@needs_triton
def test_triton_forward(dtype, packed):
    x, decay, gain, v_init = tensors(dtype)
    s, v_last, h, _ = cpu_forward(x, decay, gain, v_init, packed)
    out = dict(zip(("s", "v_last", "h"), poisoned(s, v_last, h), strict=True))
    facts = triton_facts("fwd", dtype, 80, H=True, PACKED=packed)
    constants = [T, N, N, N, 1, 0.0, 0.0, REST, THRESHOLD, THRESHOLD]
    args = [x, decay, gain, v_init, *out.values(), *constants]
    ptxvm.launch(ptxvm.Kernel(facts.ptx, "lif_fwd_kernel"), 2, 128, args, shared=facts.shared)
    assert_equal(out, {"s": s, "v_last": v_last, "h": h})


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton_backward(dtype):
    """Whole segments and one of a single step."""
    x, decay, gain, v_init = tensors(dtype)
    g_s, g_v_last = torch.randn(T, N).to(dtype), torch.randn(N)
    names = ("g_x", "g_decay", "g_gain", "g_v_init")
    want = dict(zip(names, cpu_backward(g_s, g_v_last, x, decay, gain, v_init), strict=True))
    out = dict(zip(names, poisoned(*want.values()), strict=True))
    starts = torch.full(((T - 1) // triton_lif().SEGMENT, N), torch.nan)
    facts = triton_facts("bwd", dtype, 80)
    constants = [T, N, N, N, 1, 0.0, 0.0, THRESHOLD, REST, THRESHOLD, THRESHOLD, 2.0, 0.0]
    args = [g_s, g_v_last, x, decay, gain, v_init, *out.values(), starts, *constants]
    ptxvm.launch(ptxvm.Kernel(facts.ptx, "lif_bwd_kernel"), 2, 128, args, shared=facts.shared)
    assert_equal(out, want)
