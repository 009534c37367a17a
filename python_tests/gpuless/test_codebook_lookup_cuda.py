"""codebook_lookup's CUDA source without a GPU: run on the checked shim against the CPU kernel, and compiled by nvcc."""

import ctypes
import re

import pytest
import torch
from backends import assert_same
from gpuless import codebook_on_shim, ops_on_shim
from gpuless.codebook_on_shim import backward_buffers, backward_parameters, forward_buffers, forward_parameters
from gpuless.shim import Shim, build

from spikecore.ops import codebook_lookup
from spikecore.testing.cases import CASES, Sample

LOOKUP = ops_on_shim.on_shim("codebook_lookup")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def problem(n=70, K=600, D=40, dtype=torch.float32, **arguments):
    g = torch.Generator().manual_seed(0)
    z, codebook = (torch.randn(rows, D, generator=g).to(dtype) for rows in (n, K))
    return Sample("problem", {"z": z, "codebook": codebook, **arguments})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("codebook")


@pytest.fixture(scope="module")
def codebook_shim(folder):
    path = folder / "float_only.cu"
    path.write_text(codebook_on_shim.source())
    return Shim(build([path], folder))


# ---- the kernels' source on the shim


@pytest.mark.slow
@pytest.mark.parametrize("order", [0, 1, 7], ids=["natural", "reversed", "random"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codebook_lookup_is_the_cpu_kernel(shim_library, dtype, order):
    """Indices, values and gradients without tolerance, no thread at fault; `order`: of threads and blocks."""
    ops_on_shim.set_order(shim_library, order)
    try:
        every = 1 if (dtype, order) == (torch.float32, 0) else 5
        for sample in list(CASES["codebook_lookup"].samples(dtype, False))[order % 5 :: every]:
            assert_same("codebook_lookup", LOOKUP, sample)
    finally:
        ops_on_shim.set_order(shim_library, 0)


@pytest.mark.parametrize("metric", ["dot", "l2", "cosine"])
def test_several_parts_of_the_codes_and_ties(shim_library, metric):
    sample = problem(n=10, K=1100, D=12, metric=metric)  # two parts
    sample.arguments["codebook"][550:] = sample.arguments["codebook"][:550].clone()
    assert_same("codebook_lookup", LOOKUP, sample)


def test_what_is_not_finite(shim_library):
    sample = problem(n=5, K=9, check_nan=False)
    sample.arguments["z"][3, 7] = torch.nan
    sample.arguments["codebook"][4] = torch.inf
    got, want = LOOKUP(**sample.arguments), codebook_lookup(**sample.arguments)
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1], rtol=0, atol=0, equal_nan=True)
    assert got[0][3] == -1
    with pytest.raises(RuntimeError, match="z must be finite"):
        LOOKUP(**sample.arguments | {"check_nan": True})
    sample.arguments["z"][3, 7] = 0
    with pytest.raises(RuntimeError, match="codebook must be finite"):
        LOOKUP(**sample.arguments | {"check_nan": True})


def test_a_difference_is_seen(shim_library):
    sample = problem(n=8, K=20)
    with pytest.raises(AssertionError, match="of 8 differ in indices"):
        assert_same("codebook_lookup", lambda **a: LOOKUP(**a, metric="l2"), sample)
    with pytest.raises(AssertionError, match="differ in grad codebook"):
        assert_same("codebook_lookup", lambda z, codebook: codebook_lookup(z, 2 * codebook - codebook.detach()), sample)


# ---- memory accesses


def run_forward(shim, n=70, K=130, D=40, splits=1, coalescing=False, metric=0, ties=False, dtype=torch.float32):
    a = problem(n, K, D, dtype).arguments
    if ties:
        a["codebook"][K // 2 :] = a["codebook"][: K - K // 2].clone()
    buffers = forward_buffers(a["z"], a["codebook"], splits)
    p = forward_parameters(buffers, metric, splits)
    shim.reset(0, coalescing, **{("ro_" if name in ("z", "codes") else "") + name: t for name, t in buffers.items()})
    assert shim.call("spk::codebook_lookup_fwd_cuda", ctypes.byref(p), None) == 0
    if not shim.error:
        want = codebook_lookup(**a, metric=("dot", "l2", "cosine")[metric])
        if not torch.equal(buffers["indices"], want[0]):
            return "wrong indices"
    return shim.error


def run_backward(shim, n=300, K=40, D=130):
    g, indices = torch.randn(n, D), torch.randint(K, (n,))
    buffers = backward_buffers(g, indices, K)
    p = backward_parameters(buffers)
    shim.reset(0, False, **{("ro_" if name != "g_codes" else "") + name: t for name, t in buffers.items()})
    assert shim.call("spk::codebook_lookup_bwd_cuda", ctypes.byref(p), None) == 0
    if not shim.error and not torch.equal(buffers["g_codes"], torch.zeros(K, D).index_add_(0, indices, g)):
        return "wrong sums"
    return shim.error


def test_tiles_are_read_by_16_bytes(codebook_shim):
    """Screening reads z once and the codes once a tile of rows, by 16 bytes a thread; norms read them by floats."""
    n, K, D, tile, settle = 128, 256, 64, 128, 256
    assert run_forward(codebook_shim, n, K, D) == ""
    found = settle * n  # by all threads of a row
    assert codebook_shim.count(False, 16) == (K // tile * n * D + n // tile * K * D) // 4 + found
    assert run_forward(codebook_shim, n, K, D + 1) == ""  # no multiple of 4: one number at a time
    assert codebook_shim.count(False, 16) == found


# ---- planted defects

DEFECTS = {
    "no barrier after the first tile": (
        ("put(0);\n    __syncthreads();", "put(0);"),
        run_forward,
        "race: .* shared memory",
    ),
    "no barrier between tiles": (
        ("if (more) put(buffer);\n      __syncthreads();", "if (more) put(buffer);"),
        run_forward,
        "race: .* shared memory",
    ),
    "one buffer": (("buffer ^= 1;", ""), run_forward, "race: .* shared memory"),
    "rows past the end": (
        ("first + row < end && d0", "d0"),
        run_forward,
        "out of bounds read of 16 bytes at byte .* of ro_",
    ),
    "numbers past the end": (
        ("&& d0 + d < D) held", ") held"),
        run_forward,
        "out of bounds read .* of ro_|wrong indices",
    ),
    "found of the wrong part": (
        ("p.found[blockIdx.y * p.n + row] = ", "p.found[blockIdx.y * p.n + row + 1] = "),
        run_forward,
        "out of bounds write of 16 bytes at byte .* of found|race",
    ),
    "no barrier before the warps' best": (
        ("indices[warp] = at;\n    }\n    __syncthreads();", "indices[warp] = at;\n    }"),
        lambda shim: run_forward(shim, ties=True),
        "race: .* shared memory",
    ),
    "too small a bound": (
        ("{product, gamma * z_norm * weight + tiny}", "{product, -0.1f * z_norm * weight}"),
        run_forward,
        "wrong indices",
    ),
    "ties to the last": (
        ("indices[w] < k", "indices[w] > k"),
        lambda shim: run_forward(shim, K=131, ties=True),
        "wrong indices",
    ),
    "ties taken for settled": (
        ("f.lower > f.second && ", "f.upper >= f.second && "),
        lambda shim: run_forward(shim, K=140, ties=True),
        "wrong indices",
    ),
    "list without barrier": (
        ("owners[place] = int(k);\n    }\n    __syncthreads();", "owners[place] = int(k);\n    }"),
        run_backward,
        "race: .* shared memory|out of bounds read .* of ro_g",
    ),
    "columns past the end": (("if (d >= p.D) return;", ""), run_backward, "out of bounds write .* of g_codes|race"),
    "rows out of order": (
        ("int place = __popc(votes & ((1u << lane) - 1))", "int place = __popc(votes & ~((2u << lane) - 1))"),
        run_backward,
        "wrong sums",
    ),
}


def run_half(shim):
    return run_forward(shim, n=150, K=261, dtype=torch.float16)


# Of the kernel for tensor cores, where its text is its own.
HALF_DEFECTS = {
    "half: rows past the end": (
        ("row0 + row < p.n && d < p.D", "d < p.D"),
        "out of bounds read of 16 bytes at byte .* of ro_z",
    ),
    "half: codes past the end": (
        ("code0 + row < end && d < p.D", "d < p.D"),
        "out of bounds read of 16 bytes at byte .* of ro_codes",
    ),
    "half: no barrier before the warps' best": (
        ("= best[r];\n  }\n  __syncthreads();", "= best[r];\n  }"),
        "race: .* shared memory",
    ),
    "half: pairs of another row": (("+ (theirs + g) *", "+ (theirs + (g ^ 1)) *"), "wrong indices"),
    "half: sums of another code": (("r % 2 * 2 + k % 2]", "r % 2 * 2 + (k + 1) % 2]"), "wrong indices"),
    "half: one warp's codes alone": (("w < kWarps; ++w) b.join", "w < 1; ++w) b.join"), "wrong indices"),
}


@pytest.mark.slow
@pytest.mark.parametrize("defect", [*DEFECTS, *HALF_DEFECTS])
def test_a_planted_defect_is_found(folder, defect):
    half = defect in HALF_DEFECTS
    edit, run, message = (HALF_DEFECTS[defect][0], run_half, HALF_DEFECTS[defect][1]) if half else DEFECTS[defect]
    path = folder / f"{re.sub(r'[^a-z]', '_', defect)}.cu"
    path.write_text(codebook_on_shim.source([edit], "__half" if half else "float"))
    found = run(Shim(build([path], folder)))
    assert re.search(message, found), found


def test_tensor_cores_without_a_defect(folder):
    path = folder / "half_only.cu"
    path.write_text(codebook_on_shim.source(types="__half"))
    half = Shim(build([path], folder))
    assert run_half(half) == ""
    for metric in range(3):
        assert run_forward(half, K=131, D=72, metric=metric, ties=True, dtype=torch.float16) == ""


def test_without_a_defect_there_is_no_fault(codebook_shim):
    for ties in (False, True):
        for metric in range(3):
            assert run_forward(codebook_shim, K=131, ties=ties, metric=metric) == ""
    assert run_backward(codebook_shim) == ""


# ---- compiled by nvcc

# Registers a thread: of 65,536 on a multiprocessor. One block of 256 screens there, 64 sums a thread; two settle.
MOST = {"codebook_norm": 64, "codebook_screen": 255, "codebook_mma": 255, "codebook_settle": 128, "codebook_bwd": 64}


@pytest.mark.slow
def test_compiled_kernels():
    """All of them for sm_90, those of float32 for the others."""
    facts = codebook_on_shim.codebook_facts([90]) + codebook_on_shim.codebook_facts([80, 100], halves=False)
    assert len(facts) == 3 + 5 * 4 + 2 * (1 + 4)
    for f in facts:
        kind = f.name.split()[0]
        assert (f.spills, f.stack, f.local) == (0, 0, 0), (f.name, f.arch)
        assert f.registers <= MOST[kind], (f.name, f.arch, f.registers)
        if re.search(" x [48]$|_mma", f.name):
            assert f.ldg128, (f.name, f.arch)
        assert bool(re.search(r"\bHMMA\.16816\.F32", f.sass)) == (kind == "codebook_mma"), (f.name, f.arch)
        if kind == "codebook_screen":
            assert len(re.findall(r"\bLDS\.128", f.sass)) >= 2 * 8, (f.name, f.arch)
