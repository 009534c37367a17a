"""Facts about compiled kernels, got without a GPU or a driver: registers, spills, shared memory, vector accesses, PTX.

A process with TRITON_INTERPRET set cannot compile Triton kernels; `triton_aot` skips there.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

ARCHS = (80, 90, 100)


@dataclass(frozen=True)
class Facts:
    name: str
    arch: int  # 80, 90, 100
    registers: int
    stack: int  # bytes a thread; not zero where registers spill or arrays stay in memory
    local: int
    shared: int  # bytes a block, without CUDA's dynamic part
    spills: int  # LDL and STL instructions
    ldg128: int  # also those straight into shared memory
    stg128: int
    lds: int
    sts: int
    mma: int
    ptx: str  # Triton only; for CUDA see nvcc_ptx
    sass: str


def triton_bin() -> Path:
    """The tools in the triton wheel: ptxas, cuobjdump, nvdisasm."""
    triton = pytest.importorskip("triton", reason="triton is not installed")
    folder = Path(triton.__file__).parent / "backends/nvidia/bin"
    if not (folder / "cuobjdump").exists():
        pytest.skip("the triton wheel brings no cuobjdump", allow_module_level=True)
    return folder


def nvcc() -> str:
    return shutil.which("nvcc") or pytest.skip("no nvcc", allow_module_level=True)


def _output(command: Sequence[Path | str]) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{(done.stdout + done.stderr)[-4000:]}")
    return done.stdout + done.stderr


def _facts(binary: Path, ptx: str = "") -> list[Facts]:
    """One per kernel and architecture in a cubin or object file."""
    tool = triton_bin() / "cuobjdump"
    pattern = r"Function (\S+?):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    usage: dict[tuple[str, int], tuple[int, ...]] = {}
    for section in re.split(r"\n(?=Fatbin elf code:)", _output([tool, "-res-usage", binary])):
        arch = re.search(r"arch = sm_(\d+)", section)
        for name, *numbers in re.findall(pattern, section):
            usage[name, int(arch[1]) if arch else 0] = tuple(map(int, numbers))
    out = []
    for section in re.split(r"\n(?=\s*code for sm_)", _output([tool, "-sass", binary])):
        if not (code := re.search(r"code for sm_(\d+)", section)):
            continue
        for name, sass in re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function : |\Z)", section, re.S):
            arch = int(code[1])
            registers, stack, shared, local = usage.get((name, arch)) or usage[name, 0]
            n = [
                len(re.findall(p, sass)) for p in (r"\b(?:LDL|STL)\b", r"\bLDG(?:STS)?\.E\.\S*128", r"\bSTG\.E\.\S*128")
            ]
            n += [len(re.findall(p, sass)) for p in (r"\bLDS\b", r"\bSTS\b", r"\b[A-Z]*MMA\b")]
            out.append(Facts(name, arch, registers, stack, local, shared, *n, ptx, sass))
    return out


def triton_compile(
    fn: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    arch: int,
    *,
    num_warps: int = 4,
    num_stages: int = 3,
    align16: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
) -> Any:
    """What `triton.compile` makes of a `@triton.jit` function for sm_`arch`.

    signature: name: "*fp32", "i32", "fp32" ... of each argument that is no constant; align16: those divisible by 16,
    as a launch would find out itself.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET=1: this process interprets, it cannot compile")
    pytest.importorskip("triton", reason="triton is not installed")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = fn.arg_names
    source = ASTSource(
        fn=fn,
        signature={n: "constexpr" if n in constants else signature[n] for n in names},
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in align16},
    )
    chosen = {"num_warps": num_warps, "num_stages": num_stages, **(options or {})}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=chosen)


def triton_aot(fn: Any, signature: Mapping[str, str], constants: Mapping[str, Any], arch: int, **how: Any) -> Facts:
    """Facts of what `triton_compile` makes; `shared` is the dynamic shared memory that Triton's launcher passes.

    What spills by an older Triton than the kernels were tuned with is skipped: it compiles, and runs a little slower.
    """
    compiled = triton_compile(fn, signature, constants, arch, **how)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        (facts,) = _facts(cubin, compiled.asm["ptx"])
    version = metadata.version("triton")
    if facts.spills and tuple(map(int, version.split(".")[:2])) < (3, 8):
        pytest.skip(f"{fn.__name__} spills for sm_{arch} by Triton {version}; asserted is that of 3.8 and newer")
    return replace(facts, shared=compiled.metadata.shared, arch=arch)


def nvcc_facts(
    source: Path, archs: Sequence[int] = ARCHS, include_dirs: Sequence[Path] = (), extra: Sequence[str] = ()
) -> list[Facts]:
    """Compile a .cu for `archs`, warnings as errors; one Facts per kernel (mangled name) and architecture.

    Spills are in the facts; add "-Xptxas", "-warn-spills" to `extra` to refuse them here.
    """
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    flags = ["-c", "-O3", "-std=c++20", "-Werror", "all-warnings", *(f"-I{d}" for d in include_dirs), *extra]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "kernels.o"
        _output([nvcc(), *flags, *targets, source, "-o", out])
        return _facts(out)


def nvcc_ptx(source: Path, include_dirs: Sequence[Path] = (), extra: Sequence[str] = (), arch: int = 80) -> str:
    """PTX of a .cu, for ptxvm."""
    flags = ["-ptx", "-O3", "-std=c++20", f"-arch=compute_{arch}", *(f"-I{d}" for d in include_dirs), *extra]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "kernels.ptx"
        _output([nvcc(), *flags, source, "-o", out])
        return out.read_text()
