"""Tests of interp_guard, run by test_tools.py in an interpreting process."""

import pytest
import torch
from gpuless import interp_guard

interp_guard.install()

from gpuless import toy_triton as toy  # noqa: E402

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def scale(x, y, mask=True):
    toy.scale[(-(-x.numel() // 32),)](x, y, x.numel(), 1.7, BN=32, MASK=mask)


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_kernel_is_right_and_rounds_to_nearest_even(dtype):
    x = torch.randn(1000).to(dtype)
    y = torch.full_like(x, torch.nan)
    scale(x, y)
    torch.testing.assert_close(y, (x.float() * 1.7).to(dtype), rtol=0, atol=0)


def test_bf16_cast_breaks_ties_to_even():
    x = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 1 + 2**-8 + 2**-20, torch.inf])
    y = torch.empty(5, dtype=torch.bfloat16)
    toy.scale[(1,)](x, y, 5, 1.0, BN=8, MASK=True)
    assert torch.equal(y, x.bfloat16())


@pytest.mark.parametrize("dtype", DTYPES)
def test_dot(dtype):
    a, b = torch.randn(16, 32).to(dtype), torch.randn(32, 16).to(dtype)
    c = torch.empty(16, 16)
    toy.product[(1,)](a, b, c, 16, 16, 32)
    torch.testing.assert_close(c, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


def test_missing_mask_is_found():
    x = torch.randn(1000)
    with pytest.raises(
        Exception, match=r"out of bounds load: 24 lane\(s\) of program \(31, 0, 0\), nearest 'p_x' at byte 4000 of 4000"
    ):
        scale(x, torch.empty_like(x), mask=False)


def test_a_view_ends_where_it_ends():
    whole = torch.randn(1024)
    with pytest.raises(Exception, match="out of bounds load"):
        scale(whole[:1000], torch.empty(1000), mask=False)


def test_atomic_sum_is_right_and_racy_sum_is_found():
    x, out = torch.randn(100), torch.zeros(1)
    toy.total[(4,)](x, out, 100, BN=32, RACY=False)
    torch.testing.assert_close(out[0], x.sum())
    with pytest.raises(Exception, match=r"race: program \(1, 0, 0\) loads 'p_sum' where another program stores"):
        toy.total[(4,)](x, out, 100, BN=32, RACY=True)
