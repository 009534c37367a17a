"""Converted SpikingJelly neurons and models against the originals; run by test_interop.py, one process per release.

    python interop_models.py clock_driven|activation_based      with the release to test on PYTHONPATH

Prints one JSON line: {check: null, or why it failed}.
"""

import copy
import importlib
import io
import itertools
import json
import pickle
import sys
import traceback

import torch
from torch import Tensor, nn

import spikecore

T = 6
FAMILY = sys.argv[1] if __name__ == "__main__" else "activation_based"
CLOCK = FAMILY == "clock_driven"
neuron, surrogate, functional, layer = (
    importlib.import_module(f"spikingjelly.{FAMILY}.{m}") for m in ("neuron", "surrogate", "functional", "layer")
)
ALL_SURROGATES = ["ATan", "Sigmoid", "PiecewiseQuadratic", "Erf", "LeakyKReLU", "Rect", "PiecewiseExp", "SoftSign"]
SURROGATES = [name for name in ALL_SURROGATES if hasattr(surrogate, name)]


def close(got: Tensor, want: Tensor, what: object) -> None:
    got, want = got.detach(), want.detach()
    error = float((got - want).norm()) / max(float(want.norm()), 1e-30)
    assert got.shape == want.shape, (what, got.shape, want.shape)
    assert got.dtype == want.dtype, (what, got.dtype, want.dtype)
    assert error <= (1e-5 if got.dtype == torch.float32 else 1e-12), (what, error)


def node(kind: str, mode: str, tau: float = 2.0, f: str = "ATan", store: bool = False, **kwargs) -> nn.Module:
    """One neuron for `mode` ("s" or "m"), whatever the release calls it."""
    if kind != "IF":
        kwargs["init_tau" if kind == "ParametricLIF" else "tau"] = tau
    kwargs["surrogate_function"] = getattr(surrogate, f)()
    if CLOCK:
        return getattr(neuron, f"{'MultiStep' if mode == 'm' else ''}{kind}Node")(**kwargs)
    return getattr(neuron, f"{kind}Node")(step_mode=mode, store_v_seq=store, **kwargs)


def run(m: nn.Module, mode: str, x: Tensor) -> Tensor:
    return m(x) if mode == "m" else torch.stack([m(x_t) for x_t in x])


def same_runs(a: nn.Module, b: nn.Module, mode: str, x: Tensor, what: object) -> None:
    """Three sequences, the third after a reset: spikes, potentials, gradients of the input and (double only) of w.

    The gradient of w is one sum over everything, with cancellation: in single precision its rounding has no bound here.
    """
    weights = torch.linspace(-1, 1, x.numel()).view_as(x)
    for call in range(3):
        grads = []
        for m in (a, b):
            m.zero_grad()
            leaf = x.clone().requires_grad_()
            s = run(m, mode, leaf)
            ((s * weights).sum() + 0.1 * m.v.square().sum()).backward()
            g_w = [p.grad for p in m.parameters() if p.dtype == torch.float64]
            grads.append((s.detach(), m.v.detach(), leaf.grad, *g_w))
        assert torch.equal(grads[0][0], grads[1][0]), (what, call, "spikes")
        assert grads[0][0].any(), (what, "no spikes: nothing was tested")
        for name, want, got in zip(("v", "g_x", "g_w"), *(g[1:] for g in grads), strict=False):
            close(got, want, (what, call, name))
        if getattr(a, "v_seq", None) is not None:
            close(b.v_seq, a.v_seq, (what, call, "v_seq"))
        for m in (a, b):
            m.detach() if call == 0 else functional.reset_net(m)
    assert a.v == b.v, (what, "v after reset")


def check_neurons() -> None:
    torch.manual_seed(0)
    x = torch.randn(T, 5, 12) + 0.6
    for kind, mode, reset, detach in itertools.product(
        ("IF", "LIF", "ParametricLIF"), "sm", (0.0, None, -0.3), (False, True)
    ):
        for decay_input in (True,) if kind == "IF" else (True, False):
            for tau in (2.0, 1.75):
                kwargs = {"v_reset": reset, "detach_reset": detach} | ({} if decay_input else {"decay_input": False})
                a = node(kind, mode, tau, store=mode == "m" and reset is None, **kwargs)
                b = spikecore.convert(copy.deepcopy(a))
                same_runs(a, b, mode, x, (kind, mode, tau, kwargs))
                same_runs(a.double(), b.double(), mode, x.double(), (kind, mode, tau, kwargs))


def check_threshold_and_eval() -> None:
    x = torch.rand(T, 4, 9)
    for kind, mode in itertools.product(("IF", "LIF", "ParametricLIF"), "sm"):
        a = node(kind, mode, v_threshold=0.375)
        b = spikecore.convert(copy.deepcopy(a))
        a.eval(), b.eval()
        with torch.no_grad():
            assert torch.equal(run(a, mode, x), run(b, mode, x)), (kind, mode)


def check_surrogates() -> None:
    torch.manual_seed(1)
    x = torch.randn(T, 5, 12) + 0.6
    for f in SURROGATES:
        a = node("LIF", "m", f=f)
        b = spikecore.convert(copy.deepcopy(a))
        same_runs(a, b, "m", x, f)
        same_runs(a, b, "m", x.double(), f)


class Net(nn.Module):
    """Convolution, batch norm, neuron, twice, and a linear readout; one time step a call, or all (mode "m")."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode
        self.conv1, self.bn1, self.lif1 = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), node("LIF", mode)
        self.conv2, self.bn2 = nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.plif2 = node("ParametricLIF", mode, f="Sigmoid", detach_reset=True)
        self.fc, self.if3 = nn.Linear(8, 4), node("IF", mode, v_reset=None)

    def forward(self, x: Tensor) -> Tensor:
        def each(f, x):
            return f(x.flatten(0, 1)).unflatten(0, x.shape[:2]) if self.mode == "m" else f(x)

        x = self.lif1(each(lambda y: self.bn1(self.conv1(y)), x))
        x = self.plif2(each(lambda y: self.bn2(self.conv2(y)), x))
        return self.if3(each(lambda y: self.fc(y.flatten(2).mean(2)), x))


def check_model() -> None:
    for mode in "sm":
        torch.manual_seed(2)
        a = Net(mode)
        nn.init.constant_(a.bn1.bias, 0.9), nn.init.constant_(a.bn2.bias, 0.9), nn.init.constant_(a.fc.bias, 0.4)
        b = copy.deepcopy(a)
        before, keys = {n: id(p) for n, p in b.named_parameters()}, list(b.state_dict())
        spikes: dict[int, list[Tensor]] = {0: [], 1: []}
        for i, m in enumerate((a, b)):
            for n in (m.lif1, m.plif2, m.if3):  # hooks set before the conversion go on working
                n.register_forward_hook(lambda _, __, out, seen=spikes[i]: seen.append(out.detach()))
        optimizer = torch.optim.SGD(b.parameters(), lr=0.1)
        assert spikecore.convert(b) is b
        assert before == {n: id(p) for n, p in b.named_parameters()}
        assert keys == list(b.state_dict()) == list(a.state_dict())

        x = torch.randn(T, 3, 2, 8, 8)
        for call in range(3):  # the second goes on from the state of the first
            for m in (a, b):
                m.zero_grad()
                (run(m, mode, x).mean(0) * torch.arange(4.0)).sum().backward()
            for n, (want, got) in enumerate(zip(*spikes.values(), strict=True)):
                assert torch.equal(got, want), (mode, call, n, int((got != want).sum()))
            largest = max(float(p.grad.norm()) for p in a.parameters())
            for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
                error = float((p.grad - q.grad).norm())
                assert error <= 1e-5 * float(p.grad.norm()) + 1e-6 * largest, (mode, call, name, error)
            if call == 0:
                for m in (a, b):
                    for n in (m.lif1, m.plif2, m.if3):
                        n.detach()
            else:
                functional.reset_net(a), functional.reset_net(b)
        for n in range(3):  # the calls come in the order of the layers
            assert any(s.any() for s in spikes[0][n::3]), (mode, n, "a silent layer tests nothing")
        w = b.plif2.w.detach().clone()
        optimizer.step()
        assert not torch.equal(b.plif2.w, w), "the optimizer made before the conversion no longer reaches w"
        b.load_state_dict(a.state_dict(), strict=True)
        assert torch.equal(b.plif2.w, a.plif2.w)


def check_helpers() -> None:
    a = nn.Sequential(node("LIF", "s"))
    functional.reset_net(a)  # 2.0 remembers what to reset
    spikecore.convert(a)
    a(torch.ones(3, 4))
    assert isinstance(a[0].v, Tensor)
    functional.reset_net(a)
    assert a[0].v == 0.0
    assert isinstance(a[0], neuron.BaseNode)
    if not CLOCK:
        functional.set_step_mode(a, "m")
        assert a(torch.ones(T, 3, 4)).shape == (T, 3, 4)
        a[0].store_v_seq = True
        a(torch.ones(T, 3, 4))
        assert a[0].v_seq.shape == (T, 3, 4)


def check_copies() -> None:
    x = torch.rand(T, 3, 4)
    b = spikecore.convert(nn.Sequential(node("ParametricLIF", "m")))
    b(x)
    b[0].detach()
    classes = type(b[0])
    assert spikecore.convert(b) is b
    assert type(b[0]) is classes, "converting twice"
    file = io.BytesIO()
    torch.save(b, file)
    file.seek(0)
    others = copy.deepcopy(b), pickle.loads(pickle.dumps(b)), torch.load(file, weights_only=False)
    want = b(x)
    for c in others:
        assert torch.equal(c(x), want)
        assert c[0].w is not b[0].w


def check_half_precision() -> None:
    b = spikecore.convert(node("LIF", "m"))
    s = b(torch.rand(T, 3, 4, dtype=torch.bfloat16))
    assert (s.dtype, b.v.dtype) == (torch.bfloat16, torch.float32)


def check_refusals() -> None:
    class Own(neuron.LIFNode):
        pass

    graded = node("LIF", "s")
    graded.surrogate_function.set_spiking_mode(False)
    tensor = node("LIF", "s")
    tensor.v_threshold = torch.ones(3)
    other = node("LIF", "s")
    other.surrogate_function = nn.Sigmoid()
    for m, words in (
        (Own(), "Own"),
        (neuron.QIFNode(), "QIFNode"),
        (graded, "spiking=False"),
        (tensor, "v_threshold"),
        (other, "surrogate Sigmoid"),
    ):
        model = nn.Sequential(node("IF", "s"), nn.Sequential(m))
        before = [type(x) for x in model.modules()]
        why = ""
        try:
            spikecore.convert(model)
        except NotImplementedError as e:
            why = str(e)
        assert words in why, (words, why)
        assert "1.0" in why, why
        assert before == [type(x) for x in model.modules()], "half converted"


def main() -> None:
    torch.set_num_threads(1)
    results = {}
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            try:
                check()
                results[name] = None
            except Exception:
                results[name] = traceback.format_exc()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
