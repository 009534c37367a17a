"""A run killed anywhere and resumed ends with the weights of one that was not, to the last bit."""

import csv
import random
import signal

import pytest

for module in ("timm", "torchmetrics", "tensorboard", "yaml", "sklearn"):
    pytest.importorskip(module)

from training_runs import Server, tiny  # noqa: E402

from spikecore.train.loop import train  # noqa: E402
from spikecore.train.recipe import RecipeError  # noqa: E402

UPDATES = 11 * 2  # 1437 // 128 an epoch


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.close()


def weights(out):
    return (out / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    assert server.run(tiny(), out) == 0, (out.parent / "rank0.txt").read_text()
    return out


def rows(out):
    with (out / "metrics.csv").open(newline="") as f:
        return [{k: v for k, v in row.items() if k not in ("seconds", "samples_per_s")} for row in csv.DictReader(f)]


def test_killed_at_random_and_resumed(server, whole, tmp_path):
    """At three random moments one after the other; then to the end."""
    places = random.Random()
    seed = places.randrange(1 << 30)
    places.seed(seed)
    out, kills = tmp_path / "run", 0
    for left in (UPDATES - 6, 8, 4):
        kill = [places.randint(1, left), places.uniform(0, 60)]
        code = server.run(tiny(), out, resume=True, kill=kill)
        kills += code == -signal.SIGKILL
        assert code in (0, -signal.SIGKILL), (tmp_path / "rank0.txt").read_text()
    assert kills, f"no run was killed, seed {seed}"
    assert server.run(tiny(), out, resume=True) == 0, (tmp_path / "rank0.txt").read_text()
    assert weights(out) == weights(whole), f"seed {seed}"
    assert (out / "best.safetensors").read_bytes() == (whole / "best.safetensors").read_bytes(), f"seed {seed}"
    assert rows(out) == rows(whole), f"seed {seed}"
    assert not list(out.glob(".*.part")) or kills


@pytest.mark.parametrize("updates", [7, 11])  # behind a checkpoint within an epoch; in the epoch's last update
def test_killed_at_a_known_place(server, whole, tmp_path, updates):
    out = tmp_path / "run"
    assert server.run(tiny(), out, kill=[updates, 0]) == -signal.SIGKILL
    assert (out / "state.pt").is_file()
    assert server.run(tiny(), out, resume=True) == 0
    assert weights(out) == weights(whole)


def test_a_run_is_not_overwritten_nor_changed(whole):
    with pytest.raises(RecipeError, match=r"holds a run already; go on with --resume"):
        train(tiny(), whole)
    for changes, message in (
        ({"epochs": 4}, r"has epochs=2, not 4"),
        ({"model_kwargs": {**tiny().model_kwargs, "T": 3}}, r"has model_kwargs=\{"),
        ({"lr": 1e-3}, r"has lr=0\.005, not 0\.001"),
        ({"effective_batch": 64}, r"has effective_batch=128, not 64"),
    ):
        with pytest.raises(RecipeError, match=message):
            train(tiny(**changes), whole, resume=True)
    before = weights(whole)
    assert any("test accuracy" in line for line in train(tiny(workers=1), whole, resume=True))  # it is over
    assert weights(whole) == before


def test_broken_state(whole, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    for content in (b"", b"no state", (whole / "state.pt").read_bytes()[:5000]):
        (out / "state.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"state\.pt is no (complete )?state of a run"):
            train(tiny(), out, resume=True)
