"""Events to frames of counts."""

import numpy as np

from spikecore.data._samples import BrokenFileError
from spikecore.data.formats import Events

__all__ = ["check_frames", "events_to_frames"]

BY = ("number", "time", "duration")


def check_frames(frames: int | None, by: str, duration: int | None) -> None:
    """Raises:
    ValueError: a wrong argument of `events_to_frames`.
    """
    if by not in BY:
        raise ValueError(f"events: by must be 'number', 'time' or 'duration', got {by!r}")
    whole = isinstance(duration, int) and duration > 0
    if not (whole if by == "duration" else duration is None):
        raise ValueError(
            f"events: duration must be whole microseconds with by='duration' and None otherwise, got {duration!r}"
        )
    if not (frames is None and by == "duration") and not (isinstance(frames, int) and frames > 0):
        raise ValueError(f"events: frames must be a whole number from 1 on, got {frames!r}")


def events_to_frames(
    events: Events, size: tuple[int, int], frames: int | None, by: str = "number", duration: int | None = None
) -> np.ndarray:
    """Counts ``[T, 2, H, W]``, channel 0 for off and 1 for on, in the smallest unsigned type that holds them.

    Args:
        size: ``(H, W)`` of the sensor.
        frames: T. With ``by="duration"`` also None, for as many as the recording lasts; otherwise such a recording is
            cut after `frames` or filled up with empty ones.
        by: ``"number"``: each frame holds ``n // T`` events. ``"time"``: each lasts ``(t_max - t_min) // T``. In both
            the last one holds the rest. ``"duration"``: each lasts `duration` microseconds.

    Raises:
        ValueError: a wrong argument.
        BrokenFileError: an event outside the sensor.
    """
    check_frames(frames, by, duration)
    h, w = size
    t, x, y, p = events
    for name, place, limit in (("x", x, w), ("y", y, h)):
        if len(place) and not 0 <= place.min() <= place.max() < limit:
            wrong = int(((place < 0) | (place >= limit)).argmax())
            raise BrokenFileError(
                f"event {wrong:,}: expected {name} below {limit} (sensor {h}x{w}), got {place[wrong]}"
            )
    cell = y.astype(np.intp)
    cell *= w
    cell += x
    cell += (p != 0) * np.intp(h * w)
    if by == "number":
        assert frames is not None
        edges = np.arange(frames + 1) * (len(t) // frames)
    else:
        t = t.astype(np.int64)
        if (t[1:] < t[:-1]).any():
            order = np.argsort(t, kind="stable")
            t, cell = t[order], cell[order]
        length = int(t[-1] - t[0]) if len(t) else 0
        if by == "time":
            assert frames is not None
            n, step = frames, max(length // frames, 1)
        else:
            assert duration is not None
            n, step = max(-(-length // duration), 1), duration
        edges = np.searchsorted(t, (t[0] if len(t) else 0) + np.arange(n + 1) * step)
    edges[-1] = len(t)
    steps = len(edges) - 1 if frames is None else frames
    counts = np.zeros((steps, 2 * h * w), np.uint8)
    for i in range(min(steps, len(edges) - 1)):
        count = np.bincount(cell[edges[i] : edges[i + 1]], minlength=2 * h * w)
        if (most := count.max()) > np.iinfo(counts.dtype).max:
            counts = counts.astype(np.min_scalar_type(most))
        counts[i] = count
    return counts.reshape(steps, 2, h, w)
