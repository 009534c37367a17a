"""Options and the parity table; see golden/harness.py."""

import pathlib

import pytest
import torch
from golden import harness


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden", metavar="DIR", type=pathlib.Path, help="also check the parity cases in DIR (write --golden=DIR)"
    )
    parser.addoption(
        "--real-data",
        metavar="DIR",
        type=pathlib.Path,
        help="train the short recipes on parts of nmnist-1k, fsdd, cifar10-jpeg (.zip or folders) in DIR "
        "(write --real-data=DIR)",
    )


def pytest_configure(config: pytest.Config) -> None:
    if worker := getattr(config, "workerinput", None):  # one of several processes, which share the cores
        torch.set_num_threads(max(1, torch.get_num_threads() // worker["workercount"]))
    folder = config.getoption("--golden")
    if folder is not None and not any(harness.case_files(folder)):
        raise pytest.UsageError(f"--golden={folder}: no NAME.json beside NAME.safetensors there")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [r for kind in ("passed", "failed", "skipped") for r in terminalreporter.stats.get(kind, ())]
    rows = [row for r in reports if r.when == "call" for key, row in r.user_properties if key == "golden"]
    if rows:
        terminalreporter.section("parity with published code")
        for line in harness.table(rows):
            terminalreporter.write_line(line)
