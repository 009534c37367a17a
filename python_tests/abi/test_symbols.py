"""The installed core needs nothing that torch 2.10 does not export; no instruction set leaks into another's code."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from native import kernels

from spikecore import _C

CORE = Path(_C.__file__)
EXPORTS = set(Path(__file__).with_name("exports_libtorch_cpu_210.txt").read_text().split())  # nm -D of torch 2.10's
STREAM = "aoti_torch_get_current_cuda_stream"  # libtorch_cuda's, so it may be missing: declared weak

# What code of an instruction set must not contain: mnemonics or operands, as objdump writes them.
FOREIGN = {
    "baseline": re.compile(r"^v|%[yz]mm|%k[0-7]|%xmm(1[6-9]|2\d|3[01])"),
    "avx2": re.compile(r"%zmm|%k[0-7]|%[xy]mm(1[6-9]|2\d|3[01])"),
    "avx512": None,
    "neon": None,
}

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files")


def tool(*command) -> str:
    if not shutil.which(command[0]):
        pytest.skip(f"no {command[0]} (Debian: binutils)")
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=True).stdout


def symbols(*args) -> list[tuple[str, str]]:
    """[(type letter, name)]"""
    rows = [line.split(maxsplit=2) for line in tool("nm", "--format=posix", "--portability", *args).splitlines()]
    return [(row[1], row[0]) for row in rows if len(row) > 1]


def undefined() -> dict[str, str]:
    return {name.partition("@")[0]: kind for kind, name in symbols("-D", "--undefined-only", CORE)}


def test_needs_no_more_than_torch_210_exports():
    needed = {name for name in undefined() if name.startswith(("aoti_torch_", "torch_"))}
    assert needed, "nothing of torch's C interface: is this the right file?"
    assert needed - EXPORTS - {STREAM} == set()


def test_the_stream_symbol_may_be_missing():
    assert undefined().get(STREAM, "w") == "w"


def test_needs_no_cpp_symbol_of_torch():
    # c10, at and torch in mangled names: whatever is not the C interface changes from torch to torch.
    assert [name for name in undefined() if re.search(r"N?K?(3c10|2at|5torch)\d", name)] == []


def test_libraries():
    dynamic = tool("readelf", "--dynamic", "--wide", CORE)
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)
    assert {"libtorch.so", "libtorch_cpu.so"} <= set(needed)
    assert [n for n in needed if re.match(r"lib(torch_cuda|torch_python|c10|cudart|cuda\b|nv)", n)] == []
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic, "a library path of the build machine"  # noqa: PT018


def test_exports_only_the_module():
    exported = [name for kind, name in symbols("-D", "--defined-only", CORE) if kind in "TDBRW"]
    assert [n for n in exported if "spk" in n or "cuda" in n.lower()] == []
    assert "PyInit__C" in exported


def functions(path: Path) -> dict[str, list[str]]:
    """{demangled function: its instructions}"""
    found: dict[str, list[str]] = {}
    for line in tool("objdump", "-d", "-C", "--no-show-raw-insn", "--wide", path).splitlines():
        if start := re.fullmatch(r"[0-9a-f]+ <(.+)>:", line):
            body = found.setdefault(start[1], [])
        elif instruction := re.match(r"\s+[0-9a-f]+:\s+(\S.*)", line):
            body.append(instruction[1])
    return found


def wide_code(found: dict[str, list[str]]) -> dict[str, str]:
    """{function: its first instruction that its namespace does not allow}"""
    wrong = {}
    for name, body in found.items():
        isa = re.search(r"\bspk::(baseline|avx2|avx512|neon)::", name)
        foreign = FOREIGN[isa[1]] if isa else FOREIGN["baseline"]
        if foreign and (bad := next((i for i in body if foreign.search(i)), None)):
            wrong[name] = bad
    return wrong


def test_core_runs_wide_instructions_only_in_their_namespace():
    if not any(kind in "tT" for kind, _ in symbols(CORE)):
        pytest.skip("the installed core is stripped, so code cannot be told apart; the objects are checked instead")
    found = functions(CORE)
    assert any("spk::" in name for name in found)
    assert wide_code(found) == {}


@pytest.mark.slow
@pytest.mark.parametrize("isa", kernels.isas())
def test_objects_of_an_instruction_set_are_their_own(tmp_path_factory, isa):
    for path in kernels.release_objects(tmp_path_factory)[isa]:
        found = functions(path)
        assert any(f"spk::{isa}::" in name for name in found)
        if FOREIGN[isa]:
            assert {n: bad for n, body in found.items() for bad in body if FOREIGN[isa].search(bad)} == {}
        # A symbol that other objects can see, of another namespace: the linker may keep this copy for everyone.
        first = isa == kernels.isas()[0]
        visible = [(kind, n) for kind, n in symbols("-C", "--defined-only", path) if kind.isupper() or kind == "u"]
        assert [s for s in visible if not ours(s[1], isa, first)] == []


def ours(name: str, isa: str, dispatch: bool) -> bool:
    if name.startswith("DW.ref."):  # data
        return True
    return f"spk::{isa}::" in name or (dispatch and "spk::" in name and "spk::avx" not in name)


@pytest.mark.slow
def test_avx512_objects_do_use_it(tmp_path_factory):
    """The check above would see it."""
    if "avx512" not in kernels.isas():
        pytest.skip("not an x86-64 machine")
    path = kernels.release_objects(tmp_path_factory)["avx512"][0]
    assert any("%zmm" in i for body in functions(path).values() for i in body)
