"""The attentions: values by hand, packed spikes, bad input, and in place of the inner part of a published block."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from spikecore.ops import (
    LIFParams,
    lif,
    pack_spikes,
    qk_attention,
    qk_attention_ref,
    spike_driven_attention,
    spike_driven_attention_ref,
    unpack_spikes,
)
from spikecore.surrogate import ATan, Sigmoid

IF = LIFParams(decay=1.0, gain=1.0, v_threshold=2.0)
SHAPE = (4, 2, 3, 5, 7)


def spikes(*shape: int, seed: int = 0, rate: float = 0.3) -> Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < rate).float()


# ---- by hand


def test_token_by_hand() -> None:
    """Two channels, two tokens, three steps; integrate and fire at 2."""
    q = torch.tensor([[[1.0, 0], [0, 1]], [[1, 1], [1, 0]], [[0, 0], [0, 0]]]).view(3, 1, 1, 2, 2)
    k = torch.ones_like(q)
    # Sums over channels: (1, 1), (2, 1), (0, 0); potentials 1 1, 3 2, 0 0.
    want = torch.tensor([[[0.0, 0], [0, 0]], [[1, 1], [1, 1]], [[0, 0], [0, 0]]]).view_as(q)
    assert torch.equal(qk_attention(q, k, "token", IF), want)


def test_channel_and_spike_driven_by_hand() -> None:
    q = torch.tensor([[[1.0, 1], [1, 0]], [[0, 0], [1, 0]]]).view(2, 1, 1, 2, 2)
    k = torch.tensor([[[1.0, 0], [1, 1]], [[1, 1], [0, 1]]]).view_as(q)
    # Sums over tokens: 2 and 1, then 0 and 1: the first channel fires at once, the second at the second step.
    assert torch.equal(
        qk_attention(q, k, "channel", IF), torch.tensor([[[1.0, 0], [0, 0]], [[0, 0], [0, 1]]]).view_as(q)
    )
    # The same sums out of k * v gate q.
    v = torch.ones_like(q)
    assert torch.equal(spike_driven_attention(k, q, v, IF), qk_attention(q, k, "channel", IF))


def test_gradient_by_hand() -> None:
    """One channel, one token, one step: out = spike(q - 2) k."""
    q = torch.full((1, 1, 1, 1, 1), 2.5, requires_grad=True)
    k = torch.full((1, 1, 1, 1, 1), 3.0, requires_grad=True)
    qk_attention(q, k, "token", IF).backward(torch.full((1, 1, 1, 1, 1), 0.5))
    assert k.grad is not None
    assert q.grad is not None
    assert k.grad.item() == 0.5
    assert q.grad.item() == pytest.approx(0.5 * 3.0 * float(ATan(2.0).derivative(torch.tensor(0.5))), rel=1e-6)


# ---- forms of input


@pytest.mark.parametrize("mode", ["token", "channel"])
def test_currents_are_spikes_of_lif(mode: str) -> None:
    """The neurons inside fire as `lif` does, bit for bit, also off the grid."""
    neuron = LIFParams(decay=0.3, gain=0.7)
    q, k = (torch.randn(9, 2, 3, 20, 33, generator=torch.Generator().manual_seed(i)) + 0.7 for i in range(2))
    outside = [lif(x, 0.3, 0.7)[0] for x in (q, k)]
    assert torch.equal(qk_attention(q, k, mode, qkv=neuron), qk_attention(*outside, mode))


@pytest.mark.parametrize("T", [1, 7, 8, 9, 17])
@pytest.mark.parametrize("turned", [False, True])
def test_packed(T: int, turned: bool) -> None:
    for shape in ((2, 3, 5, 7), (1, 2, 9, 300), (1, 2, 300, 9)):
        q, k, v = (spikes(T, *shape, seed=i) for i in range(3))
        bits = [pack_spikes(x) for x in (q, k, v)]
        if turned:
            bits = [x.permute(0, 1, 4, 2, 3).contiguous().permute(0, 1, 3, 4, 2) for x in bits]
        attn = LIFParams(decay=0.75, gain=torch.full((3 if shape[1] == 3 else 2,), 0.25), v_threshold=1.0)
        for mode in ("token", "channel"):
            out = qk_attention(*bits[:2], mode, attn, T=T)
            assert out.dtype == torch.uint8
            assert out.stride(4) == bits[0].stride(4)
            assert torch.equal(unpack_spikes(out, T), qk_attention(q, k, mode, attn))
            assert torch.equal(out, qk_attention_ref(*bits[:2], mode, attn, T=T))
        out = spike_driven_attention(*bits, attn, T=T)
        assert torch.equal(unpack_spikes(out, T), spike_driven_attention(q, k, v, attn))
        assert torch.equal(out, spike_driven_attention_ref(*bits, attn, T=T))


def test_packed_compiles() -> None:
    bits = [pack_spikes(spikes(9, 1, 2, 3, 5, seed=i)) for i in range(2)]
    f = torch.compile(lambda q, k: qk_attention(q, k, T=9), backend="aot_eager", fullgraph=True)
    assert torch.equal(f(*bits), qk_attention(*bits, T=9))


def test_a_models_views_are_not_copied() -> None:
    """[T, B, C, N] and [T, B, N, C] alike: the output lies as they do."""
    x = spikes(4, 2, 6, 8).unflatten(2, (2, 3))
    assert qk_attention(x, x).is_contiguous()
    y = spikes(4, 2, 8, 6).unflatten(3, (2, 3)).permute(0, 1, 3, 4, 2)
    assert qk_attention(y, y).permute(0, 1, 4, 2, 3).is_contiguous()


def test_export_and_autocast() -> None:
    class Attention(nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return qk_attention(q, k, qkv=LIFParams())

    q, k = (2 * spikes(*SHAPE, seed=i) for i in range(2))
    program = torch.export.export(Attention(), (q, k))
    assert torch.equal(program.module()(q, k), Attention()(q, k))
    with torch.autocast("cpu", torch.bfloat16):
        out = qk_attention(q.bfloat16(), k.bfloat16(), qkv=LIFParams())
    assert out.dtype == torch.bfloat16
    assert torch.equal(out.float(), Attention()(q, k))


def test_more_rows_than_are_summed_at_once() -> None:
    """Sums of columns over several parts of the rows, each added to what the parts before left."""
    x = [spikes(3, 1, 2, 600, 9, seed=i).requires_grad_() for i in range(3)]
    for out, want in (
        (qk_attention(*x[:2]), qk_attention_ref(*x[:2])),
        (qk_attention(*x[:2], "channel"), qk_attention_ref(*x[:2], "channel")),
        (spike_driven_attention(*x), spike_driven_attention_ref(*x)),
    ):
        assert torch.equal(out, want)
        assert 0 < out.mean() < 1
        for g, w in zip(*(torch.autograd.grad(y.sum(), x, allow_unused=True) for y in (out, want)), strict=True):
            assert g is w is None or torch.equal(g, w)


# ---- gradients


@pytest.mark.parametrize("mode", ["token", "channel", "spike-driven"])
def test_smooth_reference_has_the_kernels_gradient(mode: str) -> None:
    """gradcheck of the smoothed reference, whose formula of the gradient is the kernel's (python_tests/test_ops.py)."""
    q, k, v = (torch.rand(3, 1, 2, 2, 3, dtype=torch.float64).requires_grad_() for _ in range(3))
    decay = torch.rand(2, dtype=torch.float64, requires_grad=True)
    gain = torch.rand((), dtype=torch.float64, requires_grad=True)

    def f(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, gain: Tensor) -> Tensor:
        neuron = {"detach_reset": False, "surrogate": Sigmoid(4.0)}
        attn, qkv = LIFParams(decay, gain, v_threshold=0.5, **neuron), LIFParams(gain, decay, **neuron)
        if mode == "spike-driven":
            return spike_driven_attention_ref(q, k, v, attn, qkv, smooth=True)
        return qk_attention_ref(q, k, mode, attn, qkv, smooth=True)

    assert torch.autograd.gradcheck(f, (q, k, v, decay, gain))


def test_second_backward_is_refused() -> None:
    q = spikes(*SHAPE).requires_grad_()
    (g,) = torch.autograd.grad(qk_attention(q, q).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="qk_attention: a second backward"):
        g.sum().backward()


# ---- bad input


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"q": [1]}, TypeError, "qk_attention: q must be a tensor, got list"),
        ({"mode": "head"}, ValueError, 'qk_attention: mode must be "token" or "channel", got \'head\''),
        ({"attn": None}, TypeError, "qk_attention: attn must be LIFParams, got NoneType"),
        ({"T": 0}, ValueError, "qk_attention: T must be None or at least 1, got 0"),
        ({"q": spikes(4, 2)}, RuntimeError, "q must be [T, B, H, D, N] with T >= 1, got float32 [4, 2] on cpu"),
        (
            {"q": spikes(*SHAPE).int()},
            RuntimeError,
            "q must be float32, bfloat16, float16 or float64, got int32 [4, 2,",
        ),
        ({"T": 4}, RuntimeError, "q must be uint8 (T was given), got float32 [4, 2, 3, 5, 7] on cpu"),
        (
            {"k": spikes(4, 2, 3, 5, 6)},
            RuntimeError,
            "k must be float32 [4, 2, 3, 5, 7] on cpu, got float32 [4, 2, 3, 5, 6]",
        ),
        ({"k": spikes(*SHAPE).half()}, RuntimeError, "k must be float32 [4, 2, 3, 5, 7] on cpu, got float16"),
        (
            {"attn": LIFParams(decay=torch.rand(2))},
            RuntimeError,
            "attn.decay must be a scalar or [3], float32 on cpu, got float32 [2] on cpu",
        ),
        (
            {"qkv": LIFParams(gain=torch.ones(3).int())},
            RuntimeError,
            "qkv.gain must be a scalar or [3], float32 on cpu, got int32 [3] on cpu",
        ),
    ],
)
def test_one_clear_line(arguments: dict, error: type, message: str) -> None:
    call = {"q": spikes(*SHAPE), "k": spikes(*SHAPE), **arguments}
    with pytest.raises(error) as caught:
        qk_attention(**call)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    if error is not RuntimeError:
        return
    with torch._subclasses.FakeTensorMode() as mode:  # word for word where the kernel is not reached

        def fake(value: object) -> object:
            if isinstance(value, LIFParams):
                return replace(value, decay=fake(value.decay), gain=fake(value.gain))
            return mode.from_tensor(value) if isinstance(value, Tensor) else value

        traced = {name: fake(value) for name, value in call.items()}
        with pytest.raises(error) as caught_traced:
            qk_attention(**traced)
    assert str(caught_traced.value) == str(caught.value)


def test_packed_bits_must_fit_their_time() -> None:
    bits = pack_spikes(spikes(9, 1, 2, 3, 5))
    with pytest.raises(RuntimeError, match="T must be in 9 to 16 for packed uint8"):
        qk_attention(bits, bits, T=8)
    with pytest.raises(RuntimeError, match="qkv must be None for packed spikes"):
        qk_attention(bits, bits, qkv=LIFParams(), T=9)


# ---- in place of a published block's inner part


class _Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u):  # type: ignore[override]
        ctx.save_for_backward(u)
        return (u >= 0).to(u.dtype)

    @staticmethod
    def backward(ctx, g):  # type: ignore[override]
        s = torch.sigmoid(4 * ctx.saved_tensors[0])
        return g * 4 * s * (1 - s)


def plain_lif(x: Tensor, v_threshold: float = 1.0) -> Tensor:
    v, out = torch.zeros_like(x[0]), []
    for x_t in x:
        h = v + (x_t - v) / 2
        s = _Spike.apply(h - v_threshold)
        v = torch.where(s.detach() > 0, 0.0, h)
        out.append(s)
    return torch.stack(out)


class TokenBlock(nn.Module):
    """QKFormer's token attention as a repository would write it; `fused` swaps three lines."""

    def __init__(self, C: int, H: int, fused: bool) -> None:
        super().__init__()
        self.H, self.fused = H, fused
        self.q, self.k, self.proj = (nn.Conv1d(C, C, 1, bias=False) for _ in range(3))
        self.q_bn, self.k_bn = (nn.BatchNorm1d(C) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:  # [T, B, C, N]
        T, B, C, N = x.shape
        q, k = (bn(conv(x.flatten(0, 1))).view(T, B, C, N) for conv, bn in ((self.q, self.q_bn), (self.k, self.k_bn)))
        q, k = (t.unflatten(2, (self.H, -1)) for t in (q, k))
        if self.fused:
            neuron = Sigmoid(4.0)
            y = qk_attention(q, k, "token", LIFParams(v_threshold=0.5, surrogate=neuron), LIFParams(surrogate=neuron))
        else:
            y = plain_lif(plain_lif(q).sum(3, keepdim=True), 0.5) * plain_lif(k)
        return self.proj(y.flatten(2, 3).flatten(0, 1)).view(T, B, C, N)


def test_drop_in() -> None:
    torch.manual_seed(0)
    plain, fused = TokenBlock(32, 4, False), TokenBlock(32, 4, True)
    fused.load_state_dict(plain.state_dict())
    results = []
    for block in (plain, fused):
        x = (2 * spikes(4, 3, 32, 25, rate=0.4)).requires_grad_()
        y = block(x)
        y.square().sum().backward()
        assert x.grad is not None
        results.append([y.detach(), x.grad, *(p.grad for p in block.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(a.abs().max()))
    assert torch.equal(results[0][0], results[1][0])
