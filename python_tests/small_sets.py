"""Small sets that can be learnt, made here in the files of the real ones: recordings of moved digits, sounds like
spoken ones."""

import pathlib

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F

from spikecore.data import load_digits
from spikecore.data.formats import Events
from spikecore.data.writers import write_atis

SPEAKERS = ("george", "jackson", "lucas", "nicolas", "theo", "yweweler")  # of the real set


def write_images(root: pathlib.Path) -> None:
    """``<train|test>/<digit>/*.png``: scikit-learn's digits in 32x32 pixels and colours."""
    digits = load_digits()
    for part, x, y in (("train", digits.x_train, digits.y_train), ("test", digits.x_test, digits.y_test)):
        colours = torch.rand(len(x), 3, 1, 1, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.5
        pixels = (255 * F.interpolate(x, size=(32, 32), mode="bilinear") * colours).byte().permute(0, 2, 3, 1)
        for i, (image, label) in enumerate(zip(pixels.numpy(), y.tolist(), strict=True)):
            folder = root / part / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray(image).save(folder / f"{i:04}.png")


def write_n_mnist(root: pathlib.Path, train: int, test: int) -> None:
    """``<Train|Test>/<digit>/*.bin``: scikit-learn's digits before a sensor of 34x34 that moves along a triangle, an
    event wherever a pixel became brighter or darker."""
    digits = load_digits()
    for part, x, y, n in (
        ("Train", digits.x_train, digits.y_train, train),
        ("Test", digits.x_test, digits.y_test, test),
    ):
        for i in range(n):
            folder = root / part / str(int(y[i]))
            folder.mkdir(parents=True, exist_ok=True)
            write_atis(folder / f"{i:05}.bin", seen(x[i : i + 1], seed=i))


def seen(image: torch.Tensor, seed: int, steps: int = 30, last: int = 300_000) -> Events:
    """Events of an image ``[1, 1, 8, 8]`` from 0 to 1, moved by up to six pixels and back in three straight ways."""
    rng = np.random.default_rng(seed)
    large = F.pad(F.interpolate(image, size=(22, 22), mode="bilinear"), (10, 10, 10, 10))[0, 0]  # [42, 42]
    corners = np.array([[0, 0], [3, 6], [6, 0], [0, 0]])
    rows = []
    before = None
    for step in range(steps + 1):
        way, along = divmod(3 * step / steps, 1)
        way = min(int(way), 2)
        dy, dx = (
            (corners[way] + along * (corners[way + 1] - corners[way]) if step < steps else corners[3])
            .round()
            .astype(int)
        )
        view = large[1 + dy : 35 + dy, 1 + dx : 35 + dx].numpy()
        if before is not None:
            change = view - before
            y, x = np.nonzero(np.abs(change) > 0.15)
            t = rng.integers((step - 1) * last // steps, step * last // steps, len(y))
            rows.append(np.stack([t, x, y, change[y, x] > 0], axis=1))
        before = view
    events = np.concatenate(rows)
    return Events(*events[events[:, 0].argsort(kind="stable")].T)


def write_spoken_digits(root: pathlib.Path, per_speaker: int) -> None:
    """``{digit}_{speaker}_{index}.wav``, 8 kHz, 0.3 to 0.5 s: a voice's pulses through two resonances that move from
    one place of the digit to another; a speaker has a pitch and a length of the throat."""
    import scipy.signal
    import soundfile

    root.mkdir(parents=True, exist_ok=True)
    places = np.random.default_rng(1).permutation(
        np.array([[300, 800], [450, 1100], [600, 1500], [750, 1900], [350, 2300]])
    )
    for s, speaker in enumerate(SPEAKERS):
        pitch, throat = 90 + 25 * s, 0.9 + 0.04 * s
        for digit in range(10):
            for index in range(per_speaker):
                rng = np.random.default_rng([s, digit, index])
                n = int(8000 * rng.uniform(0.3, 0.5))
                pulses = (np.diff(np.floor(np.arange(n + 1) * pitch * rng.uniform(0.93, 1.07) / 8000)) > 0).astype(
                    float
                )
                halves = []
                for formants in (places[digit % 5], places[(digit // 5 + digit + 1) % 5]):
                    part = pulses + 0.02 * rng.standard_normal(n)
                    for hertz in formants * throat * rng.uniform(0.95, 1.05):
                        part = scipy.signal.lfilter(*scipy.signal.iirpeak(hertz, 6, fs=8000), part)
                    halves.append(part / np.abs(part).max())
                mix = np.linspace(0, 1, n)
                wave = 0.5 * ((1 - mix) * halves[0] + mix * halves[1])
                soundfile.write(root / f"{digit}_{speaker}_{index}.wav", wave.astype(np.float32), 8000)
