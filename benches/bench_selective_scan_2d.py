"""`selective_scan_2d` (four directions, softplus) against the plain loop and mambapy's pscan on permuted copies.

A peer is a function of the operator's arguments that raises ImportError where it is not installed.
"""

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from spikecore import ops
from spikecore.ops import cross_merge, cross_scan, selective_scan_2d, selective_scan_2d_ref
from spikecore.testing.cases import CASES
from spikecore.testing.cases.selective_scan_2d import sample
from spikecore.testing.compare import assert_close
from spikecore.testing.timing import Problem, Scaling

DISTRIBUTIONS = ("mambapy", "mamba-ssm")
Scan = Callable[..., Tensor]

# name: (sizes, {direction: {contestant: times our time it must take}})
SHAPES: dict[str, tuple[dict[str, int], dict[str, dict[str, float]]]] = {
    "B=2 C=96 S=1 56x56": ({"B": 2, "C": 96, "S": 1, "H": 56, "W": 56}, {}),
    "B=2 C=192 S=1 56x56": (
        {"B": 2, "C": 192, "S": 1, "H": 56, "W": 56},
        {"forward": {"loop": 50.0, "mambapy": 20.0}, "training": {"loop": 20.0, "mambapy": 20.0}},
    ),
    "B=2 C=384 S=16 14x14": (
        {"B": 2, "C": 384, "S": 16, "H": 14, "W": 14},
        {"forward": {"loop": 50.0, "mambapy": 20.0}, "training": {"loop": 20.0, "mambapy": 20.0}},
    ),
}
# Of a GPU, beyond its caches.
LARGE: dict[str, tuple[dict[str, int], dict[str, dict[str, float]]]] = {
    "B=32 C=192 S=1 56x56": ({"B": 32, "C": 192, "S": 1, "H": 56, "W": 56}, {}),
    "B=32 C=384 S=16 14x14": ({"B": 32, "C": 384, "S": 16, "H": 14, "W": 14}, {}),
}
QUICK: dict[str, tuple[dict[str, int], dict[str, dict[str, float]]]] = {
    "B=1 C=20 S=2 6x5": ({"B": 1, "C": 20, "S": 2, "H": 6, "W": 5}, {}),
}


def _walked(t: Tensor) -> Tensor:
    return torch.stack([cross_scan(t[:, k], (k,))[:, 0] for k in range(t.shape[1])], 1)


def _on_copies(scan: Scan) -> Scan:
    """A scan of ``[B, K C, L]`` sequences on the permuted copies of VMamba."""

    def run(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor) -> Tensor:
        H, W = x.shape[2:]
        u, dt = cross_scan(x).flatten(1, 2), _walked(delta).flatten(1, 2)
        y = scan(u, dt, A.flatten(0, 1), _walked(B), _walked(C), D.flatten(), delta_bias.flatten())
        return cross_merge(y.unflatten(1, (4, -1)), H, W).unflatten(2, (H, W))

    return run


def _materialised(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """exp(dt A) and dt B u: [B, L, K C, S], and C: [B, L, K C, S]."""
    dt = torch.nn.functional.softplus(dt + bias.unsqueeze(-1)).transpose(1, 2).unsqueeze(-1)
    B, C = (t.permute(0, 3, 1, 2).repeat_interleave(len(A) // t.shape[1], 2) for t in (B, C))
    return torch.exp(dt * A), dt * B * u.transpose(1, 2).unsqueeze(-1), C


def _loop(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> Tensor:
    # With `unbind`: the backward of indexing is quadratic in L.
    decays, steps, C = _materialised(u, dt, A, B, C, bias)
    h, ys = torch.zeros_like(steps[:, 0]), []
    for decay_l, step_l, C_l in zip(decays.unbind(1), steps.unbind(1), C.unbind(1), strict=True):
        h = decay_l * h + step_l
        ys.append((h * C_l).sum(-1))
    return torch.stack(ys, 2) + D.unsqueeze(-1) * u


def _mambapy() -> Scan:
    pscan = importlib.import_module("mambapy.pscan").pscan

    def scan(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> Tensor:
        decays, steps, C = _materialised(u, dt, A, B, C, bias)
        return (pscan(decays, steps) * C).sum(-1).transpose(1, 2) + D.unsqueeze(-1) * u

    return _on_copies(scan)


def _composed() -> Scan:
    """This package's own one-dimensional scan on the copies."""
    scan = getattr(ops, "selective_scan", None)
    if scan is None:
        raise ImportError("no selective_scan here")

    def run(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> Tensor:
        return scan(u, dt, A, B, C, D, None, bias, True)

    return _on_copies(run)


def _mamba_ssm() -> Scan:
    """Its CUDA kernels on the copies, on a GPU alone."""
    scan = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn

    def run(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> Tensor:
        return scan(u, dt, A, B, C, D, None, bias, True)

    return _on_copies(run)


def ours(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor) -> Tensor:
    return selective_scan_2d(x, delta, A, B, C, D, delta_bias, True)


PEERS: dict[str, Callable[[], Scan]] = {
    "loop": lambda: _on_copies(_loop),
    "mambapy": _mambapy,
    "copies + selective_scan": _composed,
    "copies + mamba-ssm": _mamba_ssm,
}


def inputs(sizes: dict[str, int], device: str) -> tuple[Tensor, ...]:
    drawn = sample("bench", torch.float32, False, **sizes)  # type: ignore[arg-type]
    return tuple(t.to(device) for t in drawn.tensors().values())


def train(f: Scan, leaves: tuple[Tensor, ...], g_y: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(f(*leaves), leaves, g_y)


def parity(device: str) -> None:
    """Outputs and gradients as close to float64 as the reference's own precision allows, on inputs as timed below."""
    drawn = sample("bench", torch.float32, False, B=2, C=20, H=7, W=9, S=3)
    names = list(drawn.tensors())
    leaves = tuple(t.to(device).requires_grad_() for t in drawn.tensors().values())
    exact = tuple(t.detach().cpu().double().requires_grad_() for t in leaves)
    g_y = torch.randn(leaves[0].shape, generator=torch.Generator().manual_seed(1)).to(device)

    def ref(*tensors: Tensor) -> Tensor:
        return selective_scan_2d_ref(*tensors, delta_softplus=True)

    for f in (ours, *(make() for peer, make in _present().items() if peer != "copies + mamba-ssm")):  # inexact exp
        assert_close(f(*leaves).cpu(), ref(*leaves).cpu(), ref(*exact), "y")
    got, want, want64 = train(ours, leaves, g_y), train(ref, leaves, g_y), train(ref, exact, g_y.cpu().double())
    for name, *g in zip(names, got, want, want64, strict=True):
        assert_close(*(t.cpu() for t in g), f"gradient of {name}")


def _present() -> dict[str, Callable[[], Scan]]:
    found = {}
    for peer, make in PEERS.items():
        try:
            make()
        except ImportError:
            continue
        found[peer] = make
    return found


def problem(name: str, sizes: dict[str, int], direction: str, device: str, bars: dict[str, float]) -> Problem:
    tensors = inputs(sizes, device)
    leaves, g_y = tuple(t.clone().requires_grad_() for t in tensors), torch.randn_like(tensors[0])
    runs: dict[str, Scan] = {"spikecore": ours}
    skipped: dict[str, str] = {}
    for peer, make in PEERS.items():
        try:
            runs[peer] = make()
        except ImportError as e:
            skipped[peer] = str(e)
    if direction == "forward":
        calls = {peer: _inference(f, tensors) for peer, f in runs.items()}
    else:
        calls = {peer: partial(train, f, leaves, g_y) for peer, f in runs.items()}
    maps = tuple(t for t in tensors if t.dim() > 3)
    copies = [torch.empty_like(t) for t in maps]

    def copy() -> None:
        for to, t in zip(copies, maps, strict=True):
            to.copy_(t)

    must_move = CASES["selective_scan_2d"].bytes_moved(sample(name, torch.float32, False, **sizes))  # type: ignore[arg-type]
    return Problem(
        name=name,
        direction=direction,
        calls={"copy": copy, **calls},
        must_move=must_move[0] + must_move[1] * (direction == "training"),
        copied=2 * sum(t.nbytes for t in maps),
        inputs=leaves,
        trained={p: partial(f, *leaves) for p, f in runs.items()} if direction == "training" else {},
        bars=bars if device == "cpu" else {},
        skipped=skipped,
    )


def problems(device: str, quick: bool) -> Iterator[Problem]:
    for name, (sizes, bars) in (QUICK if quick else SHAPES if device == "cpu" else LARGE).items():
        for direction in ("forward", "training"):
            yield problem(name, sizes, direction, device, bars.get(direction, {}))


def scaling(device: str, quick: bool) -> Iterator[Scaling]:
    """Time and memory over the number of places on a square map."""
    sides = (4, 8) if quick else (32, 64, 128, 256)
    for direction in ("forward", "training"):
        rows: dict[int, Problem] = {}
        for side in sides:
            sizes: dict[str, Any] = {"B": 1, "C": 32, "S": 4, "H": side, "W": side}
            row = problem(f"L={side * side}", sizes, direction, device, {})
            if side > 64:  # the others take a gigabyte and more, or minutes
                row.calls = {
                    n: c for n, c in row.calls.items() if n in ("copy", "spikecore", "copies + selective_scan")
                }
                row.trained = {n: f for n, f in row.trained.items() if n in row.calls}
            rows[side * side] = row
        yield Scaling(f"selective_scan_2d, {direction}, B=1 C=32 S=4, square maps", "L", rows)


def _inference(f: Scan, tensors: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.no_grad():
            return f(*tensors)

    return run
