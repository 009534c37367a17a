"""Codebook layers: start, updates, revival, ranks; the merging book."""

import os
import pathlib
import subprocess
import sys
import tempfile

import pytest
import torch
from torch import Tensor

from spikecore.layers import Codebook, MergingCodebook, kmeans_plus_plus


def clusters(n: int, K: int, D: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    centres = 10 * torch.randn(K, D, generator=g)
    return centres[torch.randint(K, (n,), generator=g)] + 0.01 * torch.randn(n, D, generator=g), centres


# ---- start -----------------------------------------------------------------------------------------------------------


def test_kmeans_plus_plus_finds_every_cluster() -> None:
    z, centres = clusters(400, 8, 4)
    start = kmeans_plus_plus(z, 8, torch.Generator().manual_seed(0))
    assert torch.cdist(centres, start).amin(1).max() < 0.1
    assert torch.equal(start, kmeans_plus_plus(z, 8, torch.Generator().manual_seed(0)))
    assert not torch.equal(start, kmeans_plus_plus(z, 8, torch.Generator().manual_seed(1)))


def test_kmeans_plus_plus_of_fewer_rows_than_codes() -> None:
    rows = torch.tensor([[1.0], [2.0]]).repeat(3, 1)
    start = kmeans_plus_plus(rows, 5, torch.Generator())
    assert start.shape == (5, 1)
    assert set(start.flatten().tolist()) == {1.0, 2.0}


def test_only_the_first_training_batch_starts() -> None:
    z, _ = clusters(100, 4, 3)
    layer = Codebook(4, 3)
    before = layer.book.clone()
    layer.eval()(z)
    assert torch.equal(layer.book, before)
    layer.train()(z)
    assert bool(layer.started)
    again = Codebook(4, 3)
    again.load_state_dict(layer.state_dict())
    assert bool(again.started)
    assert torch.equal(again.book, layer.book)


# ---- updates ---------------------------------------------------------------------------------------------------------


def test_ema_by_hand() -> None:
    layer = Codebook(2, 1, decay=0.5, eps=0.0, dead_below=0.0)
    layer.started.fill_(True)
    layer.book.copy_(torch.tensor([[0.0], [10.0]]))
    layer.sums.copy_(layer.book)
    out = layer(torch.tensor([[1.0], [3.0], [9.0]]))
    assert out.indices.tolist() == [0, 0, 1]
    # counts 1, 1 -> 1.5, 1; sums 0, 10 -> 2, 9.5
    assert layer.counts.tolist() == [1.5, 1.0]
    torch.testing.assert_close(layer.book, torch.tensor([[2 / 1.5], [9.5]]))
    assert out.values.tolist() == [[0.0], [0.0], [10.0]]  # of the book before
    assert out.usage.tolist() == pytest.approx([2 / 3, 1 / 3])
    assert float(out.perplexity) == pytest.approx((3 / 2) ** (2 / 3) * 3 ** (1 / 3))
    assert float(out.loss) == pytest.approx(0.25 * (1 + 9 + 1) / 3)


@pytest.mark.parametrize("update", ["ema", "gradient"])
@pytest.mark.parametrize("metric", ["l2", "cosine", "dot"])
def test_training_brings_codes_to_their_rows(update: str, metric: str) -> None:
    z, _ = clusters(300, 6, 5)
    z = torch.nn.functional.normalize(z, dim=1) if metric != "l2" else z
    layer = Codebook(6, 5, metric=metric, update=update, decay=0.8, seed=3)
    losses = []
    optimiser = torch.optim.SGD(layer.parameters(), 1.0) if update == "gradient" else None
    for _ in range(60):
        out = layer(z.clone().requires_grad_())
        losses.append(float(out.loss.detach()))
        if optimiser:
            optimiser.zero_grad()
            out.loss.backward()
            optimiser.step()
    assert losses[-1] <= losses[0] * 1.001
    assert losses[-1] < 0.01
    if metric == "l2":
        assert float(out.perplexity) > 5


def test_gradients() -> None:
    z = torch.randn(20, 3, requires_grad=True)
    for update in ("ema", "gradient"):
        layer = Codebook(5, 3, update=update)
        out = layer(z)
        (out.values.sum() + out.loss).backward()
        want = 1 + 2 * 0.25 * (z.detach() - out.values.detach()) / z.numel()
        torch.testing.assert_close(z.grad, want)
        z.grad = None
        assert (layer.book.grad is not None) == (update == "gradient")
        assert [n for n, _ in layer.named_parameters()] == (["book"] if update == "gradient" else [])


def test_dead_codes_come_back_with_fresh_statistics() -> None:
    layer = Codebook(3, 2, decay=0.5, dead_below=0.3)
    layer.started.fill_(True)
    layer.book.copy_(torch.tensor([[0.0, 0], [1, 1], [1000, 1000]]))
    layer.sums.copy_(layer.book)
    z = torch.tensor([[0.0, 0.1], [1, 1.1]]).repeat(10, 1)
    layer(z)
    assert layer.counts[2] == 0.5
    assert layer.book[2, 0] > 400
    layer(z)
    assert layer.counts[2] == 1
    assert (z == layer.book[2]).all(1).any()
    assert torch.equal(layer.sums[2], layer.book[2])


def test_half_precision_and_autocast() -> None:
    z = torch.randn(2, 7, 4)
    layer = Codebook(5, 4).eval()
    out = layer(z.bfloat16())
    assert (out.values.dtype, out.loss.dtype, out.indices.shape) == (torch.bfloat16, torch.float32, (2, 7))
    assert layer(torch.zeros(0, 4)).loss == 0


def test_arguments() -> None:
    with pytest.raises(ValueError, match="update must be 'ema' or 'gradient', got 'adam'"):
        Codebook(2, 2, update="adam")
    with pytest.raises(ValueError, match="codes and dim must be at least 1, got 0 and 2"):
        Codebook(0, 2)
    with pytest.raises(ValueError, match="decay"):
        Codebook(2, 2, decay=1.0)


# ---- ranks -----------------------------------------------------------------------------------------------------------

_RANK = """
import sys, torch, torch.distributed as dist
from spikecore.layers import Codebook
rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
if world > 1:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
states = {}
for metric in ("l2", "cosine"):
    for update in ("ema", "gradient"):
        layer = Codebook(24, 6, metric=metric, update=update, decay=0.6, dead_below=0.4)
        for step in range(12):
            z = torch.randn(50, 6, generator=torch.Generator().manual_seed(step)) * torch.tensor([1, 5, 1, 1, 1, 1.0])
            out = layer(z if world == 1 else z[:20] if rank == 0 else z[20:])
        states |= {f"{metric} {update} {k}": v for k, v in layer.state_dict().items()}
        states[f"{metric} {update} perplexity"] = out.perplexity
torch.save(states, f"{folder}/{world}_{rank}.pt")
"""


@pytest.mark.slow
def test_two_ranks_are_one_process_with_the_joined_batch(tmp_path: pathlib.Path) -> None:
    """Unequal shares, starts and revivals included: all books are the same bits."""
    runs = [(0, 2), (1, 2), (0, 1)]
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", _RANK, str(rank), str(world), str(tmp_path)],
            stderr=subprocess.PIPE, text=True, cwd=tempfile.gettempdir(), env=env,
        )
        for rank, world in runs
    ]  # fmt: skip
    for process in started:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    first, second, alone = (torch.load(tmp_path / f"{world}_{rank}.pt") for rank, world in runs)
    assert {k: v for k, v in alone.items() if k.endswith("batches")}
    for name, want in alone.items():
        assert torch.equal(first[name], want), name
        assert torch.equal(second[name], want), name


# ---- the merging book ------------------------------------------------------------------------------------------------


def test_fills_first_then_merges_one_after_the_other() -> None:
    book = MergingCodebook(2, 2)
    book.add(torch.tensor([[1.0, 0]]), torch.tensor([1.0]))
    assert len(book) == 1
    book.add(torch.tensor([[0.0, 1], [3, 0], [0, 2]]), torch.tensor([2.0, 1, 2]))
    assert torch.equal(book.book, torch.tensor([[2.0, 0], [0, 1.5]]))
    assert book.weights.tolist() == [2, 4]
    assert book.search(torch.tensor([[1.0, 0], [0, 1]])).tolist() == [0, 1]
    assert torch.equal(book.decode(torch.tensor([1])), torch.tensor([[0.0, 1.5]]))


def test_the_published_rule_merges_a_whole_batch() -> None:
    book = MergingCodebook(2, 1, published=True)
    book.add(torch.tensor([[1.0]]), torch.tensor([1.0]))
    book.add(torch.tensor([[3.0], [5.0]]), torch.tensor([1.0, 2.0]))
    assert len(book) == 1  # one would have fitted
    assert book.book.tolist() == [[3.5]]
    assert book.weights.tolist() == [4, 0]


def test_every_token_meets_the_book_as_it_is() -> None:
    """The first token turns row 0 around, so that the second belongs to row 1; the published rule looks only once."""
    tokens, importance = torch.tensor([[-30.0, 31], [1, 0.5]]), torch.tensor([3.0, 1.0])
    for published, weights in ((False, [4, 2]), (True, [5, 1])):
        book = MergingCodebook(2, 2, published=published)
        book.add(torch.tensor([[1.0, 1.2], [1, 0]]), torch.ones(2))
        book.add(tokens, importance)
        assert book.weights.tolist() == weights


def test_refused() -> None:
    book = MergingCodebook(3, 2)
    with pytest.raises(RuntimeError, match="the book is empty"):
        book.search(torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"tokens must be \[n, 2\] and importance \[n\], got \[1, 3\] and \[1\]"):
        book.add(torch.zeros(1, 3), torch.ones(1))
    for tokens, importance in ((torch.ones(1, 2), torch.zeros(1)), (torch.full((1, 2), torch.nan), torch.ones(1))):
        with pytest.raises(ValueError, match="must be finite and importance positive"):
            book.add(tokens, importance)
    book.add(torch.zeros(0, 2), torch.zeros(0))
    assert len(book) == 0
