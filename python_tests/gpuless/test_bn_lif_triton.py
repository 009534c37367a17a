"""bn_lif's Triton kernels without a GPU: interpreted with the guard in another process."""

from pathlib import Path

import pytest
from gpuless.interpreted import passed, run_interpreted

pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.slow
def test_interpreted():
    assert passed(run_interpreted(Path(__file__).with_name("interpreted_bn_lif.py"))) == 7
