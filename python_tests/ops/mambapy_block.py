"""Run by test_selective_scan.py beside an installed mambapy: its block with its own scan and with ours."""

import torch
from mambapy.mamba import MambaBlock, MambaConfig

from spikecore.ops import selective_scan
from spikecore.testing.compare import assert_close


def ours(x, delta, A, B, C, D):
    """In place of MambaBlock.selective_scan, whose sequences are [B, L, C]."""
    return selective_scan(x.mT, delta.mT, A, B.mT, C.mT, D).mT


def run(block, x):
    x = x.clone().requires_grad_()
    y = block(x)
    names = ["x", *(name for name, _ in block.named_parameters())]
    g = torch.autograd.grad(y.square().sum(), [x, *block.parameters()])
    return {"y": y.detach(), **dict(zip(names, g, strict=True))}


torch.manual_seed(0)
block = MambaBlock(MambaConfig(d_model=32, n_layers=1, d_state=16))
x = torch.randn(2, 64, 32)
theirs = run(block, x)
block.double()
exact = run(block, x.double())
block.float()
block.selective_scan = ours
mine = run(block, x)
for name, want in theirs.items():
    assert_close(mine[name], want, exact[name], name)
print("same")
