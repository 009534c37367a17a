"""Two gloo ranks and activation checkpointing, one small variant of each family."""

import functools
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from spikecore.models import create_model

VARIANTS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "sew_resnet_test": ({}, (2, 3, 32, 32)),
    "sma_vgg8_test": ({"dropout": 0.0}, (2, 8, 2, 32, 32)),
    "ms_resnet_test": ({}, (2, 3, 64, 64)),
    "qkformer_test": ({}, (2, 3, 32, 32)),
    "ecsnn_vgg_test": ({"dropout": 0.0}, (2, 1, 8, 8)),
    "svmamba_test": ({}, (2, 3, 24, 24)),
    "vmamba_test": ({}, (2, 3, 24, 24)),
    "sdt_test": ({}, (2, 3, 32, 32)),
    "spikformer_test": ({}, (2, 3, 32, 32)),
    "spikingformer_test": ({}, (2, 3, 32, 32)),
}


def build(name: str) -> tuple[nn.Module, Tensor]:
    """Norms in evaluation, so that a batch does not depend on how it is split; biased, so that neurons fire."""
    settings, shape = VARIANTS[name]
    torch.manual_seed(0)
    model = create_model(name, **settings)
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(m.bias, 0.0, 2.0)
            nn.init.constant_(m.weight, 1.0)
            m.eval()
    return model.double(), torch.rand(shape, dtype=torch.float64) * 2


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model(x).square().mean().backward()
    module = model.module if isinstance(model, DistributedDataParallel) else model
    return {n: p.grad for n, p in module.named_parameters() if p.requires_grad}


@functools.cache
def alone(name: str) -> dict[str, Tensor]:
    return gradients(*build(name))


def rank_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {}
    for name in VARIANTS:
        model, x = build(name)
        found[name] = gradients(DistributedDataParallel(model), x[rank::2])
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, dict[str, Tensor]]]:
    with tempfile.TemporaryDirectory() as folder:
        running = [subprocess.Popen([sys.executable, __file__, str(rank), folder]) for rank in range(2)]
        assert [process.wait(timeout=300) for process in running] == [0, 0]
        return [torch.load(pathlib.Path(folder) / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", VARIANTS)
def test_two_ranks_are_one_batch(name: str, ranks: list[dict[str, dict[str, Tensor]]]) -> None:
    assert sum(bool(g.any()) for g in alone(name).values()) > len(alone(name)) // 2
    for n, g in alone(name).items():
        assert torch.equal(ranks[0][name][n], ranks[1][name][n]), n
        torch.testing.assert_close(ranks[0][name][n], g, msg=lambda m, n=n: f"{n}: {m}")


@pytest.mark.parametrize("name", VARIANTS)
def test_activation_checkpointing(name: str) -> None:
    model, x = build(name)
    calls = 0
    for stage in model.stages:
        module = model.get_submodule(stage)

        def run(*args: Any, inner: Any = module.forward) -> Any:
            nonlocal calls
            calls += 1
            return checkpoint(inner, *args, use_reentrant=False)

        module.forward = run
    for n, g in gradients(model, x).items():
        assert torch.equal(g, alone(name)[n]), n
    assert calls == len(model.stages)


if __name__ == "__main__":
    rank_of_two(int(sys.argv[1]), sys.argv[2])


def test_the_gain_of_spiking_linear_layers() -> None:
    """The same first weights but for the gain; without it, narrow layers do not fire at first."""
    rates: dict[float, list[float]] = {}
    for gain in (1.0, 16.0):
        torch.manual_seed(0)
        model = create_model("sma_vgg8_test", dropout=0.0, linear_gain=gain)
        fired = rates.setdefault(gain, [])
        for index in (3, 6):
            model.others[index].register_forward_hook(lambda m, args, out, fired=fired: fired.append(out.mean().item()))
        torch.manual_seed(1)
        model.train()(torch.randint(0, 4, (4, 8, 2, 34, 34)).float())
        if gain == 1:
            plain = model.state_dict()
    assert rates[1.0] == [0, 0]
    assert all(rate > 0.01 for rate in rates[16.0])
    for name, value in model.state_dict().items():
        if name.endswith("weight"):
            times = 16 if name in ("others.2.weight", "others.5.weight") else 1
            torch.testing.assert_close(value, plain[name] * times)
