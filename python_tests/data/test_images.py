"""Image sets in the layouts users have, from files made here; broken ones are named."""

import gzip
import pickle
import re
import struct
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")

from PIL import Image

from spikecore.data import BrokenFileError, create_dataset, list_datasets, load_digits

RNG = np.random.default_rng(0)


def pixels(*shape):
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def save_images(root, places):
    saved = {}
    for place in places:
        path = root / place
        path.parent.mkdir(parents=True, exist_ok=True)
        saved[place] = pixels(9, 12, 3)
        Image.fromarray(saved[place]).save(path)
    return saved


def cifar(root, name):
    """Pickled batches as the originals: python 2's protocol, latin1 keys, lists of labels."""
    fine = "fine_" if name == "cifar100" else ""
    folder = root / f"cifar-{name[5:]}-{'batches-py' if not fine else 'python'}"
    folder.mkdir()
    parts = {**{f"data_batch_{i}": 4 for i in range(1, 6)}, "test_batch": 3} if not fine else {"train": 20, "test": 3}
    data, n = {}, 10 if not fine else 100
    for part, size in parts.items():
        data[part] = {"data": pixels(size, 3072), f"{fine}labels": RNG.integers(0, n, size).tolist(), "filenames": []}
        (folder / part).write_bytes(pickle.dumps(data[part], protocol=2))
    names = [f"class{i}" for i in range(n)]
    (folder / ("batches.meta" if not fine else "meta")).write_bytes(
        pickle.dumps({f"{fine}label_names": names}, protocol=2)
    )
    return folder, data


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_batches(tmp_path, name):
    folder, data = cifar(tmp_path, name)
    train, test = (create_dataset(name, root, part) for root, part in ((tmp_path, "train"), (folder, "test")))
    assert (len(train), len(test), train.kind, train.classes[7]) == (20, 3, "image", "class7")
    image, label = train[13]
    part = data["data_batch_4" if name == "cifar10" else "train"]
    i = 1 if name == "cifar10" else 13
    assert isinstance(image, Image.Image)
    np.testing.assert_array_equal(np.asarray(image), part["data"][i].reshape(3, 32, 32).transpose(1, 2, 0))
    assert label == part["labels" if name == "cifar10" else "fine_labels"][i]


def test_cifar_is_torchvisions(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    cifar(tmp_path, "cifar10")
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    theirs, ours = CIFAR10(tmp_path, train=True), create_dataset("cifar10", tmp_path)
    assert [theirs[i][1] for i in range(20)] == ours.targets
    for i in range(20):
        np.testing.assert_array_equal(np.asarray(ours[i][0]), np.asarray(theirs[i][0]))


class Harmful:
    def __reduce__(self):
        return (print, ("the batch ran code",))


def test_batches_that_are_none(tmp_path, capsys):
    folder, _ = cifar(tmp_path, "cifar10")
    whole = (folder / "data_batch_1").read_bytes()
    for content, said in [
        (pickle.dumps({"data": Harmful()}), "it asks for builtins.print, which a batch has no need of"),
        (whole[: len(whole) // 2], "expected a pickled batch of CIFAR: "),
        (b"no pickle", "expected a pickled batch of CIFAR: "),
        (b"", "expected a pickled batch of CIFAR: "),
        (pickle.dumps([1]), "expected a pickled dict, got list"),
        (pickle.dumps({"data": pixels(4, 30)}), r"expected 'data' to be uint8 \[n, 3072\], got uint8 \[4, 30\]"),
        (pickle.dumps({"data": pixels(4, 3072), "labels": [0]}), "expected 'labels' to be a list of 4 numbers"),
    ]:  # fmt: skip
        (folder / "data_batch_1").write_bytes(content)
        with pytest.raises(BrokenFileError, match=rf"data_batch_1: .*{said}"):
            create_dataset("cifar10", tmp_path)
    assert capsys.readouterr().out == ""
    (folder / "data_batch_1").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected data_batch_1; found batches\.meta, data_batch_2, "):
        create_dataset("cifar10", tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "image_folder", "mini_imagenet", "imagenet"])
def test_class_folders(tmp_path, name):
    saved = save_images(tmp_path, ["train/cat/1.png", "train/cat/more/0.png", "train/dog/1.bmp", "train/emu/1.png"])
    held = "val" if name == "imagenet" else "test"
    saved |= save_images(tmp_path, [f"{held}/dog/1.png"])
    (tmp_path / "train/dog/notes.txt").write_text("")
    (tmp_path / "train/.hidden").mkdir()
    train, test = create_dataset(name, tmp_path), create_dataset(name, tmp_path, "test")
    assert (train.classes, train.targets, test.classes, test.targets) == (
        ["cat", "dog", "emu"],
        [0, 0, 1, 2],
        train.classes,
        [1],
    )
    for i, place in enumerate(["train/cat/1.png", "train/cat/more/0.png", "train/dog/1.bmp"]):
        np.testing.assert_array_equal(np.asarray(train[i][0]), saved[place])
    np.testing.assert_array_equal(np.asarray(test[0][0]), saved[f"{held}/dog/1.png"])


def test_few_shot_division_is_refused(tmp_path):
    save_images(tmp_path, ["train/a/1.png", "test/b/1.png"])
    with pytest.raises(ValueError, match="class 'b' is not among the 1 of the training part"):
        create_dataset("mini_imagenet", tmp_path, "test")


def test_caltech101(tmp_path):
    save_images(
        tmp_path,
        [
            f"caltech101/101_ObjectCategories/{of}/image_{i}.jpg"
            for of in ("ant", "BACKGROUND_Google", "bass")
            for i in range(5)
        ],
    )
    train, test = create_dataset("caltech101", tmp_path), create_dataset("caltech101", tmp_path, "test")
    assert (train.classes, len(train), len(test)) == (["ant", "bass"], 8, 2)
    Image.fromarray(pixels(5, 5)).save(tmp_path / "caltech101/101_ObjectCategories/ant/image_0.jpg")
    assert train[0][0].mode == "RGB", "grey images are repeated"


def idx(array):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.mark.parametrize("place", ["", "raw", "MNIST/raw"])
@pytest.mark.parametrize("packed", [False, True])
def test_mnist(tmp_path, place, packed):
    images, labels = pixels(6, 28, 28), np.arange(6, dtype=np.uint8)
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    for name, array in (("t10k-images-idx3-ubyte", images), ("t10k-labels.idx1-ubyte", labels)):
        content = idx(array)
        (tmp_path / place / (name + ".gz" * packed)).write_bytes(gzip.compress(content) if packed else content)
    test = create_dataset("mnist", tmp_path, "test")
    assert (test[4][0].mode, test[4][1], test.classes) == ("L", 4, list("0123456789"))
    np.testing.assert_array_equal(np.asarray(test[4][0]), images[4])


def test_fashion_mnist_names_its_classes(tmp_path):
    (tmp_path / "FashionMNIST/raw").mkdir(parents=True)
    for name, array in (
        ("train-images-idx3-ubyte", pixels(2, 28, 28)),
        ("train-labels-idx1-ubyte", np.array([9, 0], np.uint8)),
    ):
        (tmp_path / "FashionMNIST/raw" / name).write_bytes(idx(array))
    train = create_dataset("fashion_mnist", tmp_path)
    assert [train.classes[label] for label in train.targets] == ["Ankle boot", "T-shirt/top"]


def test_idx_files_that_are_none(tmp_path):
    images, labels = tmp_path / "train-images-idx3-ubyte", tmp_path / "train-labels-idx1-ubyte"
    labels.write_bytes(idx(np.zeros(3, np.uint8)))
    whole = idx(pixels(3, 28, 28))
    for content, said in [
        (b"", "byte 0: expected 00 00 08 03 .*, got $"),
        (b"\x89PNG....", "byte 0: expected 00 00 08 03 .*, got 89 50 4e 47"),
        (whole[:9], "byte 16: expected "),
        (whole[:-1], "byte 16: expected 2,352 bytes, 3x28x28, got 2,351"),
        (whole + b"1", "byte 16: expected 2,352 bytes, 3x28x28, got 2,353"),
        (idx(pixels(4, 28, 28)), "expected 4 labels below 10, got 3"),
    ]:  # fmt: skip
        images.write_bytes(content)
        with pytest.raises(BrokenFileError, match=rf"{re.escape(str(tmp_path))}/train-.*: {said}"):
            create_dataset("mnist", tmp_path)
    images.unlink()
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(whole)[:-20])
    with pytest.raises(BrokenFileError, match=r"idx3-ubyte\.gz: expected a complete gzip file"):
        create_dataset("mnist", tmp_path)


def test_digits():
    train, test, data = create_dataset("digits", None), create_dataset("digits", None, "test"), load_digits()
    assert (len(train), len(test), train.targets) == (1437, 360, data.y_train.tolist())
    np.testing.assert_array_equal(np.asarray(test[5][0]), np.rint(data.x_test[5, 0].numpy() * 255))


# ---- what all share --------------------------------------------------------------------------------------------------


def test_broken_images(tmp_path):
    save_images(tmp_path, [f"train/a/{i}.{kind}" for i, kind in enumerate(["png", "jpg", "png", "webp", "png", "jpg"])])
    for name in ("1.jpg", "2.png"):
        whole = (tmp_path / "train/a" / name).read_bytes()
        (tmp_path / "train/a" / name).write_bytes(whole[: len(whole) // 2])
    (tmp_path / "train/a/4.png").write_text("no image")
    dataset = create_dataset("image_folder", tmp_path)
    for i, name in ((1, "1.jpg"), (2, "2.png"), (4, "4.png")):
        with pytest.raises(
            BrokenFileError, match=rf"{re.escape(str(tmp_path))}/train/a/{name}: expected an image that can be read: "
        ):
            dataset[i]
    for _ in range(2):
        with pytest.warns(
            UserWarning, match=r"image_folder: left out 3 of 6 samples that cannot be read; first .*a/1\.jpg"
        ):
            some = create_dataset("image_folder", tmp_path, on_error="skip")
        assert (len(some), len(some.skipped)) == (3, 3)
        assert [some[i][0].size for i in range(3)] == [(12, 9)] * 3
    (tmp_path / "train/a/0.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"0\.png"):
        dataset[0]


def test_transforms_follow(tmp_path):
    from torchvision.transforms import v2

    save_images(tmp_path, ["train/a/1.png", "train/b/1.png"])
    dataset = create_dataset("image_folder", tmp_path, transform=v2.Compose([v2.PILToTensor(), v2.Resize(4)]))
    assert dataset[0][0].shape == (3, 4, 5)
    assert repr(dataset) == "image_folder: 2 samples (image) of 2 classes"


def test_classes_chosen(tmp_path):
    save_images(tmp_path, [f"train/{of}/{i}.png" for of in "abcd" for i in range(2)])
    dataset = create_dataset("image_folder", tmp_path, classes=["d", "b"])
    assert (dataset.classes, dataset.targets) == (["d", "b"], [1, 1, 0, 0])
    for classes, said in [
        (["d", "x"], "there is no class 'x'"),
        (["a", "a"], "each class once"),
        ([], "each class once"),
    ]:
        with pytest.raises(ValueError, match=said):
            create_dataset("image_folder", tmp_path, classes=classes)


@pytest.mark.parametrize(
    ("args", "options", "said"),
    [
        (("cifar11",), {}, "there is no dataset 'cifar11'; did you mean cifar1"),
        (("qqq",), {}, r"there is no dataset 'qqq'; spikecore\.data\.list_datasets\(\) names them all"),
        (("mnist", "training"), {}, "split must be 'train', 'val' or 'test', got 'training'"),
        (("mnist", "val"), {}, "mnist: it has no val split; use 'train' and 'test'"),
        (("mnist",), {"on_error": "ignore"}, "on_error must be 'raise' or 'skip', got 'ignore'"),
        (("mnist",), {"download": True}, "mnist: unknown option 'download'; it takes none"),
        (("caltech101",), {"share": 1}, "caltech101: unknown option 'share'; it takes test_share, split_file"),
        (("event_folder",), {"height": 3}, "event_folder: it also needs the option 'width'"),
    ],
)  # fmt: skip
def test_wrong_arguments(tmp_path, args, options, said):
    name, *split = args
    with pytest.raises(ValueError, match=said):
        create_dataset(name, tmp_path, *split, **options)


def test_without_a_folder():
    with pytest.raises(ValueError, match="root must be the folder that holds mnist, got None"):
        create_dataset("mnist", None)


def test_without_the_extra(tmp_path, monkeypatch):
    for name, module, package in [("mnist", "images", "torchvision.datasets"), ("gtzan", "audio", "librosa")]:
        monkeypatch.delitem(sys.modules, f"spikecore.data.{module}", raising=False)
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ImportError, match=rf'{name} needs {package}: pip install "spikecore\[train\]"'):
            create_dataset(name, tmp_path)


def test_names_need_no_extra(tmp_path):
    """Nor do the readers of event files."""
    script = "import sys; from spikecore.data import list_datasets, read_events; list_datasets(); print(*sys.modules)"
    # Not in the clone: there the bare source folder would stand before the installed package.
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path)
    loaded = done.stdout.split()
    assert not {"torchvision", "PIL", "librosa", "soundfile", "sklearn", "scipy", "aedat"} & set(loaded)


def test_missing_files_are_one_line(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "pictures").mkdir()
    for name in list_datasets():
        if name == "digits":
            continue
        options = {"height": 3, "width": 3} if name == "event_folder" else {}
        for root, found in ((tmp_path, "found notes.txt, pictures/"), (tmp_path / "no", "there is no such folder"),
                            (tmp_path / "pictures", "found an empty folder")):  # fmt: skip
            with pytest.raises(FileNotFoundError) as e:
                create_dataset(name, root, **options)
            assert str(e.value).startswith(f"{name}: {root}: expected ")
            assert str(e.value).endswith(found)
            assert "\n" not in str(e.value)
    assert list_datasets("*mnist") == ["fashion_mnist", "mnist", "n_mnist"]
