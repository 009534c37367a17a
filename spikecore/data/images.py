"""Images, as PIL images: transforms of timm and torchvision follow."""

import gzip
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torchvision.datasets import FashionMNIST
from torchvision.datasets.folder import IMG_EXTENSIONS

from spikecore.data._samples import BrokenFileError, Source, reading
from spikecore.data.digits import load_digits
from spikecore.data.folders import class_files, divided, first_folder, missing, no_val, numbered, split_folder
from spikecore.data.splits import split_files

_DIGITS = [str(digit) for digit in range(10)]


def cifar10(root: Path, split: str) -> Source:
    """CIFAR-10 (Krizhevsky 2009), RGB 32x32: 50,000 to train on and 10,000 to test on.

    Reads ``cifar-10-batches-py/`` or ``<train|test>/<class>/*.png``; there is no val.
    """
    return _cifar("cifar10", root, split, "cifar-10-batches-py", "data_batch_{}", "test_batch", "batches.meta", "")


def cifar100(root: Path, split: str) -> Source:
    """CIFAR-100 (Krizhevsky 2009), the 100 fine classes, RGB 32x32: 50,000 to train on and 10,000 to test on.

    Reads ``cifar-100-python/`` or ``<train|test>/<class>/*.png``; there is no val.
    """
    return _cifar("cifar100", root, split, "cifar-100-python", "train", "test", "meta", "fine_")


def mnist(root: Path, split: str) -> Source:
    """MNIST (LeCun et al. 1998), grey 28x28: 60,000 to train on and 10,000 to test on.

    Reads ``train-images-idx3-ubyte`` and its kind, also ``.gz``, in ``.``, ``raw/`` or ``MNIST/raw/``; there is no val.
    """
    return _idx_set("mnist", root, split, "MNIST", _DIGITS)


def fashion_mnist(root: Path, split: str) -> Source:
    """Fashion-MNIST (Xiao et al. 2017), grey 28x28: 60,000 to train on and 10,000 to test on.

    Reads files as `mnist` does, also in ``FashionMNIST/raw/``.
    """
    return _idx_set("fashion_mnist", root, split, "FashionMNIST", FashionMNIST.classes)


def digits(root: Path, split: str) -> Source:
    """scikit-learn's handwritten digits, grey 8x8: 1,437 to train on and 360 to test on (`load_digits`). No files."""
    no_val("digits", split)
    data = load_digits()
    x, y = (data.x_train, data.y_train) if split == "train" else (data.x_test, data.y_test)
    grey = (x[:, 0] * 255).round().byte().numpy()
    return _arrays(grey, y.tolist(), _DIGITS)


def imagenet(root: Path, split: str) -> Source:
    """ImageNet-1k (ILSVRC 2012), RGB of any size: 1,281,167 to train on, 50,000 to validate.

    Reads ``<train|val>/<class>/*``. ``"test"`` is the validation part too: ImageNet's own test images have no labels.
    """
    return _folders("imagenet", root, "val" if split == "test" else split)


def mini_imagenet(root: Path, split: str) -> Source:
    """Mini-ImageNet for classification: 100 classes of 600 RGB images, divided as the folders divide them.

    Reads ``<train|val|test>/<class>/*``.
    """
    return _folders("mini_imagenet", root, split)


def image_folder(root: Path, split: str) -> Source:
    """Images of your own: ``<train|val|test>/<class>/*``, read as RGB."""
    return _folders("image_folder", root, split)


def caltech101(root: Path, split: str, *, test_share: float = 0.2, split_file: str | None = None) -> Source:
    """Caltech-101 (Fei-Fei et al. 2004), RGB of about 300x200: 8,677 of 101 classes, the background class left out.

    Reads ``101_ObjectCategories/<class>/*.jpg``, also below ``caltech101/``, or ``<class>/*.jpg``.

    Args:
        test_share, split_file: see `spikecore.data.splits.split_files`.
    """
    folder = first_folder(root, ("101_ObjectCategories", "caltech101/101_ObjectCategories", ".")) or root
    files = class_files(folder, IMG_EXTENSIONS)
    files.pop("BACKGROUND_Google", None)
    if not files:
        raise missing("caltech101", root, "101_ObjectCategories/<class>/*.jpg")
    files = split_files("caltech101", files, split, test_share, split_file)
    return _files(files, list(files))


def open_image(path: str) -> Image.Image:
    """The image as RGB.

    Raises:
        BrokenFileError: not an image, or cut off.
    """
    with reading(path, "an image that can be read"), Image.open(path) as image:
        return image.convert("RGB")


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The uint8 array of an IDX file (LeCun's, also gzipped).

    Raises:
        BrokenFileError: another file, or a part of one.
    """
    packed = path.suffix == ".gz"
    with reading(path, "a complete gzip file"), gzip.open(path) if packed else open(path, "rb") as file:
        data = file.read()
    magic = bytes((0, 0, 8, dimensions))
    if data[:4] != magic:
        raise BrokenFileError(
            f"{path}: byte 0: expected {magic.hex(' ')} (uint8, {dimensions}-D), got {data[:4].hex(' ')}"
        )
    shape = np.frombuffer(data[4 : 4 + 4 * dimensions].ljust(4 * dimensions, b"\0"), ">u4").astype(int)
    start, expected = 4 + 4 * dimensions, int(shape.prod())
    if (got := len(data) - start) != expected:
        raise BrokenFileError(
            f"{path}: byte {start}: expected {expected:,} bytes, {'x'.join(map(str, shape))}, got {got:,}"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def read_batch(path: Path) -> dict[str, Any]:
    """A pickled CIFAR batch, of which nothing but dicts, lists, numbers, strings and numpy arrays is accepted.

    Raises:
        BrokenFileError: another file, a part of one, or one that would run code.
    """
    with reading(path, "a pickled batch of CIFAR"), open(path, "rb") as file:
        batch = _ArraysOnly(file, encoding="latin1").load()
    if not isinstance(batch, dict):
        raise BrokenFileError(f"{path}: expected a pickled dict, got {type(batch).__name__}")
    return batch


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return np.empty(0).__reduce__()[0]  # numpy's own, wherever this release keeps it
        allowed = {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype, ("_codecs", "encode"): _latin1}
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a batch has no need of")
        return allowed[module, name]


def _latin1(text: str, encoding: str) -> bytes:
    return text.encode("latin1")


def _cifar(name: str, root: Path, split: str, base: str, train: str, test: str, meta: str, fine: str) -> Source:
    no_val(name, split)
    folder = next((at for at in (root / base, root) if (at / meta).is_file()), None)
    if folder is None:
        if split_folder(root, split) is None:
            raise missing(name, root, f"{base}/{meta} or <train|test>/<class>/*.png")
        return _folders(name, root, split)
    if split == "test":
        files = [folder / test]
    else:
        files = [folder / train.format(i) for i in range(1, 6)] if "{}" in train else [folder / train]
    pixels, labels = [], []
    for file in files:
        if not file.is_file():
            raise missing(name, folder, file.name)
        batch = read_batch(file)
        x, y = batch.get("data"), batch.get(f"{fine}labels")
        if not isinstance(x, np.ndarray) or x.dtype != np.uint8 or x.ndim != 2 or x.shape[1] != 3072:
            got = f"{x.dtype} {list(x.shape)}" if isinstance(x, np.ndarray) else type(x).__name__
            raise BrokenFileError(f"{file}: expected 'data' to be uint8 [n, 3072], got {got}")
        if not isinstance(y, list) or len(y) != len(x):
            raise BrokenFileError(f"{file}: expected '{fine}labels' to be a list of {len(x):,} numbers")
        pixels.append(x)
        labels += y
    names = read_batch(folder / meta).get(f"{fine}label_names")
    if not isinstance(names, list) or not all(y in range(len(names)) for y in set(labels)):
        raise BrokenFileError(f"{folder / meta}: expected '{fine}label_names' to name each label")
    rgb = np.concatenate(pixels).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return _arrays(np.ascontiguousarray(rgb), [int(y) for y in labels], names)


def _idx_set(name: str, root: Path, split: str, base: str, classes: list[str]) -> Source:
    no_val(name, split)
    stem = "train" if split == "train" else "t10k"
    parts = []
    for part, dimensions in (("images", 3), ("labels", 1)):
        names = [f"{stem}-{part}{dot}idx{dimensions}-ubyte{end}" for dot in "-." for end in ("", ".gz")]
        places = [root / at / file for at in (f"{base}/raw", "raw", ".") for file in names]
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            raise missing(name, root, f"{names[0]} or {names[1]} in ., raw/ or {base}/raw/")
        parts.append(read_idx(path, dimensions))
    images, labels = parts
    if len(images) != len(labels) or (len(labels) and labels.max() >= len(classes)):
        raise BrokenFileError(
            f"{path}: expected {len(images):,} labels below {len(classes)}, got {len(labels):,} up to {labels.max()}"
        )
    return _arrays(images, labels.tolist(), classes)


def _folders(name: str, root: Path, split: str) -> Source:
    return _files(*divided(name, root, split, IMG_EXTENSIONS, f"{split}/<class>/*.jpg or another image file"))


def _files(files: dict[str, list[str]], classes: list[str]) -> Source:
    paths, labels = numbered(files, classes)
    return Source(classes, paths, labels, open_image, paths)


def _arrays(images: np.ndarray, labels: list[int], classes: list[str]) -> Source:
    return Source(classes, range(len(labels)), labels, partial(_from_array, images))


def _from_array(images: np.ndarray, i: int) -> Image.Image:
    return Image.fromarray(images[i])
