"""Compiles the CPU kernels outside of the extension, with the flags of CMakeLists.txt."""

from __future__ import annotations

import functools
import itertools
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"


@functools.cache
def cmake_list(name: str) -> list[str]:
    """The words of the first `set(name ...)` in CMakeLists.txt."""
    match = re.search(rf"^\s*set\({name}\b([^)]*)\)", (ROOT / "CMakeLists.txt").read_text(), re.M)
    assert match, f"CMakeLists.txt sets no {name}"
    return match[1].split()


def isas(machine: str = platform.machine()) -> list[str]:
    """The instruction sets built for a machine, that of the dispatch functions first."""
    return ["baseline", "avx2", "avx512"] if machine in ("x86_64", "AMD64") else ["neon"]


def require(tool: str, package: str) -> str:
    path = shutil.which(tool)
    if not path:
        pytest.skip(f"no {tool} (Debian: {package})")
    return path


def run(command: Sequence[str | Path], **options) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
    return done.stdout


def compile_isas(
    folder: Path, names: Sequence[str], compiler: str, extra: Sequence[str] = (), *, dispatch: bool = True,
    ops: Sequence[str] = (),
) -> dict[str, list[Path]]:  # fmt: skip
    """{isa: its objects} in `folder`, of all operators or `ops`; a warning fails.

    The first gets the dispatch functions, which need all others.
    """
    jobs = {}
    for name in names:
        for op in ops or cmake_list("ops"):
            target = folder / f"{op}_{name}.o"
            flags = [*cmake_list("cpu_flags"), *cmake_list(f"flags_{name}"), f"-DSPK_ISA={name}", *extra]
            if dispatch and name == names[0]:
                flags.append("-DSPK_DISPATCH")
            jobs[name, target] = [
                compiler, "-std=c++20", "-fPIC", "-fvisibility=hidden", *flags, "-Werror", f"-I{CSRC}",
                "-c", CSRC / op / f"{op}_cpu.cpp", "-o", target,
            ]  # fmt: skip
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, jobs.values()))
    return {name: [target for isa, target in jobs if isa == name] for name in names}


def link_check(op: str, folder: Path, objects: dict[str, list[Path]], compiler: str, extra: Sequence[str] = ()) -> Path:
    """<op>_check.cpp with these kernels, as a program."""
    program = folder / f"{op}_check"
    run([
        compiler, "-std=c++20", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}", *extra,
        Path(__file__).with_name(f"{op}_check.cpp"), CSRC / "core/isa.cpp", *itertools.chain(*objects.values()),
        "-o", program,
    ])  # fmt: skip
    return program


def release_objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """The kernels as the extension has them, compiled once in a test run."""
    return _release_objects(tmp_path_factory.getbasetemp() / "cpu_kernels")


@functools.cache
def _release_objects(folder: Path) -> dict[str, list[Path]]:
    folder.mkdir()
    return compile_isas(folder, isas(), require("g++", "g++"))
