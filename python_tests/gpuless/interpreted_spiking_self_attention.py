"""spiking_self_attention by lif's Triton kernels; test_spiking_self_attention_triton.py runs it interpreting.

The operator launches no Triton kernel but lif's, whose own accesses interpreted_lif.py guards. Here, under the same
guard, how they are put together is checked: spikes, gradients, and mistakes planted in the composition.
"""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from backends import through
from gpuless import interp_guard
from test_ops import check_gradients

interp_guard.install()

from spikecore.testing.cases import CASES  # noqa: E402
from spikecore.triton import spiking_self_attention as module  # noqa: E402

CASE = CASES["spiking_self_attention"]
TRITON = replace(CASE, op=through("spiking_self_attention", module))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_it_is_the_operator(dtype):
    """Half precision over fewer samples."""
    for sample in list(CASE.samples(dtype, True))[:: 2 if dtype == torch.float32 else 6]:
        got, want = TRITON.op(**sample.arguments)[0], CASE.op(**sample.arguments)[0]
        assert torch.equal(got, want), sample
        assert got.stride() == want.stride(), sample
        check_gradients(TRITON, sample)


def test_a_difference_is_seen():
    sample = CASE.sample("currents, heads")
    wrong = replace(CASE, op=lambda **a: TRITON.op(**a | {"scale": 2 * a["scale"]}))
    assert not torch.equal(wrong.op(**sample.arguments)[0], CASE.op(**sample.arguments)[0])
    with pytest.raises(AssertionError, match="gradient of"):
        check_gradients(wrong, sample)


# ---- planted mistakes

DEFECTS = {
    "kv not turned": ("(b_k @ b_v.mT).mT @ b_q", "(b_k @ b_v.mT) @ b_q", "spikes"),
    "no scale in forward": ("y = scale * (", "y = (", "spikes"),
    "packed spikes of floats": ("attn, T > 0)", "attn, T >= 0)", "spikes"),
    "the channel is the batch": ("_HEADS = 2", "_HEADS = 1", "spikes|must be"),
    "no scale in backward": ("g_y = scale * g_u", "g_y = g_u", "gradient of"),
    "gradients exchanged": ("g_kv @ b_v, g_kv.mT @ b_k", "g_kv.mT @ b_k, g_kv @ b_v", "gradient of"),
    "the parameters of one operand": ("sum(r[1] for r in results)", "results[0][1]", "gradient of"),
}


def check(case, sample):
    got, want = case.op(**sample.arguments)[0], CASE.op(**sample.arguments)[0]
    assert torch.equal(got, want), "spikes"
    check_gradients(case, sample)


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_mistake_is_found(tmp_path, defect):
    old, new, message = DEFECTS[defect]
    source = Path(module.__file__).read_text()
    assert old in source, f"the composition no longer contains {old!r}"
    path = tmp_path / "planted.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("planted", path)
    planted = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(planted)
    sample = CASE.sample("currents, heads")
    with pytest.raises(Exception, match=message):
        check(replace(CASE, op=through("spiking_self_attention", planted)), sample)
    check(TRITON, sample)
