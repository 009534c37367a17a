"""spiking_self_attention's Triton kernels on the CPU; test_spiking_self_attention_triton.py runs it interpreting.

Under the guard: spikes, packed spikes and gradients, and mistakes planted in the kernels and in what launches them.
"""

from dataclasses import replace

import pytest
import torch
from backends import through
from gpuless import interp_guard
from gpuless.planted import planted
from test_ops import check_gradients

interp_guard.install()

from spikecore.ops.lif import LIFParams, pack_spikes  # noqa: E402
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


def wide(packed=False):
    """Three tiles of columns by two of rows, and sums of several parts."""
    g = torch.Generator().manual_seed(0)
    operands = {name: (torch.rand(9, 1, 2, 70, 150, generator=g) < 0.3).float() for name in "qkv"}
    attn = LIFParams(decay=torch.tensor([0.5, 0.25]), v_threshold=24.0, v_reset=None)
    if packed:
        return {name: pack_spikes(x) for name, x in operands.items()} | {"attn": attn, "T": 9}
    return operands | {"attn": attn}


@pytest.mark.parametrize("packed", [False, True])
def test_more_than_a_tile(packed):
    arguments = wide(packed)
    want = CASE.op(**arguments)[0]
    assert torch.equal(TRITON.op(**arguments)[0], want)
    assert packed or 0.05 < want.mean() < 0.95


# ---- planted mistakes

DEFECTS = {
    "packed spikes of floats": ("PACKED_OUT=T > 0", "PACKED_OUT=T >= 0", "spikes|out of bounds|race"),
    "the channel is the batch": ("_HEADS = 2", "_HEADS = 1", "spikes|must be"),
    "no scale in backward": ("g_y = scale * g_u", "g_y = g_u", "gradient of"),
    "gradients exchanged": ("g_kv @ b_v, g_kv.mT @ b_k", "g_kv.mT @ b_k, g_kv @ b_v", "gradient of"),
    "the parameters of one operand": ("sum(r[1] for r in results)", "results[0][1]", "gradient of"),
    "kv turned": ("tl.dot(b_k, tl.trans(b_v)", "tl.dot(b_v, tl.trans(b_k)", "spikes"),
    "no scale in forward": ("_charge(b_v, scale * y,", "_charge(b_v, y,", "spikes"),
    "the bit of another step": ("bit = (t % 8)", "bit = ((t + 1) % 8)", "spikes"),
    "heads overlap in kv": ("p_kv + matrix * D * D + d", "p_kv + matrix * D + d", "race: program"),
    "tiles overlap": ("n = (tile % across * BN +", "n = (tile % across * 16 +", "race: program|spikes"),
    "load without mask": (
        "b_kv = tl.load(at_kv + d * D, mask=(d < D) & (e[None, :] < D), other=0.0)",
        "b_kv = tl.load(at_kv + d * D)",
        "out of bounds load: .* nearest 'p_kv'|race: program",
    ),
    "store without mask": (
        "fired.to(tl.float32).to(p_out.dtype.element_ty), mask=mask)",
        "fired.to(tl.float32).to(p_out.dtype.element_ty))",
        "race: .*'p_out'|out of bounds store: .* nearest 'p_out'",
    ),
}  # fmt: skip


def check(case, sample):
    got, want = case.op(**sample.arguments)[0], CASE.op(**sample.arguments)[0]
    assert torch.equal(got, want), "spikes"
    check_gradients(case, sample)


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_mistake_is_found(tmp_path, defect):
    old, new, message = DEFECTS[defect]
    wrong = planted(module, tmp_path, (old, new))
    sample = CASE.sample("currents, heads")
    if defect == "tiles overlap":
        sample = replace(sample, arguments=wide())
    with pytest.raises(Exception, match=message):
        check(replace(CASE, op=through("spiking_self_attention", wrong)), sample)
    check(TRITON, CASE.sample("currents, heads"))
