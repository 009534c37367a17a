"""Pictures of event frames: blue where it grew brighter (on), orange where darker (off), on dark grey."""

import os
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from spikecore.data.formats import npz_arrays, read_events
from spikecore.data.frames import events_to_frames

__all__ = ["frame_images", "load_frames", "save_gif", "save_pngs"]

# told apart with every kind of colour vision; both in one cell give a light grey
BACK, OFF, ON = (np.array(rgb, np.float32) for rgb in ((22, 24, 29), (255, 122, 26), (64, 156, 255)))
SENSORS = [(34, 34), (128, 128), (180, 240), (240, 304), (260, 346), (480, 640), (720, 1280)]
LEAST_SIDE = 256


def load_frames(
    path: str | os.PathLike, frames: int | None = 16, by: str = "number", duration: int | None = None
) -> np.ndarray:
    """Counts ``[T, 2, H, W]`` of a recording, or of a ``.npz`` that holds ``frames``.

    The sensor is taken to be the smallest of `SENSORS` on which all events lie, else as large as they need. The other
    arguments: see `spikecore.data.frames.events_to_frames`.
    """
    if Path(path).suffix.lower() == ".npz" and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            ready = "frames.npy" in archive.namelist()
        if ready:
            return npz_arrays(path, ("frames",))[0]
    events = read_events(path)
    h, w = (int(place.max(initial=0)) + 1 for place in (events.y.astype(np.int64), events.x.astype(np.int64)))
    size = next(((sh, sw) for sh, sw in SENSORS if h <= sh and w <= sw), (h, w))
    return events_to_frames(events, size, frames, by, duration)


def frame_images(frames: np.ndarray) -> list[Image.Image]:
    """An RGB image of each of the frames ``[T, 2, H, W]``, enlarged by a whole number to at least 256 rows.

    A cell is the brighter the more events it has, up to the count that only one cell in a hundred exceeds.
    """
    frames = np.asarray(frames, np.float32)
    counted = frames[frames > 0]
    full = max(float(np.quantile(counted, 0.99)), 1.0) if len(counted) else 1.0
    light = np.where(frames > 0, 0.45 + 0.55 * np.minimum(frames / full, 1), 0)[..., None]  # [T, 2, H, W, 1]
    rgb = BACK + light[:, 0] * (OFF - BACK) + light[:, 1] * (ON - BACK)
    scale = max(1, -(-LEAST_SIDE // frames.shape[2]))
    pixels = rgb.clip(0, 255).astype(np.uint8).repeat(scale, 1).repeat(scale, 2)
    return [Image.fromarray(image) for image in pixels]


def save_pngs(frames: np.ndarray, folder: str | os.PathLike, stem: str) -> list[Path]:
    """Write ``{stem}_{t}.png`` for each frame into `folder`, which is made."""
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    width = len(str(max(len(frames) - 1, 0)))
    paths = [out / f"{stem}_{t:0{width}}.png" for t in range(len(frames))]
    for image, path in zip(frame_images(frames), paths, strict=True):
        image.save(path)
    return paths


def save_gif(frames: np.ndarray, path: str | os.PathLike, milliseconds: float = 100) -> Path:
    """Write the frames as an animation that shows each for `milliseconds` (a GIF knows hundredths of a second)."""
    out = Path(path)
    out.parent.mkdir(parents=True, exist_ok=True)
    first, *rest = frame_images(frames)
    unfinished = out.with_name(f".{out.name}.unfinished")
    shown = max(20, round(milliseconds / 10) * 10)  # browsers slow down what is shown for less
    first.save(unfinished, "GIF", save_all=True, append_images=rest, duration=shown, loop=0)
    unfinished.replace(out)
    return out
