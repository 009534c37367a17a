"""What the sweep does not know of spiking_self_attention: numbers by hand, equality with lif, messages, autocast."""

import pytest
import torch
from torch import Tensor

from spikecore.ops import LIFParams, lif, pack_spikes, spiking_self_attention, spiking_self_attention_ref
from spikecore.ops import unpack_spikes as unpack
from spikecore.surrogate import Rectangle, Sigmoid

SHAPE = (4, 2, 3, 8, 37)


def operands(shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float32, spikes: bool = True) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    x = [torch.randn(shape, generator=g) for _ in range(3)]
    return [((t > 0.5) if spikes else t + 0.5).to(dtype) for t in x]


def test_by_hand() -> None:
    """D = 2, N = 3, one step: kv = [[1, 2], [0, 1]], y = 1/4 [[1, 0, 1], [3, 1, 2]] at threshold 1/2, gain 1."""
    k = torch.tensor([[1.0, 0, 1], [0, 1, 0]])
    v = torch.tensor([[1.0, 0, 0], [1, 1, 1]])
    q = torch.tensor([[1.0, 0, 1], [1, 1, 0]])
    attn = LIFParams(1.0, 1.0, v_threshold=0.5, surrogate=Rectangle(1.0))
    q, k, v = (x.view(1, 1, 1, 2, 3).requires_grad_() for x in (q, k, v))
    out = spiking_self_attention(q, k, v, 0.25, attn)
    assert out.flatten().tolist() == [0, 0, 0, 1, 0, 1]
    out.sum().backward()
    # The rectangle passes a gradient of 1 where |y - 1/2| < 1/2; g_y = [[1, 0, 1], [1, 1, 1]] / 4.
    assert (4 * q.grad).flatten().tolist() == [3, 2, 3, 1, 1, 1]
    # g_kv = q g_y^T = [[2, 2], [1, 2]] / 4
    assert (4 * k.grad).flatten().tolist() == [4, 2, 2, 3, 2, 2]
    assert (4 * v.grad).flatten().tolist() == [2, 1, 2, 2, 2, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_neurons_inside_are_lif(dtype: torch.dtype) -> None:
    """Spikes from currents equal those of lif first and the attention on its spikes, bit for bit; so do packed ones."""
    x = operands((9, 2, 3, 20, 300), dtype, spikes=False)
    qkv = LIFParams(torch.tensor([0.3, 0.7, 0.9]), 1 / 3, v_threshold=0.7, v_reset=None)
    attn = LIFParams(0.9, 0.37, v_threshold=0.5)
    spikes = [lif(t, qkv.decay, qkv.gain, v_threshold=0.7, v_reset=None)[0] for t in x]
    want = spiking_self_attention(*spikes, 0.0123, attn)
    assert 0.01 < want.double().mean() < 0.99
    assert torch.equal(spiking_self_attention(*x, 0.0123, attn, qkv), want)
    packed = spiking_self_attention(*map(pack_spikes, spikes), 0.0123, attn, T=9)
    assert (packed.dtype, packed.shape) == (torch.uint8, (2, 2, 3, 20, 300))
    if dtype != torch.float64:
        assert torch.equal(unpack(packed, 9, dtype), want)
        assert torch.equal(spiking_self_attention_ref(*spikes, 0.0123, attn), want)


def test_no_square_of_the_tokens() -> None:
    """Peak memory of a training step: nothing near [N, N]."""
    from spikecore.testing.timing import bytes_kept, bytes_peak

    x = [t.requires_grad_() for t in operands((2, 1, 1, 4, 2000), spikes=False)]
    qkv = LIFParams()
    assert bytes_kept(lambda: spiking_self_attention(*x, qkv=qkv), *x) == 0
    peak = bytes_peak(lambda: torch.autograd.grad(spiking_self_attention(*x, qkv=qkv).sum(), x))
    assert peak < 6 * x[0].nbytes


def test_autocast_leaves_the_precision_alone() -> None:
    x = operands(spikes=False)
    with torch.autocast("cpu", torch.bfloat16):
        got = spiking_self_attention(*x, qkv=LIFParams())
    assert torch.equal(got, spiking_self_attention(*x, qkv=LIFParams()))


def test_export() -> None:
    class Block(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return spiking_self_attention(q, k, v, qkv=LIFParams(surrogate=Sigmoid(4.0)))

    x = tuple(operands(spikes=False))
    assert torch.equal(torch.export.export(Block(), x).module()(*x), Block()(*x))


def test_a_second_backward_is_refused() -> None:
    q, k, v = (t.requires_grad_() for t in operands())
    (g,) = torch.autograd.grad(spiking_self_attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="spiking_self_attention: a second backward"):
        g.sum().backward()


@pytest.mark.parametrize("attached", [False, True])
def test_gradcheck(attached: bool) -> None:
    """The smooth reference's true gradient is the formula that the kernels compute."""
    x = [t.requires_grad_() for t in operands((2, 1, 2, 2, 3), torch.float64, spikes=False)]
    decay = torch.tensor([0.5, 0.7], dtype=torch.float64, requires_grad=True)

    def f(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
        p = LIFParams(decay, 0.6, surrogate=Sigmoid(2.0), detach_reset=not attached)
        return spiking_self_attention_ref(q, k, v, 0.5, p, p, smooth=True)

    if attached:  # a detached reset has no true gradient
        torch.autograd.gradcheck(f, (*x, decay))
    assert torch.isfinite(f(*x, decay)).all()


PACKED = [pack_spikes(t) for t in operands()]
BAD = {
    "q must be float32, bfloat16, float16 or float64 (packed spikes need T), got int64": (
        lambda: spiking_self_attention(*(t.long() for t in operands())), RuntimeError),
    "q must be float32, bfloat16, float16 or float64 (packed spikes need T), got uint8": (
        lambda: spiking_self_attention(*PACKED), RuntimeError),
    "q must be [T, B, H, D, N] with T >= 1, got float32 [2, 3, 8, 37] on cpu": (
        lambda: spiking_self_attention(*(t[0] for t in operands())), RuntimeError),
    "q must be uint8 [ceil(T / 8), B, H, D, N] with T = 9, got uint8 [1, 2, 3, 8, 37] on cpu": (
        lambda: spiking_self_attention(*PACKED, T=9), RuntimeError),
    "qkv needs currents, got packed spikes": (
        lambda: spiking_self_attention(*PACKED, T=4, qkv=LIFParams()), RuntimeError),
    "v must be float32 [4, 2, 3, 8, 37] on cpu, got float32 [4, 2, 3, 8, 36] on cpu": (
        lambda: spiking_self_attention(*operands()[:2], operands()[2][..., 1:]), RuntimeError),
    "k must be float32 [4, 2, 3, 8, 37] on cpu, got bfloat16 [4, 2, 3, 8, 37] on cpu": (
        lambda: spiking_self_attention(operands()[0], operands()[1].bfloat16(), operands()[2]), RuntimeError),
    "attn.decay must be a scalar or [3], float32 on cpu, got float32 [2] on cpu": (
        lambda: spiking_self_attention(*operands(), attn=LIFParams(torch.ones(2))), RuntimeError),
    "qkv.gain must be a scalar or [3], float32 on cpu, got int64 [3] on cpu": (
        lambda: spiking_self_attention(*operands(), qkv=LIFParams(0.5, torch.ones(3).long())), RuntimeError),
    "q must be a tensor, got list": (lambda: spiking_self_attention([], [], []), TypeError),
    "attn must be LIFParams, got 0.5": (lambda: spiking_self_attention(*operands(), attn=0.5), TypeError),
    "T must be at least 1, got 0": (lambda: spiking_self_attention(*PACKED, T=0), ValueError),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_one_clear_line(message: str) -> None:
    call, error = BAD[message]
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value).splitlines()[0] == f"spiking_self_attention: {message}" or str(raised.value).startswith(
        f"spiking_self_attention: {message} "
    )


@pytest.mark.parametrize("message", [m for m, (_, error) in BAD.items() if error is RuntimeError])
def test_tracing_says_the_same(message: str) -> None:
    from torch._subclasses import FakeTensorMode

    call, _ = BAD[message]
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(RuntimeError) as raised:
        call()
    assert str(raised.value).startswith(f"spiking_self_attention: {message}")
