"""lif alone: sequences computed by hand, special values, streaming, bad input, and the neurons that stand on it."""

import dataclasses
import math
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import spikecore
from spikecore import IF, LIF, PLIF, Leaky
from spikecore.ops import lif, lif_ref, pack_spikes, unpack_spikes
from spikecore.surrogate import ATan, Erf, FastSigmoid, LeakyReLU, Rectangle, Sigmoid, Surrogate, Triangle
from spikecore.testing.cases import values

# ---- five steps by hand ----------------------------------------------------------------------------------------------
#
# Rational arithmetic throughout; float64 holds every number below exactly. The loss is 1 s0 + 2 s1 - s2 + s3 + 2 s4 +
# v_last; the surrogate is Triangle(2), so ds/dh = (1 - |h - v_threshold| / 2) / 2, where no other is named.

X = [1.5, 0.5, 0.75, 1.25, 0.25]


@dataclasses.dataclass(frozen=True)
class Hand:
    name: str
    arguments: dict[str, Any]
    s: list[int]
    h: list[float]
    v: list[float]
    g_x: list[float]
    g_decay: float
    g_gain: float
    x: list[float] = dataclasses.field(default_factory=lambda: X)
    neuron: Callable[[], nn.Module] | None = None


SOFT, ATTACHED = {"v_reset": None}, {"detach_reset": False}
HANDS = [
    Hand("IF", {"decay": 1.0, "gain": 1.0}, [1, 0, 1, 1, 0], [1.5, 0.5, 1.25, 1.25, 0.25], [0, 0.5, 0, 0, 0.25],
         [0.375, 0.3125, -0.4375, 0.4375, 1.625], -0.21875, 1.34375,
         neuron=lambda: IF(surrogate=Triangle(2.0))),
    Hand("IF, attached", {"decay": 1.0, "gain": 1.0, **ATTACHED}, [1, 0, 1, 1, 0], [1.5, 0.5, 1.25, 1.25, 0.25],
         [0, 0.5, 0, 0, 0.25],
         [0.05098928511142731, 0.5760190486907959, -0.21413040161132812, -0.408447265625, 1.546875],
         -0.10706520080566406, 0.08005531877279282, neuron=lambda: IF(surrogate=Triangle(2.0), detach_reset=False)),
    Hand("LIF", {"decay": 0.5, "gain": 0.5}, [1, 0, 1, 1, 0], [1.5, 0.5, 1, 1.25, 0.25], [0, 0.5, 0, 0, 0.25],
         [0.1875, 0.25, -0.25, 0.21875, 0.8125], -0.25, 2.78125, x=[3, 1, 1.5, 2.5, 0.5],
         neuron=lambda: LIF(2.0, surrogate=Triangle(2.0))),
    Hand("LIF undivided, soft", {"decay": 0.75, "gain": 1.0, **SOFT}, [1, 0, 1, 1, 0],
         [1.5, 0.875, 1.40625, 1.5546875, 0.666015625], [0.5, 0.875, 0.40625, 0.5546875, 0.666015625],
         [1.5864143371582031, 1.6152191162109375, 0.90362548828125, 1.736083984375, 1.8330078125],
         3.3203125, 6.493307113647461,
         neuron=lambda: LIF(4.0, decay_input=False, v_reset=None, surrogate=Triangle(2.0))),
    Hand("mem_update", {"decay": 0.25, "gain": 1.0, "v_threshold": 0.5, "strict": True, "surrogate": Rectangle(1.0)},
         [0, 0, 1, 0, 0], [0.5, 0.5, 0.875, 0.25, 0.5], [0.5, 0.5, 0, 0.25, 0.5], [1.4375, 1.75, -1, 1.75, 3],
         1.125, 2.375, x=[0.5, 0.375, 0.75, 0.25, 0.4375]),
    Hand("Leaky, subtract", {"decay": 0.5, "gain": 1.0, "strict": True, "reset_by": 2.0, **SOFT}, [1, 0, 0, 1, 0],
         [1.5, 0.25, 0.875, 1.6875, 0.09375], [-0.5, 0.25, 0.875, -0.3125, 0.09375],
         [0.7080078125, 0.666015625, 0.08203125, 1.1015625, 1.546875], 0.16796875, 3.22021484375,
         neuron=lambda: Leaky(0.5, surrogate=Triangle(2.0))),
    Hand("Leaky, zero", {"decay": 0.5, "gain": 1.0, "strict": True}, [1, 0, 0, 1, 0], [1.5, 0.5, 1, 1.75, 0.25],
         [0, 0.5, 1, 0, 0.25], [0.375, 0.578125, -0.34375, 0.3125, 1.625], 0.140625, 1.390625,
         neuron=lambda: Leaky(0.5, reset="zero", surrogate=Triangle(2.0))),
]  # fmt: skip
HAND = pytest.mark.parametrize("hand", HANDS, ids=lambda h: h.name)
FLOATS = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


def backward(s: Tensor, v_last: Tensor) -> None:
    weights = torch.tensor([1, 2, -1, 1, 2], dtype=s.dtype).view(-1, *[1] * (s.dim() - 1))
    ((weights * s).sum() + v_last.sum()).backward()


@HAND
@FLOATS
@pytest.mark.parametrize("op", [lif, lif_ref], ids=["kernel", "reference"])
def test_by_hand(hand: Hand, op: Callable, dtype: torch.dtype) -> None:
    def leaf(value: Any) -> Tensor:
        return torch.tensor(value, dtype=dtype, requires_grad=True)

    x = leaf(hand.x)
    arguments = {"surrogate": Triangle(2.0), **hand.arguments}
    decay, gain = leaf(arguments.pop("decay")), leaf(arguments.pop("gain"))
    s, v_last, h, v = op(x, decay, gain, return_h=True, return_v=True, **arguments)
    assert (s.tolist(), h.tolist(), v.tolist(), v_last.item()) == (hand.s, hand.h, hand.v, hand.v[-1])
    backward(s, v_last)
    got = [*x.grad.tolist(), decay.grad.item(), gain.grad.item()]
    want = [*hand.g_x, hand.g_decay, hand.g_gain]
    assert got == (want if dtype == torch.float64 else pytest.approx(want, rel=1e-6))


@pytest.mark.parametrize("hand", [h for h in HANDS if h.neuron], ids=lambda h: h.name)
def test_neuron_by_hand(hand: Hand) -> None:
    neuron, x = hand.neuron(), torch.tensor(hand.x, dtype=torch.float64, requires_grad=True)
    s, v_last = neuron.run(x)
    assert (s.tolist(), v_last.item()) == (hand.s, hand.v[-1])
    backward(s, v_last)
    assert x.grad.tolist() == hand.g_x


@pytest.mark.parametrize(
    ("neuron", "x", "s", "v_last", "g_x", "g_w"),
    [
        # k = 1/2, dk/dw = 1/4: g_w = (g_gain - g_decay) / 4 where the input is divided, else -g_decay / 4.
        (PLIF(2.0, surrogate=Triangle(2.0)), [3, 1, 1.5, 2.5, 0.5], [1, 0, 1, 1, 0], 0.25,
         [0.1875, 0.25, -0.25, 0.21875, 0.8125], (2.78125 + 0.25) / 4),
        (PLIF(2.0, decay_input=False, v_reset=None, detach_reset=False, surrogate=Triangle(2.0)), X, [1, 0, 1, 1, 0],
         0.40625, [0.6262087766081095, 0.8038680851459503, -0.2529134750366211, 0.81256103515625, 1.3515625],
         -0.7361823469400406 / 4),
    ],
    ids=["PLIF", "PLIF undivided, soft, attached"],
)  # fmt: skip
def test_plif_by_hand(neuron: PLIF, x: list, s: list, v_last: float, g_x: list, g_w: float) -> None:
    neuron = neuron.double()
    neuron.zero_grad()
    leaf = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    out = neuron.run(leaf)
    assert (out[0].tolist(), out[1].item()) == (s, v_last)
    backward(*out)
    assert (leaf.grad.tolist(), neuron.w.grad.item()) == (g_x, g_w)


@FLOATS
def test_channels_by_hand(dtype: torch.dtype) -> None:
    """Channel 0 with k = 1/4 and channel 1 with k = 1/2, [T, B=2, C=2]; the batch doubles a parameter's gradient."""
    x = torch.tensor([[6, 2, 3, 5, 1], [3, 1, 1.5, 2.5, 0.5]], dtype=dtype).T.unsqueeze(1).repeat(1, 2, 1)
    k = torch.tensor([0.25, 0.5], dtype=dtype)
    x, decay, gain = x.requires_grad_(), (1 - k).requires_grad_(), k.clone().requires_grad_()
    v_init = torch.zeros(2, 2, dtype=dtype, requires_grad=True)
    s, v_last = lif(x, decay, gain, v_init=v_init, surrogate=Triangle(2.0))
    assert s[:, 1].T.tolist() == [[1, 0, 1, 1, 0], [1, 0, 1, 1, 0]]
    backward(s, v_last)
    assert x.grad[:, 0, 0].tolist() == [0.09375, 0.099609375, -0.1171875, 0.109375, 0.40625]
    assert x.grad[:, 1, 1].tolist() == [0.1875, 0.25, -0.25, 0.21875, 0.8125]
    assert (decay.grad / 2).tolist() == [-0.234375, -0.25]
    assert (gain.grad / 2).tolist() == [5.453125, 2.78125]
    assert v_init.grad.tolist() == [[0.28125, 0.1875]] * 2


def test_rest_below_zero_by_hand() -> None:
    v_init = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    x = torch.tensor(X, dtype=torch.float64, requires_grad=True)
    s, v_last, h = lif(x, 0.5, 1.0, v_reset=-0.5, v_init=v_init, return_h=True, surrogate=Triangle(2.0), **ATTACHED)
    assert (s.tolist(), h.tolist()) == ([1, 0, 0, 1, 0], [1.5, 0, 0.5, 1.25, -0.25])
    backward(s, v_last)
    assert v_init.grad.item() == 0.12632980942726135
    assert x.grad[2:].tolist() == [-0.39716339111328125, -0.0709228515625, 1.328125]


# ---- special values --------------------------------------------------------------------------------------------------

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("n", [1, 40], ids=["tail", "vectors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("x", "soft", "s", "v"),
    [
        ([NAN, 9, 9], False, [0, 0, 0], [NAN, NAN, NAN]),
        ([NAN, 9, 9], True, [0, 0, 0], [NAN, NAN, NAN]),
        ([INF, 1, 2], False, [1, 0, 1], [0, 0.5, 0]),
        ([INF, 1, 2], True, [1, 1, 1], [INF, INF, INF]),
        ([-INF, 9, 9], False, [0, 0, 0], [-INF, -INF, -INF]),
        ([-INF, 9, 9], True, [0, 0, 0], [-INF, -INF, -INF]),
    ],
)
def test_nan_and_infinity(x: list, soft: bool, s: list, v: list, dtype: torch.dtype, n: int) -> None:
    x = torch.tensor(x, dtype=dtype).unsqueeze(1).expand(3, n)
    for op in (lif, lif_ref):
        got_s, v_last, got_v = op(x, v_reset=None if soft else 0.0, return_v=True)
        assert got_s[:, -1].tolist() == s
        want = torch.tensor(v, dtype=got_v.dtype).unsqueeze(1).expand(3, n)
        torch.testing.assert_close(got_v, want, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(v_last, want[-1], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("bad", [INF, -INF, NAN])
def test_gradients_beside_a_special_value(bad: float, detach: bool) -> None:
    """A neuron with an infinite or NaN input harms no other, and its own gradients are the reference's."""
    x = torch.full((3, 20), 0.75)
    x[1, 7] = bad
    grads = []
    for op in (lif, lif_ref):
        leaf = x.clone().requires_grad_()
        s, v_last = op(leaf, detach_reset=detach)
        (s.sum() + v_last.sum()).backward()
        grads.append(leaf.grad)
    others = torch.arange(20) != 7
    torch.testing.assert_close(grads[0][:, others], grads[1][:, others])
    torch.testing.assert_close(grads[0], grads[1], equal_nan=True)


@pytest.mark.parametrize("threshold", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equality_at_the_threshold(threshold: float, dtype: torch.dtype) -> None:
    at = torch.tensor(threshold, dtype=dtype)
    x = torch.stack([at, torch.nextafter(at, at + 1), torch.nextafter(at, at - 1)]).unsqueeze(0)
    for op in (lif, lif_ref):
        assert op(x, 1.0, 1.0, v_threshold=threshold)[0].tolist() == [[1, 1, 0]]
        assert op(x, 1.0, 1.0, v_threshold=threshold, strict=True)[0].tolist() == [[0, 1, 0]]


def test_infinite_threshold_never_fires_on_finite_input() -> None:
    x = torch.tensor([[1e30, 3e38, -1.0, INF]])
    for op in (lif, lif_ref):
        assert op(x, 1.0, 1.0, v_threshold=INF)[0].tolist() == [[0, 0, 0, 1]], op  # equality fires
        assert op(x, 1.0, 1.0, v_threshold=INF, strict=True)[0].tolist() == [[0, 0, 0, 0]], op


# ---- streaming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("v_reset", [0.0, None], ids=["hard", "soft"])
def test_chunks_equal_one_call(v_reset: float | None, dtype: torch.dtype) -> None:
    x = values((13, 2, 37), dtype, False)
    whole = lif(x, 0.7, 0.6, v_reset=v_reset, return_h=True)
    v, parts = None, []
    for chunk in x.split([1, 4, 2, 5, 1]):
        s, v, h = lif(chunk, 0.7, 0.6, v_reset=v_reset, v_init=v, return_h=True)
        parts.append((s, h))
    assert torch.equal(torch.cat([s for s, _ in parts]), whole[0])
    assert torch.equal(torch.cat([h for _, h in parts]), whole[2])
    assert torch.equal(v, whole[1])
    assert v.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_gradients_run_through_chunks() -> None:
    """Autograd joins v_last and v_init of neighbouring chunks: the gradients are those of one call."""
    grads = []
    for sizes in ([12], [5, 1, 6]):
        x, decay = (
            values((12, 3, 4), torch.float64, False).requires_grad_(),
            torch.full((4,), 0.7).double().requires_grad_(),
        )
        v, spikes = None, []
        for chunk in x.split(sizes):
            s, v = lif(chunk, decay, 0.6, v_init=v, detach_reset=False)
            spikes.append(s)
        (torch.cat(spikes).cos().sum() + v.square().sum()).backward()
        grads.append((x.grad, decay.grad))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("T", [4, 12, 21])
@pytest.mark.parametrize("N", [5120, 4999], ids=["rows 4 KiB apart", ""])
def test_bits_do_not_depend_on_addresses(N: int, T: int) -> None:
    """Where read and written rows would hinder one another, kernels walk them the other way or move one aside."""
    line, page = 16, 1024  # floats of a cache line and of 4 KiB, beyond which addresses look alike to the processor
    x, g_s, v = values((T, N), torch.float32, grid=False), torch.randn(T, N), values((N,), torch.float32, grid=False)

    def at(t: Tensor, lines: int) -> Tensor:
        room = torch.empty(t.numel() + 2 * page)
        first = (lines * line - room.data_ptr() // 4) % page
        return room[first : first + t.numel()].view_as(t).copy_(t)

    def run(x: Tensor, g_s: Tensor, v: Tensor) -> list[Tensor]:
        out = []
        for v_init in (None, v.requires_grad_()):
            s, v_last = lif(x.requires_grad_(), 0.5, 0.25, v_init=v_init)
            wrt = [x] if v_init is None else [x, v_init]
            out += [s, v_last, *torch.autograd.grad(s, wrt, g_s)]
        return out

    want = run(x, g_s, v)
    for lines in range(64):
        for got, bits in zip(run(at(x, lines), at(g_s, 5 * lines), at(v, 3 * lines)), want, strict=True):
            assert torch.equal(got, bits), f"x {lines} lines behind a multiple of 4 KiB"


@pytest.mark.parametrize("neuron", [IF(), LIF(3.0), LIF(3.0, decay_input=False, v_reset=None), PLIF(4.0, channels=5),
                                    Leaky(0.9), Leaky(0.8, reset="zero")], ids=str)  # fmt: skip
def test_step_equals_forward(neuron: spikecore.neurons.Neuron) -> None:
    neuron = neuron if not isinstance(neuron, PLIF) else PLIF(4.0, channels=5, channel_dim=-1)
    x, v, spikes = values((7, 3, 5), torch.float32, False), None, []
    for x_t in x:
        s, v = neuron.step(x_t, v)
        spikes.append(s)
    with torch.no_grad():
        assert torch.equal(torch.stack(spikes), neuron(x))
        assert torch.equal(v, neuron.run(x)[1])
    assert set(neuron.state_dict()) == ({"w"} if isinstance(neuron, PLIF) else set())
    assert not list(neuron.buffers())


# ---- packed spikes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [1, 7, 8, 9, 16, 19])
def test_pack_round_trip(T: int) -> None:
    s = (values((T, 3, 5), torch.float32, False) > 0.5).float()
    p = pack_spikes(s)
    assert (p.dtype, tuple(p.shape)) == (torch.uint8, ((T + 7) // 8, 3, 5))
    for t in range(8 * len(p)):
        bit = (p[t // 8] >> (t % 8)) & 1
        assert torch.equal(bit, s[t].to(torch.uint8) if t < T else torch.zeros_like(bit))
    for dtype in (torch.float32, torch.bfloat16, torch.bool):
        assert torch.equal(unpack_spikes(p, T, dtype), s.to(dtype))
    for wrong in (0, 8 * len(p) - 8, 8 * len(p) + 1):
        with pytest.raises(ValueError, match=rf"p must be uint8 \[ceil\(T / 8\), ...\] with T = {wrong}, got"):
            unpack_spikes(p, wrong)


def test_packed_spikes_carry_no_gradient_but_v_last_does() -> None:
    x = values((9, 4, 5), torch.float32, True).requires_grad_()
    s, v_last = lif(x, packed=True)
    v_last.sum().backward()
    y = x.detach().requires_grad_()
    lif(y)[1].sum().backward()
    assert not s.requires_grad
    assert torch.equal(x.grad, y.grad)


# ---- autograd --------------------------------------------------------------------------------------------------------


def test_double_backward_is_refused() -> None:
    x = values((4, 6), torch.float32, True).requires_grad_()
    (g,) = torch.autograd.grad(lif(x)[0].sum(), x, create_graph=True)
    line = "lif: a second backward \\(double backward\\) is not defined for surrogate gradients"
    with pytest.raises(RuntimeError, match=line):
        g.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
def test_own_surrogate(packed: bool, dtype: torch.dtype) -> None:
    """A callable: the same spikes as the kernel, and with a known family's formula its gradients."""
    builtin = ATan(2.0)
    results = []
    for surrogate in (builtin, lambda u: builtin.derivative(u)):
        x = values((9, 3, 4), dtype, False).requires_grad_()
        decay = torch.full((4,), 0.7, requires_grad=True)
        out = lif(x, decay, 0.6, surrogate=surrogate, return_v=True, return_h=True, packed=packed)
        out[1].sum().backward()
        results.append((*out, x.grad, decay.grad))
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, want)
    assert torch.equal(results[0][0], results[1][0])


# ---- bad input: one line, the same from the kernel, the fake and the path of own surrogates --------------------------

X4 = torch.zeros(4, 2, 3)
NOT_A_FLOAT = "lif: x must be float32, bfloat16, float16 or float64, got"
TENSOR_ROWS: list[tuple[str, Tensor, dict[str, Any], str]] = [
    ("integer", X4.int(), {}, f"{NOT_A_FLOAT} int32 [4, 2, 3] on cpu"),
    ("bool", X4.bool(), {}, f"{NOT_A_FLOAT} bool [4, 2, 3] on cpu"),
    ("complex", X4.cfloat(), {}, f"{NOT_A_FLOAT} complex64 [4, 2, 3] on cpu"),
    ("uint8", X4.byte(), {}, f"{NOT_A_FLOAT} uint8 [4, 2, 3] on cpu"),
    ("float8", X4.to(torch.float8_e4m3fn), {}, f"{NOT_A_FLOAT} float8_e4m3fn [4, 2, 3] on cpu"),
    ("0-d", torch.tensor(1.0), {}, "lif: x must be [T, ...] with T >= 1, got float32 [] on cpu"),
    ("T=0", X4[:0], {}, "lif: x must be [T, ...] with T >= 1, got float32 [0, 2, 3] on cpu"),
    ("v_init shape", X4, {"v_init": torch.zeros(3)},
     "lif: v_init must be float32 [2, 3] on cpu, got float32 [3] on cpu"),
    ("v_init transposed", X4, {"v_init": torch.zeros(3, 2)},
     "lif: v_init must be float32 [2, 3] on cpu, got float32 [3, 2] on cpu"),
    ("v_init dtype", X4.bfloat16(), {"v_init": torch.zeros(2, 3, dtype=torch.bfloat16)},
     "lif: v_init must be float32 [2, 3] on cpu, got bfloat16 [2, 3] on cpu"),
    ("v_init float64", X4.double(), {"v_init": torch.zeros(2, 3)},
     "lif: v_init must be float64 [2, 3] on cpu, got float32 [2, 3] on cpu"),
    ("v_init device", X4, {"v_init": torch.zeros(2, 3, device="meta")},
     "lif: v_init must be float32 [2, 3] on cpu, got float32 [2, 3] on meta"),
    ("decay shape", X4, {"decay": torch.zeros(2)},
     "lif: decay must be a scalar or [3], float32 on cpu, got float32 [2] on cpu"),
    ("decay 2-d", X4, {"decay": torch.zeros(1, 3)},
     "lif: decay must be a scalar or [3], float32 on cpu, got float32 [1, 3] on cpu"),
    ("decay dtype", X4, {"decay": torch.ones(3, dtype=torch.int64)},
     "lif: decay must be a scalar or [3], float32 on cpu, got int64 [3] on cpu"),
    ("decay device", X4, {"decay": torch.zeros(3, device="meta")},
     "lif: decay must be a scalar or [3], float32 on cpu, got float32 [3] on meta"),
    ("scalar decay device", X4, {"decay": torch.zeros((), device="meta")},
     "lif: decay must be a scalar, float32 on cpu, got float32 [] on meta"),
    ("gain shape", X4, {"gain": torch.zeros(3), "channel_dim": 1},
     "lif: gain must be a scalar or [2], float32 on cpu, got float32 [3] on cpu"),
    *((f"channel_dim {d}", X4, {"decay": torch.zeros(3), "channel_dim": d},
       f"lif: channel_dim must name a dimension of x after the first (x has 3), got {d}") for d in (0, 3, -3, -4, 7)),
]  # fmt: skip


def refusal(f: Callable[[], Any]) -> tuple[type[BaseException], str]:
    with pytest.raises((RuntimeError, TypeError, ValueError)) as e:
        f()
    return e.type, str(e.value)


@pytest.mark.parametrize(("x", "arguments", "line"), [row[1:] for row in TENSOR_ROWS], ids=[r[0] for r in TENSOR_ROWS])
@pytest.mark.parametrize("path", ["kernel", "fake", "own surrogate", "compiled"])
def test_bad_tensor(path: str, x: Tensor, arguments: dict, line: str) -> None:
    if path == "fake":
        with FakeTensorMode() as mode:
            fake = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in arguments.items()}
            error, got = refusal(lambda: lif(mode.from_tensor(x), **fake))
    elif path == "compiled":
        torch._dynamo.reset()
        error, got = refusal(lambda: torch.compile(lambda: lif(x, **arguments), backend="eager", fullgraph=True)())
        error, got = (RuntimeError, line) if issubclass(error, RuntimeError) and line in got else (error, got)
    else:
        own = {"surrogate": lambda u: u} if path == "own surrogate" else {}
        error, got = refusal(lambda: lif(x, **arguments, **own))
    assert (error, got) == (RuntimeError, line)


VALUE = "lif: v_threshold must be at or above the resting potential"
WHY = "(a neuron below it would fire without input), got"
CONSTANT_ROWS: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (ValueError, f"{VALUE} 0.0 {WHY} -1.0", {"v_threshold": -1.0}),
    (ValueError, f"{VALUE} 0.0 {WHY} nan", {"v_threshold": NAN}),
    (ValueError, f"{VALUE} 0.0 {WHY} -0.5", {"v_threshold": -0.5, "v_reset": None}),
    (ValueError, f"{VALUE} 2.0 {WHY} 1.0", {"v_reset": 2.0}),
    (ValueError, "lif: v_reset must be a finite number or None (soft reset), got inf", {"v_reset": INF}),
    (ValueError, "lif: v_reset must be a finite number or None (soft reset), got nan", {"v_reset": NAN}),
    (ValueError, "lif: reset_by must be a finite number >= 0, got -1.0", {"v_reset": None, "reset_by": -1.0}),
    (ValueError, "lif: reset_by must be a finite number >= 0, got inf", {"v_reset": None, "reset_by": INF}),
    (ValueError, "lif: reset_by must be a finite number >= 0, got nan", {"v_reset": None, "reset_by": NAN}),
    (TypeError, "lif: surrogate must be a spikecore.surrogate object or a callable, got 'atan'", {"surrogate": "atan"}),
    (TypeError, "lif: surrogate must be a spikecore.surrogate object or a callable, got None", {"surrogate": None}),
    (TypeError, "lif: x must be a tensor, got list", {"x": [1.0, 2.0]}),
]


@pytest.mark.parametrize(("error", "line", "arguments"), CONSTANT_ROWS, ids=[r[1] for r in CONSTANT_ROWS])
def test_bad_constant(error: type, line: str, arguments: dict) -> None:
    assert refusal(lambda: lif(**{"x": X4, **arguments})) == (error, line)
    with FakeTensorMode():
        assert refusal(lambda: lif(**{"x": torch.empty(4, 2, 3), **arguments})) == (error, line)
    if {"x", "surrogate"}.isdisjoint(arguments):
        got = refusal(lambda: IF(**arguments))
        assert got == (error, line.replace("lif:", "IF:"))


@pytest.mark.parametrize("value", [0.0, -1.0, INF, NAN])
@pytest.mark.parametrize("family", [ATan, Sigmoid, Rectangle, Triangle, FastSigmoid, Erf, LeakyReLU])
def test_bad_surrogate_parameter(family: type[Surrogate], value: float) -> None:
    name = next(f.name for f in dataclasses.fields(family) if f.init)
    line = f"{family.__name__}: {name} must be a positive finite number, got {value}"
    assert refusal(lambda: family(value)) == (ValueError, line)


def test_bad_neuron_arguments() -> None:
    assert refusal(lambda: LIF(0.5)) == (ValueError, "LIF: tau must be a finite number of steps >= 1, got 0.5")
    assert refusal(lambda: LIF(NAN)) == (ValueError, "LIF: tau must be a finite number of steps >= 1, got nan")
    assert refusal(lambda: PLIF(1.0)) == (ValueError, "PLIF: tau must be a finite number of steps > 1, got 1.0")
    assert refusal(lambda: Leaky(1.5)) == (ValueError, "Leaky: beta must be in (0, 1], got 1.5")
    assert refusal(lambda: Leaky(0.0)) == (ValueError, "Leaky: beta must be in (0, 1], got 0.0")
    assert refusal(lambda: Leaky(reset="none"))[1] == 'Leaky: reset must be "subtract" or "zero", got \'none\''


# ---- in networks: export, ahead-of-time compilation, autocast --------------------------------------------------------


class Net(nn.Module):
    """Conv-BN-LIF over [T, B, C, H, W]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.lif = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), LIF(2.0, surrogate=Erf())

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x.flatten(0, 1)))
        return self.lif(y.unflatten(0, x.shape[:2]))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def test_export(net: Net) -> None:
    x = values((4, 2, 2, 5, 5), torch.float32, False)
    program = torch.export.export(net, (x,))
    assert any("spikecore.lif_fwd" in str(node.target) for node in program.graph.nodes)
    assert torch.equal(program.module()(x), net(x))


@pytest.mark.slow
def test_aot_inductor(net: Net, tmp_path: Any) -> None:
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("no C++ compiler")
    x = values((4, 2, 2, 5, 5), torch.float32, False)
    with torch.no_grad():
        program = torch.export.export(net, (x,))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "net.pt2"))
        got, want = torch._inductor.aoti_load_package(path)(x), net(x)
    assert got.shape == want.shape
    assert set(got.unique().tolist()) == {0.0, 1.0}
    # Inductor may fuse and round the batch norm otherwise: a few spikes at the threshold may differ.
    assert (got != want).float().mean() < 0.01


def test_autocast(net: Net) -> None:
    x = values((4, 2, 2, 5, 5), torch.float32, False).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x)
        current = net.bn(net.conv(x.flatten(0, 1))).unflatten(0, x.shape[:2])
    assert y.dtype == current.dtype == torch.bfloat16
    assert torch.equal(y, lif_ref(current, surrogate=Erf())[0])
    y.float().sum().backward()
    assert x.grad.isfinite().all()
    assert net.conv.weight.grad.abs().sum() > 0
