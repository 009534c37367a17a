"""`selective_scan` (softplus, bias, D) against a plain torch loop, mambapy's scan, mamba-ssm and torch.compile.

A peer is a function of the same arguments; one that cannot be had raises ImportError where it is made.
"""

import importlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from spikecore.ops import selective_scan, selective_scan_ref
from spikecore.testing.cases import CASES, Sample
from spikecore.testing.compare import assert_close
from spikecore.testing.timing import Problem, Scaling

DISTRIBUTIONS = ("mambapy", "mamba-ssm")
Scan = Callable[..., Tensor]

# name: (B, C, S, L)
SHAPES = {"B=2 C=384 S=1 L=3136": (2, 384, 1, 3136), "B=2 C=768 S=16 L=784": (2, 768, 16, 784)}
LARGE = {"B=32 C=384 S=1 L=3136": (32, 384, 1, 3136), "B=32 C=768 S=16 L=784": (32, 768, 16, 784)}  # of a GPU
QUICK = {"B=1 C=16 S=2 L=64": (1, 16, 2, 64)}


def ours(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> Tensor:
    return selective_scan(u, delta, A, B, C, D, delta_bias=bias, delta_softplus=True)


def loop(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> Tensor:
    """What mamba's reference does, with `unbind`: its indexing has a backward that is quadratic in L."""
    dt = F.softplus(delta + bias.unsqueeze(-1))
    decay = torch.exp(torch.einsum("bcl,cs->bcls", dt, A))
    x = torch.einsum("bcl,bsl,bcl->bcls", dt, B, u)
    h, ys = u.new_zeros(*u.shape[:2], A.shape[1]), []
    for decay_l, x_l, C_l in zip(decay.unbind(2), x.unbind(2), C.unbind(2), strict=True):
        h = decay_l * h + x_l
        ys.append(torch.einsum("bcs,bs->bc", h, C_l))
    return torch.stack(ys, -1) + u * D.unsqueeze(-1)


def mambapy() -> Scan:
    pscan = importlib.import_module("mambapy.pscan").pscan

    def run(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> Tensor:
        u, B, C = u.mT, B.mT, C.mT  # its layout has L before the channels
        dt = F.softplus(delta + bias.unsqueeze(-1)).mT
        h = pscan(torch.exp(dt.unsqueeze(-1) * A), dt.unsqueeze(-1) * B.unsqueeze(2) * u.unsqueeze(-1))
        return ((h @ C.unsqueeze(-1)).squeeze(3) + D * u).mT

    return run


def mamba_ssm() -> Scan:
    """Its CUDA kernels, on a GPU alone."""
    return partial(_mamba_ssm, importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn)


def _mamba_ssm(
    scan: Callable[..., Tensor], u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor
) -> Tensor:
    return scan(u, delta, A, B, C, D, delta_bias=bias, delta_softplus=True)


def compiled() -> Scan:
    raise ImportError("it unrolls the loop over L, and compiles for many minutes")


PEERS: dict[str, Callable[[], Scan]] = {
    "loop": lambda: loop,
    "mambapy": mambapy,
    "mamba-ssm": mamba_ssm,
    "torch.compile": compiled,
}
BARS = {"forward": {"loop": 50.0, "mambapy": 20.0}, "training": {"loop": 20.0, "mambapy": 20.0}}


def inputs(B: int, C: int, S: int, L: int, device: str) -> list[Tensor]:
    """Steps and decays as mamba starts with: steps of 0.001 to 0.1, A = -1 ... -S."""
    g = torch.Generator().manual_seed(0)
    delta, bias = torch.randn(B, C, L, generator=g) * 0.5, torch.rand(C, generator=g) * 4.6 - 6.9
    A = -torch.arange(1.0, S + 1).expand(C, S).contiguous()
    u, Bs, Cs = (torch.randn(*shape, generator=g) for shape in ((B, C, L), (B, S, L), (B, S, L)))
    return [t.to(device) for t in (u, delta, A, Bs, Cs, torch.ones(C), bias)]


def train(f: Scan, leaves: list[Tensor], g_y: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(f(*leaves), leaves, g_y)


def parity(device: str) -> None:
    """Outputs and gradients as close to float64 as the reference's in float32."""

    def reference(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> Tensor:
        return selective_scan_ref(u, delta, A, B, C, D, delta_bias=bias, delta_softplus=True)

    for shape in ((2, 40, 1, 200), (2, 40, 16, 100)):
        leaves = [t.requires_grad_() for t in inputs(*shape, device)]
        g_y = torch.randn(leaves[0].shape, generator=torch.Generator().manual_seed(1)).to(device)
        exact = [t.detach().double().requires_grad_() for t in leaves]
        assert_close(ours(*leaves), reference(*leaves), reference(*exact), f"{shape}: y")
        got = train(ours, leaves, g_y), train(reference, leaves, g_y), train(reference, exact, g_y.double())
        for name, *g in zip(("u", "delta", "A", "B", "C", "D", "delta_bias"), *got, strict=True):
            assert_close(*g, f"{shape}: gradient of {name}")


def _present() -> tuple[dict[str, Scan], dict[str, str]]:
    """The contestants, and why others are absent."""
    runs, skipped = {"spikecore": ours}, {}
    for peer, make in PEERS.items():
        try:
            runs[peer] = make()
        except ImportError as e:
            skipped[peer] = str(e)
    return runs, skipped


def problems(device: str, quick: bool) -> Iterator[Problem]:
    runs, skipped = _present()
    for name, shape in (QUICK if quick else SHAPES if device == "cpu" else LARGE).items():
        for direction in ("forward", "training"):
            bars = {} if quick or device != "cpu" else BARS[direction]
            yield _problem(name, shape, direction, device, runs, bars, skipped)


def _problem(
    name: str, shape: tuple[int, int, int, int], direction: str, device: str, runs: dict[str, Scan],
    bars: dict[str, float], skipped: dict[str, str],
) -> Problem:  # fmt: skip
    tensors = inputs(*shape, device)
    leaves, u = [t.clone().requires_grad_() for t in tensors], tensors[0]
    g_y, out = torch.randn_like(u), torch.empty_like(u)
    names = ("u", "delta", "A", "B", "C", "D", "delta_bias")
    must_move = CASES["selective_scan"].bytes_moved(Sample(name, dict(zip(names, tensors, strict=True))))
    training = direction == "training"
    calls = {peer: partial(train, f, leaves, g_y) if training else _inference(f, tensors) for peer, f in runs.items()}
    return Problem(
        name=name,
        direction=direction,
        calls={"copy": partial(out.copy_, u), **calls},
        must_move=must_move[0] + must_move[1] * training,
        copied=2 * u.nbytes,
        inputs=tuple(leaves),
        trained={p: partial(f, *leaves) for p, f in runs.items()} if training else {},
        bars=bars,
        skipped=skipped,
    )


def _inference(f: Scan, tensors: list[Tensor]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.no_grad():
            return f(*tensors)

    return run


def scaling(device: str, quick: bool) -> Iterator[Scaling]:
    """Time and memory along L, forward and backward: both grow linearly."""
    lengths = (64, 128) if quick else tuple(1 << n for n in range(10, 17))
    peers = {name: run for name, run in _present()[0].items() if name != "loop"}  # whose steps take minutes to profile
    at = {}
    for L in lengths:
        runs = peers if L <= 8192 else {"spikecore": ours}  # mambapy's takes gigabytes then
        at[L] = _problem(f"L={L}", (1, 64, 16, L), "training", device, runs, {}, {})
    yield Scaling("training, B=1 C=64 S=16", "L", at)
