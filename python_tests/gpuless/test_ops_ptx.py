"""Whole operators, forward and backward, as nvcc and Triton compile them for sm_80, run by the PTX interpreter."""

import copy
import re
from dataclasses import replace

import pytest
import torch
from backends import assert_same, results
from gpuless import lif_on_shim, on_ptx, ops_on_shim, ptxvm
from gpuless.bn_lif_backends import assert_equal_but_for_sums
from gpuless.selective_scan_backends import assert_near
from gpuless.shim import CSRC
from test_ops import check_gradients

from spikecore.ops.lif import LIFParams
from spikecore.testing.cases import CASES, Sample, values
from spikecore.testing.cases.selective_scan import scan_sample
from spikecore.testing.cases.selective_scan_2d import sample as scan2d_sample
from spikecore.testing.compare import assert_close

HEADS = {"decay": torch.tensor([0.5, 0.25]), "gain": torch.tensor(0.75)}
FLOAT, HALF = torch.float32, torch.float16


def qk_sample(mode: str, dtype: torch.dtype = FLOAT, N: int = 16) -> Sample:
    """Currents on the grid. Tokens (N of them) are columns, channels are rows."""
    operands = {arg: values((5, 1, 2, 6, N), dtype, True, i) for i, arg in enumerate("qk")}
    neurons = {"attn": LIFParams(**HEADS, v_threshold=0.5), "qkv": LIFParams(**HEADS)}
    return Sample(f"{mode} {dtype} N={N}", {**operands, **neurons, "mode": mode})


def ssa_sample(N: int) -> Sample:
    operands = {arg: (values((2, 1, 2, 5, N), FLOAT, True, i) > 1).float() for i, arg in enumerate("qkv")}
    return Sample(f"N={N}", {**operands, "attn": LIFParams(**HEADS, v_threshold=0.25), "scale": 0.125})


def scan(L: int, C: int = 9, dtype: torch.dtype = FLOAT, **changes) -> Sample:
    return scan_sample(f"{dtype} L={L}", dtype, False, B=1, C=C, S=2, L=L, **changes)


def scan_2d(H: int, W: int, dtype: torch.dtype = FLOAT) -> Sample:
    return scan2d_sample(f"{dtype} {H} x {W}", dtype, False, B=1, C=3, H=H, W=W, S=2, directions=(0, 3))


def bn_sample(shape: tuple[int, ...], dtype: torch.dtype = FLOAT, **changes) -> Sample:
    """In training, everything given and asked for."""
    channels = {n: torch.linspace(0.5, 0.9, shape[2]) for n in ("weight", "bias", "running_mean", "running_var")}
    neuron = {"decay": channels["weight"].clone(), "gain": channels["bias"].clone(), "detach_reset": False}
    given = {"residual": values(shape, dtype, True, 1), "v_init": torch.rand(shape[1:]), "return_sum": True}
    x = {"x": values(shape, dtype, True), **channels, "training": True}
    return Sample(f"{dtype} {list(shape)}", x | neuron | given | changes)


# ---- nvcc: the bits that the same source gives on the shim, in chunks and beyond, by vectors and not

NVCC = {
    "qk_attention": [qk_sample("token"), qk_sample("channel", HALF), qk_sample("token", N=5)],
    "bn_lif": [bn_sample((12, 1, 2, 32)), bn_sample((2, 3, 3, 5)), bn_sample((3, 2, 16, 1), HALF, training=False)],
    "selective_scan": [scan(132), scan(5, C=17, options="h_init last D"), scan(16, C=2, dtype=HALF)],
    "selective_scan_2d": [scan_2d(8, 17), scan_2d(3, 5), scan_2d(3, 8, HALF)],
    "spiking_self_attention": [ssa_sample(20), ssa_sample(3)],
}
KERNELS = {
    "qk_attention": "qk_(sum|gate|attn_bwd|operand_bwd|reduce)",
    "bn_lif": "bn_(stats|stats_finish|constants|lif_fwd|lif_bwd|lif_bwd_finish|lif_bwd_x)",
    "selective_scan": "selective_scan_(fwd|bwd|reduce)",
    "selective_scan_2d": "selective_scan_2d_(fwd|bwd)",
    "spiking_self_attention": "ssa_(dots|fwd|bwd_neuron|bwd_product|bwd_sum)",
}


@pytest.fixture(scope="module")
def kernels_of(tmp_path_factory):
    cache: dict[str, on_ptx.Kernels] = {}

    def of(op: str) -> on_ptx.Kernels:
        if op not in cache:
            sources = [CSRC / op / f"{op}_cuda.cu"]
            if op == "spiking_self_attention":  # sums its parameters' gradients by lif's kernels
                sources.append(tmp_path_factory.mktemp("ptx") / lif_on_shim.SOURCE.name)
                sources[-1].write_text(lif_on_shim.source(["float"], ["atan"]))
            cache[op] = on_ptx.Kernels(*sources)
        return cache[op]

    return of


def same(got: torch.Tensor | None, wanted: torch.Tensor | None) -> bool:
    return got is wanted if got is None or wanted is None else torch.equal(got, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("op", NVCC)
def test_nvcc(kernels_of, op):
    seen = set()
    for sample in NVCC[op]:
        wanted = results(CASES[op], ops_on_shim.on_shim(op), sample)
        with on_ptx.of_nvcc(op, kernels_of(op)) as (function, launched):
            got = results(CASES[op], function, sample)
        assert [name for name, w in wanted.items() if not same(got[name], w)] == [], sample
        seen |= set(launched)
    names = re.findall(r"\w+", KERNELS[op])
    assert {s.split("_kernel")[0] for s in seen} >= {names[0] + n for n in names[1:]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "old", "new", "complaint"),
    [
        ("qk_sum_kernel<float, 4, true>", r"^add\.rn\.f32", "sub.rn.f32", "960 differ in"),
        ("qk_gate_kernel<float, 4>", r"(st\.global\S*v4\S* \[[^]]*)", r"\1+4", "misaligned 16-byte write of out"),
        ("qk_gate_kernel<float, 4>", r"(ld\.global\S*v4\S* .*\[[^]]*)", r"\1+65536", "out of bounds read of 16 bytes"),
    ],
    ids=["subtracts", "4 bytes on", "64 KiB on"],
)  # fmt: skip
def test_a_wrong_instruction_is_seen(kernels_of, kernel, old, new, complaint):
    kernels = copy.copy(kernels_of("qk_attention"))
    code = kernels[kernel].code
    at = next(i for i, instruction in enumerate(code) if re.search(old, instruction.text))
    kernels[kernel] = copy.copy(kernels[kernel])
    kernels[kernel].code = [*code[:at], ptxvm.instruction(re.sub(old, new, code[at].text)), *code[at + 1 :]]
    with (
        on_ptx.of_nvcc("qk_attention", kernels) as (function, _),
        pytest.raises((AssertionError, RuntimeError), match=complaint),
    ):
        assert_same("qk_attention", function, qk_sample("token"), grid=True)


# ---- Triton: the CPU kernel's numbers, or as near the exact ones


@pytest.mark.slow
def test_triton_qk_attention():
    with on_ptx.of_triton("qk_attention") as (function, launched):
        for sample in (qk_sample("token"), qk_sample("channel", HALF), qk_sample("token", N=5)):
            assert_same("qk_attention", function, sample, grid=True)
    assert set(launched) == {f"qk_{name}_kernel" for name in ("sum", "gate", "attn_bwd", "operand_bwd")}


@pytest.mark.slow
def test_triton_bn_lif():
    with on_ptx.of_triton("bn_lif") as (function, launched):
        for sample in (CASES["bn_lif"].sample("maps, every"), bn_sample((6, 1, 2, 32), HALF, training=False)):
            assert_equal_but_for_sums(function, sample)
    assert set(launched) == {f"bn_{name}_kernel" for name in ("stats", "lif_fwd", "lif_bwd", "lif_bwd_x")}


@pytest.mark.slow
def test_triton_selective_scan():
    with on_ptx.of_triton("selective_scan") as (function, launched):
        for sample in (scan(5), scan(3, C=17, dtype=HALF, options="h_init last D")):
            assert_near(function, sample)
    assert set(launched) == {"selective_scan_fwd_kernel", "selective_scan_bwd_kernel"}


@pytest.mark.slow
def test_triton_selective_scan_2d():
    case = CASES["selective_scan_2d"]
    with on_ptx.of_triton("selective_scan_2d") as (function, launched):
        for sample in (scan_2d(6, 12), scan_2d(3, 5, HALF)):
            got, want = function(**sample.arguments)[0], case.ref(**sample.arguments)[0]
            assert_close(got, want, case.ref(**sample.to(torch.float64).arguments)[0], str(sample))
            check_gradients(replace(case, op=function), sample)
    assert set(launched) == {"selective_scan_2d_fwd_kernel", "selective_scan_2d_bwd_kernel"}


@pytest.mark.slow
def test_triton_spiking_self_attention():
    """Forward; backward launches lif's kernels alone."""
    with on_ptx.of_triton("spiking_self_attention") as (function, launched):
        for sample in (ssa_sample(20), ssa_sample(3)):
            want = CASES["spiking_self_attention"].op(**sample.arguments)[0]
            assert torch.equal(function(**sample.arguments)[0], want), sample
            assert 0 < want.mean() < 1
    assert set(launched) == {"ssa_dots_kernel", "ssa_fwd_kernel"}
