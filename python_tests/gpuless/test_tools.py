"""Tests of the tools in this folder: right results on toy kernels, and every planted defect found by name."""

import ctypes
import os
from pathlib import Path

import pytest
import torch
from gpuless import aot, ptxvm
from gpuless.interpreted import run_interpreted
from gpuless.shim import CSRC, Shim, build

HERE = Path(__file__).parent
TOY = HERE / "toy_kernels.cu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ORDERS = pytest.mark.parametrize("seed", [0, 1, 7], ids=["natural", "reversed", "random"])


def packed_signs(x):
    """[R, ceil(columns / 32)] words, bit i of word w for column 32 w + i."""
    bits = torch.nn.functional.pad(x > 0, (0, -x.shape[1] % 32)).view(len(x), -1, 32).long()
    return (bits << torch.arange(32)).sum(-1)


# ---- the host shim


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A function from defects to the checked library in which they are planted."""
    cache = tmp_path_factory.mktemp("shim")
    return lambda *defects, checked=True: Shim(build([TOY], cache, checked=checked, defines=defects))


@pytest.fixture(scope="module")
def shim(library):
    return library()


@pytest.fixture(scope="module")
def first_defects(library):
    return library("TOY_NO_MASK", "TOY_NO_BARRIER", "TOY_DIVERGENT")


@pytest.fixture(scope="module")
def second_defects(library):
    return library("TOY_WRITE_INPUT", "TOY_SHUFFLE_MASK", "TOY_BLOCK_RACE")


def run_scale(shim, dtype, n=1000, seed=0, coalescing=False):
    x, y = torch.randn(n).to(dtype), torch.full((n,), torch.nan, dtype=dtype)
    shim.reset(seed, coalescing, ro_x=x, y=y)
    assert shim.call("toy_scale", DTYPES.index(dtype), x, y, n, 1.5) == 0
    return y, (x.float() * 1.5).to(dtype)


def run_row_sum(shim, seed=0):
    x = torch.randn(5, 300)
    rows, total, bits = torch.zeros(5), torch.zeros(1), torch.zeros(5, 10, dtype=torch.int32)
    shim.reset(seed, ro_x=x, rows=rows, total=total, bits=bits)
    shim.call("toy_row_sum", x, rows, total, bits, 5, 300)
    return x, rows, total, bits


def run_reverse(shim, seed=0):
    x, y = torch.randn(5, 50), torch.zeros(5, 50)
    shim.reset(seed, ro_x=x, y=y)
    shim.call("toy_reverse", x, y, 5, 50)
    return x, y


@ORDERS
@pytest.mark.parametrize("dtype", DTYPES)
def test_shim_elementwise(shim, seed, dtype):
    y, expected = run_scale(shim, dtype, seed=seed)
    assert not shim.error
    assert torch.equal(y, expected)


@ORDERS
def test_shim_reduction(shim, seed):
    x, rows, total, bits = run_row_sum(shim, seed)
    assert not shim.error
    torch.testing.assert_close(rows, x.sum(1))
    torch.testing.assert_close(total[0], x.sum())
    assert torch.equal(bits.long() & 0xFFFFFFFF, packed_signs(x))


@ORDERS
def test_shim_dynamic_shared(shim, seed):
    x, y = run_reverse(shim, seed)
    assert not shim.error
    assert torch.equal(y, x.flip(1))


def test_shim_fast_build(library):
    fast = library(checked=False)
    y, expected = run_scale(fast, torch.float32, 1 << 18)  # 1,024 blocks
    assert torch.equal(y, expected)
    x, rows, *_ = run_row_sum(fast)
    torch.testing.assert_close(rows, x.sum(1))


def test_shim_names_out_of_bounds(first_defects):
    run_scale(first_defects, torch.float32)
    assert "out of bounds read of 16 bytes at byte 4000 of ro_x (4000 bytes)" in first_defects.error


@pytest.mark.parametrize("dtype", DTYPES)
def test_shim_names_misaligned_vectors(shim, dtype):
    n = 1000
    x, y = torch.zeros(n + 1).to(dtype)[1:], torch.zeros(n, dtype=dtype)
    shim.reset(ro_x=x, y=y)
    shim.call("toy_scale", DTYPES.index(dtype), x, y, n, 1.5)
    assert "misaligned 16-byte access to ro_x" in shim.error
    assert "toy_kernels.cu:" in shim.error


def test_shim_names_write_to_read_only(second_defects):
    run_scale(second_defects, torch.float32)
    assert "write to the read-only ro_x" in second_defects.error


@ORDERS
def test_shim_names_missing_barrier(first_defects, seed):
    run_row_sum(first_defects, seed)
    assert "race: " in first_defects.error
    assert "of shared memory part byte" in first_defects.error
    assert "with no barrier between" in first_defects.error


@ORDERS
def test_shim_names_divergent_barrier(first_defects, seed):
    run_reverse(first_defects, seed)
    assert "divergent barrier: 50 threads at __syncthreads, 14 exited" in first_defects.error


def test_shim_names_lane_outside_mask(second_defects):
    run_row_sum(second_defects)
    assert "calls a warp primitive whose mask leaves it out" in second_defects.error


@ORDERS
def test_shim_names_race_between_blocks(library, seed):
    racy = library("TOY_BLOCK_RACE")
    run_row_sum(racy, seed)
    assert "race: read of total byte 0 written by block" in racy.error


def test_shim_poisons_uninitialised_shared(library):
    careless = library("TOY_UNINITIALISED")
    _, rows, *_ = run_row_sum(careless)
    assert rows.isnan().all()


@pytest.mark.parametrize(("stride", "sectors_a_request"), [(1, 4), (8, 32)])
def test_shim_counts_sectors(shim, stride, sectors_a_request):
    n = 2048
    x, y = torch.randn(n), torch.zeros(n)
    shim.reset(0, True, ro_x=x, y=y)
    shim.call("toy_scale_struct", x, y, n, 2.0, stride)
    assert not shim.error
    assert torch.equal(y, 2 * x)
    for write in (False, True):
        requests, sectors = shim.coalescing(write)
        assert (requests, sectors) == (n // 32, n // 32 * sectors_a_request)


def test_shim_counts_a_vector_access_once(shim):
    run_scale(shim, torch.float32, n=1024, coalescing=True)
    assert shim.coalescing(False) == (8, 128)  # 8 warps, 512 bytes each
    assert (shim.count(False, 16), shim.count(False, 4)) == (256, 0)


# ---- the PTX interpreter, on what nvcc emits


@pytest.fixture(scope="module")
def toy_ptx():
    return aot.nvcc_ptx(TOY, [CSRC])


@pytest.mark.parametrize("dtype", DTYPES)
def test_ptxvm_elementwise(toy_ptx, dtype):
    name = "scale_kernelI" + {torch.float32: "f", torch.float16: "6__half", torch.bfloat16: "13__nv_bfloat16"}[dtype]
    x, y = torch.randn(1000).to(dtype), torch.full((1000,), torch.nan, dtype=dtype)
    ptxvm.launch(ptxvm.Kernel(toy_ptx, name), 4, 64, [x, y, 1000, 1.5])
    assert torch.equal(y, (x.float() * 1.5).to(dtype))


def test_ptxvm_struct_argument(toy_ptx):
    class Scale(ctypes.Structure):
        _fields_ = [("x", ctypes.c_void_p), ("y", ctypes.c_void_p), ("n", ctypes.c_int64), ("factor", ctypes.c_float)]

    x, y = torch.randn(100), torch.zeros(100)
    kernel = ptxvm.Kernel(toy_ptx, "scale_struct_kernel")
    ptxvm.launch(kernel, 2, 64, [Scale(x.data_ptr(), y.data_ptr(), 100, 2.0), 3], buffers={"ro_x": x, "y": y})
    assert torch.equal(y, 2 * x)
    with pytest.raises(ptxvm.PtxFault, match="write to the read-only ro_y"):
        ptxvm.launch(kernel, 2, 64, [Scale(x.data_ptr(), y.data_ptr(), 100, 2.0), 3], buffers={"ro_x": x, "ro_y": y})


def test_ptxvm_reduction(toy_ptx):
    x = torch.randn(3, 300)
    rows, total, bits = torch.zeros(3), torch.zeros(1), torch.zeros(3, 10, dtype=torch.int32)
    ptxvm.launch(ptxvm.Kernel(toy_ptx, "row_sum_kernel"), 3, 64, [x, rows, total, bits, 300])
    torch.testing.assert_close(rows, x.sum(1))
    torch.testing.assert_close(total[0], x.sum())
    assert torch.equal(bits.long() & 0xFFFFFFFF, packed_signs(x))


def test_ptxvm_dynamic_shared(toy_ptx):
    x, y = torch.randn(3, 50), torch.zeros(3, 50)
    kernel = ptxvm.Kernel(toy_ptx, "reverse_kernel")
    ptxvm.launch(kernel, 3, 64, [x, y, 50], shared=200)
    assert torch.equal(y, x.flip(1))
    with pytest.raises(ptxvm.PtxFault, match=r"out of bounds write of 4 bytes at byte 100 of shared \(100 bytes\)"):
        ptxvm.launch(kernel, 3, 64, [x, y, 50], shared=100)


def test_ptxvm_names_out_of_bounds_and_misaligned(toy_ptx):
    x, y = torch.randn(1000), torch.zeros(1000)
    kernel = ptxvm.Kernel(toy_ptx, "scale_kernelIfLi4E")
    with pytest.raises(ptxvm.PtxFault, match="out of bounds read of 16 bytes at byte 4000 of argument 0"):
        ptxvm.launch(kernel, 5, 64, [x, y, 1200, 1.5])
    with pytest.raises(ptxvm.PtxFault, match="misaligned 16-byte read of argument 0"):
        ptxvm.launch(kernel, 1, 64, [x[1:], y, 256, 1.5])


HAND_WRITTEN = """
.visible .entry hand(.param .u64 out, .param .f32 a, .param .f32 b, .param .u32 c)
{
  .reg .pred %p<5>; .reg .b16 %h<3>; .reg .f32 %f<9>; .reg .b32 %r<24>; .reg .b64 %rd<3>;
  ld.param.u64 %rd1, [out]; ld.param.f32 %f1, [a]; ld.param.f32 %f2, [b]; ld.param.u32 %r1, [c];
  setp.geu.f32 %p1, %f1, %f2;
  selp.u32 %r2, 1, 0, %p1;
  st.global.u32 [%rd1], %r2;
  setp.neu.f32 %p2, %f1, %f2;
  selp.u32 %r3, 1, 0, %p2;
  st.global.u32 [%rd1+4], %r3;
  set.lt.u32.f32 %r4, %f1, %f2;
  st.global.u32 [%rd1+8], %r4;
  prmt.b32 %r5, %r1, 0x0, 0x0123;
  st.global.u32 [%rd1+12], %r5;
  bfe.s32 %r6, %r1, 4, 8;
  bfi.b32 %r7, 255, %r1, 8, 4;
  st.global.v2.u32 [%rd1+16], {%r6, %r7};
  shf.l.wrap.b32 %r8, %r1, %r1, 8;
  lop3.b32 %r9, %r1, 240, 255, 0x6a;
  st.global.v2.b32 [%rd1+24], {%r8, %r9};
  mul.hi.u32 %r10, %r1, %r1;
  cvt.rni.s32.f32 %r11, %f2;
  st.global.v2.u32 [%rd1+32], {%r10, %r11};
  cvt.rn.f16x2.f32 %r12, %f2, 0f3F800000;
  cvt.rn.bf16x2.f32 %r13, %f2, 0f3F808000;
  st.global.v2.u32 [%rd1+40], {%r12, %r13};
  { .reg .b16 low, high; mov.b32 {low, high}, %r12; cvt.f32.f16 %f3, high; }  st.global.f32 [%rd1+48], %f3;
  shr.s32 %r14, %r1, 40;
  redux.sync.add.s32 %r15, %r1, 1;
  st.global.v2.u32 [%rd1+56], {%r14, %r15};
  ret;
}
"""


def test_ptxvm_instructions():
    out = torch.zeros(16, dtype=torch.int32)
    ptxvm.launch(ptxvm.Kernel(HAND_WRITTEN, "hand"), 1, 1, [out, float("nan"), 2.5, 0x89ABCDEF])
    word = [v & 0xFFFFFFFF for v in out.tolist()]
    c = 0x89ABCDEF
    assert word[:3] == [1, 1, 0]  # NaN: geu and neu hold, lt does not
    assert word[3] == 0xEFCDAB89
    assert word[4:6] == [0xFFFFFFDE, c & ~0xF00 | 0xF00]
    assert word[6:8] == [0xABCDEF89, (c & 240) ^ 255]
    assert word[8:10] == [c * c >> 32, 2]
    assert word[10:12] == [0x41003C00, 0x40203F80]
    assert out[12:13].view(torch.float32).item() == 2.5
    assert word[14:16] == [0xFFFFFFFF, c]


def test_ptxvm_keeps_static_and_dynamic_shared_memory_apart():
    """Static memory of the function itself, too; and predicates may be set to -1."""
    ptx = """.extern .shared .align 16 .b8 dynamic[];
.visible .entry both(.param .u64 p) {
  .reg .pred %p<2>; .reg .b32 %r<4>; .reg .b64 %rd<2>;
  .shared .align 4 .b8 fixed[8];
  ld.param.u64 %rd1, [p]; mov.u32 %r1, 7; mov.u32 %r2, 9; mov.pred %p1, -1;
  @%p1 st.shared.u32 [fixed+4], %r1; st.shared.u32 [dynamic+4], %r2; ld.shared.u32 %r3, [fixed+4];
  st.global.u32 [%rd1], %r3; ret;
}
"""
    p = torch.zeros(1, dtype=torch.int32)
    ptxvm.launch(ptxvm.Kernel(ptx, "both"), 1, 1, [p], shared=8)
    assert p.item() == 7
    with pytest.raises(ptxvm.PtxFault, match="out of bounds write of 4 bytes"):
        ptxvm.launch(ptxvm.Kernel(ptx, "both"), 1, 1, [p], shared=4)


def test_ptxvm_refuses_what_it_does_not_know():
    ptx = ".visible .entry odd() {\n .reg .b32 %r<2>;\n dp4a.u32.u32 %r1, %r1, %r1, %r1;\n ret;\n}\n"
    with pytest.raises(NotImplementedError, match=r"dp4a\.u32\.u32 %r1"):
        ptxvm.launch(ptxvm.Kernel(ptx, "odd"), 1, 1, [])


def test_ptxvm_fma_rounds_once():
    ptx = """.visible .entry one(.param .u64 p) {
  .reg .f32 %f<5>; .reg .b64 %rd<2>;
  ld.param.u64 %rd1, [p]; ld.global.v2.f32 {%f1, %f2}, [%rd1]; ld.global.f32 %f3, [%rd1+8];
  fma.rn.f32 %f4, %f1, %f2, %f3; st.global.f32 [%rd1+12], %f4; ret;
}
"""
    # The exact sum lies 2**-70 below a tie; rounded to float64 first it would be the tie, and go up to the even side.
    p = torch.tensor([(1 - 2**-23) * 2**-24, 1 + 2**-23, 1 + 2**-23, 0.0])
    ptxvm.launch(ptxvm.Kernel(ptx, "one"), 1, 1, [p])
    assert p[3].item() == 1 + 2**-23


# ---- Triton, compiled


@pytest.fixture(scope="module")
def toy_triton():
    pytest.importorskip("triton", reason="triton is not installed")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET=1: this process interprets, it cannot compile")
    from gpuless import toy_triton

    return toy_triton


SCALE = {"N": "i32", "factor": "fp32"}
TRITON_TYPE = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}


def aot_scale(toy_triton, dtype, arch=80, mask=True, align16=("p_x", "p_y", "N")):
    signature = {"p_x": TRITON_TYPE[dtype], "p_y": TRITON_TYPE[dtype], **SCALE}
    return aot.triton_aot(toy_triton.scale, signature, {"BN": 1024, "MASK": mask}, arch, align16=align16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ptxvm_runs_triton(toy_triton, dtype):
    x, y = torch.randn(1008).to(dtype), torch.full((1008,), torch.nan, dtype=dtype)
    facts = aot_scale(toy_triton, dtype)
    ptxvm.launch(ptxvm.Kernel(facts.ptx, "scale"), 1, 128, [x, y, 1008, 1.5], shared=facts.shared)
    assert torch.equal(y, (x.float() * 1.5).to(dtype))


def test_ptxvm_finds_missing_mask_of_triton(toy_triton):
    x, y = torch.randn(1008), torch.zeros(1008)
    kernel = ptxvm.Kernel(aot_scale(toy_triton, torch.float32, mask=False).ptx, "scale")
    with pytest.raises(ptxvm.PtxFault, match="out of bounds read of 16 bytes at byte 4032 of argument 0"):
        ptxvm.launch(kernel, 1, 128, [x, y, 1008, 1.5])


@pytest.mark.parametrize("dtype", DTYPES)
def test_ptxvm_runs_triton_dot(toy_triton, dtype):
    pointers = dict(zip(("p_a", "p_b", "p_c"), (TRITON_TYPE[dtype],) * 2 + ("*fp32",), strict=True))
    facts = aot.triton_aot(toy_triton.product, pointers, {"M": 32, "N": 16, "K": 64}, 80, align16=tuple(pointers))
    assert facts.mma > 0
    a, b, c = torch.randn(32, 64).to(dtype), torch.randn(64, 16).to(dtype), torch.zeros(32, 16)
    ptxvm.launch(ptxvm.Kernel(facts.ptx, "product"), 1, 128, [a, b, c], shared=facts.shared)
    tolerance = 0.05 if dtype == torch.float32 else 1e-5  # float32 goes through tf32: 11 bits
    torch.testing.assert_close(c, a.float() @ b.float(), rtol=0, atol=tolerance)


def test_ptxvm_runs_triton_scan_and_sum(toy_triton):
    x = torch.randn(30, 20)
    y = torch.zeros_like(x)
    types = {"p_x": "*fp32", "p_y": "*fp32", "L": "i32", "N": "i32"}
    facts = aot.triton_aot(toy_triton.cumulative, types, {"BL": 32, "BN": 16}, 80, align16=("p_x", "p_y"))
    ptxvm.launch(ptxvm.Kernel(facts.ptx, "cumulative"), 2, 128, [x, y, 30, 20], shared=facts.shared)
    torch.testing.assert_close(y, x.cumsum(0))
    out = torch.zeros(1)
    facts = aot.triton_aot(
        toy_triton.total, {"p_x": "*fp32", "p_sum": "*fp32", "N": "i32"}, {"BN": 256, "RACY": False}, 80
    )
    ptxvm.launch(ptxvm.Kernel(facts.ptx, "total"), 3, 128, [x, out, 600], shared=facts.shared)
    torch.testing.assert_close(out[0], x.sum())


@pytest.mark.parametrize("arch", aot.ARCHS)
def test_triton_facts(toy_triton, arch):
    facts = aot_scale(toy_triton, torch.float32, arch)
    assert (facts.spills, facts.local, facts.stack) == (0, 0, 0)
    assert facts.registers > 0
    assert facts.ldg128 > 0
    assert facts.stg128 > 0
    assert aot_scale(toy_triton, torch.float32, arch, align16=()).ldg128 == 0


def test_nvcc_facts():
    facts = aot.nvcc_facts(TOY, include_dirs=[CSRC])
    assert sorted({f.arch for f in facts}) == list(aot.ARCHS)
    vector = [f for f in facts if "scale_kernelI" in f.name]
    assert len(vector) == 9
    assert all(f.ldg128 and f.stg128 and not f.spills for f in vector)
    rows = [f for f in facts if "row_sum" in f.name]
    assert all(f.lds and f.sts and f.shared >= 128 for f in rows)


# ---- Triton, interpreted


def test_interpreter_guard():
    assert " passed" in run_interpreted(HERE / "interpreted_tools.py")


def test_a_failure_in_the_interpreting_process_fails_the_test(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("def test_bad():\n    assert False, 'planted'\n")
    with pytest.raises(AssertionError, match="planted"):
        run_interpreted(bad)
