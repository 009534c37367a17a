"""The samples of `codebook_lookup`: every metric, book, group, layout and size."""

from collections.abc import Iterator
from typing import Any

import torch

from spikecore.ops.codebook_lookup import METRICS, codebook_lookup, codebook_lookup_ref
from spikecore.testing.cases._case import LAYOUTS, Case, Sample, values


def _sample(
    name: str, dtype: torch.dtype, grid: bool, shape: tuple[int, ...] = (3, 7, 24), K: int = 37,
    layout: str = "contiguous", groups: int = 1, books: bool = False, mixed: bool = False, **arguments: Any,
) -> Sample:  # fmt: skip
    seed = sum(map(ord, name))
    D = shape[-1] // groups
    state = torch.float32 if mixed and dtype in (torch.bfloat16, torch.float16) else dtype
    z = LAYOUTS[layout](values(shape, dtype, grid, seed))
    codebook = values((groups, K, D) if books else (K, D), dtype, grid, seed + 1).to(state)
    return Sample(name, {"z": z, "codebook": codebook, "groups": groups, **arguments})


def _samples(dtype: torch.dtype, grid: bool) -> Iterator[Sample]:
    def sample(name: str, **changes: Any) -> Sample:
        return _sample(name, dtype, grid, **changes)

    for metric in METRICS:
        yield sample(metric, metric=metric)
        yield sample(f"{metric}, two groups", metric=metric, groups=2)
        yield sample(f"{metric}, two books", metric=metric, groups=2, books=True)
        yield sample(f"{metric}, several tiles", metric=metric, shape=(103, 40), K=261)
        yield sample(f"{metric}, few numbers", metric=metric, shape=(50, 2), K=70)  # many ties
        same = sample(f"{metric}, equal codes", metric=metric)
        same.arguments["codebook"][:] = same.arguments["codebook"][-1]
        yield same
    yield sample("float32 book", mixed=True, metric="l2", groups=3, shape=(5, 33))
    yield sample("one book in three dimensions", books=True)
    yield sample("three groups of one row", shape=(33,), groups=3, books=True)
    yield sample("unaligned", layout="unaligned")
    yield sample("rows apart", layout="slice of T", shape=(9, 24), metric="l2")
    yield sample("rows apart, one book for two groups", layout="slice of T", shape=(9, 24), groups=2)
    yield sample("every row the same", layout="expanded T", shape=(9, 24))
    yield sample("every other number", layout="every other channel", shape=(4, 2, 24))
    yield sample("numbers outermost", layout="time innermost", shape=(24, 6, 24))
    for n in (1, 12, 13, 97):
        yield sample(f"n={n}", shape=(n, 17), K=33)
    for D in (1, 15, 16, 31, 33, 64, 129):
        yield sample(f"D={D}", shape=(9, D), metric=METRICS[D % 3])
    for K in (1, 2, 31, 32, 33, 64, 700):
        yield sample(f"K={K}", K=K, shape=(20, 8), metric=METRICS[K % 3])
    yield sample("[D]", shape=(24,))
    for shape in ((0, 24), (3, 0, 24), (5, 0)):
        yield sample(f"empty {list(shape)}", shape=shape, K=5)
    yield sample("empty, books", shape=(0, 24), K=5, groups=2, books=True)


def _bytes(sample: Sample) -> tuple[int, int]:
    a = sample.arguments
    z, codebook = a["z"], a["codebook"]
    rows = z.shape[:-1].numel() * a["groups"]
    return 2 * z.nbytes + codebook.nbytes + 8 * rows, z.nbytes + 8 * rows + codebook.nbytes


def _large(dtype: torch.dtype) -> Iterator[Sample]:
    for metric in METRICS:
        yield _sample(metric, dtype, False, shape=(1500, 48), K=900, metric=metric)
    yield _sample("books", dtype, False, shape=(5000, 20), K=90, groups=2, books=True)


CASE = Case(
    name="codebook_lookup",
    op=codebook_lookup,
    ref=codebook_lookup_ref,
    registered=("codebook_lookup_fwd", "codebook_lookup_bwd"),
    dtypes=(torch.float32, torch.bfloat16, torch.float16, torch.float64),
    samples=_samples,
    outputs=lambda sample: ("indices", "values"),
    discrete=frozenset({"indices"}),
    bytes_moved=_bytes,
    few=("dot", "l2, two books", "cosine, two groups", "numbers outermost", "[D]", "empty [3, 0, 24]"),
    large=_large,
)
