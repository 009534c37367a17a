"""Sounds: features against their definitions, folders, divisions, broken files; all files made here."""

import numpy as np
import pytest

soundfile = pytest.importorskip("soundfile")
librosa = pytest.importorskip("librosa")

from spikecore.data import BrokenFileError, create_dataset  # noqa: E402
from spikecore.data.audio import read_wave, spectrum  # noqa: E402


def tone(hertz, seconds, rate):
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate).astype(np.float32)


def save(root, places, rate=8000, seconds=0.3):
    for i, place in enumerate(places):
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(root / place, tone(200 + 50 * i, seconds, rate), rate)
    return root


MEL = {"feature": "mel", "rate": 22050, "bins": 96, "n_fft": 512, "hop": 256, "frames": 323}


def test_mel_of_a_tone():
    """Loudest in the band whose centre is nearest, 0 dB there, never below -80."""
    x = spectrum(tone(3000, 82_500 / 22050, 22050), **MEL)
    assert (x.shape, x.dtype) == ((1, 96, 323), np.float32)
    centres = librosa.mel_frequencies(98, fmin=0, fmax=22050 / 2)[1:-1]
    assert (x[0, :, 20:-20].argmax(axis=0) == np.abs(centres - 3000).argmin()).all()
    assert x.max() == 0
    assert x.min() >= -80
    quiet = spectrum(0.01 * tone(3000, 82_500 / 22050, 22050), **MEL)
    np.testing.assert_allclose(quiet, np.maximum(x, quiet.min()), atol=1e-2)  # relative to its own maximum
    assert quiet.min() < -70


def test_mfcc_are_the_cosines_of_the_mel_spectrum():
    from scipy.fft import dct

    wave = np.random.default_rng(0).standard_normal(22050 * 4).astype(np.float32)
    x = spectrum(wave, feature="mfcc", rate=22050, bins=40, n_fft=2048, hop=512, frames=173)
    assert x.shape == (1, 40, 173)
    power = librosa.feature.melspectrogram(y=wave, sr=22050, n_mels=128)
    decibels = 10 * np.log10(np.maximum(power, 1e-10))
    expected = dct(np.maximum(decibels, decibels.max() - 80), axis=0, norm="ortho")[:40]
    np.testing.assert_allclose(x[0], expected, rtol=1e-4, atol=1e-3)


def test_stretched_and_filled():
    wave = tone(500, 1.0, 8000)
    settings = {"feature": "mel", "rate": 8000, "bins": 32, "n_fft": 256, "hop": 80}
    natural = spectrum(wave, frames=101, **settings)
    short = spectrum(wave, frames=50, **settings)
    assert short.shape == (1, 32, 50)
    np.testing.assert_allclose(short[0, :, 24], natural[0, :, [48, 49]].mean(0), atol=2)  # at (24 + 0.5) 101 / 50 - 0.5
    filled = spectrum(wave, frames=201, seconds=2.0, **settings)
    np.testing.assert_allclose(filled[0, :, :90], natural[0, :, :90], atol=1e-4)
    assert (filled[0, :, 110:] == -80).all()
    assert spectrum(wave[:5], frames=10, **settings).shape == (1, 32, 10)
    assert np.isfinite(spectrum(np.zeros(8000, np.float32), frames=10, **settings)).all()


def test_read_wave(tmp_path):
    stereo = np.stack([tone(440, 1, 16000), np.zeros(16000, np.float32)], axis=1)
    soundfile.write(tmp_path / "a.wav", stereo, 16000, subtype="FLOAT")
    np.testing.assert_allclose(read_wave(str(tmp_path / "a.wav"), 16000), stereo[:, 0] / 2)
    halved = read_wave(str(tmp_path / "a.wav"), 8000)
    np.testing.assert_allclose(halved[200:-200], tone(440, 1, 8000)[200:-200] / 2, atol=1e-3)
    soundfile.write(tmp_path / "none.wav", np.zeros(0), 8000)
    soundfile.write(tmp_path / "nan.wav", np.array([0, np.nan]), 8000, subtype="FLOAT")
    (tmp_path / "text.wav").write_text("no sound")
    (tmp_path / "empty.wav").write_bytes(b"")
    for name, said in {
        "none": "expected finite samples, got none", "nan": "expected finite samples, got some that are not",
        "text": "expected a sound that can be read", "empty": "expected a sound that can be read",
    }.items():  # fmt: skip
        with pytest.raises(BrokenFileError, match=rf"{name}\.wav: {said}"):
            read_wave(str(tmp_path / f"{name}.wav"), 8000)


def test_spoken_digits(tmp_path):
    names = [f"{digit}_{speaker}_{i}" for digit in (0, 7) for speaker in ("ann", "bob") for i in (0, 4, 5, 12)]
    save(tmp_path, [f"recordings/{name}.wav" for name in names])
    (tmp_path / "recordings/README.wav").write_text("not one of them")
    train, test = create_dataset("spoken_digits", tmp_path), create_dataset("spoken_digits", tmp_path, "test")
    assert (len(train), len(test), sorted(set(test.targets)), train.kind) == (8, 8, [0, 7], "audio")
    x, label = train[0]
    assert (tuple(x.shape), str(x.dtype), label) == ((1, 40, 64), "torch.float32", 0)
    assert x.max() == 0
    for part, kept in (("train", "ann"), ("test", "bob")):
        apart = create_dataset("spoken_digits", tmp_path, part, speakers=["bob"])
        expected = [f"{digit}_{kept}_{i}" for digit in (0, 7) for i in (0, 12, 4, 5)]
        for i, name in enumerate(expected):
            wave = read_wave(str(tmp_path / f"recordings/{name}.wav"), 8000)
            same = spectrum(wave, feature="mel", rate=8000, bins=40, n_fft=256, hop=80, frames=64)
            np.testing.assert_array_equal(apart[i][0], same)
    for speakers in ([], ["eve"], ["ann", "bob"]):
        with pytest.raises(ValueError, match="speakers must be some of ann, bob, got"):
            create_dataset("spoken_digits", tmp_path, speakers=speakers)


def test_gtzan(tmp_path):
    """Songs are divided, not their parts; the broken song of the published set is left out."""
    rate = 22050
    for genre in ("jazz", "rock"):
        for i in (1, 2, 54):
            path = tmp_path / "Data/genres_original" / genre / f"{genre}.{i:05}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            parts = [tone(300 * (part + 1), 82_500 / rate, rate) for part in range(8)]
            soundfile.write(path, np.concatenate([*parts, np.zeros(1000 + i)]), rate)
    (tmp_path / "Data/genres_original/jazz/jazz.00054.wav").write_bytes(b"broken")
    train = create_dataset("gtzan", tmp_path, test_share=0.5)
    test = create_dataset("gtzan", tmp_path, "test", test_share=0.5)
    assert (len(train), len(test), train.classes) == (8 * 3, 8 * 2, ["jazz", "rock"])
    assert test.targets == [0] * 8 + [1] * 8
    peaks = [int(test[i][0][0].mean(dim=1).argmax()) for i in range(8)]
    assert test[0][0].shape == (1, 96, 323)
    assert peaks == sorted(set(peaks)), "eight parts in their order"
    soundfile.write(tmp_path / "Data/genres_original/rock/rock.00001.wav", np.zeros(659_999), rate)
    with pytest.raises(
        BrokenFileError, match=r"rock\.00001\.wav: expected 660,000 samples at 22,050 a second, got 659,999"
    ):
        create_dataset("gtzan", tmp_path, test_share=0.5)
    with pytest.warns(UserWarning, match="left out 8 of 24 samples"):
        assert len(create_dataset("gtzan", tmp_path, test_share=0.5, on_error="skip")) == 16


def test_urbansound8k(tmp_path):
    save(
        tmp_path,
        [f"UrbanSound8K/audio/fold{i}/{1000 + i}-{i % 10}-0-{j}.wav" for i in range(1, 11) for j in range(2)],
        22050,
    )
    train, test = (create_dataset("urbansound8k", tmp_path, part, fold=4) for part in ("train", "test"))
    assert (len(train), test.targets, test.classes[4], test.classes[9]) == (18, [4, 4], "drilling", "street_music")
    assert test[0][0].shape == (1, 40, 173)
    for wrong in (0, 11, "4"):
        with pytest.raises(ValueError, match="fold must be 1 to 10"):
            create_dataset("urbansound8k", tmp_path, fold=wrong)
    save(tmp_path, ["UrbanSound8K/audio/fold1/siren.wav"])
    with pytest.raises(BrokenFileError, match=r"siren\.wav: expected a name like 100032-3-0-0\.wav"):
        create_dataset("urbansound8k", tmp_path)


SMALL = {"rate": 8000, "bins": 16, "n_fft": 256, "hop": 80, "frames": 20}


@pytest.mark.parametrize("layout", ["{part}/{of}/{i}.wav", "{of}/{i}.flac", "{of}_{i}.ogg"])
def test_audio_folder(tmp_path, layout):
    for part in ("train", "test"):
        count = 4 if part == "train" else 1
        save(tmp_path, [layout.format(part=part, of=of, i=i) for of in ("cat", "dog") for i in range(count)])
    divided = "{part}" in layout
    parts = [create_dataset("audio_folder", tmp_path, part, test_share=0.25, **SMALL) for part in ("train", "test")]
    assert [len(part) for part in parts] == [8 if divided else 6, 2]
    assert (parts[1].targets, parts[1].classes, parts[0][0][0].shape) == ([0, 1], ["cat", "dog"], (1, 16, 20))


@pytest.mark.parametrize(("options", "said"), [
    ({"feature": "stft"}, "feature must be 'mel' or 'mfcc', got 'stft'"),
    ({"bins": 0}, "bins must be a whole number from 1 on, got 0"),
    ({"rate": 8000.0}, r"rate must be a whole number from 1 on, got 8000\.0"),
])  # fmt: skip
def test_wrong_features(tmp_path, options, said):
    with pytest.raises(ValueError, match=said):
        create_dataset("audio_folder", save(tmp_path, ["a/1.wav", "a/2.wav"]), **{**SMALL, **options})
