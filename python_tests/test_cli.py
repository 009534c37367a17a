import subprocess
import sys

import pytest
import torch

from spikecore import doctor
from spikecore._backend import backend_info
from spikecore.cli import main


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    info = backend_info()
    assert 8 <= len(out.splitlines()) <= 14
    for expected in (info["version"], torch.__version__, info["isa"], info["cuda"], info["gpu_reason"]):
        assert expected in out


@pytest.mark.parametrize(
    ("gpu", "info", "expected"),
    [
        (False, {"torch_cuda": None}, "install a CUDA build of torch"),
        (False, {"torch_cuda": "13.0"}, "nvidia-smi"),
        (True, {"torch_cuda": "13.0", "gpu_backend": None, "triton": None}, "pip install triton"),
        (True, {"torch_cuda": "13.0", "gpu_backend": "triton", "triton": "3.0"}, "Triton serves the GPU"),
    ],
)
def test_doctor_says_how_to_fix(monkeypatch, gpu, info, expected):
    info = {**backend_info(), **info}
    monkeypatch.setattr(doctor, "backend_info", lambda: info)
    monkeypatch.setattr(doctor, "_gpu", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert any(line.startswith("fix") and expected in line for line in doctor.doctor_lines())


def test_doctor_names_the_missing_extra(monkeypatch):
    monkeypatch.setattr(doctor, "_TRAIN", {"no-such-thing": "no_such_thing"})
    lines = "\n".join(doctor.doctor_lines())
    assert "missing: no-such-thing" in lines
    assert 'pip install "spikecore[train]"' in lines


@pytest.mark.parametrize("argv", [[], ["dance"], ["quickstart", "--seeds", "0"], ["quickstart", "--epochs", "x"]])
def test_usage_errors(capsys, argv):
    with pytest.raises(SystemExit) as exit:
        main(argv)
    assert exit.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_bad_folder_is_one_line(capsys, tmp_path):
    pytest.importorskip("sklearn")
    (tmp_path / "file").write_text("")
    assert main(["quickstart", "--out", str(tmp_path / "file")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"spikecore: error: cannot create the folder {tmp_path / 'file'}: File exists\n"


def test_errors_of_the_system_name_the_file(capsys, monkeypatch):
    def fail():
        raise PermissionError(13, "Permission denied", "some/file")

    monkeypatch.setattr(doctor, "doctor_lines", fail)
    assert main(["doctor"]) == 1
    assert capsys.readouterr().err == "spikecore: error: some/file: Permission denied\n"


def test_missing_extra_is_one_line(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.delitem(sys.modules, "spikecore.train.quickstart", raising=False)
    assert main(["quickstart"]) == 1
    err = capsys.readouterr().err
    assert err == 'spikecore: error: quickstart: tqdm is missing; pip install "spikecore[train]"\n'


def test_as_a_module(tmp_path):
    command = [sys.executable, "-m", "spikecore", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.startswith("spikecore ")
