"""The operators on the shim, built once and kept by content for the next run."""

import pytest
import torch
from gpuless import lif_on_shim, ops_on_shim
from gpuless.shim import Shim, build


@pytest.fixture(scope="session")
def shim_cache():
    return ops_on_shim.cache_dir()


@pytest.fixture(scope="session")
def shim_library(shim_cache):
    """torch.ops.spikecore_shim on the checked shim; takes `ops_on_shim.set_order`."""
    return ops_on_shim.load(shim_cache, checked=True)


@pytest.fixture(scope="session")
def lif_shim(shim_cache):
    """The same kernels without torch, for launches by ctypes."""
    return Shim(build([lif_on_shim.SOURCE], shim_cache))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
