"""Parity cases: outputs, gradients and spike counts of published code, and how far from them is right.

A case is a pair NAME.json + NAME.safetensors; a bundle's JSON has ``cases``, its sub-cases, whose tensors are called
SUBCASE/NAME or, where all share one, shared/NAME. What a case is of tells its key: (``source.repo``, ``source.file`` or
``source.release``, object); what was built, its ``config``. A runner is registered for a key:

    @runner("owner/repo", "file.py", "Class", op="lif")
    def run(case: Case, lif) -> Report: ...

It runs once for each of ``backends[op]``, a backend's name to a callable with the op's signature (``op=None``: once,
called with None). So a new case of a known key needs no code, and a case of an unknown key is listed as such.
"""

import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

Runner = Callable[["Case", Any], "Report"]

backends: dict[str | None, dict[str, Any]] = {None: {"-": None}}
_runners: dict[tuple[str, str, str], tuple[Runner, str | None]] = {}


def runner(repo: str, file: str, object: str, *, op: str | None = None) -> Callable[[Runner], Runner]:
    """Register the decorated function for one key; `file` is the release where the source is a package's release."""

    def register(run: Runner) -> Runner:
        assert (repo, file, object) not in _runners, f"two runners for {(repo, file, object)}"
        _runners[repo, file, object] = run, op
        return run

    return register


# ---- cases ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """`name` is unique in its folder, `data` the JSON (a sub-case's entries over its bundle's)."""

    name: str
    data: dict[str, Any]
    path: pathlib.Path
    prefix: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        source = self.data["source"]
        return source["repo"], source.get("file") or source["release"], self.data.get("object") or source["object"]

    @property
    def config(self) -> dict[str, Any]:
        return self.data["config"]

    @property
    def target(self) -> bool:
        """False where the case shows a fault or another version: its difference is reported, not required."""
        return self.data.get("target", True)

    @property
    def runner(self) -> tuple[Runner, str | None] | None:
        return _runners.get(self.key)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by NAME; shared ones too."""
        with safe_open(self.path.with_suffix(".safetensors"), "pt") as f:
            found = {}
            for key in f.keys():  # noqa: SIM118 (no mapping: it cannot be iterated)
                for prefix in ("shared/", self.prefix) if self.prefix else ("",):
                    if key.startswith(prefix):
                        found[key.removeprefix(prefix)] = f.get_tensor(key)
            return found

    def input(self, name: str) -> Tensor:
        """An input by its rule where it has one, else as stored."""
        spec = self.data.get("inputs", {}).get(name)
        if spec is None:
            return self.tensors[name].clone()
        dtype = getattr(torch, spec.get("dtype", "float32"))
        return fill(self.data["case_seed"], spec.get("rule_name", f"input:{name}"), spec["shape"], spec["fill"], dtype)


def case_files(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    return (p for p in sorted(folder.glob("*.json")) if p.with_suffix(".safetensors").is_file())


def load(folder: pathlib.Path) -> Iterator[Case]:
    """Every case of a folder, bundles taken apart."""
    for path in case_files(folder):
        data = json.loads(path.read_text(encoding="utf-8"))
        if "cases" not in data:
            yield Case(path.stem, data, path)
            continue
        for name, sub in data["cases"].items():
            yield Case(f"{path.stem}/{name}", {**data, **sub}, path, f"{name}/")


def uniform(seed: int, name: str, shape: list[int]) -> np.ndarray:
    """The u of the fill rule: float64 of `shape` in [0, 1), from seed, name and shape alone."""
    key = f"{seed}|{name}|" + "x".join(str(n) for n in shape)
    state = np.random.RandomState(int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "little"))
    return state.random_sample(int(np.prod(shape, dtype=int))).reshape(shape)


def fill(seed: int, name: str, shape: list[int], rule: list, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor by its rule, computed in float64 and rounded once ("stored" ones are no rule: see `Case.tensors`)."""
    kind, *p = rule
    if kind == "const":
        return torch.full(shape, p[0], dtype=dtype)
    u = uniform(seed, name, shape)
    if kind == "uniform":
        u = p[0] + (p[1] - p[0]) * u
    elif kind == "bernoulli":
        u = (u < p[0]).astype(np.float64)
    elif kind == "counts":
        u = np.maximum(0, np.floor(p[0] + (p[1] - p[0]) * u))
    else:
        raise ValueError(f"no fill rule {rule!r} ({name})")
    return torch.from_numpy(u).to(dtype)


def fill_state(target: torch.nn.Module | dict[str, Tensor], case: Case) -> None:
    """The case's state by its rules: into a module (whose keys must all be there; it need not have all), or a dict."""
    state = {}
    for entry in case.data["state"]:
        key, rule = entry["key"], entry["fill"]
        if rule == ["stored"]:
            state[key] = case.tensors[f"state.{key}"]
        else:
            state[key] = fill(case.data["case_seed"], key, entry["shape"], rule, getattr(torch, entry["dtype"]))
    if isinstance(target, torch.nn.Module):
        target.load_state_dict({key: state[key] for key in target.state_dict()})
    else:
        target.update(state)


def loss_weight(case: Case, out: Tensor) -> Tensor:
    """The W of a train run's loss, sum(out * W)."""
    return fill(case.data["case_seed"], "loss_weight", list(out.shape), ["uniform", -1, 1])


def probe(t: Tensor, seed: int, tag: str) -> float:
    """The ``dot`` of a statistics record: t against the rule's weights in [-1, 1), in float64."""
    w = torch.from_numpy(2 * uniform(seed, f"probe:{tag}", [t.numel()]) - 1)
    return float(t.detach().flatten().double() @ w)


# ---- what is right --------------------------------------------------------------------------------------------------


@dataclass
class Report:
    """Differences of one run, against the tolerances that come with the cases (the numbers in `spikes` ... `rates`)."""

    spikes_differing: int = 0
    output_error: float = 0.0
    gradient_error: float = 0.0
    failures: list[str] = field(default_factory=list)

    def spikes(self, got: Tensor, want: Tensor) -> None:
        """Element by element, exact."""
        self._count("spikes", int((got.detach() != want).sum()), 0)

    def counts(self, name: str, got: int, want: int, near: int = 0) -> None:
        """Rule 1: a layer's count, exact; `near` (its within_1e-5) where margin and summation order call for it."""
        self._count(f"spike count of {name}", abs(got - want), near)

    def _count(self, name: str, differing: int, allowed: int) -> None:
        self.spikes_differing += differing
        if differing > allowed:
            self.failures.append(f"{name}: {differing} differ (at most {allowed} may)")

    def output(self, name: str, got: Tensor, want: Tensor) -> None:
        """Rule 2: |got - want| <= 1e-5 max(1, absmax of want)."""
        got, want = got.detach().double(), want.double()
        error = float((got - want).abs().max() / want.abs().max().clamp(min=1)) if want.numel() else 0.0
        self.output_error = max(self.output_error, error)
        self._limit(name, error, 1e-5)

    def gradients(self, got: dict[str, Tensor], want: dict[str, Tensor], largest: float = 0.0) -> None:
        """Rule 3: ||g - ref|| <= 1e-4 ||ref|| + 1e-6 largest, the case's largest gradient norm (found in `want` too).

        The error is given over ||ref|| + 0.01 largest, so that its limit is 1e-4 throughout.
        """
        largest = max([largest, *(float(w.double().norm()) for w in want.values())])
        for name, w in want.items():
            w = w.double()
            scale = float(w.norm()) + 0.01 * largest
            error = float((got[name].detach().double() - w).norm()) / scale if scale else float(got[name].norm())
            self.gradient_error = max(self.gradient_error, error)
            self._limit(name, error, 1e-4)

    def values(self, name: str, got: Tensor, want: Tensor) -> None:
        """Rule 4, where nothing spikes: relative 1e-5 (of the largest value: sums may cancel)."""
        got, want = got.detach().double(), want.double()
        difference = float((got - want).abs().max()) if want.numel() else 0.0
        error = difference / (float(want.abs().max()) or 1.0) if difference else 0.0
        self.output_error = max(self.output_error, error)
        self._limit(name, error, 1e-5)

    def rates(self, name: str, got: float, want: float) -> None:
        """Rule 5, reduced precision: firing rates within 0.02."""
        self._limit(f"rate of {name}", abs(got - want), 0.02)

    def _limit(self, name: str, error: float, limit: float) -> None:
        if not error <= limit:  # `not <=` fails NaN too
            self.failures.append(f"{name}: error {error:.1e}, at most {limit:.0e}")


def table(rows: list[list[str]]) -> Iterator[str]:
    """The lines of the parity table, columns aligned; `rows` as `row` makes them."""
    rows = [["case", "backend", "max error", "of gradients", "spikes differing", ""], *rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ("  ".join(cell.ljust(w) for cell, w in zip(r, widths, strict=True)).rstrip() for r in rows)


def row(case: Case, backend: str, report: Report | None) -> list[str]:
    if report is None:
        return [case.name, backend, "-", "-", "-", "no runner yet"]
    verdict = "ok" if not report.failures else "FAILED" if case.target else "differs (not a target)"
    errors = f"{report.output_error:.1e}", f"{report.gradient_error:.1e}", str(report.spikes_differing)
    return [case.name, backend, *errors, verdict]
