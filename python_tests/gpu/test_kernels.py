"""Every kernel of both GPU backends on a card: the CPU's sweep, its bits, sizes that cross blocks, streams, graphs."""

import dataclasses

import pytest
import test_ops
import torch
from backends import assert_same, results
from golden.harness import Report
from gpu.on_gpu import BACKENDS, case_on, kernels, there
from gpuless.bn_lif_backends import assert_equal_but_for_sums
from gpuless.lif_backends import lif_samples
from gpuless.qk_on_shim import packed_calls
from gpuless.selective_scan_backends import assert_near, scan_samples
from torch import Tensor

from spikecore.testing.cases import CASES, Case, Sample, values
from spikecore.testing.cases.codebook_lookup import CASE as CODEBOOK

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ON = pytest.mark.parametrize("backend", BACKENDS)
EACH_CASE = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))


def chosen(backend: str) -> list[tuple[Case, str, torch.dtype]]:
    """All samples; of half precision, which differs in loads and stores alone, some for Triton, which compiles each."""
    return [
        (case, name, dtype)
        for case in CASES.values()
        for dtype in DTYPES
        for name in case.names()[:: 4 if backend == "triton" and dtype != torch.float32 else 1]
    ]


SWEEP = [(backend, *rest) for backend in BACKENDS for rest in chosen(backend)]


@pytest.mark.parametrize(
    ("backend", "case", "name", "dtype"), SWEEP, ids=[f"{b}-{c.name}-{n}-{d}" for b, c, n, d in SWEEP]
)
def test_sweep(backend: str, case: Case, name: str, dtype: torch.dtype) -> None:
    on_gpu = case_on(case, backend)
    for grid in (True, False):
        sample = case.sample(name, dtype, grid)
        test_ops.check_forward(on_gpu, sample, grid)
        test_ops.check_gradients(on_gpu, sample)


# ---- the CPU kernels' bits

NO_SCANS = [case for name, case in CASES.items() if not name.startswith("selective_scan")]


def assert_like_the_cpu(case: Case, backend: str, sample: Sample, grid: bool) -> None:
    """Bit for bit. Triton divides to two units in the last place, so gradients of surrogates are held by a norm."""
    op = case_on(case, backend).op
    if case.name == "spiking_self_attention" or (backend == "triton" and sample.dtype != torch.float32):
        # Gradients that are sums beyond the grid, or rounded to half precision from either side.
        for got, want in zip(op(**sample.arguments), case.op(**sample.arguments), strict=True):
            assert torch.equal(got, want), sample.name
        test_ops.check_gradients(dataclasses.replace(case, op=op), sample)
    elif backend == "triton" and case is not CODEBOOK:
        got, want = results(case, op, sample, grid=grid), results(case, case.op, sample, grid=grid)
        report = Report()
        report.gradients(
            *({n: g for n, g in r.items() if n.startswith("grad ") and g is not None} for r in (got, want))
        )
        assert not report.failures, (sample.name, report.failures)
        for name in case.outputs(sample):
            assert torch.equal(got[name], want[name]), (sample.name, name)
    elif case.name == "bn_lif":
        assert_equal_but_for_sums(op, sample)
    else:
        assert_same(case.name, op, sample, grid=grid)


@ON
@pytest.mark.parametrize(
    "case", [c for n, c in CASES.items() if not n.startswith("selective_scan")], ids=lambda c: c.name
)
def test_results_are_the_cpu_kernels(case: Case, backend: str) -> None:
    """On the grid, whose sums are exact in any order. Scans, which sum over blocks, are held by the sweep."""
    for dtype in DTYPES:
        for sample in list(case.samples(dtype, True))[:: 1 if backend == "cuda" else 9]:
            assert_like_the_cpu(case, backend, sample, True)


@ON
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lif_and_codebook_are_the_cpu_kernels_off_the_grid(backend: str, dtype: torch.dtype) -> None:
    """lif across segments, blocks and vectors too."""
    every = 1 if backend == "cuda" else 4
    for sample in lif_samples(dtype)[::every]:
        assert_like_the_cpu(CASES["lif"], backend, sample, False)
    for sample in list(CODEBOOK.samples(dtype, False))[::every]:
        assert_like_the_cpu(CODEBOOK, backend, sample, False)


# ---- beyond a block, a segment, a tile


@ON
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scan_across_blocks(backend: str, dtype: torch.dtype) -> None:
    for sample in scan_samples(dtype):
        assert_near(case_on(CASES["selective_scan"], backend).op, sample)


@ON
@EACH_CASE
def test_large(case: Case, backend: str) -> None:
    on_gpu = case_on(case, backend)
    for dtype in DTYPES:
        for sample in case.large(dtype):
            test_ops.check_forward(on_gpu, sample, False)
            test_ops.check_gradients(on_gpu, sample)


@ON
def test_packed_attention_is_the_cpu_kernel(backend: str) -> None:
    for op, arguments in packed_calls():
        got = case_on(CASES[op], backend).op(**arguments)[0]
        assert torch.equal(got, CASES[op].op(**arguments)[0]), (op, arguments["T"])


@ON
@pytest.mark.parametrize("metric", ["dot", "l2", "cosine"])
def test_codes_in_parts_and_ties(backend: str, metric: str) -> None:
    g = torch.Generator().manual_seed(0)
    for n, K, D in ((10, 3000, 48), (1000, 1100, 64), (3, 257, 768)):
        z, codebook = torch.randn(n, D, generator=g), torch.randn(K, D, generator=g)
        codebook[K // 2 : K // 2 * 2] = codebook[: K // 2].clone()
        for dtype in DTYPES:
            sample = Sample("ties", {"z": z.to(dtype), "codebook": codebook.to(dtype), "metric": metric})
            assert_same("codebook_lookup", case_on(CODEBOOK, backend).op, sample)


def test_codebook_refuses_what_is_not_finite() -> None:
    z, codebook = torch.randn(5, 40, device="cuda"), torch.randn(9, 40, device="cuda")
    z[3, 7] = torch.nan
    with pytest.raises(RuntimeError, match="z must be finite"):
        CODEBOOK.op(z, codebook)
    assert CODEBOOK.op(z, codebook, check_nan=False)[0][3] == -1


# ---- how calls run


def gpu_sample(case: Case, dtype: torch.dtype = torch.float32) -> Sample:
    sample = next(case.large(dtype)).map(there)
    if case is CODEBOOK:  # whether all is finite is a question to the GPU, whose answer is waited for
        sample.arguments["check_nan"] = False
    return sample


def outputs_and_gradients(case: Case, op: object, sample: Sample) -> list[Tensor]:
    """Under the same upstream gradients at each call; nothing of it waits for the GPU."""
    sample, leaves = sample.leaves()
    outputs = list(op(**sample.arguments))
    ends = [o for o in outputs if o.requires_grad]
    upstream = [torch.linspace(-1, 1, o.numel(), device=o.device).view(o.shape).to(o.dtype) for o in ends]
    gradients = torch.autograd.grad(ends, list(leaves.values()), upstream, allow_unused=True)
    return [*outputs, *(g for g in gradients if g is not None)]


@ON
@EACH_CASE
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_each_run_gives_the_same_bits(case: Case, backend: str, dtype: torch.dtype) -> None:
    op, sample = kernels(case.name, backend), gpu_sample(case, dtype)
    first, *others = [outputs_and_gradients(case, op, sample.map(torch.clone)) for _ in range(5)]
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@ON
@EACH_CASE
def test_it_runs_on_the_current_stream(case: Case, backend: str) -> None:
    op, sample = kernels(case.name, backend), gpu_sample(case)
    want = outputs_and_gradients(case, op, sample.map(torch.clone))  # running statistics change
    late = sample.map(torch.zeros_like)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)  # a tenth of a second, in which a kernel of another stream would see zeros
        for t, source in zip(late.tensors().values(), sample.tensors().values(), strict=True):
            t.copy_(source)
        got = outputs_and_gradients(case, op, late)
        torch.cuda.current_stream().synchronize()
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


@ON
@EACH_CASE
def test_a_captured_graph_replays_on_new_numbers(case: Case, backend: str) -> None:
    op, sample = kernels(case.name, backend), gpu_sample(case)
    want = outputs_and_gradients(case, op, sample.map(torch.clone))  # running statistics change
    static = sample.map(torch.zeros_like)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        outputs_and_gradients(case, op, static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = outputs_and_gradients(case, op, static)
    for t, source in zip(static.tensors().values(), sample.tensors().values(), strict=True):
        t.copy_(source)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


@EACH_CASE
def test_opcheck(case: Case) -> None:
    for name in case.few[:3]:
        sample = case.sample(name).map(there)
        (forward, args, outputs), *rest = test_ops.recorded(case, sample)
        for backward, backward_args, _ in rest:
            torch.library.opcheck(backward, backward_args)
        if all(o.is_floating_point() for o in outputs):
            args = tuple(t.requires_grad_() if isinstance(t, Tensor) else t for t in args)
        torch.library.opcheck(forward, args)


@EACH_CASE
def test_inductor(case: Case) -> None:
    torch._dynamo.reset()
    sample = case.sample(case.few[0]).map(there)
    compiled = torch.compile(lambda **arguments: case.op(**arguments), fullgraph=True)
    want, got = (outputs_and_gradients(case, f, sample) for f in (case.op, compiled))
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


@EACH_CASE
def test_autocast(case: Case) -> None:
    sample = gpu_sample(case)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cuda", dtype):
            results = outputs_and_gradients(case, case.op, sample)
        assert all(r.isfinite().all() for r in results if r.is_floating_point())


def test_what_a_gpu_does_not_take_is_one_line() -> None:
    x = torch.randn(4, 10, dtype=torch.float64, device="cuda")
    with pytest.raises(RuntimeError, match="float64 runs on the CPU only"):
        CASES["lif"].op(x)
    with pytest.raises(Exception, match=r"v_init must be .* on cuda.*, got .* cpu"):
        CASES["lif"].op(x.float(), v_init=torch.zeros(10))


# ---- sizes


@ON
def test_more_than_two_billion_numbers(backend: str) -> None:
    """Places beyond 2**31: the last ones are those of the same call on a part."""
    N = 1 << 30
    x = (torch.arange(N, device="cuda", dtype=torch.int32) % 251).to(torch.float16).div_(64)
    x = torch.stack([x, x.flip(0), x])[:, :, None].requires_grad_()  # [3, N, 1]: 3.2 billion
    op = kernels("lif", backend)
    s = op(x)[0]
    (g,) = torch.autograd.grad(s, x, x.detach())
    for part in (slice(0, 1000), slice(N - 1000, N)):
        y = x.detach()[:, part].contiguous().requires_grad_()
        s_y = op(y)[0]
        assert torch.equal(s[:, part], s_y)
        assert torch.equal(g[:, part], torch.autograd.grad(s_y, y, y.detach())[0])


@ON
def test_a_scan_of_65536_steps_keeps_memory_linear(backend: str) -> None:
    op = kernels("selective_scan", backend)

    def peak(L: int) -> int:
        B, C, S = 1, 64, 16
        u, delta = (values((B, C, L), torch.float32, False, i).cuda().requires_grad_() for i in range(2))
        A = -torch.rand(C, S, device="cuda")
        Bs, Cs = (values((B, S, L), torch.float32, False, 2 + i).cuda().requires_grad_() for i in range(2))
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        y = op(u=u, delta=delta * 0.01, A=A, B=Bs, C=Cs, delta_softplus=True)
        y = y[0] if isinstance(y, tuple) else y
        assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), (u, delta, Bs, Cs)))
        return torch.cuda.max_memory_allocated() - before

    peak(1024)
    short, long = peak(8192), peak(65536)
    assert long < 8.5 * short
    assert long < 64 * 16 * 65536 * 4  # one [B, C, L, S] tensor
