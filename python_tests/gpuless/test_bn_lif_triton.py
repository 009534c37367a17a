"""bn_lif's Triton kernels without a GPU: compiled ahead of time, and interpreted with the guard in another process."""

import re
from pathlib import Path

import pytest
import torch
from backends import results
from gpuless import on_ptx
from gpuless.interpreted import passed, run_interpreted

from spikecore.testing.cases import Sample
from spikecore.testing.cases.bn_lif import CASE

pytest.importorskip("triton", reason="triton is not installed")

# Registers a thread, of 65,536 on a multiprocessor.
MOST = {"bn_stats_kernel": 64, "bn_lif_fwd_kernel": 64, "bn_lif_bwd_kernel": 255, "bn_lif_bwd_x_kernel": 64}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "archs"), [(torch.float32, (80, 90, 100)), (torch.float16, (80,)), (torch.bfloat16, (90,))], ids=str
)
def test_compiled(dtype, archs):
    """As launched for rows that are wide enough for vectors, all gradients wanted: no spills, 16-byte accesses of x and
    s, no contraction."""
    C = 8
    channels = {n: torch.rand(C) + 0.5 for n in ("weight", "bias", "running_mean", "running_var", "decay", "gain")}
    maps = {"x": torch.rand(8, 2, C, 16, 16).to(dtype), "residual": torch.rand(8, 2, C, 16, 16).to(dtype)}
    wide = Sample(
        "wide", {**maps, **channels, "v_init": torch.rand(2, C, 16, 16), "training": True, "return_sum": True}
    )
    launches = {}
    keep = lambda launch: launches.setdefault(launch.fn.__name__, launch)  # noqa: E731
    with on_ptx.of_triton("bn_lif", keep) as (function, _):
        results(CASE, function, wide)
    assert set(launches) == set(MOST)
    for name, launch in launches.items():
        for arch in archs:
            f = launch.facts(arch)
            print(f"{name} {dtype} sm_{arch}: registers {f.registers}, LDG.128 {f.ldg128}, STG.128 {f.stg128}")
            assert (f.spills, f.stack, f.local) == (0, 0, 0), (name, arch)
            assert f.registers <= MOST[name], (name, arch, f.registers)
            assert not re.search(r"\bfma\.rn\.f32", f.ptx), (name, arch)
            assert f.ldg128, (name, arch)
            assert f.stg128, (name, arch)


@pytest.mark.slow
def test_interpreted():
    assert passed(run_interpreted(Path(__file__).with_name("interpreted_bn_lif.py"))) == 10
