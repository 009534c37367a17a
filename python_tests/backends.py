"""`spikecore.ops.lif` through another backend's launchers: the same public function, checks and autograd formula."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from spikecore.ops import lif
from spikecore.testing.cases import CASES, Sample, values

_lif = __import__("sys").modules["spikecore.ops.lif"]  # the module; the attribute of that name is the function


@contextlib.contextmanager
def _ops(**launchers: Callable) -> Iterator[None]:
    """torch.ops.spikecore.NAME replaced by the given callables."""
    originals = {name: getattr(torch.ops.spikecore, name) for name in launchers}
    try:
        for name, launcher in launchers.items():
            setattr(torch.ops.spikecore, name, launcher)
        yield
    finally:
        for name, original in originals.items():
            setattr(torch.ops.spikecore, name, original)


def lif_through(fwd: Callable, bwd: Callable) -> Callable:
    """A callable with `lif`'s signature and gradients whose kernels are the launchers `fwd` and `bwd`."""

    class Through(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = fwd(*inputs)
            _lif._setup_context(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            with _ops(lif_bwd=bwd):
                return _lif._backward(ctx, *grads)

    def through(*args: Any, **kwargs: Any) -> Any:
        with _ops(lif_fwd=Through.apply):
            return lif(*args, **kwargs)

    return through


def lif_samples(dtype: torch.dtype, lengths: tuple[int, ...] = (1, 4, 9, 50, 100)) -> list[Sample]:
    """Those of the sweep, off the grid, and sequences that cross the kernels' segments, blocks and vectors."""
    out = list(CASES["lif"].samples(dtype, False))
    for T in lengths:
        for N in (520, 517):
            every = {"return_h": True, "return_v": True, "v_init": torch.randn(N), "detach_reset": False}
            channels = {"decay": torch.rand(N), "gain": torch.rand(N), "channel_dim": 1}
            scalars = {"decay": torch.tensor(0.9), "gain": torch.tensor(0.7)}
            for name, changes in (
                ("hard", {**every, **channels}),
                ("soft", {**every, **scalars, "v_reset": None}),
                ("packed", {"packed": True, "v_init": torch.randn(N), **scalars}),
            ):
                out.append(Sample(f"T={T} N={N} {name}", {"x": values((T, N), dtype, False, T), **changes}))
    return out


def results(op: Callable, sample: Sample, seed: int = 0) -> dict[str, Tensor | None]:
    """Outputs and the gradients of every differentiable input, under random gradients of every output."""
    sample, leaves = sample.leaves()
    outputs = op(**sample.arguments)
    g = torch.Generator().manual_seed(seed)
    ends = [o for o in outputs if o.requires_grad]
    upstream = [torch.randn(o.shape, generator=g).to(o.dtype) for o in ends]
    gradients = torch.autograd.grad(ends, list(leaves.values()), upstream, allow_unused=True)
    named = dict(zip(CASES["lif"].outputs(sample), (o.detach() for o in outputs), strict=True))
    return named | {f"grad {name}": g for name, g in zip(leaves, gradients, strict=True)}


def assert_same(op: Callable, sample: Sample, reference: Callable = lif) -> None:
    """`op` gives the numbers of `reference`, every output and gradient, without tolerance; and their strides."""
    got, want = results(op, sample), results(reference, sample)
    assert got.keys() == want.keys()
    for name, w in want.items():
        g = got[name]
        if w is None or g is None:
            assert w is g, f"{sample}: {name}"
            continue
        assert (g.dtype, g.shape, g.stride()) == (w.dtype, w.shape, w.stride()), f"{sample}: {name}"
        differing = int((g != w).sum())
        assert torch.equal(g, w), f"{sample}: {differing} of {w.numel()} differ in {name}"


def triton_lif_facts(direction: str, dtype: torch.dtype, arch: int, *, aligned: bool = True, **changes: Any) -> Any:
    """`gpuless.aot.Facts` of lif_fwd_kernel or lif_bwd_kernel as the launchers call them: decay and gain per channel,
    all gradients wanted. `aligned`: N and x's step divisible by 16; `changes`: of the constants.
    """
    from gpuless import aot

    from spikecore.triton import lif as module

    kernel = getattr(module, f"lif_{direction}_kernel")
    x = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}[dtype]
    flags = {"HARD": True, "DECAY": True, "GAIN": True, "PER_CHANNEL": True, "V_INIT": True}
    flags["BN"] = module.BLOCK_BYTES // dtype.itemsize
    if direction == "fwd":
        flags |= {"H": False, "V": False, "PACKED": False}
    else:
        flags |= {
            "DETACH": True,
            "KIND": 0,
            "NEED_DECAY": True,
            "NEED_GAIN": True,
            "NEED_V_INIT": True,
            "SEG": module.SEGMENT,
        }
        flags |= {"G_S": True, "G_V_LAST": True, "G_H": False, "G_V": False}
    flags |= changes
    absent = {"p_h": "H", "p_v": "V", "p_g_h": "G_H", "p_g_v": "G_V"}
    constants = flags | {p: None for p, flag in absent.items() if p in kernel.arg_names and not flags[flag]}
    signature = {}
    for name in kernel.arg_names:
        if name in ("p_x", "p_s", "p_g_s", "p_g_x"):
            signature[name] = "*u8" if name == "p_s" and flags["PACKED"] else x
        else:
            signature[name] = "*fp32" if name.startswith("p_") else "fp32"
    signature |= dict.fromkeys(("T", "N", "x_step", "C", "inner"), "i32")
    divisible = [n for n in signature if n.startswith("p_") and n not in constants] + ["N", "x_step"] * aligned
    options = {"enable_fp_fusion": False}  # as _launch in spikecore/triton/lif.py
    return aot.triton_aot(kernel, signature, constants, arch, align16=divisible, options=options)
