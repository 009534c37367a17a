"""spiking_self_attention's CUDA source without a GPU: on the checked shim, spikes and gradients of the operator."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from gpuless import ops_on_shim
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
