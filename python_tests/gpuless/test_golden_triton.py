"""The parity cases by Triton's interpreter, in a process of its own."""

import re

import pytest
from golden import harness, kinds  # noqa: F401  (registers the runners)
from gpuless.interpreted import PYTHON_TESTS, passed, run_interpreted


@pytest.mark.slow
def test_golden_cases_interpreted(request):
    """The kept cases and those of --golden, with the kernels in Triton: one line of the parity table each."""
    folder = request.config.getoption("--golden")
    kept = PYTHON_TESTS / "golden/cases"
    cases = [c for f in (kept, folder) if f for c in harness.load(f) if c.runner and c.runner[1]]
    options = [f"--golden={folder.resolve()}"] if folder else []
    output = run_interpreted(PYTHON_TESTS / "golden/test_golden.py", "-k", "test_parity and triton", *options)
    assert passed(output) == len(cases)
    rows = re.findall(r"^(\S+) +triton .*?(ok|FAILED|differs \(not a target\))$", output, re.M)
    assert sorted(name for name, _ in rows) == sorted(c.name for c in cases)
    targets = {c.name for c in cases if c.target}
    assert {verdict for name, verdict in rows if name in targets} == {"ok"}
