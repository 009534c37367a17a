"""The processes of a run, one for each device, as torchrun's environment describes them."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from spikecore._backend import backend_info

__all__ = ["LostRankError", "Ranks", "joined"]


class LostRankError(ConnectionError):
    """A rank that others waited for is gone."""


@dataclass(frozen=True)
class Ranks:
    """This process among `world` of them."""

    rank: int
    world: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0

    def sum(self, numbers: Tensor) -> Tensor:
        """The sum over the ranks, on each of them."""
        if self.world > 1:
            numbers = numbers.to(self.device)
            dist.all_reduce(numbers)
        return numbers.cpu()

    def wait(self) -> None:
        if self.world > 1:
            dist.barrier()


@contextmanager
def joined() -> Iterator[Ranks]:
    """This process's ranks: those of torchrun, or itself alone. GPUs are used where their kernels are live.

    Raises:
        LostRankError: within, when another rank has gone: the message names it.
        ValueError: there are fewer GPUs than ranks on this machine.
    """
    gpu = backend_info()["gpu_backend"] is not None
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_RANK", 0))
    if gpu and local >= torch.cuda.device_count():
        raise ValueError(f"rank {rank} has no GPU: there are {torch.cuda.device_count()} on this machine")
    device = torch.device("cuda", local) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    if world == 1:
        yield Ranks(0, 1, device)
        return
    timeout, start = timedelta(minutes=10), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    # torchrun may keep one store for all its starts; in a later one the first one's addresses must not be found.
    store = dist.PrefixStore(f"start-{start}", next(rendezvous("env://", rank, world, timeout=timeout))[0])
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if gpu else "gloo", store=store, rank=rank, world_size=world, timeout=timeout
    )
    try:
        yield Ranks(rank, world, device)
    except RuntimeError as e:
        lost = _lost(store, rank, world) if "onnection" in str(e) or isinstance(e, dist.DistError) else []
        if lost:
            names = ", ".join(str(r) for r in lost)
            raise LostRankError(f"rank {names} of {world} is lost; rank {rank} cannot go on without it") from e
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _lost(store: dist.Store, rank: int, world: int) -> list[int]:
    """Who does not answer within seconds. All that are left come here, as their connections break together."""
    try:
        store.set(f"left-{rank}", "here")
        deadline = time.monotonic() + 5
        others = set(range(world)) - {rank}
        while others and time.monotonic() < deadline:
            others = {r for r in others if not store.check([f"left-{r}"])}
            time.sleep(0.1)
        return sorted(others)
    except (RuntimeError, dist.DistError):  # the store was the first rank's
        return [0]
