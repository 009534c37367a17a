"""Runs a test file in a process of its own in which Triton interprets: one process either interprets or compiles."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PYTHON_TESTS = Path(__file__).resolve().parents[1]


def run_interpreted(path: Path, *options: str) -> str:
    """Run pytest on `path` with TRITON_INTERPRET=1; returns its output, fails or skips as it did.

    `path` should not match test_*.py, or the compiling process collects it too. It calls `interp_guard.install()`.
    """
    pytest.importorskip("triton", reason="triton is not installed")
    ini = [
        "-c",
        os.devnull,
        "--rootdir",
        str(PYTHON_TESTS),
        "-o",
        f"pythonpath={PYTHON_TESTS}",
        "-p",
        "no:cacheprovider",
    ]
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "--import-mode=importlib", *ini, str(path), *options]
    # Not in the clone: python -m would put the bare source folder before the installed package.
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=PYTHON_TESTS)
    if done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED and "SKIPPED" in done.stdout:
        pytest.skip(done.stdout.strip().splitlines()[-2])
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def passed(output: str) -> int:
    """How many tests a run's output says have passed."""
    found = re.search(r"(\d+) passed", output)
    assert found, output
    return int(found[1])
