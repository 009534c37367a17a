"""bn_lif beside the sweep: hand values, the modules it replaces, gradients of the smoothed path, and mistakes."""

import pytest
import torch
from torch import nn

from spikecore import LIF
from spikecore.ops import bn_lif, lif
from spikecore.ops.bn_lif import bn_lif_ref
from spikecore.surrogate import Sigmoid

X = (4, 3, 5, 6, 6)  # [T, B, C, H, W]


def norm(C: int = 5, **settings) -> nn.BatchNorm2d:
    made = nn.BatchNorm2d(C, **settings)
    if made.affine:
        with torch.no_grad():
            made.weight.copy_(torch.linspace(0.5, 2, C))
            made.bias.copy_(torch.linspace(-0.5, 1, C))
    return made


def of(m: nn.BatchNorm2d) -> tuple:
    return m.weight, m.bias, m.running_mean, m.running_var


def test_by_hand():
    """Two channels over two steps: mean 2 and variance 1, mean 0 and variance 4, with eps 0 but for rounding."""
    x = torch.tensor([[[1.0, -2.0]], [[3.0, 2.0]]])  # [T, B, C]
    mean, var = torch.zeros(2), torch.ones(2)
    weight, bias = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0])
    s, y = bn_lif(x, weight, bias, mean, var, training=True, eps=1e-12, gain=1.0, return_sum=True)
    torch.testing.assert_close(y, torch.tensor([[[0.0, -2.0]], [[2.0, 2.0]]]))
    assert s.tolist() == [[[0, 0]], [[1, 1]]]  # h = 0.5 v + y: 0, -2; then 2 and 0.5 * -2 + 2 = 1, which fires
    torch.testing.assert_close(mean, torch.tensor([0.2, 0.0]))
    torch.testing.assert_close(var, torch.tensor([0.9 + 0.1 * 2, 0.9 + 0.1 * 8]))  # the unbiased variances: 2 and 8


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.3, "eps": 1e-3}, {"affine": False}], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels-last"])
def test_is_the_norm_and_then_the_neuron(settings, layout):
    """Outputs, gradients and running statistics over three batches in training, then evaluated."""
    a, b = norm(**settings).double(), norm(**settings).double()
    for k in range(4):
        if k == 3:
            a.eval()
        g = torch.Generator().manual_seed(k)
        x = torch.randn(X, generator=g, dtype=torch.float64).flatten(0, 1).to(memory_format=layout).unflatten(0, X[:2])
        one, two = x.clone(memory_format=torch.preserve_format).requires_grad_(), x.clone().requires_grad_()
        s = bn_lif(one, *of(a), training=a.training, momentum=a.momentum, eps=a.eps)
        b.train(a.training)
        want, _ = lif(b(two.flatten(0, 1)).unflatten(0, X[:2]))
        assert torch.equal(s, want)
        up = torch.randn(X, generator=g, dtype=torch.float64)
        names = [n for n, _ in a.named_parameters()]
        got = torch.autograd.grad((s * up).sum(), [one, *a.parameters()])
        expected = torch.autograd.grad((want * up).sum(), [two, *b.parameters()])
        for name, p, q in zip(["x", *names], got, expected, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")
        torch.testing.assert_close(a.running_mean, b.running_mean, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(a.running_var, b.running_var, rtol=1e-12, atol=1e-14)


def test_cumulative_average_is_the_callers():
    a, b = norm(momentum=None), norm(momentum=None)
    for k in range(1, 4):
        x = torch.randn(X)
        bn_lif(x, *of(a), training=True, momentum=1 / k)
        b(x.flatten(0, 1))
    torch.testing.assert_close(a.running_mean, b.running_mean)
    torch.testing.assert_close(a.running_var, b.running_var)


def test_sum_carries_its_own_gradient():
    """Through y alone bn_lif is a batch norm and a sum."""
    x, r = (
        torch.randn(X, dtype=torch.float64, requires_grad=True),
        torch.randn(X, dtype=torch.float64, requires_grad=True),
    )
    a = norm().double()
    _, y = bn_lif(x, *of(a), r, training=True, return_sum=True)
    up = torch.randn_like(y)
    got = torch.autograd.grad((y * up).sum(), [x, r, *a.parameters()])
    want = torch.autograd.grad(((a(x.flatten(0, 1)).unflatten(0, X[:2]) + r) * up).sum(), [x, r, *a.parameters()])
    for p, q in zip(got, want, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_the_smoothed_path(training):
    """The reference's own gradients, which the sweep holds the kernels to."""
    shape = (3, 2, 2, 2)
    tensors = [torch.randn(shape, dtype=torch.float64), *(torch.rand(2, dtype=torch.float64) + 0.5 for _ in range(2))]
    tensors += [torch.randn(shape, dtype=torch.float64), torch.full((2,), 0.6, dtype=torch.float64)]
    for t in tensors:
        t.requires_grad_()

    def smooth(x, weight, bias, residual, decay):
        running = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
        return bn_lif_ref(
            x, weight, bias, *running, residual, decay=decay, detach_reset=False, surrogate=Sigmoid(2.0),
            training=training, return_sum=True, smooth=True,
        )  # fmt: skip

    assert torch.autograd.gradcheck(smooth, tensors)


def test_module_calls_it():
    a, neuron = norm(), LIF(tau=2.0)
    x = torch.randn(X)
    assert torch.equal(neuron(x, norm=a), bn_lif(x, *of(norm()), training=True, decay=0.5, gain=0.5))
    assert a.num_batches_tracked == 1


def test_autocast_computes_in_float32():
    x = torch.randn(X).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        s = bn_lif(x, *of(norm()), training=True)
    assert s.dtype == torch.bfloat16
    assert torch.equal(s.float(), bn_lif(x.float(), *of(norm()), training=True))


@pytest.mark.parametrize(
    ("error", "change", "message"),
    [
        (ValueError, {"x": torch.randn(1, 1, 5)}, "training needs more than 1 number a channel, got x [1, 1, 5]"),
        (ValueError, {"running_mean": None}, "running_mean and running_var must be given together"),
        (ValueError, {"running_mean": None, "running_var": None, "training": False}, "where training=False"),
        (ValueError, {"eps": 0.0}, "eps must be above 0, got 0.0"),
        (TypeError, {"x": [1.0]}, "x must be a tensor, got list"),
        (TypeError, {"surrogate": 3}, "surrogate must be a spikecore.surrogate object or a callable, got 3"),
        (RuntimeError, {"weight": torch.ones(4)}, "weight must be [5], float32 on cpu, got float32 [4] on cpu"),
        (RuntimeError, {"residual": torch.randn(4, 3, 5)}, "residual must be float32 [4, 3, 5, 6, 6] on cpu"),
        (RuntimeError, {"channel_dim": 0}, "channel_dim must name a dimension of x after the first (x has 5), got 0"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, dict) else v if isinstance(v, str) else v.__name__,
)
def test_mistakes(error, change, message):
    weight, bias, mean, var = of(norm())
    arguments = {"x": torch.randn(X), "weight": weight, "bias": bias, "running_mean": mean, "running_var": var}
    with pytest.raises(error) as caught:
        bn_lif(**{**arguments, "training": True, **change})
    assert str(caught.value).splitlines()[0].startswith("bn_lif: ")
    assert message in str(caught.value)


def test_second_backward_is_refused():
    x = torch.randn(X, requires_grad=True)
    s = bn_lif(x, *of(norm()), training=True)
    (g,) = torch.autograd.grad(s.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        g.sum().backward()
