"""What the parts of the package promise one another: numbers, registrations, docstrings, import floors."""

import ast
import importlib
import inspect
import pathlib
import re
import sys
from collections.abc import Iterator

import pytest
import torch

import spikecore
from spikecore import neurons, ops, surrogate
from spikecore.testing.cases import CASES, SURROGATES

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = pathlib.Path(spikecore.__file__).parent
REGISTERED = sorted(n.split("::")[1] for n in torch._C._dispatch_get_all_op_names() if n.startswith("spikecore::"))


def source(path: str) -> str:
    file = ROOT / path
    if not file.is_file():
        pytest.skip(f"{path} is not here: the tests run beside an installed package")
    return file.read_text(encoding="utf-8")


# ---- surrogates: one number a family ---------------------------------------------------------------------------------


def test_surrogate_kinds_are_counted() -> None:
    families = [getattr(surrogate, name) for name in surrogate.__all__ if name != "Surrogate"]
    assert sorted(f.kind for f in families) == list(range(len(families)))
    assert {type(s) for s in SURROGATES} == set(families)
    assert [type(s).kind for s in SURROGATES] == list(range(len(families)))


def test_surrogate_kinds_are_those_of_cpp() -> None:
    text = source("csrc/core/surrogate.h")
    (body,) = re.findall(r"enum class Surrogate : int32_t \{([^}]*)\}", text)
    enum = [name.strip().replace("_", "") for name in body.split(",")]
    assert enum == [type(s).__name__.lower() for s in SURROGATES]
    assert re.findall(r"kSurrogates = (\d+);", text) == [str(len(enum))]


def test_surrogate_kinds_are_those_of_triton() -> None:
    text = source("spikecore/triton/lif.py")
    body = text[text.index("def _surrogate(") : text.index("def _charge(")]
    branches = re.findall(r"(?:if|elif) KIND == (\d+):  # (\w+)", body)
    last = re.findall(r"else:  # (\w+)", body)
    assert [(int(k), n) for k, n in branches] == [(s.kind, type(s).__name__) for s in SURROGATES[:-1]]
    assert last == [type(SURROGATES[-1]).__name__]


# ---- registrations ---------------------------------------------------------------------------------------------------


def test_every_registered_operator_has_a_case() -> None:
    assert sorted({op for case in CASES.values() for op in case.registered}) == REGISTERED


@pytest.mark.parametrize("op", REGISTERED)
def test_one_implementation_for_each_key(op: str) -> None:
    dump = torch._C._dispatch_dump(f"spikecore::{op}")
    keys = re.findall(r"^(\w+)(?:\[alias\])?(?: \(inactive\))?: ", dump, re.MULTILINE)
    keys = [k for k in keys if k not in ("name", "schema", "debug")]
    assert len(keys) == len(set(keys)), dump
    assert "(inactive)" not in dump, dump  # a registration that another one replaced
    assert {"CPU", "CUDA", "Meta", "Autograd"} <= set(keys), dump
    assert "CompositeImplicitAutograd" not in keys


@pytest.mark.parametrize("op", REGISTERED)
def test_backward_operators_follow_forward(op: str) -> None:
    base, direction = op.rsplit("_", 1)
    assert direction in ("fwd", "bwd")
    assert {f"{base}_fwd", f"{base}_bwd"} <= set(REGISTERED)
    assert callable(getattr(ops, base))
    assert callable(getattr(ops, f"{base}_ref"))
    assert base in ops.__all__
    assert f"{base}_ref" in ops.__all__


@pytest.mark.parametrize("case", CASES.values(), ids=lambda c: c.name)
def test_reference_takes_the_operators_arguments(case) -> None:
    op, ref = inspect.signature(case.op).parameters, inspect.signature(case.ref).parameters
    assert list(ref)[: len(op)] == list(op)
    assert [p.default for p in ref.values()][: len(op)] == [p.default for p in op.values()]


# ---- docstrings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES.values(), ids=lambda c: c.name)
def test_public_functions_tell_everything(case) -> None:
    doc = inspect.getdoc(case.op)
    for section in ("Args:", "Returns:", "Raises:"):
        assert f"\n{section}\n" in doc, section
    arguments = doc[doc.index("Args:") : doc.index("Returns:")]
    missing = [p for p in inspect.signature(case.op).parameters if not re.search(rf"\b{p}\b", arguments)]
    assert missing == []


@pytest.mark.parametrize("module", [spikecore, ops, surrogate, neurons], ids=lambda m: m.__name__)
def test_everything_public_has_a_docstring(module) -> None:
    assert module.__doc__
    for name in module.__all__:
        thing = getattr(module, name)
        if callable(thing):
            assert (thing.__doc__ or "").strip(), name
            assert not thing.__doc__.startswith(f"{name}("), f"{name}: only a dataclass's generated docstring"


# ---- the neurons' table ----------------------------------------------------------------------------------------------


def test_neuron_table() -> None:
    """Each row of the table in the module's docstring against what the module passes to the operator."""
    rows = re.findall(r"^\| `([^`]+)`[^|]*\| ([^|]+) \| ([^|]+) \|", neurons.__doc__, re.MULTILINE)
    made = {
        "IF": neurons.IF(),
        "LIF(decay_input=True)": neurons.LIF(3.0),
        "LIF(decay_input=False)": neurons.LIF(3.0, decay_input=False),
        "PLIF": neurons.PLIF(3.0),
        "Leaky(beta)": neurons.Leaky(0.7),
    }
    assert [name for name, _, _ in rows] == list(made)
    for name, decay, gain in rows:
        numbers = {"tau": 3.0, "k": 1 / 3, "beta": 0.7}
        want = [eval(e.split(",")[0], numbers) for e in (decay, gain)]
        got = [torch.as_tensor(p).item() for p in made[name].decay_and_gain()]
        assert got == pytest.approx(want, rel=1e-6), name
    assert made["Leaky(beta)"].strict
    assert made["Leaky(beta)"].reset_by == pytest.approx(1 / 0.7)
    assert float(neurons.PLIF(3.0, decay_input=False).decay_and_gain()[1]) == 1.0


def test_neurons_default_as_the_operator_does() -> None:
    op = inspect.signature(ops.lif).parameters
    for name, p in inspect.signature(neurons.Neuron.__init__).parameters.items():
        if name != "self":
            assert p.default == op[name].default, name


# ---- floors ----------------------------------------------------------------------------------------------------------

# Each part may import itself and the parts of the rows above it.
FLOORS = [
    {"_C"},
    {"_backend", "surrogate", "ops", "triton"},
    {"neurons", "layers"},
    {"models", "testing", "interop", "energy"},
    {"data"},
    {"train"},
    {"edge", "caption"},
    {"cli", "doctor", "__main__"},
]
CORE = set.union(*FLOORS[:3], {"interop", "energy", "__init__"})  # may import torch and numpy alone


def rank(part: str) -> int:
    return next(i for i, parts in enumerate(FLOORS) if part in parts)


def imported(path: pathlib.Path, package: str, top_only: bool = False) -> Iterator[str]:
    """Full names of the modules that a file imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: 1 - node.level or None] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def files() -> list[tuple[str, str, pathlib.Path]]:
    """(part, package, file) of everything that is installed as spikecore."""
    found = [(PACKAGE, "spikecore")] + ([(ROOT / "models", "spikecore.models")] if (ROOT / "models").is_dir() else [])
    rows = []
    for folder, package in found:
        for path in sorted(folder.rglob("*.py")):
            inner = path.relative_to(folder).with_suffix("").parts
            dotted = ".".join([package, *inner[:-1]])
            part = "models" if package.endswith("models") else inner[0]
            rows.append((part, dotted, path))
    return rows


@pytest.mark.parametrize(
    ("part", "package", "path"), files(), ids=lambda v: v.name if isinstance(v, pathlib.Path) else v
)
def test_imports_go_up_only(part: str, package: str, path: pathlib.Path) -> None:
    names = set(imported(path, package))
    wanted = {n.split(".")[1] for n in names if n.startswith("spikecore.")}
    parts = {p for floor in FLOORS for p in floor}
    if part == "__init__":
        assert wanted & parts <= CORE
    else:
        assert {p for p in wanted & parts if rank(p) > rank(part)} == set()
    tops = {n.split(".")[0] for n in imported(path, package, top_only=True)}
    if part in CORE:
        others = tops - {"spikecore", "torch", "numpy", *(["triton"] if part == "triton" else [])}
        assert others <= sys.stdlib_module_names, others
    assert "models" not in tops


def test_triton_is_imported_only_where_chosen() -> None:
    for part, package, path in files():
        if part != "triton":
            assert not any(n.split(".")[0] == "triton" for n in imported(path, package)), path.name
            assert not any(n.startswith("spikecore.triton") for n in imported(path, package, top_only=True)), path.name


def test_modules_import_alone() -> None:
    for name in ("ops.lif", "surrogate", "neurons", "testing.cases", "testing.compare"):
        assert importlib.import_module(f"spikecore.{name}").__doc__
