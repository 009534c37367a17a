"""`spikecore.convert`: SpikingJelly's three releases, each in a folder and a process of its own, and snnTorch."""

import copy
import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

import spikecore

HERE = pathlib.Path(__file__).parent

# ---- SpikingJelly: the releases share one import name ---------------------------------------------------------------

RELEASES = {
    ("0.0.0.0.12", "clock_driven"): ["spikingjelly==0.0.0.0.12"],
    ("0.0.0.0.14", "clock_driven"): ["spikingjelly==0.0.0.0.14"],
    ("0.0.0.0.14", "activation_based"): ["spikingjelly==0.0.0.0.14"],
    ("2.0.0", "activation_based"): ["spikingjelly==2.0.0", "loguru"],
}
CHECKS = [
    line.removeprefix("def ").partition("(")[0]
    for line in (HERE / "interop_models.py").read_text(encoding="utf-8").splitlines()
    if line.startswith("def check_")
]


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    """Per release and family the checks' outcomes, {check: None or why it failed}; each run once, when first asked."""
    folders: dict[str, pathlib.Path] = {}
    known: dict[tuple[str, str], dict[str, str | None]] = {}

    def outcomes(release: str, family: str) -> dict[str, str | None]:
        if release not in folders:
            folder = tmp_path_factory.mktemp(f"spikingjelly-{release}")
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
            done = subprocess.run([*pip, *RELEASES[release, family]], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"pip cannot install SpikingJelly {release}: {done.stderr.strip().splitlines()[-1:]}")
            folders[release] = folder
        if (release, family) not in known:
            path = os.pathsep.join(filter(None, [str(folders[release]), os.environ.get("PYTHONPATH")]))
            done = subprocess.run(
                [sys.executable, str(HERE / "interop_models.py"), family],
                capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path},
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            known[release, family] = json.loads(done.stdout.splitlines()[-1])
        return known[release, family]

    return outcomes


@pytest.mark.peers
@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(("release", "family"), RELEASES)
def test_spikingjelly(release: str, family: str, check: str, results) -> None:
    why = results(release, family)[check]
    assert why is None, why


# ---- snnTorch -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def snn():
    return pytest.importorskip("snntorch")


def run_leaky(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The usual loop; spikes, potentials and gradients (of the input, of beta where it learns)."""
    m.zero_grad()
    leaf = x.clone().requires_grad_()
    mem, spikes, potentials = torch.zeros_like(x[0]), [], []
    for x_t in leaf:
        if m.init_hidden:
            out = m(x_t)
            s, mem = out if m.output else (out, m.mem)
        else:
            s, mem = m(x_t, mem)
        spikes.append(s)
        potentials.append(mem)
    s, h = torch.stack(spikes), torch.stack(potentials)
    ((s * torch.linspace(-1, 1, x.numel()).view_as(x)).sum() + 0.1 * h.square().sum()).backward()
    return s.detach(), h.detach(), [leaf.grad, *(p.grad for p in m.parameters())]


def same_leaky(a: nn.Module, x: Tensor) -> None:
    b = spikecore.convert(copy.deepcopy(a))
    s, h, grads = run_leaky(a, x)
    s2, h2, grads2 = run_leaky(b, x)
    assert s.any(), "no spikes: nothing was tested"
    assert torch.equal(s2, s.to(s2.dtype))
    # Without the delay snnTorch's gradients pass through its spikes, which are float32 whatever the input is.
    limit = 1e-12 if x.dtype == torch.float64 and a.reset_delay else 1e-5
    for got, want in zip((h2, *grads2), (h, *grads), strict=True):
        assert got.shape == want.shape
        assert float((got - want).norm()) <= limit * float(want.norm())


BETAS = {
    "half": lambda: 0.5,
    "point nine": lambda: 0.9,
    "above one": lambda: torch.tensor(1.5),  # clamped
    "per neuron": lambda: torch.linspace(0.3, 0.95, 12),
    "one element": lambda: torch.tensor([0.8]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("reset", ["subtract", "zero", "none"])
@pytest.mark.parametrize("delay", [True, False])
def test_leaky(snn, reset: str, beta: str, delay: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 5, 12, dtype=dtype) + 0.6
    learn = dtype == torch.float64  # one sum over everything, with cancellation: too rough to compare in float32
    for hidden, output in ((False, False), (True, False), (True, True)):
        m = snn.Leaky(
            BETAS[beta](), threshold=0.75, reset_mechanism=reset, reset_delay=delay, learn_beta=learn,
            init_hidden=hidden, output=output,
        )  # fmt: skip
        same_leaky(m.to(dtype), x)


def test_leaky_per_channel(snn) -> None:
    torch.manual_seed(0)
    same_leaky(snn.Leaky(torch.linspace(0.2, 0.9, 3).view(3, 1, 1)), torch.randn(5, 2, 3, 4, 4) + 0.6)
    with pytest.raises(NotImplementedError, match=r"beta of shape \[3, 4, 1\]"):
        spikecore.convert(snn.Leaky(torch.rand(3, 4, 1)))


SURROGATES = [
    "atan",
    "fast_sigmoid",
    "heaviside",
    "sigmoid",
    "spike_rate_escape",
    "straight_through_estimator",
    "triangular",
]


@pytest.mark.parametrize("name", SURROGATES)
def test_leaky_surrogates(snn, name: str) -> None:
    from snntorch import surrogate

    torch.manual_seed(0)
    x = torch.rand(7, 5, 12) * 1.2  # sigmoid(25) of snnTorch overflows to NaN for u < -3.5
    same_leaky(snn.Leaky(0.5, spike_grad=getattr(surrogate, name)()), x)
    if name in ("atan", "fast_sigmoid", "sigmoid"):
        same_leaky(snn.Leaky(0.5, spike_grad=getattr(surrogate, name)(5.0)), x)


def test_leaky_without_surrogate(snn) -> None:
    same_leaky(snn.Leaky(0.5, surrogate_disable=True), torch.rand(7, 5, 12) * 1.5)


def test_snntorch_model(snn) -> None:
    """Convolution, batch norm, Leaky, twice: outputs, gradients, keys, old checkpoints, `utils.reset`."""
    from snntorch import utils

    def net() -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), snn.Leaky(0.5, init_hidden=True),
            nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), snn.Leaky(0.9, init_hidden=True, learn_beta=True),
            nn.Flatten(), nn.Linear(8 * 16, 4), snn.Leaky(0.8, init_hidden=True, output=True, reset_mechanism="zero"),
        )  # fmt: skip

    torch.manual_seed(3)
    a = net()
    for m in (a[1], a[4]):
        nn.init.constant_(m.bias, 0.6)
    nn.init.constant_(a[7].bias, 0.6)
    b = net()  # no deepcopy: `utils.reset` knows only what was constructed
    b.load_state_dict(a.state_dict())
    parameters = dict(b.named_parameters())
    assert spikecore.convert(b) is b
    assert all(p is parameters[name] for name, p in b.named_parameters())
    assert list(a.state_dict()) == list(b.state_dict())
    b.load_state_dict(a.state_dict(), strict=True)

    x = torch.randn(6, 3, 2, 8, 8)
    for call in range(3):  # the second goes on from the state of the first
        outs = []
        for m in (a, b):
            m.zero_grad()
            out = [m(x_t) for x_t in x]
            s, mem = (torch.stack(o) for o in zip(*out, strict=True))
            ((s.mean(0) + 0.1 * mem.mean(0)) * torch.arange(4.0)).sum().backward()
            outs.append((s.detach(), mem.detach()))
        (s, mem), (s2, mem2) = outs
        assert s.any()
        assert torch.equal(s, s2)
        torch.testing.assert_close(mem2, mem, rtol=1e-5, atol=1e-5)
        largest = max(float(p.grad.norm()) for p in a.parameters())
        for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
            error = float((p.grad - q.grad).norm())
            assert error <= 1e-5 * float(p.grad.norm()) + 1e-6 * largest, (name, error)
        if call == 0:
            for m in (a, b):
                for n in (m[2], m[5], m[8]):
                    n.mem = n.mem.detach()
        else:
            utils.reset(a), utils.reset(b)
            assert not b[2].mem.any()


def test_threshold_of_a_loaded_checkpoint(snn) -> None:
    b = spikecore.convert(snn.Leaky(0.5, threshold=10.0))
    assert not b(torch.ones(2, 3))[0].any()
    b.load_state_dict(snn.Leaky(0.5, threshold=0.5).state_dict())
    assert b(torch.ones(2, 3))[0].all()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"inhibition": True}, "inhibition"),
        ({"learn_threshold": True}, "learn_threshold"),
        ({"threshold": torch.ones(3)}, "threshold of shape"),
        ({"graded_spikes_factor": 2.0}, "graded_spikes_factor=2"),
        ({"learn_graded_spikes_factor": True}, "learn_graded_spikes_factor"),
        ({"state_quant": lambda x: x}, "state_quant"),
        ({"spike_grad": torch.sigmoid}, "surrogate .*sigmoid"),
    ],
)
@pytest.mark.filterwarnings("ignore:Inhibition is an unstable feature")
def test_snntorch_refusals(snn, options: dict, word: str) -> None:
    model = nn.Sequential(snn.Leaky(0.5), nn.Sequential(snn.Leaky(0.5, **options)))
    with pytest.raises(NotImplementedError, match=rf"1\.0 \(Leaky\): {word}"):
        spikecore.convert(model)
    assert type(model[0]) is snn.Leaky


def test_other_snntorch_neurons_are_refused(snn) -> None:
    with pytest.raises(NotImplementedError, match="Synaptic"):
        spikecore.convert(snn.Synaptic(0.5, 0.5))


def test_mem_beside_init_hidden(snn) -> None:
    with pytest.raises(TypeError, match="init_hidden"):
        spikecore.convert(snn.Leaky(0.5, init_hidden=True))(torch.ones(2, 3), torch.ones(2, 3))


def test_modules_without_neurons_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(2, 2), spikecore.LIF())
    assert spikecore.convert(model) is model
    assert [type(m) for m in model] == [nn.Linear, spikecore.LIF]
