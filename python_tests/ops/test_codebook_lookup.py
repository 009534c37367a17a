"""codebook_lookup beyond the sweep: hand values, ties and near-ties, what is refused, gradients, memory."""

import pathlib
import re

import pytest
import torch
from torch import Tensor

from spikecore.ops import codebook_decode, codebook_lookup, codebook_lookup_ref, residual_codebook_lookup
from spikecore.ops.codebook_lookup import METRICS
from spikecore.testing.timing import bytes_peak

ROOT = pathlib.Path(__file__).parents[2]


def exact(z: Tensor, codebook: Tensor, metric: str) -> Tensor:
    return codebook_lookup_ref(z, codebook, metric)[0]


def random(n: int, K: int, D: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, D, generator=g), torch.randn(K, D, generator=g)


# ---- values ----------------------------------------------------------------------------------------------------------


def test_hand_values() -> None:
    book = torch.tensor([[1.0, 0], [0, 2], [3, 3]])
    z = torch.tensor([[1.0, 0.5], [-1, 1], [-2, -1]])
    # dot: (1, 1, 4.5), (-1, 2, 0), (-2, -2, -9): a tie, which the smaller index wins
    want = {"dot": [2, 1, 0], "l2": [0, 1, 0], "cosine": [2, 1, 1]}
    for metric, indices in want.items():
        got, values = codebook_lookup(z, book, metric)
        assert got.tolist() == indices, metric
        assert torch.equal(values, book[indices])


def test_hand_gradients() -> None:
    book = torch.tensor([[1.0, 0], [0, 1], [5, 5]], requires_grad=True)
    z = torch.tensor([[1.0, 0], [0, 1], [0.9, 0]], requires_grad=True)
    _, values = codebook_lookup(z, book, "l2")
    g = torch.tensor([[1.0, 2], [3, 4], [5, 6]])
    g_z, g_book = torch.autograd.grad(values, (z, book), g)
    assert torch.equal(g_z, g)
    assert g_book.tolist() == [[6, 8], [3, 4], [0, 0]]


def test_products_and_residuals_by_hand() -> None:
    books = torch.tensor([[[0.0], [10]], [[0.0], [-1]]])
    indices, values = codebook_lookup(torch.tensor([[7.0, -3]]), books, "l2", groups=2)
    assert (indices.tolist(), values.tolist()) == ([[1, 1]], [[10, -1]])
    assert torch.equal(codebook_decode(indices, books), values)
    stages = torch.tensor([[[0.0], [10]], [[0.0], [-3]], [[0.0], [0.5]]])
    z = torch.tensor([[7.4]], requires_grad=True)
    stages.requires_grad_()
    indices, values = residual_codebook_lookup(z, stages)
    assert (indices.tolist(), values.tolist()) == ([[1, 1, 1]], [[7.5]])
    g_z, g_stages = torch.autograd.grad(values.sum(), (z, stages))
    assert g_z.tolist() == [[1]]
    assert g_stages.tolist() == [[[0], [1]]] * 3
    indices, values = residual_codebook_lookup(torch.zeros(2, 4), [torch.zeros(3, 2)] * 2, groups=2)
    assert (indices.shape, values.shape) == ((2, 2, 2), (2, 4))


def test_decode() -> None:
    book = torch.arange(6.0).view(3, 2).requires_grad_()
    out = codebook_decode(torch.tensor([[2, 0], [-1, 2]]), book)
    assert torch.equal(out[0], book[[2, 0]])
    assert out[1, 0].isnan().all()
    (g,) = torch.autograd.grad(out[:, 1].sum(), book)
    assert g.tolist() == [[1, 1], [0, 0], [1, 1]]
    with pytest.raises(IndexError, match=r"codebook_decode: indices must be -1 to 2, got 0 to 3"):
        codebook_decode(torch.tensor([0, 3]), book)
    with pytest.raises(ValueError, match=r"indices must be int64 \[..., 2\], got int64 \[3\] on cpu"):
        codebook_decode(torch.zeros(3, dtype=torch.int64), torch.zeros(2, 4, 1))
    with pytest.raises(ValueError, match="codebook must be"):
        codebook_decode(torch.zeros(3, dtype=torch.int64), torch.zeros(0, 4))


# ---- exactness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
def test_equal_codes_leave_the_first(metric: str) -> None:
    z, book = random(100, 300, 24)
    first, _ = codebook_lookup(z, book, metric)
    assert torch.equal(codebook_lookup(z, torch.cat([book, book]), metric)[0], first)
    assert torch.equal(codebook_lookup(z, book[:1].expand(700, 24), metric)[0], torch.zeros(100, dtype=torch.int64))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_near_ties(metric: str, dtype: torch.dtype) -> None:
    """Codes that differ in the last bits of one number: sums in float32 cannot tell them apart."""
    z, book = (t.to(dtype) for t in random(64, 8, 96))
    eps = torch.finfo(dtype).eps
    near = book.repeat_interleave(40, 0)
    near[:, 5] *= 1 + eps * torch.randint(-3, 4, (len(near),)).to(dtype)
    for rows in (z, near[::5]):
        got = codebook_lookup(rows, near, metric)[0]
        a, b = rows.double(), near.double()
        scores = -torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square() if metric == "l2" else a @ b.T
        if metric == "cosine":
            scores = scores / b.norm(dim=1)
        # Float64 errs, too: what is chosen is the best up to that.
        limit = 1e-14 * (a.norm(dim=1) * b.norm(dim=1).max() + scores.abs().amax(1))
        assert (lost(scores, got) <= limit).all()
        if dtype == torch.float32 and metric == "dot":
            assert (lost(scores, (rows @ near.T).argmax(1)) > limit).any(), "float32 sums find them all: no near-ties"


def lost(scores: Tensor, chosen: Tensor) -> Tensor:
    """How far below the best the chosen codes lie."""
    return scores.amax(1) - scores.gather(1, chosen.unsqueeze(1)).squeeze(1)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    "change",
    [
        lambda t: t + 100,
        lambda t: t * 1e-21,
        lambda t: t * 1e18,
        lambda t: t * 1e-42,
        lambda t: t * torch.logspace(-6, 6, t.shape[1]),
        lambda t: t * torch.logspace(-15, 15, len(t)).unsqueeze(1),
        lambda t: t.sign(),
    ],
    ids=["far from 0", "small", "large", "subnormal", "columns apart", "rows apart", "signs"],
)
def test_hard_numbers(metric: str, change) -> None:
    """Where the screening says little, the answer is still that of float64."""
    z, book = (change(t) for t in random(60, 700, 48))
    got, want = codebook_lookup(z, book, metric)[0], exact(z, book, metric)
    if metric == "cosine":  # z / |c| rounds otherwise than (z c) / |c|: equal up to that
        a, b = z.double(), book.double() / book.double().norm(dim=1, keepdim=True)
        assert (lost(a @ b.T, got) <= 1e-14 * a.norm(dim=1)).all()
    else:
        assert torch.equal(got, want)


def test_zero_codes_and_rows() -> None:
    book = torch.tensor([[-1.0, 0], [0, 0], [-1, -1]])
    assert codebook_lookup(torch.tensor([[1.0, 1], [0, 0]]), book, "cosine")[0].tolist() == [1, 0]


# ---- what is not finite ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("metric", METRICS)
def test_nan_has_no_neighbour(metric: str, value: float, dtype: torch.dtype) -> None:
    z, book = (t.to(dtype) for t in random(30, 50, 20))
    clean = codebook_lookup(z, book, metric)
    z[17, 3] = value
    with pytest.raises(RuntimeError, match=r"codebook_lookup: z must be finite, got NaN or infinity \(check_nan=False"):
        codebook_lookup(z, book, metric)
    indices, values = codebook_lookup(z, book, metric, check_nan=False)
    assert indices[17] == -1
    assert values[17].isnan().all()
    rest = torch.arange(30) != 17
    assert torch.equal(indices[rest], clean[0][rest])
    assert torch.equal(values[rest], clean[1][rest])


@pytest.mark.parametrize("metric", METRICS)
def test_a_broken_code_is_never_chosen(metric: str) -> None:
    z, book = random(40, 70, 12)
    want, _ = codebook_lookup(z, book, metric)
    book = torch.cat([book, torch.full((1, 12), torch.nan), torch.full((1, 12), torch.inf)])
    with pytest.raises(RuntimeError, match="codebook_lookup: codebook must be finite"):
        codebook_lookup(z, book, metric)
    assert torch.equal(codebook_lookup(z, book, metric, check_nan=False)[0], want)
    assert (codebook_lookup(z, book[-2:], metric, check_nan=False)[0] == -1).all()


def test_index_minus_one_gives_the_book_no_gradient() -> None:
    z, book = torch.full((2, 3), torch.nan), torch.ones(4, 3, requires_grad=True)
    values = codebook_lookup(z, book, check_nan=False)[1]
    assert not torch.autograd.grad(values.sum(), book)[0].any()


# ---- what is refused -------------------------------------------------------------------------------------------------

Z, BOOK = torch.zeros(4, 6), torch.zeros(5, 6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"z": Z.long()}, "z must be float32, bfloat16, float16 or float64, got int64 [4, 6] on cpu"),
        ({"codebook": BOOK[:0]}, "codebook must hold 1 to 2^31 - 1 codes, got 0"),
        ({"codebook": BOOK[:1].expand(2**31, 6)}, "codebook must hold 1 to 2^31 - 1 codes, got 2147483648"),
        ({"codebook": BOOK[:, :5]}, "codebook must be float32 [K, 6] or [1, K, 6] on cpu, got float32 [5, 5] on cpu"),
        ({"codebook": BOOK.double()}, "codebook must be float32 [K, 6] or [1, K, 6] on cpu, got float64 [5, 6] on cpu"),
        ({"codebook": BOOK[0]}, "codebook must be float32 [K, 6] or [1, K, 6] on cpu, got float32 [6] on cpu"),
        (
            {"z": Z.half(), "codebook": BOOK.bfloat16()},
            "codebook must be float16 or float32 [K, 6] or [1, K, 6] on cpu, got",
        ),
        ({"codebook": torch.zeros(3, 5, 3), "groups": 2}, "codebook must be float32 [K, 3] or [2, K, 3] on cpu, got"),
        ({"groups": 4}, "z must be [..., groups * D] with groups = 4, got float32 [4, 6] on cpu"),
        ({"groups": 0}, "groups must be at least 1, got 0"),
        ({"z": torch.zeros(())}, "z must be [..., groups * D] with groups = 1, got float32 [] on cpu"),
    ],
    ids=lambda v: v[:40] if isinstance(v, str) else "",
)
def test_refused_by_kernel_and_by_fake(arguments: dict, message: str) -> None:
    arguments = {"z": Z, "codebook": BOOK, **arguments}
    with pytest.raises(RuntimeError, match="^" + re.escape(f"codebook_lookup: {message}")):
        codebook_lookup(**arguments)
    mode = torch._subclasses.FakeTensorMode()
    with mode, pytest.raises(RuntimeError, match=re.escape(f"codebook_lookup: {message}")):
        codebook_lookup(**{k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in arguments.items()})


def test_another_device_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"codebook must be float32 \[K, 6\] or \[1, K, 6\] on meta, got .* on cpu"):
        codebook_lookup(Z.to("meta"), BOOK)


def test_refused_in_python() -> None:
    with pytest.raises(ValueError, match="codebook_lookup: metric must be one of dot, l2, cosine, got 'cos'"):
        codebook_lookup(Z, BOOK, "cos")
    with pytest.raises(TypeError, match="codebook_lookup: z must be a tensor, got list"):
        codebook_lookup([1.0], BOOK)
    with pytest.raises(ValueError, match="residual_codebook_lookup: codebooks must hold at least one stage"):
        residual_codebook_lookup(Z, [])


def test_checks_are_those_of_cpp() -> None:
    source = ROOT / "csrc/codebook_lookup/codebook_lookup.cpp"
    if not source.is_file():
        pytest.skip("the tests run beside an installed package")
    cpp = re.sub(r'"\s*"', "", source.read_text())
    for line in (
        "must be float32, bfloat16, float16 or float64",
        "codebook must hold 1 to 2^31 - 1 codes",
        "groups must be at least 1",
    ):
        assert line in cpp
    (names,) = re.findall(r"enum class Metric : int32_t \{ (.*?) \}", (source.with_suffix(".h")).read_text())
    assert tuple(names.split(", ")) == METRICS


def test_double_backward_is_refused() -> None:
    z, book = (t.requires_grad_() for t in random(4, 5, 3))
    _, values = codebook_lookup(z, book)
    g = torch.ones_like(values, requires_grad=True)
    (g_book,) = torch.autograd.grad(values, book, g, create_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        g_book.sum().backward()


def test_a_wrong_index_is_refused_by_backward() -> None:
    with pytest.raises(RuntimeError, match="codebook_lookup backward: indices must be below 5, got 5"):
        torch.ops.spikecore.codebook_lookup_bwd(Z, torch.full((4,), 5), BOOK, 1)


# ---- torch -----------------------------------------------------------------------------------------------------------


def test_autocast_and_export() -> None:
    z, book = random(6, 20, 8)

    class Model(torch.nn.Module):
        def forward(self, z: Tensor, book: Tensor) -> tuple[Tensor, Tensor]:
            return codebook_lookup(z, book, "l2")

    program = torch.export.export(Model(), (z, book))
    for got, want in zip(program.module()(z, book), codebook_lookup(z, book, "l2"), strict=True):
        assert torch.equal(got, want)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = torch.nn.functional.linear(z, torch.eye(8))
        indices, values = codebook_lookup(half, book, "l2")
    assert values.dtype == torch.bfloat16
    assert torch.equal(indices, codebook_lookup(half.float(), book, "l2")[0])


def test_gradcheck_of_the_values() -> None:
    z, book = (t.double() for t in random(5, 4, 3))
    indices = codebook_lookup(z, book)[0]
    book.requires_grad_()
    assert torch.autograd.gradcheck(lambda b: codebook_decode(indices, b), book)
    want = torch.autograd.grad(codebook_decode(indices, book).sin().sum(), book)[0]
    assert torch.equal(torch.autograd.grad(codebook_lookup(z, book)[1].sin().sum(), book)[0], want)


def test_memory_stays_small() -> None:
    """No [n, K] matrix: 4 M scores here; working space beyond the results under 4 MiB."""
    z, book = random(3152, 1400, 96)
    results = 8 * len(z) + z.nbytes
    assert bytes_peak(lambda: codebook_lookup(z, book)) - results < 4 << 20


def test_where_bfloat16_says_little() -> None:
    """A common offset makes its rounding larger than the differences: the trial sends the rest to float32."""
    z, book = random(256, 1500, 64)
    z[:, 0] = book[:, 0] = 100.0
    assert torch.equal(codebook_lookup(z, book, "l2")[0], exact(z, book, "l2"))
