"""codebook_lookup as nvcc and Triton compile it for sm_80, run by the PTX interpreter: the CPU kernel's numbers."""

import importlib.util

import pytest
import torch
from gpuless import aot, codebook_on_shim, ptxvm
from gpuless.codebook_backends import triton_facts
from gpuless.codebook_on_shim import backward_buffers, backward_parameters, forward_buffers, forward_parameters
from gpuless.shim import CSRC

from spikecore.ops import codebook_lookup

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
N, K, D = 20, 70, 48


def tensors(dtype=torch.float32):
    torch.manual_seed(0)
    z, codes = torch.randn(N, D).to(dtype), torch.randn(K, D).to(dtype)
    codes[40:] = codes[:30]  # ties
    return z, codes


def norms(x):
    return (x.double().norm(dim=1) * (1 + 2.0**-20)).float()


def read_only(buffers, *names):
    return {("ro_" if n in names else "") + n: t for n, t in buffers.items()}


@pytest.fixture(scope="module")
def ptx(tmp_path_factory):
    path = tmp_path_factory.mktemp("ptx") / codebook_on_shim.SOURCE.name
    path.write_text(codebook_on_shim.source())
    return aot.nvcc_ptx(path, [CSRC], codebook_on_shim.NVCC)


@pytest.mark.parametrize("V", [4, 1])
def test_nvcc_forward(ptx, V):
    """Screening by tiles, then settling row by row."""
    z, codes = tensors()
    buffers = forward_buffers(z, codes)
    buffers["z_norm"].copy_(norms(z))
    buffers["c_norm"].copy_(norms(codes))
    p = forward_parameters(buffers)
    seen = read_only(buffers, "z", "codes", "z_norm", "c_norm")
    ptxvm.launch(ptxvm.Kernel(ptx, f"codebook_screen_kernelIffLi{V}E"), 1, 256, [p], buffers=seen)
    seen = read_only(buffers, "z", "codes", "z_norm", "c_norm", "found")
    ptxvm.launch(ptxvm.Kernel(ptx, "codebook_settle_kernelIff"), N, 256, [p], buffers=seen)
    indices, values = codebook_lookup(z, codes)
    assert torch.equal(buffers["indices"], indices)
    assert torch.equal(buffers["values"], values)


def test_nvcc_backward(ptx):
    g, indices = torch.randn(150, D), torch.randint(20, (150,))
    buffers = backward_buffers(g, indices, 20)
    seen = read_only(buffers, "g", "indices")
    ptxvm.launch(
        ptxvm.Kernel(ptx, "codebook_bwd_kernelIff"), (2, 1, 1), 128, [backward_parameters(buffers)], buffers=seen
    )
    assert torch.equal(buffers["g_codes"], torch.zeros(20, D).index_add_(0, indices, g))


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_triton_screening(dtype):
    """On tensor cores in half precision: what it leaves in the race holds the nearest code of every row."""
    from spikecore.triton.codebook_lookup import WARPS, gamma_of

    z, codes = tensors(dtype)
    found, index = torch.full((1, N, 3), torch.nan), torch.full((1, N), -7, dtype=torch.int32)
    facts = triton_facts("screen", dtype, 80)
    args = [z, codes, norms(z), norms(codes), found, index, N, K, D, D, gamma_of(D, dtype)]
    kernel = ptxvm.Kernel(facts.ptx, "codebook_screen_kernel")
    ptxvm.launch(kernel, (1, 1, 1), 32 * WARPS[dtype], args, shared=facts.shared)
    scores = z.double() @ codes.double().T
    upper, lower, second = found[0].double().unbind(1)
    best = scores.amax(1)
    assert (lower <= best).all()
    assert (best <= upper).all()
    sure = lower > second
    want = codebook_lookup(z, codes)[0]
    assert torch.equal(index[0].long()[sure], want[sure])
    assert (~sure[want < 30]).all(), "ties must not be taken for settled"
    assert sure[want >= 30].any()


@needs_triton
def test_triton_backward():
    g, indices = torch.randn(40, D), torch.randint(6, (40,))
    ordered, order = indices.sort(stable=True)
    out = torch.full((6, D), torch.nan)
    starts = torch.searchsorted(ordered, torch.arange(7))
    facts = triton_facts("bwd", torch.float32, 80, BD=64)
    ptxvm.launch(
        ptxvm.Kernel(facts.ptx, "codebook_bwd_kernel"),
        (6, 1, 1),
        128,
        [g, order, starts, out, D, D],
        shared=facts.shared,
    )
    assert torch.equal(out, torch.zeros(6, D).index_add_(0, indices, g))
