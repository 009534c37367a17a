"""`import spikecore`: silent, light, without side effects; and clear where it cannot work."""

import importlib.metadata
import os
import pathlib
import subprocess
import sys
import tempfile

import pytest

import spikecore

ROOT = pathlib.Path(__file__).parents[1]


def run(script: str, *flags: str, cwd: pathlib.Path | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, *flags, "-c", script]
    # Not in the clone: there the bare source folder would stand before the installed package.
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=cwd or tempfile.gettempdir())


_LIGHT = """
import os, sys, torch, numpy
modules, environment = set(sys.modules), dict(os.environ)
handlers, threads = list(__import__("logging").root.handlers), torch.get_num_threads()
dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()
import spikecore
new = {name.split(".")[0] for name in set(sys.modules) - modules}
new = {name for name in new if name not in sys.stdlib_module_names and not name.startswith("_spikecore")}
assert new == {"spikecore"}, f"beyond torch and numpy: {new}"
heavy = {"sklearn", "matplotlib", "timm", "triton", "snntorch", "spikingjelly", "safetensors", "tqdm", "scipy"}
assert not heavy & ({n.split(".")[0] for n in set(sys.modules) - modules}), heavy
for part in ("data", "train", "models", "triton", "testing", "cli"):
    assert f"spikecore.{part}" not in sys.modules, part
assert dict(os.environ) == environment, "the environment changed"
assert list(__import__("logging").root.handlers) == handlers
assert (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()) == (threads, dtype, grad)
assert not torch.cuda.is_initialized()
"""


def test_import_is_silent_and_light() -> None:
    done = run(_LIGHT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_import_without_a_warning(tmp_path: pathlib.Path) -> None:
    """As errors: the warnings of spikecore's import, after torch and numpy have given theirs. Writes no file."""
    script = "import warnings, torch, numpy; warnings.simplefilter('error'); import spikecore; spikecore.backend_info()"
    done = run(script, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def test_import_with_warnings_as_errors() -> None:
    done = run("import spikecore", "-W", "error")
    if done.returncode and run("import torch, numpy", "-W", "error").returncode:
        pytest.skip("torch itself warns on import here")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_bare_models_is_refused() -> None:
    if not (ROOT / "models" / "__init__.py").is_file():
        pytest.skip("no source folder beside the tests")
    done = run("import models", cwd=ROOT)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1
    assert last == (
        "ImportError: this package is spikecore.models; write `import spikecore.models`, not `import models`"
    )


_NO_CORE = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name == "spikecore._C":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
try:
    import spikecore
except ImportError as e:
    assert not isinstance(e, ModuleNotFoundError), "the cause's own type says less"
    print(e)
"""


def test_missing_core_says_what_to_do() -> None:
    done = run(_NO_CORE)
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = done.stdout.splitlines()
    assert line.startswith(
        "spikecore: the compiled core (spikecore._C) is missing, so the installation was interrupted"
    )
    assert "pip install --force-reinstall --no-deps" in line


def test_another_import_error_is_not_hidden() -> None:
    """A core that is there but cannot load keeps its own message."""
    blocked = 'raise ModuleNotFoundError(f"No module named {name!r}", name=name)'
    script = _NO_CORE.replace(blocked, 'raise ImportError("libtorch.so: cannot open shared object file")')
    done = run(script)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "libtorch.so: cannot open shared object file\n"


def test_a_missing_dependency_of_the_core_is_named() -> None:
    """ModuleNotFoundError of something else than _C is not told as a missing core."""
    blocked = 'raise ModuleNotFoundError(f"No module named {name!r}", name=name)'
    other = 'raise ModuleNotFoundError("No module named \'torch._dynamo\'", name="torch._dynamo")'
    done = run(_NO_CORE.replace(blocked, other).replace("assert not isinstance", "# isinstance"))
    assert "torch._dynamo" in done.stdout, done.stdout


def test_version() -> None:
    assert spikecore.__version__ == importlib.metadata.version("spikecore")
    assert spikecore.backend_info()["isa"] == os.environ.get("SPIKECORE_ISA", spikecore.backend_info()["isas"][-1])
