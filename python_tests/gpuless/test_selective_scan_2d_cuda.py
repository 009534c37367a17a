"""selective_scan_2d's CUDA source without a GPU: run on the checked shim, and compiled by nvcc."""

import re
from dataclasses import replace

import pytest
import torch
from gpuless import aot, ops_on_shim, scan2d_on_shim, shim
from gpuless.scan2d_on_shim import launch
from test_ops import check_gradients

from spikecore.testing.cases import CASES
from spikecore.testing.cases.selective_scan_2d import sample
from spikecore.testing.compare import assert_close

CASE = CASES["selective_scan_2d"]
ON_SHIM = replace(CASE, op=ops_on_shim.on_shim("selective_scan_2d"))
# Chunks of 128 places, more channels than a block of either kernel, states in both halves of a warp.
CHUNKS = {
    "chunks": {"H": 12, "W": 25, "C": 5, "S": 2},
    "many": {"H": 12, "W": 24, "C": 20, "S": 34, "B": 1, "directions": (1, 2)},
}


def check(drawn):
    got, want = ON_SHIM.op(**drawn.arguments)[0], CASE.ref(**drawn.arguments)[0]
    assert_close(got, want, CASE.ref(**drawn.to(torch.float64).arguments)[0], str(drawn))
    check_gradients(ON_SHIM, drawn)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_it_is_the_reference(shim_library, dtype):
    """Half precision, which differs in loads and stores alone, over every fourth sample."""
    samples = list(CASE.samples(dtype, False)) + [sample(name, dtype, False, **sizes) for name, sizes in CHUNKS.items()]
    for drawn in samples if dtype == torch.float32 else samples[::4]:
        check(drawn)


@pytest.mark.parametrize("order", [1, 7], ids=["reversed", "random"])
def test_the_order_of_threads_does_not_matter(shim_library, order):
    drawn = sample("chunks", torch.float16, False, H=12, W=13, C=18)
    natural = ON_SHIM.op(**drawn.arguments)[0]
    ops_on_shim.set_order(shim_library, order)
    try:
        assert torch.equal(ON_SHIM.op(**drawn.arguments)[0], natural)
        check(drawn)
    finally:
        ops_on_shim.set_order(shim_library, 0)


@pytest.fixture(scope="module")
def scan2d_shim(shim_cache):
    return shim.Shim(shim.build([scan2d_on_shim.SOURCE], shim_cache))


def test_rows_are_read_by_vectors(scan2d_shim):
    """A walk of rows takes 16 bytes a lane, each map once; one of columns, or of an odd number of places, 4."""
    L = 12 * 16
    for directions, size in (((0,), 16), ((2,), 16), ((1,), 4)):
        launch(scan2d_shim, "fwd", C=1, S=1, directions=directions, coalescing=True)
        assert not scan2d_shim.error
        assert scan2d_shim.count(True, size) == L * 4 // size
        if size == 16:  # x, delta, B, C
            assert scan2d_shim.count(False, size) == 4 * L * 4 // size
    launch(scan2d_shim, "fwd", C=1, H=7, W=15, directions=(0,))
    assert scan2d_shim.count(False, 16) == 0


# ---- planted defects

DEFECTS = {
    "no barrier before the next direction": (
        "__syncwarp();  // the next direction adds to places of other lanes",
        "",
        "fwd",
        "race: (read|write) of y",
    ),
    "no barrier after the starts": (
        "__syncwarp();  // starts are read by other lanes",
        "",
        "bwd",
        "race: (read|write) of starts",
    ),
    "no barrier before the sums over channels": (
        "= part_C;\n        __syncthreads();",
        "= part_C;",
        "bwd",
        "race: (read|write) of shared memory parts",
    ),
    "one place too many": ("l + i < w.L ? w.place", "l + i <= w.L ? w.place", "fwd", "out of bounds read|race"),
    "one channel too many": ("if (c >= p.C) return;", "", "fwd", "out of bounds"),
    "a state too many": ("for (int s = 0; s < p.S; ++s)", "for (int s = 0; s <= p.S; ++s)", "fwd", "out of bounds"),
    "one tile for all states": ("turn = 1 - turn", "turn = 0", "bwd", "race: (read|write) of shared memory parts"),
    "columns of another height": ("h == w.H", "h == w.H + 1", "fwd", "race|bounds"),
    "rows of another height": ("walk_place(code, l, H, W)", "walk_place(code, l - 1, H, W)", "fwd", "race|bounds"),
}  # fmt: skip


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_defect_is_found(tmp_path, defect):
    old, new, direction, message = DEFECTS[defect]
    text = scan2d_on_shim.SOURCE.read_text()
    assert old in text, f"the kernels no longer contain {old!r}"
    path = tmp_path / "planted.cu"
    path.write_text(text.replace(old, new, 1))
    planted = shim.Shim(shim.build([path], tmp_path))
    launch(planted, direction, H=11, W=13)
    assert re.search(message, planted.error), planted.error


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_without_a_defect_there_is_no_fault(scan2d_shim, dtype):
    for direction in ("fwd", "bwd"):
        outputs = launch(scan2d_shim, direction, H=11, W=13, C=18, dtype=dtype)
        assert not scan2d_shim.error
        assert all(t.isfinite().all() for t in outputs.values())


# ---- compiled by nvcc

MOST = {"fwd": 64, "bwd": 128}  # registers a thread: 8 blocks of 128 threads on a multiprocessor, and one of 512


@pytest.mark.slow
def test_compiled_kernels():
    facts = aot.nvcc_facts(scan2d_on_shim.SOURCE, aot.ARCHS, [shim.CSRC], ["-fmad=false"])
    assert len(facts) == 2 * 3 * len(aot.ARCHS)
    for f in facts:
        direction = re.search(r"selective_scan_2d_(fwd|bwd)_kernel", f.name)[1]
        print(f"{direction} sm_{f.arch}: registers {f.registers}, LDG.128 {f.ldg128}, STG.128 {f.stg128}")
        assert f.registers <= MOST[direction], f.name
        assert (f.spills, f.stack, f.local) == (0, 0, 0), f.name
        if "IfE" in f.name:  # four of the halves are 8 bytes
            assert f.ldg128, f.name
            assert f.stg128, f.name
