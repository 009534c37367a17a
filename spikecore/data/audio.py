"""Sounds as images, float32 ``[1, bins, frames]``: mel spectra in dB or MFCC, made once and kept in the cache.

The features of `gtzan` and `urbansound8k` are those of EC-SNN (Yu et al., IJCAI 2024). Files are read by soundfile,
mixed to one channel and resampled; librosa makes the features.
"""

import functools
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import librosa
import numpy as np
import soundfile
import torch

from spikecore.data._samples import BrokenFileError, Source, reading
from spikecore.data.folders import class_files, divided, first_folder, missing, no_val, numbered, split_folder
from spikecore.data.splits import split_files

EXTENSIONS = (".wav", ".flac", ".ogg", ".au", ".mp3")


def gtzan(root: Path, split: str, *, test_share: float = 0.2, split_file: str | None = None) -> Source:
    """GTZAN (Tzanetakis & Cook 2002), mel ``[1, 96, 323]``: 10 genres of 100 songs of 30 s, each in 8 parts.

    Reads ``genres_original/<genre>/*.wav``, also below ``Data/``, or ``genres/<genre>/*.au``. The first 660,000 samples
    at 22.05 kHz are cut in 8. Songs are divided, not parts, so that no song is on both sides (EC-SNN divides parts: its
    accuracies are not comparable). ``jazz.00054``, broken where the set is published, is left out.

    Args:
        test_share, split_file: see `spikecore.data.splits.split_files`.
    """
    folder = first_folder(root, ("genres_original", "Data/genres_original", "genres", ".")) or root
    files = class_files(folder, EXTENSIONS)
    if not files:
        raise missing("gtzan", root, "genres_original/<genre>/*.wav or genres/<genre>/*.au")
    files = {of: [path for path in paths if Path(path).stem != "jazz.00054"] for of, paths in files.items()}
    paths, labels = numbered(split_files("gtzan", files, split, test_share, split_file), list(files))
    items = [(path, part) for path in paths for part in range(8)]
    recipe: dict[str, Any] = {"rate": 22050, "feature": "mel", "bins": 96, "n_fft": 512, "hop": 256, "frames": 323}
    load = partial(_song_part, **recipe)
    return Source(
        list(files), items, [label for label in labels for _ in range(8)], load, [path for path, _ in items], recipe
    )


def urbansound8k(root: Path, split: str, *, fold: int = 10) -> Source:
    """UrbanSound8K (Salamon et al. 2014), MFCC ``[1, 40, 173]``: 8,732 sounds of up to 4 s, of 10 classes, in 10 folds.

    Reads ``audio/fold<1..10>/*.wav``, also below ``UrbanSound8K/``, or ``fold<1..10>/*.wav``. Shorter sounds are
    stretched to 173 frames (bilinear).

    Args:
        fold: the fold to test on; the other nine are for training. (EC-SNN divides at random: parts of one recording
            are on both sides.)
    """
    no_val("urbansound8k", split)
    if fold not in range(1, 11):
        raise ValueError(f"urbansound8k: fold must be 1 to 10, got {fold!r}")
    folder = first_folder(root, ("UrbanSound8K/audio", "audio", ".")) or root
    files = class_files(folder, (".wav",))
    if not all(f"fold{i}" in files for i in range(1, 11)):
        raise missing("urbansound8k", root, "audio/fold1/*.wav to audio/fold10/*.wav")
    chosen = [f"fold{i}" for i in range(1, 11) if (i == fold) == (split == "test")]
    paths = [path for at in chosen for path in files[at]]
    labels = []
    for path in paths:
        match = re.fullmatch(r"\d+-(\d)-\d+-\d+", Path(path).stem)
        if match is None:
            raise BrokenFileError(f"{path}: expected a name like 100032-3-0-0.wav, where 3 is the class")
        labels.append(int(match[1]))
    classes = "air_conditioner car_horn children_playing dog_bark drilling engine_idling gun_shot jackhammer siren"
    return _source(
        [*classes.split(), "street_music"], paths, labels, feature="mfcc", rate=22050, bins=40, n_fft=2048, hop=512,
        frames=173,
    )  # fmt: skip


def spoken_digits(
    root: Path,
    split: str,
    *,
    speakers: Sequence[str] | None = None,
    feature: str = "mel",
    bins: int = 40,
    frames: int = 64,
) -> Source:
    """Free Spoken Digit Dataset (Jackson et al.), ``[1, 40, 64]``: 3,000 recordings by six people, about 0.4 s, 8 kHz.

    Reads ``{digit}_{speaker}_{index}.wav`` in ``recordings/`` or in `root`. The customary division tests on the indices
    0 to 4 of each digit and speaker; there is no val. Spectra of 32 ms each 10 ms are stretched to `frames` (bilinear).

    Args:
        speakers: test on these and train on the others, so that none is on both sides.
        feature, bins, frames: see `spectrum`.
    """
    no_val("spoken_digits", split)
    folder = first_folder(root, ("recordings", "free-spoken-digit-dataset/recordings", ".")) or root
    named = {path: re.fullmatch(r"(\d)_(\w+)_(\d+)", path.stem) for path in sorted(folder.glob("*.wav"))}
    parts = {str(path): match.groups() for path, match in named.items() if match}
    if not parts:
        raise missing("spoken_digits", root, "recordings/{digit}_{speaker}_{index}.wav")
    heard = sorted({speaker for _, speaker, _ in parts.values()})
    if speakers is not None and (not speakers or set(speakers) - set(heard) or set(speakers) == set(heard)):
        raise ValueError(f"spoken_digits: speakers must be some of {', '.join(heard)}, got {speakers!r}")
    paths, labels = [], []
    for path, (digit, speaker, index) in parts.items():
        test = speaker in speakers if speakers is not None else int(index) < 5
        if test == (split == "test"):
            paths.append(path)
            labels.append(int(digit))
    classes = [str(digit) for digit in range(10)]
    return _source(classes, paths, labels, feature=feature, rate=8000, bins=bins, n_fft=256, hop=80, frames=frames)


def audio_folder(
    root: Path,
    split: str,
    *,
    feature: str = "mel",
    rate: int = 22050,
    bins: int = 64,
    n_fft: int = 1024,
    hop: int = 512,
    frames: int = 128,
    seconds: float | None = None,
    test_share: float = 0.2,
    split_file: str | None = None,
) -> Source:
    """Sounds of your own: ``<train|val|test>/<class>/*.wav``; or ``<class>/*.wav`` or ``{class}_*.wav``, to be divided.

    Args:
        feature, rate, bins, n_fft, hop, frames, seconds: see `spectrum`.
        test_share, split_file: for folders that do not divide, see `spikecore.data.splits.split_files`.
    """
    if split_folder(root, "train") or split_folder(root, "test"):
        files, classes = divided("audio_folder", root, split, EXTENSIONS, f"{split}/<class>/*.wav")
    else:
        files = class_files(root, EXTENSIONS)
        if not files and root.is_dir():
            for path in sorted(root.iterdir()):
                if path.suffix.lower() in EXTENSIONS and "_" in path.stem:
                    files.setdefault(path.stem.split("_")[0], []).append(str(path))
        if not files:
            raise missing("audio_folder", root, "<train|val|test>/<class>/*.wav, <class>/*.wav or {class}_*.wav")
        classes = list(files)
        files = split_files("audio_folder", files, split, test_share, split_file)
    paths, labels = numbered(files, classes)
    return _source(
        classes,
        paths,
        labels,
        feature=feature,
        rate=rate,
        bins=bins,
        n_fft=n_fft,
        hop=hop,
        frames=frames,
        seconds=seconds,
    )


def spectrum(
    wave: np.ndarray,
    *,
    feature: str,
    rate: int,
    bins: int,
    n_fft: int,
    hop: int,
    frames: int,
    seconds: float | None = None,
) -> np.ndarray:
    """Features ``[1, bins, frames]`` float32 of a wave ``[n]``.

    Args:
        feature: ``"mel"``: power in `bins` mel bands, in dB below the loudest, down to -80 or a power of
            1e-10. ``"mfcc"``: the first `bins` cepstral coefficients of 128 mel bands.
        rate: samples a second.
        n_fft, hop: length and distance of the windows, in samples.
        frames: another number of windows is stretched to this one (bilinear).
        seconds: cut or fill up the wave with silence to this length first.
    """
    if seconds is not None:
        wave = librosa.util.fix_length(wave, size=round(seconds * rate))
    wave = librosa.util.fix_length(wave, size=max(len(wave), n_fft))
    if feature == "mel":
        power = librosa.feature.melspectrogram(y=wave, sr=rate, n_mels=bins, n_fft=n_fft, hop_length=hop)
        values = librosa.power_to_db(power, ref=np.max)
    elif feature == "mfcc":
        values = librosa.feature.mfcc(y=wave, sr=rate, n_mfcc=bins, n_fft=n_fft, hop_length=hop)
    else:
        raise ValueError(f"spectrum: feature must be 'mel' or 'mfcc', got {feature!r}")
    x = torch.from_numpy(np.ascontiguousarray(values)).float()[None]
    if x.shape[2] != frames:
        x = torch.nn.functional.interpolate(x[None], size=(bins, frames), mode="bilinear", align_corners=False)[0]
    return x.numpy()


def read_wave(path: str, rate: int) -> np.ndarray:
    """The sound ``[n]`` float32, one channel, `rate` samples a second.

    Raises:
        BrokenFileError: not a sound file, or one without a finite sample.
    """
    with reading(path, "a sound that can be read"), open(path, "rb") as file:
        wave, own_rate = soundfile.read(file, dtype="float32", always_2d=True)
    wave = wave.mean(axis=1)
    if not len(wave) or not np.isfinite(wave).all():
        raise BrokenFileError(f"{path}: expected finite samples, got {'some that are not' if len(wave) else 'none'}")
    return wave if own_rate == rate else librosa.resample(wave, orig_sr=own_rate, target_sr=rate)


def _source(classes: list[str], paths: list[str], labels: list[int], **recipe: Any) -> Source:
    for name in ("rate", "bins", "n_fft", "hop", "frames"):
        if not isinstance(recipe[name], int) or recipe[name] < 1:
            raise ValueError(f"audio: {name} must be a whole number from 1 on, got {recipe[name]!r}")
    if recipe["feature"] not in ("mel", "mfcc"):
        raise ValueError(f"audio: feature must be 'mel' or 'mfcc', got {recipe['feature']!r}")
    return Source(classes, paths, labels, partial(_features, **recipe), paths, recipe)


def _features(path: str, rate: int, **recipe: Any) -> np.ndarray:
    return spectrum(read_wave(path, rate), rate=rate, **recipe)


def _song_part(item: tuple[str, int], rate: int, **recipe: Any) -> np.ndarray:
    path, part = item
    wave = _last_wave(path, rate)
    if len(wave) < 660_000:
        raise BrokenFileError(f"{path}: expected 660,000 samples at {rate:,} a second, got {len(wave):,}")
    return spectrum(wave[part * 82_500 : (part + 1) * 82_500], rate=rate, **recipe)


@functools.lru_cache(maxsize=1)  # the parts of a song are asked for one after the other
def _last_wave(path: str, rate: int) -> np.ndarray:
    return read_wave(path, rate)
