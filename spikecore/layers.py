"""Layers that keep a codebook: `Codebook`, learned with the network, and `MergingCodebook`, filled from a stream."""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spikecore.ops import codebook_decode, codebook_lookup

__all__ = ["Codebook", "CodebookOutput", "MergingCodebook", "kmeans_plus_plus"]


class CodebookOutput(NamedTuple):
    """What a `Codebook` returns: ``values [..., dim]``, ``indices [...]``, the commitment loss, and of this batch (over
    all ranks) each code's share of the rows ``usage [K]`` and ``perplexity = exp(entropy of usage)``.
    """

    values: Tensor
    indices: Tensor
    loss: Tensor
    usage: Tensor
    perplexity: Tensor


class Codebook(nn.Module):
    """A vector-quantisation layer (van den Oord et al. 2017).

    In training, the first batch starts the book by k-means++ (Arthur & Vassilvitskii 2007). ``update="ema"`` then moves
    each code to a running mean of its rows (no gradient reaches the book); ``update="gradient"`` leaves it to an
    optimiser, by the gradient of the values and of ``mean |code - z|^2`` in the loss. A code that wins less than
    `dead_below` rows a batch, in the running mean, is revived: it becomes a row of the batch, and its statistics start
    afresh.

    Under `torch.distributed` every rank must call the layer as often; sums, starts and revivals are taken over all of
    them, so that all hold the book that one process with the joined batch (in the order of the ranks) would hold.

    Args:
        codes, dim: size of the book.
        metric: as in `codebook_lookup`. With "cosine" codes are kept at length 1.
        update: "ema" or "gradient".
        decay: of the running means.
        commitment: weight of ``mean |z - code|^2`` in the loss, which pulls z to its code.
        dead_below: 0 revives none.
        eps: added to counts (Laplace smoothing), so that no code is divided by 0.
        seed: of the start and the revivals.
    """

    def __init__(
        self, codes: int, dim: int, *, metric: str = "l2", update: str = "ema", decay: float = 0.99,
        commitment: float = 0.25, dead_below: float = 0.01, eps: float = 1e-5, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        if codes < 1 or dim < 1:
            raise ValueError(f"Codebook: codes and dim must be at least 1, got {codes} and {dim}")
        if update not in ("ema", "gradient"):
            raise ValueError(f"Codebook: update must be 'ema' or 'gradient', got {update!r}")
        if not 0 <= decay < 1:
            raise ValueError(f"Codebook: decay must be in [0, 1), got {decay}")
        self.metric, self.update, self.decay, self.commitment = metric, update, decay, commitment
        self.dead_below, self.eps, self.seed = dead_below, eps, seed
        book = torch.randn(codes, dim, generator=torch.Generator().manual_seed(seed)) / dim**0.5
        if update == "gradient":
            self.book = nn.Parameter(book)
        else:
            self.register_buffer("book", book)
        # Running means a batch: rows that a code won, and their sum.
        self.register_buffer("counts", torch.ones(codes))
        self.register_buffer("sums", book.clone())
        self.register_buffer("started", torch.tensor(False))
        self.register_buffer("batches", torch.tensor(0))

    book: Tensor
    counts: Tensor
    sums: Tensor
    started: Tensor
    batches: Tensor

    def extra_repr(self) -> str:
        return f"{self.book.shape[0]}, {self.book.shape[1]}, metric={self.metric!r}, update={self.update!r}"

    def forward(self, z: Tensor) -> CodebookOutput:
        """Quantise ``z: [..., dim]``; in training also start, update and revive the book."""
        rows = z.detach().reshape(-1, z.shape[-1]).float()
        if self.training and not self.started and len(joined := _gather(rows)):
            self._start(joined)
        book = self.book.to(z.dtype) if z.dtype == torch.float64 else self.book
        indices, values = codebook_lookup(z, book, self.metric)
        won = torch.bincount(indices.flatten(), minlength=len(book)).to(self.counts)
        _sum_over_ranks(won)
        loss = self.commitment * _mean_square(z, values.detach())
        if self.update == "gradient":
            loss = loss + _mean_square(codebook_decode(indices, book), z.detach())
        if self.training:
            self._learn(rows, indices.flatten(), won)
        usage = won / won.sum().clamp(min=1)
        perplexity = torch.special.entr(usage).sum().exp()
        return CodebookOutput(values, indices, loss, usage, perplexity)

    @torch.no_grad()
    def _start(self, rows: Tensor) -> None:
        self.book.copy_(self._normalised(kmeans_plus_plus(rows, len(self.book), self._generator())))
        self.counts.fill_(1)
        self.sums.copy_(self.book)
        self.started.fill_(True)

    @torch.no_grad()
    def _learn(self, rows: Tensor, indices: Tensor, won: Tensor) -> None:
        if self.metric == "cosine":
            rows = torch.nn.functional.normalize(rows, dim=-1)
        self.counts.lerp_(won, 1 - self.decay)
        if self.update == "ema":
            # In float64, so that how the rows are shared out among the ranks leaves no trace.
            sums = torch.zeros_like(self.sums, dtype=torch.float64).index_add_(0, indices, rows.double())
            _sum_over_ranks(sums)
            self.sums.lerp_(sums.float(), 1 - self.decay)
            total = self.counts.sum()
            smoothed = (self.counts + self.eps) / (total + len(self.counts) * self.eps) * total
            self.book.copy_(self._normalised(self.sums / smoothed.unsqueeze(1)))
        if self.dead_below > 0:
            self._revive(rows)
        self.batches += 1

    def _revive(self, rows: Tensor) -> None:
        dead = (self.counts < self.dead_below).nonzero().flatten()
        if not dead.numel() or not (rows := _gather(rows)).numel():
            return
        order = torch.randperm(len(rows), generator=self._generator()).to(rows.device)
        fresh = self._normalised(rows[order[torch.arange(len(dead), device=rows.device) % len(rows)]])
        self.book.data[dead] = fresh
        self.sums[dead] = fresh
        self.counts[dead] = 1

    def _normalised(self, book: Tensor) -> Tensor:
        return torch.nn.functional.normalize(book, dim=-1) if self.metric == "cosine" else book

    def _generator(self) -> torch.Generator:
        """The same numbers on every rank and device."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + int(self.batches))


def kmeans_plus_plus(rows: Tensor, codes: int, generator: torch.Generator) -> Tensor:
    """`codes` of ``rows: [n, D]``, each drawn with probability proportional to its squared distance from those before.

    Where fewer rows differ than codes are wanted, rows repeat.
    """
    n = len(rows)
    draws = torch.rand(codes, generator=generator, dtype=torch.float64).to(rows.device)
    chosen = torch.empty(codes, dtype=torch.int64, device=rows.device)
    distance = torch.full((n,), math.inf, dtype=torch.float64, device=rows.device)
    for k in range(codes):
        weight = distance.cumsum(0) if k else torch.arange(1, n + 1, dtype=torch.float64, device=rows.device)
        total = weight[-1]
        uniform = torch.arange(1, n + 1, dtype=torch.float64, device=rows.device)
        weight = torch.where(total > 0, weight, uniform)
        at = torch.searchsorted(weight, draws[k] * weight[-1], right=True).clamp(max=n - 1)
        chosen[k] = at
        distance = torch.minimum(distance, (rows - rows[at]).double().square().sum(-1))
    return rows[chosen]


def _ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _sum_over_ranks(t: Tensor) -> None:
    if _ranks() > 1:
        dist.all_reduce(t)


def _gather(rows: Tensor) -> Tensor:
    """The rows of all ranks, one after the other."""
    if _ranks() == 1:
        return rows
    sizes = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(_ranks())]
    dist.all_gather(sizes, torch.tensor([len(rows)], device=rows.device))
    most = max(int(n) for n in sizes)
    parts = [rows.new_empty(most, rows.shape[1]) for _ in sizes]
    dist.all_gather(parts, torch.cat([rows, rows.new_zeros(most - len(rows), rows.shape[1])]))
    return torch.cat([part[: int(n)] for part, n in zip(parts, sizes, strict=True)])


def _mean_square(a: Tensor, b: Tensor) -> Tensor:
    """Of the differences, in float32 at least; 0 for nothing."""
    difference = a.to(torch.promote_types(a.dtype, torch.float32)) - b
    return difference.square().sum() / max(difference.numel(), 1)


class MergingCodebook(nn.Module):
    """A book filled from a stream of weighted tokens: appended while there is room, then merged into the most similar.

    A merge weighs by importance: ``row = (w_row row + w_token token) / (w_row + w_token)``, ``w_row += w_token``; most
    similar is the largest dot product, the smaller index among equals. Nothing here carries gradients.

    Args:
        size, dim: of the book when it is full.
        published: the rule of the caption encoder's published code (Hua et al.): a batch that would overflow the book
            is merged as a whole, even where part of it would fit (so the book may stay short of `size` for ever), and
            all its tokens are compared with the book as it was before the batch. By default a batch first fills the
            book, and every token meets the book as the token before left it.
    """

    def __init__(self, size: int, dim: int, *, published: bool = False) -> None:
        super().__init__()
        if size < 1 or dim < 1:
            raise ValueError(f"MergingCodebook: size and dim must be at least 1, got {size} and {dim}")
        self.size, self.published = size, published
        self.register_buffer("rows", torch.zeros(size, dim))
        self.register_buffer("weights", torch.zeros(size))
        self.register_buffer("filled", torch.tensor(0))

    rows: Tensor
    weights: Tensor
    filled: Tensor

    def __len__(self) -> int:
        return int(self.filled)

    @property
    def book(self) -> Tensor:
        """The rows in use, ``[len(self), dim]``."""
        return self.rows[: len(self)]

    def extra_repr(self) -> str:
        return f"{self.size}, {self.rows.shape[1]}, published={self.published}"

    @torch.no_grad()
    def add(self, tokens: Tensor, importance: Tensor) -> None:
        """Take in ``tokens: [n, dim]`` of ``importance: [n]`` (positive)."""
        n, dim = tokens.shape if tokens.dim() == 2 else (-1, -1)
        if dim != self.rows.shape[1] or importance.shape != (n,):
            raise ValueError(
                f"MergingCodebook: tokens must be [n, {self.rows.shape[1]}] and importance [n], got "
                f"{list(tokens.shape)} and {list(importance.shape)}"
            )
        if n and not bool((importance > 0).all() & importance.isfinite().all() & tokens.isfinite().all()):
            raise ValueError("MergingCodebook: tokens must be finite and importance positive and finite")
        tokens, importance = tokens.to(self.rows), importance.to(self.weights)
        count = len(self)
        fits = n if count + n <= self.size else 0 if self.published and count else min(n, self.size - count)
        self.rows[count : count + fits] = tokens[:fits]
        self.weights[count : count + fits] = importance[:fits]
        self.filled += fits
        tokens, importance = tokens[fits:], importance[fits:]
        if not len(tokens):
            return
        if self.published:
            for i, token, weight in zip(self.search(tokens).tolist(), tokens, importance, strict=True):
                self._merge(i, token, weight)
        else:
            for token, weight in zip(tokens, importance, strict=True):
                self._merge(int(self.search(token)), token, weight)

    def _merge(self, i: int, token: Tensor, weight: Tensor) -> None:
        total = self.weights[i] + weight
        self.rows[i] = (self.weights[i] * self.rows[i] + weight * token) / total
        self.weights[i] = total

    @torch.no_grad()
    def search(self, tokens: Tensor) -> Tensor:
        """Index of the most similar row of each token: ``[..., dim]`` to ``[...]``."""
        if not len(self):
            raise RuntimeError("MergingCodebook: the book is empty: add tokens first")
        return codebook_lookup(tokens.to(self.rows), self.book)[0]

    def decode(self, indices: Tensor) -> Tensor:
        """The rows at `indices`, ``[...]`` to ``[..., dim]``."""
        return codebook_decode(indices, self.book)
