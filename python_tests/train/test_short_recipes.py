"""The recipes that are short enough for a CPU do learn: a part of each run, under a minute of one core.

``pytest --real-data=DIR``: on parts of the real sets there (zip files or folders of the names below); else on the sets
of small_sets.py, in the same files. The floors lie five standard errors or more above chance (25 % of 100 test samples,
20 % of 360 and more), and far below what the whole recipes reach, which the README tells.
"""

import csv
import pathlib
import shutil
import zipfile
from collections.abc import Callable

import pytest
import small_sets

for module in ("timm", "librosa", "soundfile", "sklearn", "yaml"):
    pytest.importorskip(module)

from spikecore.train.loop import train  # noqa: E402
from spikecore.train.recipe import load_recipe  # noqa: E402

pytestmark = pytest.mark.slow
FLOOR = 0.25
FOLDERS = {"n_mnist": "nmnist-1k", "spoken_digits": "fsdd", "cifar10": "cifar10-jpeg"}
MADE: dict[str, Callable[[pathlib.Path], None]] = {
    "cifar10": small_sets.write_images,
    "n_mnist": lambda root: small_sets.write_n_mnist(root, 600, 100),
    "spoken_digits": lambda root: small_sets.write_spoken_digits(root / "recordings", 20),
}


def wanted(path: str) -> bool:
    """Whether a file of a real set belongs to the part that is trained and tested on here."""
    file = pathlib.PurePosixPath(path)
    number = int(file.stem.split("_")[-1]) if file.suffix in (".wav", ".jpg") else 0
    return file.suffix == ".bin" or (file.suffix == ".wav" and number < 20) or (file.suffix == ".jpg" and number < 800)


@pytest.fixture
def folder_of(request, tmp_path):
    """The folder of a set's part, made, unpacked or copied."""

    def folder(name: str) -> pathlib.Path:
        root, real = tmp_path / name, request.config.getoption("--real-data")
        if real is None:
            MADE[name](root)
            return root
        packed, plain = real / f"{FOLDERS[name]}.zip", real / FOLDERS[name]
        if packed.is_file():
            with zipfile.ZipFile(packed) as archive:
                archive.extractall(root, filter(wanted, archive.namelist()))
        else:
            shutil.copytree(plain, root, ignore=lambda at, files: [f for f in files if "." in f and not wanted(f)])
        return root

    return folder


def accuracy(recipe: str, out: pathlib.Path, *overrides: str) -> float:
    """Of the last epoch's weights, on the test part."""
    train(load_recipe(recipe, ["seed=0", *overrides]), out)
    with (out / "metrics.csv").open() as file:
        found = float([*csv.DictReader(file)][-1]["test_accuracy"])
    print(f"{recipe}: {found:.2%}")
    return found


@pytest.mark.parametrize(
    ("recipe", "epochs"), [("sma_vgg8_test_nmnist", 4), ("ecsnn_small_fsdd", 3), ("ecsnn_small_speakers_fsdd", 3)]
)
def test_a_part_of_a_short_recipe_learns(recipe, epochs, folder_of, tmp_path):
    data = folder_of(load_recipe(recipe).data.name)
    settings = [f"data.root={data}", f"epochs={epochs}", f"val_interval={epochs}"]
    assert accuracy(recipe, tmp_path / "run", *settings) > FLOOR


def test_a_part_of_a_transformer_learns_images(folder_of, tmp_path, request):
    epochs = 2 if request.config.getoption("--real-data") else 11  # some 250 updates
    settings = [f"data.root={folder_of('cifar10')}", f"epochs={epochs}", "warmup_epochs=0", f"val_interval={epochs}"]
    assert accuracy("qkformer_small_cifar10", tmp_path / "run", *settings) > 0.2


def test_a_part_of_a_transformer_learns_digits(tmp_path):
    assert accuracy("qkformer_test_digits", tmp_path / "run", "epochs=8", "warmup_epochs=2", "val_interval=8") > 0.5


def test_a_student_learns_from_the_teacher_before_it(folder_of, tmp_path):
    settings = [f"data.root={folder_of('spoken_digits')}", "epochs=3", "val_interval=3"]
    assert accuracy("ecsnn_small_ann_fsdd", tmp_path / "teacher", *settings) > FLOOR
    weights = tmp_path / "teacher" / "model.safetensors"
    student = accuracy("ecsnn_tiny_kd_fsdd", tmp_path / "run", *settings, f"distill.teacher_checkpoint={weights}")
    assert student > FLOOR
