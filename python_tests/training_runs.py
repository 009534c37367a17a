"""Runs of `spikecore train` in processes of their own: a server has imported everything once, and forks them."""

import itertools
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

import torch

from spikecore.train import loop
from spikecore.train.recipe import Recipe, recipe_of

# A few milliseconds an update, with everything that draws random numbers or carries a state.
TINY: dict[str, Any] = {
    "name": "tiny",
    "model": "ecsnn_vgg_test",
    "model_kwargs": {"layers": "8 P 12 P", "hidden": [16], "T": 2, "dropout": 0.2, "num_classes": 10},
    "data": {"name": "digits"},
    "img_size": 8,
    "crop_padding": 1,
    "scale": [1.0, 1.0],
    "ratio": [1.0, 1.0],
    "reprob": 0.25,
    "mixup": 0.5,
    "cutmix": 0.5,
    "mixup_off_epoch": 1,
    "batch_size": 64,
    "effective_batch": 128,
    "lr": 5e-3,
    "weight_decay": 0.01,
    "clip_grad": 1.0,
    "epochs": 2,
    "warmup_epochs": 1,
    "sched_on_updates": True,
    "model_ema": True,
    "model_ema_decay": 0.9,
    "val_interval": 2,
    "recovery_interval": 3,
    "workers": 0,
}


def tiny(**changes: Any) -> Recipe:
    return recipe_of({**TINY, **changes}, "tiny")


class Server:
    """Has imported everything, and forks a process for each run: ``python training_runs.py`` at the other end."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, recipe: Recipe, out: pathlib.Path, **job: Any) -> int:
        """The number of a started process; `job`: see `_train`."""
        return self._ask({"recipe": recipe.to_dict(), "out": str(out), **job})

    def wait(self, pid: int) -> int:
        """Exit code, -9 after SIGKILL."""
        return self._ask({"wait": pid})

    def run(self, recipe: Recipe, out: pathlib.Path, **job: Any) -> int:
        return self.wait(self.start(recipe, out, **job))

    def close(self) -> None:
        self.process.communicate()

    def _ask(self, job: dict[str, Any]) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


def serve() -> None:
    torch.set_num_threads(1)
    while line := sys.stdin.readline():
        job = json.loads(line)
        if "wait" in job:
            answer = os.waitstatus_to_exitcode(os.waitpid(job["wait"], 0)[1])
        elif not (answer := os.fork()):
            _train(**job)
        print(answer, flush=True)


def _train(
    recipe: dict, out: str, *, resume: bool = False, rank: int = 0, world: int = 1, port: int = 0,
    kill: list[float] | None = None,
) -> None:  # fmt: skip
    """Exits with 0 after the run and with 1 after an error, whose line ends ``rank{n}.txt`` beside the folder `out`.

    Args:
        kill: after so many updates, and so many milliseconds into what follows.
    """
    with pathlib.Path(out).with_name(f"rank{rank}.txt").open("w") as log:
        sys.stdin.close()
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        if world > 1:
            own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
            os.environ.update({"MASTER_ADDR": "127.0.0.1", **{k: str(v) for k, v in own.items()}})
        if kill is not None:
            kill_at(*kill)
        try:
            loop.train(recipe_of(recipe, "job"), out, resume=resume)
        except Exception as e:
            log.write(f"\n{type(e).__name__}: {e}\n")
            log.flush()
            os._exit(1)
        os._exit(0)


def kill_at(updates: float, milliseconds: float) -> None:
    real, count = loop._Run.step, itertools.count(1)

    def kill() -> None:
        time.sleep(milliseconds / 1000)
        os.kill(os.getpid(), signal.SIGKILL)

    def step(*args: Any) -> float:
        loss = real(*args)
        if next(count) == updates:
            threading.Thread(target=kill, daemon=True).start()
        return loss

    loop._Run.step = step  # type: ignore[method-assign]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


if __name__ == "__main__":
    serve()
