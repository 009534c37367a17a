"""`cross_scan` and `cross_merge`: orders written out, adjointness, layouts, compilers, bad input."""

import itertools

import pytest
import torch

from spikecore.ops import SCANS, cross_merge, cross_scan

# Of the map [[0, 1, 2], [3, 4, 5]].
ORDERS = {
    0: [0, 1, 2, 3, 4, 5],
    1: [0, 3, 1, 4, 2, 5],
    2: [5, 4, 3, 2, 1, 0],
    3: [5, 2, 4, 1, 3, 0],
    4: [2, 5, 1, 4, 0, 3],
    5: [3, 0, 4, 1, 5, 2],
}


def test_orders():
    x = torch.arange(6).view(1, 1, 2, 3)
    for code, order in ORDERS.items():
        assert cross_scan(x, (code,)).tolist() == [[[order]]], code
    assert cross_scan(x)[0, :, 0].tolist() == [ORDERS[k] for k in range(4)]
    assert cross_scan(x, 2)[0, :, 0].tolist() == [ORDERS[0], ORDERS[2]]
    assert cross_scan(x, 1)[0, :, 0].tolist() == [ORDERS[0]]


def test_quarter_turns():
    x = torch.randn(2, 3, 4, 5)
    want = torch.stack([torch.rot90(x, k, (2, 3)).flatten(2) for k in range(4)], 1)
    assert torch.equal(cross_scan(x, SCANS[3]), want)


@pytest.mark.parametrize("codes", [*SCANS, *itertools.permutations((3, 4, 5)), (2,), (5, 5)], ids=str)
def test_each_is_the_others_adjoint(codes):
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    ys = torch.randn(2, len(codes), 3, 20, dtype=torch.float64, requires_grad=True)
    scanned, merged = cross_scan(x, codes), cross_merge(ys, 4, 5, codes)
    torch.testing.assert_close((scanned * ys).sum(), (merged * x.flatten(2)).sum())
    torch.testing.assert_close(torch.autograd.grad(scanned, x, ys)[0].flatten(2), merged)
    torch.testing.assert_close(torch.autograd.grad(merged, ys, x.flatten(2))[0], scanned)
    assert torch.autograd.gradgradcheck(lambda x: cross_scan(x, codes).square(), (x,))


def test_layouts():
    x = torch.randn(2, 3, 4, 5)
    last, ys = x.permute(0, 2, 3, 1), cross_scan(x)
    assert torch.equal(cross_scan(last, channels_last=True), ys)
    out = cross_scan(x, out_channels_last=True)
    assert out.is_contiguous()
    assert torch.equal(out.permute(0, 2, 3, 1), ys)
    merged = cross_merge(out, 4, 5, channels_last=True, out_channels_last=True)
    torch.testing.assert_close(merged.transpose(1, 2), cross_merge(ys, 4, 5))
    torch.testing.assert_close(cross_merge(ys, 4, 5).unflatten(2, (4, 5)), 4 * x)


def test_sizes_of_zero_and_one():
    for shape in ((0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0), (1, 1, 1, 1)):
        ys = cross_scan(torch.ones(shape))
        assert ys.shape == (shape[0], 4, shape[1], shape[2] * shape[3])
        assert torch.equal(cross_merge(ys, *shape[2:]), 4 * torch.ones(shape).flatten(2))


def test_full_graph_compile():
    def f(x):
        return cross_merge(cross_scan(x, SCANS[3]).square(), 4, 5, SCANS[3])

    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), f(x))
    torch.testing.assert_close(torch.autograd.grad(compiled(x).sum(), x)[0], torch.autograd.grad(f(x).sum(), x)[0])


@pytest.mark.parametrize("directions", [0, 3, 5, (), (6,), (0.5,), (0,) * 9, -1], ids=str)
def test_bad_directions(directions):
    with pytest.raises(ValueError, match=r"cross_scan: directions must be 1, 2, 4 or up to 8 numbers from 0 to 5, got"):
        cross_scan(torch.ones(1, 1, 2, 2), directions)


def test_bad_shapes():
    with pytest.raises(ValueError, match=r"cross_scan: x must have 4 dimensions, got \[2, 2\]"):
        cross_scan(torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"cross_merge: ys must have 4 dimensions, got \[2, 2\]"):
        cross_merge(torch.ones(2, 2), 1, 2)
    want = r"cross_merge: ys must have 4 directions and 2 \* 3 positions, got \[1, 4, 1, 5\]"
    with pytest.raises(ValueError, match=want):
        cross_merge(torch.ones(1, 4, 1, 5), 2, 3)
