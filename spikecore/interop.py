"""`convert`: a model of SpikingJelly or snnTorch, its neurons run by `spikecore.ops.lif`.

A converted neuron stays the object it was: its class becomes a subclass of the foreign one that replaces nothing but
the forward pass (the way `torch.nn.utils.parametrize` works). So its parameters, buffers, ``state_dict`` keys, hooks
and its state stay where they were, and what the foreign package does with its neurons (``functional.reset_net``,
``functional.set_step_mode``, ``utils.reset``, ``isinstance``) goes on working. Neither package is imported here:
classes are known by module and name, which hold for every release given below.

| package | neurons |
|---|---|
| SpikingJelly 0.0.0.0.12 (``clock_driven``) | IFNode, LIFNode, ParametricLIFNode and their MultiStep forms |
| SpikingJelly 0.0.0.0.14, 2.0 (``activation_based``) | IFNode, LIFNode, ParametricLIFNode |
| snnTorch 1.0 | Leaky |

Potentials are float32 where the input is of half precision; a float32 sum may round otherwise than the package's own.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from spikecore import surrogate as sg
from spikecore.ops.lif import lif

__all__ = ["convert"]


def convert(model: nn.Module) -> nn.Module:
    """Run the neurons of a SpikingJelly or snnTorch model by spikecore, in place.

    Converting twice does no harm; neurons without spikes (``NonSpiking...``) and all other modules are left alone.

    Args:
        model: any module; it may itself be a neuron.

    Returns:
        `model`.

    Raises:
        NotImplementedError: a neuron class, option or surrogate that spikecore does not have, by name and with the path
            of the module. Nothing is converted then.
    """
    found = []
    for path, m in model.named_modules():
        base = None if isinstance(m, _Adapter) else _adapter_base(type(m))
        if base is None:
            continue
        try:
            base.check(m)
        except NotImplementedError as e:
            raise NotImplementedError(f"convert: {path or 'the model'} ({type(m).__name__}): {e}") from None
        found.append((m, base))
    for m, base in found:
        m.__class__ = _adapter_class(base, type(m))  # type: ignore[arg-type]
    return model


def _adapter_base(cls: type) -> "type[_Adapter] | None":
    """The adapter for a neuron class of a foreign package; None where `cls` is no such class."""
    for c in cls.__mro__:
        package, _, rest = c.__module__.partition(".")
        family, _, rest = rest.partition(".")
        if package == "spikingjelly" and rest.split(".")[0] == "neuron" and issubclass(c, nn.Module):
            if c.__name__.startswith("NonSpiking"):
                return None
            if c is cls and cls.__name__.removeprefix("MultiStep") in ("IFNode", "LIFNode", "ParametricLIFNode"):
                return {"clock_driven": _ClockDriven, "activation_based": _ActivationBased}.get(family, _Unknown)
            return _Unknown
        if package == "snntorch" and c.__name__ in ("Leaky", "SpikingNeuron"):
            return _Leaky if c is cls and cls.__name__ == "Leaky" else _Unknown
    return None


@functools.cache
def _adapter_class(base: Any, cls: Any) -> Any:
    return type(f"Fused{cls.__name__}", (base, cls), {"__module__": __name__, "__doc__": base.__doc__})


def _rebuild(base: type, cls: type) -> Any:
    adapter = _adapter_class(base, cls)
    return adapter.__new__(adapter)


class _Adapter:
    """Put before a foreign neuron class; reads the neuron's options at every call, so that they may be changed."""

    def check(self) -> None:
        """Raise NotImplementedError for what the adapter could not run."""
        raise NotImplementedError

    if TYPE_CHECKING:  # what the foreign class brings
        v: Any

        def __getattr__(self, name: str) -> Any: ...

    def __reduce__(self) -> tuple:  # the class has no name that pickle could find
        return _rebuild, type(self).__bases__, self.__dict__


def _state_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class _Unknown(_Adapter):
    def check(self) -> None:
        raise NotImplementedError("a neuron class that spikecore does not have")


# ---- SpikingJelly --------------------------------------------------------------------------------------------------

_SPIKINGJELLY: dict[str, Callable[[Any], sg.Surrogate]] = {
    "ATan": lambda f: sg.ATan(f.alpha),
    "Erf": lambda f: sg.Erf(f.alpha),
    "LeakyKReLU": lambda f: sg.LeakyReLU(f.k, f.leak),
    "PiecewiseQuadratic": lambda f: sg.Triangle(1 / f.alpha),
    "Rect": lambda f: sg.Rectangle(1 / f.alpha),
    "Sigmoid": lambda f: sg.Sigmoid(f.alpha),
}


class _SpikingJelly(_Adapter):
    def check(self) -> None:
        _SpikingJelly.arguments(self)
        f = self.surrogate_function
        if _spikingjelly_surrogate(f) is None:
            _check_heaviside(f, strict=False)

    def arguments(self) -> dict[str, Any]:
        """What `lif` takes, from the neuron's present options."""
        if not isinstance(self.v_threshold, int | float):
            raise NotImplementedError("v_threshold must be a number")
        if getattr(self, "backend", None) == "lava":
            raise NotImplementedError("backend='lava'")
        if getattr(self, "_neuron_precision", None) is not None:
            raise NotImplementedError("a neuron precision of its own (_neuron_precision)")
        f = self.surrogate_function
        if not getattr(f, "spiking", True):
            raise NotImplementedError("surrogate_function.spiking=False (graded output)")
        if hasattr(self, "w"):
            k = self.w.sigmoid()
            decay, gain = 1 - k, k
        else:
            k = 1 / self.tau if hasattr(self, "tau") else 0.0
            decay, gain = 1 - k, k or 1.0
        return {
            "decay": decay,
            "gain": gain if getattr(self, "decay_input", True) else 1.0,
            "v_threshold": self.v_threshold,
            "v_reset": self.v_reset,
            "detach_reset": self.detach_reset,
            "surrogate": _spikingjelly_surrogate(f) or _Derivative(f),
        }

    def run(self, x_seq: Tensor, store_v_seq: bool) -> Tensor:
        v = self.v
        if not isinstance(v, Tensor):  # a number until the first call
            v = None if v == (self.v_reset or 0.0) else torch.full_like(x_seq[0], v, dtype=_state_dtype(x_seq))
        elif v.shape != x_seq.shape[1:] and hasattr(self, "materialize_states"):
            v = None  # 2.0 starts anew when the shape changes; before, it is an error
        else:
            v = v.to(_state_dtype(x_seq))
        s, self.v, *v_seq = lif(x_seq, v_init=v, return_v=store_v_seq, **self.arguments())
        if store_v_seq:
            (self.v_seq,) = v_seq
        return s


class _ClockDriven(_SpikingJelly):
    """SpikingJelly's ``clock_driven`` neuron, run by `spikecore.ops.lif`."""

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "v_seq"):  # a MultiStep neuron: x is [T, ...]
            return self.run(x, store_v_seq=True)
        return self.run(x.unsqueeze(0), store_v_seq=False).squeeze(0)


class _ActivationBased(_SpikingJelly):
    """SpikingJelly's ``activation_based`` neuron, run by `spikecore.ops.lif`; its base class looks at ``step_mode``."""

    def single_step_forward(self, x: Tensor) -> Tensor:
        s = self.run(x.unsqueeze(0), store_v_seq=False).squeeze(0)
        if self.store_v_seq and hasattr(self, "_append_v_seq"):  # 2.0 stores single steps too
            self._append_v_seq(self.v)
        return s

    def multi_step_forward(self, x_seq: Tensor) -> Tensor:
        return self.run(x_seq, self.store_v_seq)


def _spikingjelly_surrogate(f: Any) -> sg.Surrogate | None:
    known = type(f).__module__.startswith("spikingjelly.") and _SPIKINGJELLY.get(type(f).__name__)
    return known(f) if known else None


# ---- snnTorch ------------------------------------------------------------------------------------------------------

_SNNTORCH: dict[str, Callable[[Mapping[str, Any]], sg.Surrogate]] = {
    "atan": lambda p: sg.ATan(p["alpha"]),
    "fast_sigmoid": lambda p: sg.FastSigmoid(p["slope"]),
    "sigmoid": lambda p: sg.Sigmoid(p["slope"]),  # finite also where snnTorch's own exp(-slope * u) overflows
    "straight_through_estimator": lambda p: sg.LeakyReLU(1.0, 1.0),
}


class _Leaky(_Adapter):
    """snnTorch's Leaky, one step a call, run by `spikecore.ops.lif`.

    snnTorch keeps the potential before the reset and resets in the next step, so the reset is done here, on the way
    in; the op charges and fires. Its own reset is off (``reset_by=0``), which makes its last potential ``mem``.
    """

    def check(self) -> None:
        for option in ("inhibition", "state_quant"):
            if getattr(self, option):
                raise NotImplementedError(f"{option}={getattr(self, option)}")
        if isinstance(self.threshold, nn.Parameter):
            raise NotImplementedError("learn_threshold=True")
        if isinstance(self.graded_spikes_factor, nn.Parameter):
            raise NotImplementedError("learn_graded_spikes_factor=True")
        _Leaky.number(self, "threshold")
        if (factor := _Leaky.number(self, "graded_spikes_factor")) != 1:
            raise NotImplementedError(f"graded_spikes_factor={factor}")
        _Leaky.decay(self)
        if _snntorch_surrogate(self.spike_grad) is None:
            _check_heaviside(self.spike_grad, strict=True)

    def number(self, name: str) -> float:
        """The value of a one-element buffer; on a GPU read only after a change, for there reading means waiting."""
        buffer = getattr(self, name)
        if buffer.numel() != 1:
            raise NotImplementedError(f"{name} of shape {list(buffer.shape)}")
        if buffer.device.type == "cpu":
            return buffer.item()
        known = self.__dict__.setdefault("_numbers", {})
        if name not in known or known[name][0] is not buffer or known[name][1] != buffer._version:
            known[name] = buffer, buffer._version, buffer.item()
        return known[name][2]

    def decay(self) -> tuple[Tensor, int]:
        """beta as `lif` takes it, and the dimension it runs along."""
        beta = self.beta.clamp(0, 1)
        wide = [d - beta.dim() for d, n in enumerate(beta.shape) if n > 1]
        if len(wide) > 1:
            raise NotImplementedError(f"beta of shape {list(beta.shape)} (more than one dimension)")
        return beta.reshape(-1 if wide else ()), wide[0] if wide else -1

    def forward(self, input_: Tensor, mem: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        if mem is not None:
            if self.init_hidden:
                raise TypeError("`mem` should not be passed as an argument while `init_hidden=True`")
            self.mem = mem
        threshold, reset, x, v = self.number("threshold"), self.reset_mechanism, input_, None
        fired = torch.zeros((), dtype=torch.bool, device=x.device)
        if self.mem.shape == x.shape:
            v = self.mem.to(_state_dtype(x))
            fired = v.detach() > threshold
            if reset == "subtract":
                x = x - threshold * fired.to(x.dtype)
            elif reset == "zero":
                v = v.masked_fill(fired, 0.0)
        decay, channel_dim = self.decay()
        s, mem = lif(
            x.unsqueeze(0), decay, 1.0, v_threshold=threshold, v_reset=None, reset_by=0.0, strict=True,
            surrogate=_snntorch_surrogate(self.spike_grad) or _Derivative(self.spike_grad), v_init=v,
            channel_dim=channel_dim,
        )  # fmt: skip
        s = s.squeeze(0)
        if not self.reset_delay and reset != "none":
            mem = mem - (s - fired.to(s.dtype)) * (threshold if reset == "subtract" else mem)
        self.mem = mem
        return s if self.init_hidden and not self.output else (s, mem)


def _snntorch_surrogate(f: Any) -> sg.Surrogate | None:
    """snnTorch's surrogates are closures: the name is the maker's, the parameters are what is closed over."""
    if not inspect.isfunction(f) or f.__module__ != "snntorch.surrogate":
        return None
    known = _SNNTORCH.get(f.__qualname__.partition(".")[0])
    return known(inspect.getclosurevars(f).nonlocals) if known else None


# ---- surrogates spikecore has no kernel for -------------------------------------------------------------------------


class _Derivative:
    """A foreign spike function's derivative, through its own backward."""

    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        self.f = f

    def __call__(self, u: Tensor) -> Tensor:
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            s = self.f(u)
            return torch.autograd.grad(s.sum(), u)[0] if s.requires_grad else torch.zeros_like(u)


def _check_heaviside(f: Callable[[Tensor], Tensor], strict: bool) -> None:
    """Refuse a spike function that does more than fire at (or, strict, above) its threshold: graded, random."""
    u = torch.tensor([-1.0, -1e-3, 0.0, 1e-3, 1.0]).repeat(64)
    with torch.no_grad():
        if not torch.equal(f(u).to(u.dtype), ((u > 0) if strict else (u >= 0)).to(u.dtype)):
            raise NotImplementedError(f"surrogate {getattr(f, '__qualname__', type(f).__name__)} (not a step function)")
