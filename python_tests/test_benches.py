"""benches/run.py runs, saves, draws, compares, prints no number for an operator that is wrong; tables of the others."""

import dataclasses
import importlib.util
import json
import pathlib
import sys
from types import ModuleType

import pytest
import torch

from spikecore.testing.timing import bench, bytes_kept, bytes_moved, bytes_peak

RUN = pathlib.Path(__file__).parents[1] / "benches" / "run.py"


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """run.py with its benches; peers that are other packages are left out, and the allocator stays as it is."""
    spec = importlib.util.spec_from_file_location("benches_run", RUN)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    modules = module.discover()
    monkeypatch.setattr(module, "discover", lambda: modules)
    monkeypatch.setattr(module.timing, "steady_memory", lambda: "allocator as it is")
    for name in [*sys.modules, "spikingjelly", "snntorch"]:  # another test of this process may have imported them
        if name.partition(".")[0] in ("spikingjelly", "snntorch"):
            monkeypatch.setitem(sys.modules, name, None)
    return module


def test_saves_draws_and_compares(runner, tmp_path, capsys):
    command = ["--op", "lif", "--quick", "--scaling", "--threads", "1"]
    assert runner.main([*command, "--json", f"{tmp_path}/old.json", "--plot", f"{tmp_path}/plots"]) == 0
    out = capsys.readouterr().out
    assert "left out: snntorch (import of snntorch halted" in out
    for name in ("lif.png", "lif_scaling.png"):
        assert (tmp_path / "plots" / name).read_bytes().startswith(b"\x89PNG")
    saved = json.loads((tmp_path / "old.json").read_text())
    assert {row["direction"] for row in saved["rows"]} == {"forward", "training"}
    for grown in saved["scaling"]:
        assert [set(point) for point in grown["points"].values()] == [{"spikecore", "eager"}] * 2
    assert saved["machine"]["versions"]["torch"] == torch.__version__
    for row in saved["rows"]:
        assert row["times"]["spikecore"]["minimum"] <= row["times"]["spikecore"]["median"]
        assert row["moved_over_must"] == 1
        assert set(row["peer_over_ours"]) == {"eager"}
        if row["direction"] == "training":
            assert row["memory_over_x"]["spikecore"] == {"kept": 0, "peak": 0}
            assert row["memory_over_x"]["eager"]["kept"] >= 1
    assert runner.main([*command, "--compare", f"{tmp_path}/old.json"]) == 0
    out = capsys.readouterr().out
    assert f"against {saved['commit'] or 'an unknown commit'}" in out
    assert "new/old" in out


def test_every_operator_can_be_scaled(runner):
    for op, module in runner.discover().items():
        for scaling in module.scaling("cpu", quick=True):
            assert len(scaling.problems) >= 2, op
            for problem in scaling.problems.values():
                problem.calls["spikecore"]()


def test_wrong_operator_gets_no_number(runner, tmp_path, capsys, monkeypatch):
    lif = runner.discover()["lif"]
    right = lif.ours
    monkeypatch.setattr(lif, "ours", lambda x: 1 - right(x))
    assert runner.main(["--op", "lif", "--quick", "--json", f"{tmp_path}/new.json"]) == 1
    out = capsys.readouterr().out
    assert "disagrees with its reference" in out
    assert " ms" not in out
    assert json.loads((tmp_path / "new.json").read_text())["rows"] == []


def test_failing_peer_is_left_out_with_its_reason(runner, capsys, monkeypatch):
    def broken(x):
        def run(x):
            raise RuntimeError("no such kernel")

        return run

    monkeypatch.setitem(runner.discover()["lif"].PEERS, "eager", broken)
    assert runner.main(["--op", "lif", "--quick", "--threads", "1"]) == 0
    assert "left out: eager (fails: no such kernel)" in capsys.readouterr().out


def test_bench_takes_turns():
    order = []
    times = bench({n: lambda n=n: order.append(n) for n in "ab"}, warmup=0, duration=0.01, turn=0.001)
    changes = [n for i, n in enumerate(order) if i == 0 or order[i - 1] != n]
    assert changes == ["a", "b"] * (len(changes) // 2)
    assert len(times["a"].turns) == len(times["b"].turns) >= 5
    assert times["a"].minimum <= times["a"].lower <= times["a"].median <= times["a"].upper


def test_bytes():
    x = torch.ones(1000, requires_grad=True)
    assert bytes_kept(lambda: x.exp().sin(), x) == 4000  # sin keeps exp's result, which exp keeps as well
    assert bytes_kept(lambda: x.exp(), x) == 0  # the result itself
    assert bytes_moved(lambda: torch.exp(x.detach()).view(10, 100)) == 8000
    assert bytes_peak(lambda: x.detach().exp().sin()) == 8000


def test_wrong_reader_gets_no_number(monkeypatch, capsys):
    pytest.importorskip("spikingjelly")
    pytest.importorskip("torchvision")
    spec = importlib.util.spec_from_file_location("bench_readers", RUN.with_name("bench_readers.py"))
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_readers", module)
    spec.loader.exec_module(module)
    kinds = module.kinds()
    right = kinds["N-MNIST, ATIS"]
    monkeypatch.setattr(module, "kinds", lambda: {"right": right})
    assert module.main(["--quick"]) == 0
    assert capsys.readouterr().out.count("M events/s") == 4
    wrong = dataclasses.replace(right, ours=lambda path: (lambda e: e._replace(x=e.y, y=e.x))(right.ours(path)))
    monkeypatch.setattr(module, "kinds", lambda: {"wrong": wrong})
    with pytest.raises(AssertionError):
        module.main(["--quick"])
    assert "M events/s" not in capsys.readouterr().out


def test_real_runs_counts_the_last_epoch(tmp_path, monkeypatch, capsys):
    yaml, _ = pytest.importorskip("yaml"), pytest.importorskip("timm")
    monkeypatch.syspath_prepend(RUN.parent)
    bench = importlib.import_module("real_runs")
    recipe = {"name": "digits", "model": "ecsnn_vgg_test", "model_kwargs": {"num_classes": 10},
              "data": {"name": "digits"}, "img_size": 8, "epochs": 2}  # fmt: skip

    def run(folder, accuracies, **changes):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "recipe.yaml").write_text(yaml.safe_dump({**recipe, **changes}))
        rows = [f"{i + 1},{accuracy}" for i, accuracy in enumerate(accuracies)]
        (tmp_path / folder / "metrics.csv").write_text("\n".join(["epoch,test_accuracy", *rows]) + "\n")
        return tmp_path / folder

    folders = [run("a_s0", [0.9, 0.5], seed=0), run("a_s1", [0.1, 0.75], seed=1)]
    (folders[0] / "cpu_seconds.txt").write_text("12\n")
    groups = bench.grouped(folders)
    assert [[run.recipe.seed for run in runs] for runs in groups.values()] == [[0, 1]]
    row = bench.table(groups)[-1]
    assert row == "| a | 360 of digits | 99,232 | 2 | 50.00, 75.00 % | 62.50 ± 17.68 % | not measured |"
    bench.draw(groups, tmp_path / "docs" / "a.png")
    assert (tmp_path / "docs" / "a.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(SystemExit, match=r"1 of 2 epochs; not finished"):
        bench.grouped([run("b_s0", [0.5], seed=0)])
    with pytest.raises(SystemExit, match=r"a_s2: other settings"):
        bench.grouped([*folders, run("a_s2", [0.5, 0.5], seed=2, lr=1.0)])
