"""Several ranks on the CPU: they train as one does, a lost one is named, torchrun goes on."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import torch

for module in ("timm", "torchmetrics", "tensorboard", "yaml", "sklearn"):
    pytest.importorskip(module)

import yaml  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from training_runs import TINY, Server, free_port, tiny  # noqa: E402

from spikecore.train.batches import seed_all  # noqa: E402
from spikecore.train.build import build_net  # noqa: E402


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.close()


def start_two(server, recipe, out, *, resume=False, kill=None):
    """Two ranks, of which `kill` is for the second."""
    port = free_port()
    return [server.start(recipe, out, rank=rank, world=2, port=port, resume=resume,
                         kill=kill if rank == 1 else None) for rank in range(2)]  # fmt: skip


def two(server, recipe, out, *, resume=False):
    """Exit codes of two ranks."""
    return [server.wait(job) for job in start_two(server, recipe, out, resume=resume)]


def said(out):
    return "\n".join(path.read_text() for path in sorted(out.parent.glob("rank*.txt")))


# Norms over channels, so that a sample does not depend on its batch; one update, whose change of the weights
# is the gradient of 720 samples, 1,000 times so that rounding them hides none of it.
GRADIENT = {
    "model": "svmamba_test", "model_kwargs": {"in_chans": 1, "num_classes": 10, "T": 2}, "opt": "momentum",
    "momentum": 0.0, "weight_decay": 0.0, "clip_grad": None, "lr": 1000.0, "epochs": 1, "warmup_epochs": 0,
    "batch_size": 180, "effective_batch": 720, "model_ema": False, "mixup": 0.0, "cutmix": 0.0,
}  # fmt: skip


def test_two_ranks_have_the_gradient_of_one(server, tmp_path):
    seed_all(0)
    before = build_net(tiny(**GRADIENT)).state_dict()
    for key, value in before.items():
        if ".in_proj." in key:
            value.mul_(20)  # so that neurons fire
    save_file(before, tmp_path / "before.safetensors")
    settings = {**GRADIENT, "initial_checkpoint": str(tmp_path / "before.safetensors")}
    assert server.run(tiny(**settings), tmp_path / "alone") == 0, said(tmp_path / "alone")
    alone = load_file(tmp_path / "alone" / "model.safetensors")
    for kind in ("ddp", "fsdp"):
        assert two(server, tiny(**settings, parallel=kind), tmp_path / kind) == [0, 0], said(tmp_path / kind)
        ours = load_file(tmp_path / kind / "model.safetensors")
        for key, start in before.items():
            gradient = start - alone[key]
            largest = gradient.abs().max().item()
            assert largest > 0 or ".ssm." in key, key  # the scan's are tiny where its weights are the first ones
            rounding = 1e-6 * start.abs().max().item()  # of the weights
            torch.testing.assert_close(start - ours[key], gradient, rtol=1e-3, atol=1e-3 * largest + rounding)


def test_a_lost_rank_is_named_and_the_run_goes_on(server, tmp_path):
    """With norms, average, accumulation and mixup: resumed, two ranks end where two that were never stopped do."""
    recipe = tiny(epochs=1, batch_size=32)
    assert two(server, recipe, tmp_path / "whole") == [0, 0], said(tmp_path / "whole")
    (tmp_path / "broken").mkdir()
    out = tmp_path / "broken" / "run"
    goes_on, lost = start_two(server, recipe, out, kill=[5, 0])
    assert server.wait(lost) == -signal.SIGKILL
    since = time.monotonic()
    assert server.wait(goes_on) == 1
    assert time.monotonic() - since < 20  # five of which it spends on finding out who is lost
    assert "LostRankError: rank 1 of 2 is lost; rank 0 cannot go on without it" in said(out)
    assert two(server, recipe, out, resume=True) == [0, 0], said(out)
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_torchrun_starts_again_from_the_checkpoint(tmp_path):
    """One rank is killed in the middle: torchrun says which, starts all anew, and they go on."""
    recipe, out = tmp_path / "tiny.yaml", tmp_path / "run"
    changes = {"epochs": 8, "val_interval": 8, "recovery_interval": 2}
    recipe.write_text(yaml.safe_dump({k: v for k, v in {**TINY, **changes}.items() if k != "name"}))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1",
        "--master-port", str(free_port()), "-m", "spikecore", "train", str(recipe), "--out", str(out),
    ]  # fmt: skip
    log = tmp_path / "log.txt"
    with log.open("w") as f:
        run = subprocess.Popen(command, stdout=f, stderr=f, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"})
        try:
            while not (out / "state.pt").is_file():
                assert run.poll() is None, log.read_text()
                time.sleep(0.05)
            os.kill(ranks_of(run.pid)[1], signal.SIGKILL)
            assert run.wait(240) == 0, log.read_text()
        finally:
            run.kill()
    assert "exitcode: -9" in log.read_text()
    assert "local_rank: 1" in log.read_text()
    assert (out / "model.safetensors").is_file()


def ranks_of(parent):
    """Process numbers by rank."""
    children = pathlib.Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    environments = {int(c): pathlib.Path(f"/proc/{c}/environ").read_bytes().split(b"\0") for c in children}
    return {int(e.removeprefix(b"RANK=")): c for c, es in environments.items() for e in es if e.startswith(b"RANK=")}
