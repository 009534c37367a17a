"""Small true files of event cameras, for tests and benches of the readers in `spikecore.data.formats`."""

import struct
from pathlib import Path

import numpy as np

from spikecore.data.formats import Events

__all__ = ["random_events", "write_aedat2", "write_aedat3", "write_aedat4", "write_atis"]


def random_events(n: int, size: tuple[int, int], seed: int = 0, last: int = 300_000) -> Events:
    """`n` events in the order of time, from 0 up to below `last` us, anywhere on a sensor of `size` ``(H, W)``."""
    rng = np.random.default_rng(seed)
    t, y, x, p = (rng.integers(0, limit, n) for limit in (last, *size, 2))
    return Events(np.sort(t), x, y, p)


def write_atis(path: Path, events: Events) -> None:
    t, x, y, p = events
    columns = (x, y, p << 7 | t >> 16, t >> 8 & 255, t & 255)
    path.write_bytes(np.stack(columns, axis=1).astype(np.uint8).tobytes())


def write_aedat2(path: Path, events: Events) -> None:
    """As a DVS128 writes them: turned, and with inverted polarity."""
    t, x, y, p = events
    address = (127 - x) << 8 | (127 - y) << 1 | (1 - p)
    comments = b"#!AER-DAT2.0\r\n# This is a raw AE data file\r\n#End Of ASCII Header\r\n"
    path.write_bytes(comments + np.stack((address, t), axis=1).astype(">u4").tobytes())


def write_aedat3(path: Path, events: Events, packet: int = 1000, overflow: int = 0) -> None:
    """In packets of `packet` events, behind one of another kind, the clock having overflowed `overflow` times."""
    t, x, y, p = events
    out = [b"#!AER-DAT3.1\r\n#Format: RAW\r\n#Source 1: DVS128\r\n#Start-Time: 2016-01-01 12:00:00\r\n#!END-HEADER\r\n"]
    out.append(struct.pack("<hhiiiiii", 0, 1, 8, 4, overflow, 2, 2, 2) + bytes(16))
    words = np.stack((x << 17 | y << 2 | p << 1 | 1, t), axis=1).astype("<u4")
    for start in range(0, len(t), packet):
        part = words[start : start + packet]
        out.append(struct.pack("<hhiiiiii", 1, 1, 8, 4, overflow, *[len(part)] * 3) + part.tobytes())
    path.write_bytes(b"".join(out))


def write_aedat4(path: Path, events: Events, size: tuple[int, int], packet: int = 1000) -> None:
    """Uncompressed, as DV writes: the flatbuffers IOHE and EVTS."""
    attributes = '<attr key="compression" type="string">NONE</attr><attr key="typeIdentifier" type="string">EVTS</attr>'
    sizes = f'<attr key="sizeX" type="int">{size[1]}</attr><attr key="sizeY" type="int">{size[0]}</attr>'
    info = (
        f'<dv version="2.0"><node name="outInfo" path="/mainloop/Recorder/outInfo/"><node name="0" path="/0/">'
        f'{attributes}<node name="info" path="/0/info/">{sizes}</node></node></node></dv>'
    ).encode()
    # root, identifier, vtable (three fields, the first left at its default), table: vtable, position, text
    head = struct.pack("<I4s5HxxiIq", 20, b"IOHE", 10, 16, 0, 8, 4, 12, 12, -1)
    text = struct.pack("<I", len(info)) + info + b"\0"
    out = [b"#!AER-DAT4.0\r\n", _sized(head + text)]
    element = np.dtype([("t", "<i8"), ("x", "<i2"), ("y", "<i2"), ("on", "?"), ("pad", "V3")])
    for start in range(0, len(events.t), packet):
        part = slice(start, start + packet)
        elements = np.zeros(len(events.t[part]), element)
        elements["t"], elements["x"], elements["y"], elements["on"] = (column[part] for column in events)
        # root, identifier, vtable (one field), table: vtable, vector; the vector's elements 8-byte aligned
        body = struct.pack("<I4s3HxxiII", 16, b"EVTS", 6, 8, 4, 8, 4, len(elements))
        payload = _sized(body + elements.tobytes())
        out.append(struct.pack("<ii", 0, len(payload)) + payload)
    path.write_bytes(b"".join(out))


def _sized(buffer: bytes) -> bytes:
    return struct.pack("<I", len(buffer)) + buffer
