"""`codebook_lookup` (dot product) against faiss' flat index, matrix product and argmax, vector-quantize-pytorch.

A peer is a function of the book that returns z -> indices; it raises ImportError where it is not installed.
"""

import importlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from spikecore.ops import codebook_lookup
from spikecore.ops.codebook_lookup import codebook_lookup_ref
from spikecore.testing.cases import CASES, Sample
from spikecore.testing.timing import Problem, Scaling

DISTRIBUTIONS = ("faiss-cpu", "vector-quantize-pytorch")
Lookup = Callable[[Tensor], Tensor]

SHAPES = {
    "n=3152 K=5000 D=768": (3152, 5000, 768),
    "n=197 K=5000 D=768": (197, 5000, 768),
    "n=4096 K=1024 D=64": (4096, 1024, 64),
}
# Of a GPU; in half precision it multiplies on tensor cores.
LARGE = {
    "n=50432 K=5000 D=768": (50432, 5000, 768),
    "n=50432 K=5000 D=768 bfloat16": (50432, 5000, 768),
    "n=3152 K=5000 D=768": (3152, 5000, 768),
    "n=262144 K=1024 D=64": (262144, 1024, 64),
}
QUICK = {"n=100 K=70 D=24": (100, 70, 24)}
FAISS = 1.0  # times our time that faiss must take at least


def ours(codebook: Tensor) -> Lookup:
    return lambda z: codebook_lookup(z, codebook)[0]


def argmax(codebook: Tensor) -> Lookup:
    return lambda z: (z @ codebook.T).argmax(1)


def product(codebook: Tensor) -> Lookup:
    """The matrix product alone: what every scan in float32 has to take."""
    return lambda z: z @ codebook.T


def faiss(codebook: Tensor) -> Lookup:
    if codebook.device.type != "cpu":
        raise ImportError("faiss-cpu runs on the CPU only")
    module = importlib.import_module("faiss")
    module.omp_set_num_threads(torch.get_num_threads())
    index = module.IndexFlatIP(codebook.shape[1])
    index.add(codebook.numpy())
    return lambda z: torch.from_numpy(index.search(z.detach().numpy(), 1)[1][:, 0])


def vector_quantize(codebook: Tensor) -> Lookup:
    """Its Euclidean codebook, in inference; on codes of one length that is the same look-up."""
    module = importlib.import_module("vector_quantize_pytorch")
    K, D = codebook.shape
    layer = module.VectorQuantize(dim=D, codebook_size=K).eval().to(codebook.device)
    layer._codebook.embed.data.copy_(codebook)

    def run(z: Tensor) -> Tensor:
        with torch.no_grad():
            return layer(z.unsqueeze(0))[1].squeeze(0)

    return run


PEERS: dict[str, Callable[[Tensor], Lookup]] = {
    "faiss": faiss,
    "argmax": argmax,
    "product": product,
    "vector-quantize": vector_quantize,
}


def inputs(n: int, K: int, D: int, device: str) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    z, codebook = torch.randn(n, D, generator=g), torch.randn(K, D, generator=g)
    return z.to(device), torch.nn.functional.normalize(codebook, dim=1).to(device)


def parity(device: str) -> None:
    """Indices equal to the reference's, on inputs as timed below and where most codes tie."""
    for n, K, D in ((197, 500, 768), (400, 1024, 64)):
        z, codebook = inputs(n, K, D, device)
        for metric in ("dot", "l2", "cosine"):
            got, want = codebook_lookup(z, codebook, metric)[0], codebook_lookup_ref(z, codebook, metric)[0]
            assert torch.equal(got, want), f"n={n} K={K} D={D} {metric}: {int((got != want).sum())} of {n} differ"
    z, codebook = torch.ones(50, 8, device=device), torch.ones(300, 8, device=device)
    assert not codebook_lookup(z, codebook)[0].any(), "of equal codes the first must win"
    assert torch.equal(ours(codebook)(z), codebook_lookup_ref(z, codebook)[0])


def problem(name: str, shape: tuple[int, int, int], device: str, bars: dict[str, float]) -> Problem:
    z, codebook = (t.to(torch.bfloat16 if "bfloat16" in name else t.dtype) for t in inputs(*shape, device))
    out, runs, skipped = torch.empty_like(z), {"spikecore": ours(codebook)}, {}
    for peer, make in PEERS.items():
        try:
            runs[peer] = make(codebook)
        except ImportError as e:
            skipped[peer] = str(e)
    return Problem(
        name=name,
        direction="forward",
        calls={"copy": partial(out.copy_, z), **{peer: partial(f, z) for peer, f in runs.items()}},
        must_move=CASES["codebook_lookup"].bytes_moved(Sample(name, {"z": z, "codebook": codebook, "groups": 1}))[0],
        copied=2 * z.nbytes,
        inputs=(z,),
        bars=bars,
        skipped=skipped,
    )


def problems(device: str, quick: bool) -> Iterator[Problem]:
    for name, shape in (QUICK if quick else SHAPES if device == "cpu" else LARGE).items():
        yield problem(name, shape, device, {} if quick or device != "cpu" else {"faiss": FAISS})
    yield training("n=100 K=70 D=24" if quick else "n=3152 K=5000 D=768", device, quick)


def training(name: str, device: str, quick: bool) -> Problem:
    """Values and their gradients to z and the book, against the same by torch."""
    z, codebook = inputs(*(QUICK if quick else SHAPES)[name], device)
    z.requires_grad_()
    codebook.requires_grad_()
    out, g = torch.empty_like(z), torch.randn_like(z)

    def eager() -> Tensor:
        values = torch.nn.functional.embedding((z.detach() @ codebook.detach().T).argmax(1), codebook)
        return values + (z - z.detach())

    def step(f: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(f(), (z, codebook), g)

    def own() -> Tensor:
        return codebook_lookup(z, codebook)[1]

    moved = CASES["codebook_lookup"].bytes_moved(Sample(name, {"z": z, "codebook": codebook, "groups": 1}))
    return Problem(
        name=name,
        direction="training",
        calls={"copy": partial(out.copy_, z.detach()), "spikecore": partial(step, own), "argmax": partial(step, eager)},
        must_move=sum(moved),
        copied=2 * z.nbytes,
        inputs=(z, codebook),
        trained={"spikecore": own, "argmax": eager},
        kept=8 * len(z),  # the indices
    )


def scaling(device: str, quick: bool) -> Iterator[Scaling]:
    """Time and memory over the number of codes, and over that of rows."""
    powers = (6, 7) if quick else (8, 10, 12, 14)
    n, K, D = (50, 64, 16) if quick else (1024, 1024, 256)
    yield Scaling(
        "codebook_lookup over K", "K", {1 << p: problem(f"K=2^{p}", (n, 1 << p, D), device, {}) for p in powers}
    )
    yield Scaling(
        "codebook_lookup over n", "n", {1 << p: problem(f"n=2^{p}", (1 << p, K, D), device, {}) for p in powers}
    )
