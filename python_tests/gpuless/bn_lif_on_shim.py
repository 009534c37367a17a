"""bn_lif's launches for ctypes, held against plain formulas, and its source with planted defects."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence

import torch
from gpuless import shim
from gpuless.lif_on_shim import DTYPES, LifNeuron, _fields

from spikecore.testing.cases import values

SOURCE = shim.CSRC / "bn_lif/bn_lif_cuda.cu"

# ---- the structs of csrc/bn_lif/bn_lif.h


class BnShape(ctypes.Structure):
    _fields_ = _fields(i32="dtype", i64="T N C inner")


class BnNorm(ctypes.Structure):
    _fields_ = _fields(ptr="mean var weight bias", f64="eps")


class BnStats(ctypes.Structure):
    _fields_ = [("shape", BnShape), *_fields(i64="x_step", ptr="x mean var sums", i64_="parts", flag="again")]


class BnLifFwd(ctypes.Structure):
    _fields_ = [
        ("shape", BnShape), ("norm", BnNorm), ("neuron", LifNeuron),
        *_fields(i64="x_step r_step", ptr="x residual v_init s y", flag="take_stats", ptr_="constants"),
    ]  # fmt: skip


class BnLifBwd(ctypes.Structure):
    _fields_ = [
        ("shape", BnShape), ("norm", BnNorm), ("neuron", LifNeuron),
        *_fields(i64="x_step r_step", ptr="x residual v_init g_s g_y g g_x g_v_init g_weight g_bias g_decay g_gain"),
        *_fields(flag="batch detach", i32="surrogate", f64="a b", ptr="sums", i64_="parts", ptr_="checkpoints"),
        *_fields(i32="steps", ptr="constants"),
    ]  # fmt: skip


def source(edits: Sequence[tuple[str, str]] = ()) -> str:
    """bn_lif_cuda.cu for float32 alone, as compiling takes the time, with the given text replaced."""
    text, n = re.subn(r"(return (?:stats|forward|backward))<__\w+>", r"\1<float>", SOURCE.read_text())
    assert n == 6
    for old, new in edits:
        assert old in text, f"{SOURCE.name} no longer contains {old!r}"
        text = text.replace(old, new)
    return text


# ---- launches; x: [T, outer, C, inner]


class Launch:
    """A launcher's parameters and the buffers that it may touch, each apart from the others."""

    def __init__(self, kind: type[ctypes.Structure], size: tuple[int, int, int, int], dtype: torch.dtype) -> None:
        T, outer, C, inner = size
        self.size, self.C, self.N = size, C, outer * C * inner
        self.shape = BnShape(DTYPES.index(dtype), T, self.N, C, inner)
        self.p = kind(shape=self.shape, x_step=self.N)
        self.buffers = {"ro_x": values(size, dtype, False)}

    def place(self, **buffers: torch.Tensor) -> None:
        self.buffers |= buffers

    def poison(self, **counts: tuple[torch.dtype, int]) -> None:
        self.buffers |= {name: torch.full((n,), torch.nan, dtype=dtype) for name, (dtype, n) in counts.items()}

    def norm_and_neuron(self) -> None:
        made = {"ro_mean": torch.linspace(0.5, 1.5, self.C), "ro_var": torch.linspace(1, 2, self.C)}
        made |= {"ro_weight": torch.linspace(0.75, 1.25, self.C), "ro_bias": torch.linspace(0, 0.5, self.C)}
        self.place(**made)
        self.p.neuron = LifNeuron(0.5, 0.5, None, None, self.C, self.shape.inner, 1.0, 0.0, 1.0, True, False)

    def run(self, library: shim.Shim, symbol: str, coalescing: bool = False) -> None:
        self.buffers = shim.apart(self.buffers)
        library.reset(0, coalescing, **self.buffers)
        pointers = {name.removeprefix("ro_"): t.data_ptr() for name, t in self.buffers.items()}
        norm = [pointers.pop(name, None) for name in ("mean", "var", "weight", "bias")]
        if hasattr(self.p, "norm"):
            self.p.norm = BnNorm(*norm, 1e-5)
        else:
            self.p.mean, self.p.var = norm[:2]
        for name, pointer in pointers.items():
            setattr(self.p, name, pointer)
        if "g_x" in pointers:
            self.p.g = self.p.g_x  # where only g_x is wanted
        assert library.call(f"spk::{symbol}", ctypes.byref(self.p), None) == 0

    def parts(self, library: shim.Shim, T: int) -> int:
        return library.call("spk::bn_parts_cuda", ctypes.byref(BnShape(0, T, self.N, self.C, self.shape.inner)))

    def places(self) -> int:
        return self.C if self.shape.inner >= 32 else self.C * self.shape.inner


MAPS, PERIODS = (3, 6, 3, 64), (3, 10, 24, 1)
MANY, MANY_PERIODS = (3, 72, 3, 64), (3, 60, 24, 1)  # sums in several parts


def differing(**pairs: tuple[torch.Tensor, torch.Tensor]) -> str:
    """What differs, pair by pair: "3 of 24 differ in var"; statistics and gradients up to a few roundings."""
    wrong = {}
    for name, (got, want) in pairs.items():
        near = (got.double() - want.double()).abs() <= 8 * torch.finfo(torch.float32).eps * want.abs().max()
        wrong[name] = int((~(near if name not in ("s", "y") else got == want)).sum())
    return "; ".join(f"{n} of {pairs[name][0].numel()} differ in {name}" for name, n in wrong.items() if n)


def run_stats(library: shim.Shim, size: tuple[int, int, int, int] = MAPS) -> str:
    """Launches; what is wrong: a fault, or numbers that differ."""
    launch = Launch(BnStats, size, torch.float32)
    launch.p.parts = launch.parts(library, size[0])
    launch.poison(mean=(torch.float32, launch.C), var=(torch.float32, launch.C))
    launch.poison(sums=(torch.float64, 2 * launch.p.parts * launch.places()))
    launch.run(library, "bn_stats_cuda")
    b, x = launch.buffers, launch.buffers["ro_x"].double()
    mean, var = x.mean((0, 1, 3)), x.var((0, 1, 3), correction=0)
    return library.error or differing(mean=(b["mean"], mean), var=(b["var"], var))


def normalised(launch: Launch) -> torch.Tensor:
    """y in the rounding of every backend."""
    x, mean, var, weight, bias = (launch.buffers[f"ro_{n}"] for n in ("x", "mean", "var", "weight", "bias"))
    scale = weight * (1 / torch.sqrt(var.double() + 1e-5)).float()
    return (x.float() - mean[:, None]) * scale[:, None] + bias[:, None]


def prepared_forward(size: tuple[int, int, int, int], dtype: torch.dtype = torch.float32) -> Launch:
    launch = Launch(BnLifFwd, size, dtype)
    launch.norm_and_neuron()
    like = torch.full(size, torch.nan, dtype=dtype)
    launch.place(s=like, y=like.clone(), constants=torch.full((5 * launch.C,), torch.nan))
    return launch


def run_forward(library: shim.Shim, size: tuple[int, int, int, int] = MAPS) -> str:
    launch = prepared_forward(size)
    launch.run(library, "bn_lif_fwd_cuda", coalescing=True)
    y, v, spikes = normalised(launch), torch.zeros(size[1:]), []
    for y_t in y:
        h = 0.5 * v + 0.5 * y_t
        spikes.append((h >= 1).float())
        v = torch.where(h >= 1, 0, h)
    wrong = library.error or differing(y=(launch.buffers["y"], y), s=(launch.buffers["s"], torch.stack(spikes)))
    requests, sectors = library.coalescing(True)
    if not wrong and library.count(True, 16) and sectors > 16 * requests:
        return f"uncoalesced: {sectors} sectors written by {requests} requests"
    return wrong


def run_backward(library: shim.Shim, size: tuple[int, int, int, int] = (25, *MAPS[1:])) -> str:
    """In three segments of nine steps; statistics are those of x."""
    launch = Launch(BnLifBwd, size, torch.float32)
    launch.norm_and_neuron()
    T = size[0]
    p = launch.p
    p.batch, p.detach, p.a, p.parts = True, True, 2.0, launch.parts(library, 1)
    p.steps = library.call("spk::bn_lif_bwd_steps", T)
    launch.place(ro_g_s=torch.randn(size), g_x=torch.full(size, torch.nan))
    launch.poison(g_weight=(torch.float32, launch.C), g_bias=(torch.float32, launch.C))
    launch.poison(sums=(torch.float64, 4 * p.parts * launch.places()), constants=(torch.float32, 7 * launch.C))
    if checkpoints := (T - 1) // p.steps:
        launch.poison(checkpoints=(torch.float32, checkpoints * launch.N))
    launch.run(library, "bn_lif_bwd_cuda")
    return library.error or differing(**gradients(launch))


def gradients(launch: Launch) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What a backward launch left, beside the formula in float64."""
    b = launch.buffers
    y, v, h = normalised(launch), torch.zeros(launch.size[1:]), []
    for y_t in y:
        h.append(0.5 * v + 0.5 * y_t)
        v = torch.where(h[-1] >= 1, 0, h[-1])
    g, g_v = [], torch.zeros(launch.size[1:], dtype=torch.float64)
    for h_t, g_s in zip(reversed(h), reversed(b["ro_g_s"].double()), strict=True):
        g_h = g_s / (1 + (torch.pi * (h_t.double() - 1)) ** 2) + torch.where(h_t >= 1, 0, g_v)
        g_v = 0.5 * g_h
        g.insert(0, 0.5 * g_h)
    g_y, x = torch.stack(g), b["ro_x"].double() - b["ro_mean"].double()[:, None]
    inverse = 1 / torch.sqrt(b["ro_var"].double() + 1e-5)
    g_weight, g_bias, n = (g_y * x).sum((0, 1, 3)) * inverse, g_y.sum((0, 1, 3)), g_y.numel() / launch.C
    to_x = g_y - (g_bias / n)[:, None] - x * (g_weight * inverse / n)[:, None]
    g_x = to_x * (b["ro_weight"].double() * inverse)[:, None]
    return {"g_x": (b["g_x"], g_x), "g_weight": (b["g_weight"], g_weight), "g_bias": (b["g_bias"], g_bias)}
