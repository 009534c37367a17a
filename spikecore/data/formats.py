"""Files of event cameras, each read whole into arrays: ATIS, AEDAT 2, 3.1 and 4, MATLAB's, numpy's."""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from spikecore.data._samples import BrokenFileError, reading

__all__ = ["EXTENSIONS", "Events", "read_aedat2", "read_aedat3", "read_aedat4", "read_atis", "read_events", "read_mat",
           "read_npz"]  # fmt: skip

EXTENSIONS = (".aedat", ".aedat4", ".bin", ".mat", ".npz")


class Events(NamedTuple):
    """Arrays ``[n]``: time in microseconds, column, row (of any integer type), polarity (0 off, 1 on; or bool)."""

    t: np.ndarray
    x: np.ndarray
    y: np.ndarray
    p: np.ndarray


def read_events(path: str | os.PathLike) -> Events:
    """The events of a file of `EXTENSIONS`; ``.aedat`` of any version.

    Raises:
        BrokenFileError: another format, or a part of a file.
        OSError: it cannot be opened.
        ImportError: AEDAT 4 needs the package ``aedat``, ``.mat`` needs scipy.
    """
    path = Path(path)
    extension = path.suffix.lower()
    readers = {".bin": read_atis, ".mat": read_mat, ".npz": read_npz}
    if extension in readers:
        return readers[extension](path)
    if extension not in EXTENSIONS:
        raise BrokenFileError(f"{path}: expected a file of events: {', '.join(EXTENSIONS)}")
    with open(path, "rb") as file:
        magic = file.read(10)
    versions = {b"#!AER-DAT2": read_aedat2, b"#!AER-DAT3": read_aedat3, b"#!AER-DAT4": read_aedat4}
    if magic not in versions:
        raise BrokenFileError(f"{path}: byte 0: expected #!AER-DAT2, 3 or 4, got {magic!r}")
    return versions[magic](path)


def read_atis(path: str | os.PathLike) -> Events:
    """ATIS recordings of 40-bit events (N-MNIST, N-Caltech101; Orchard et al. 2015): x, y, 1 bit polarity, 23 of time.

    An event of row 240 stands for 2^13 us that the clock skipped.
    """
    data = _bytes(path)
    n, rest = divmod(len(data), 5)
    if rest or not n:
        raise BrokenFileError(f"{path}: byte {5 * n:,}: expected an event of 5 bytes, the file ends after {rest}")
    word = np.ndarray((n,), ">u4", data, 1, (5,)).astype(np.uint32)  # y, then polarity and time
    x, y = np.ndarray((n,), np.uint8, data, 0, (5,)), np.ndarray((n,), np.uint8, data, 1, (5,))
    t, p = word & 0x7FFFFF, (word & 0x800000) != 0
    if word.max() >= 240 << 24 and (skipped := y == 240).any():
        t = t + np.cumsum(skipped) * 2**13
        t, x, y, p = t[~skipped], x[~skipped], y[~skipped], p[~skipped]
    return Events(t, x, y, p)


def read_aedat2(path: str | os.PathLike) -> Events:
    """AEDAT 2 of a DVS128 (CIFAR10-DVS): lines of ``#``, then address and time, 32 bits each, high byte first.

    The camera's x counts from the right and its y from the bottom, turned by 90 degrees: both are put upright, and its
    inverted polarity is put right, as SpikingJelly does. Events of its synchronisation input (bit 15) are left out.
    """
    data = _bytes(path)
    _expect(path, data, b"#!AER-DAT2")
    start = _after_comments(data)
    if start == len(data) and not data.endswith(b"\n"):
        raise BrokenFileError(f"{path}: byte {start:,}: expected the end of a line of comment, the file ends")
    if rest := (len(data) - start) % 8:
        at = len(data) - rest
        raise BrokenFileError(f"{path}: byte {at:,}: expected an event of 8 bytes, the file ends after {rest}")
    words = np.frombuffer(data, ">u4", offset=start)
    address, t = words[0::2].astype(np.uint32), words[1::2].astype(np.uint32)
    if len(address) and address.max() > 0x7FFF:
        if address.max() > 0xFFFF:
            wrong = int((address > 0xFFFF).argmax())
            raise BrokenFileError(
                f"{path}: byte {start + 8 * wrong:,}: expected an address of a DVS128, below 0x10000, "
                f"got {address[wrong]:#x}"
            )
        pixels = address < 0x8000
        address, t = address[pixels], t[pixels]
    address = address.astype(np.uint16)
    return Events(t, 127 - (address >> 8), 127 - (address >> 1 & 127), (address & 1) == 0)


def read_aedat3(path: str | os.PathLike) -> Events:
    """AEDAT 3.1 (DVS128 Gesture): lines of ``#`` up to ``#!END-HEADER``, then packets; those of polarity are read.

    A packet: 28 bytes that give type, size of an event, overflows of the clock, and numbers of events; then the
    events, each 32 bits for validity, polarity, y, x and 32 bits of time. Events marked invalid are left out.
    """
    data = _bytes(path)
    _expect(path, data, b"#!AER-DAT3")
    end = b"#!END-HEADER\r\n"
    at = data.find(end) + len(end)
    if at < len(end):
        raise BrokenFileError(f"{path}: byte {_after_comments(data):,}: expected the line #!END-HEADER")
    if b"\n#Format: " in data[:at] and b"\n#Format: RAW" not in data[:at]:
        raise BrokenFileError(
            f"{path}: byte {data.find(b'#Format'):,}: expected '#Format: RAW', got a compressed format"
        )
    words, overflows = [], []
    while at < len(data):
        if len(data) - at < 28:
            raise BrokenFileError(
                f"{path}: byte {at:,}: expected a header of 28 bytes, the file ends after {len(data) - at}"
            )
        kind, size = int.from_bytes(data[at : at + 2], "little"), int.from_bytes(data[at + 4 : at + 8], "little")
        overflow, capacity, number, valid = np.frombuffer(data, "<u4", 4, at + 12).tolist()
        begin, at = at + 28, at + 28 + size * capacity
        if number > capacity or (kind == 1 and size != 8):
            raise BrokenFileError(
                f"{path}: byte {begin - 28:,}: expected a packet of at most {capacity:,} events of 8 bytes, "
                f"got {number:,} of {size}"
            )
        if at > len(data):
            raise BrokenFileError(
                f"{path}: byte {begin:,}: expected {capacity:,} events of {size} bytes, "
                f"the file ends after {len(data) - begin:,}"
            )
        if kind == 1:
            packet = np.frombuffer(data, "<u4", 2 * number, begin).reshape(-1, 2)
            words.append(packet if valid == number else packet[packet[:, 0] & 1 == 1])
            overflows.append(overflow)
    both = np.concatenate(words) if words else np.empty((0, 2), "<u4")
    address, t = np.ascontiguousarray(both[:, 0]), both[:, 1].astype(np.int64)
    if any(overflows):
        t |= np.repeat(np.asarray(overflows, np.int64) << 31, [len(packet) for packet in words])
    x, y = (address >> 17).astype(np.uint16), (address >> 2).astype(np.uint16) & 0x7FFF
    return Events(t, x, y, (address >> 1).astype(np.uint8) & 1)


def read_aedat4(path: str | os.PathLike) -> Events:
    """AEDAT 4 (DV), by the package ``aedat`` (extra: ``pip install "spikecore[aedat]"``)."""
    _check_packets(path, _bytes(path))
    try:
        import aedat
    except ImportError as e:
        raise ImportError(f'{path}: AEDAT 4 needs the package aedat: pip install "spikecore[aedat]"') from e
    with reading(path, "an AEDAT 4 file that the package aedat can read"):
        packets = [packet["events"] for packet in aedat.Decoder(str(path)) if "events" in packet]
    if not packets:
        return Events(*(np.empty(0, kind) for kind in (np.int64, np.uint16, np.uint16, np.uint8)))
    events = np.concatenate(packets)
    return Events(events["t"].astype(np.int64), events["x"], events["y"], events["on"].astype(np.uint8))


def read_mat(path: str | os.PathLike) -> Events:
    """Events in MATLAB's files (up to version 7), with scipy.

    ``out1`` (CIFAR10-DVS): columns t, x, y, polarity 0 and 1, or dat2mat's t, -1, -1, x, y, polarity -1 and 1.
    ``TD`` (the tools of N-MNIST's authors): fields ts, x, y counted from 1, p 1 and 2.
    """
    from scipy.io import loadmat

    with reading(path, "a MATLAB file up to version 7"):
        content = loadmat(path)
    if "TD" in content and {"ts", "x", "y", "p"} <= set(content["TD"].dtype.names or ()):
        t, x, y, p = (content["TD"][field][0, 0].ravel().astype(np.int64) for field in ("ts", "x", "y", "p"))
        return Events(t, x - 1, y - 1, p - 1)
    table = content.get("out1")
    if not isinstance(table, np.ndarray) or table.ndim != 2 or table.shape[1] not in (4, 6):
        names = ", ".join(name for name in content if not name.startswith("__"))
        raise BrokenFileError(
            f"{path}: expected out1 with 4 or 6 columns, or TD with ts, x, y, p; found {names or 'nothing'}"
        )
    t, x, y, p = table[:, [0, -3, -2, -1]].astype(np.int64).T
    return Events(t, x, y, p > 0)


def read_npz(path: str | os.PathLike) -> Events:
    """SpikingJelly's ``events_np`` files: arrays t, x, y, p."""
    return Events(*npz_arrays(path, ("t", "x", "y", "p")))


def npz_arrays(path: str | os.PathLike, names: tuple[str, ...]) -> list[np.ndarray]:
    """The arrays `names` of a numpy archive; nothing pickled is read.

    Raises:
        BrokenFileError: another file, a part of one, or one without them.
    """
    with reading(path, f"a numpy archive with {', '.join(names)}"), np.load(path) as archive:
        if lost := [name for name in names if name not in archive.files]:
            raise BrokenFileError(f"{path}: expected the array {lost[0]!r}, found {', '.join(archive.files) or 'none'}")
        return [archive[name] for name in names]


def _bytes(path: str | os.PathLike) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.read()


def _expect(path: str | os.PathLike, data: bytes, magic: bytes) -> None:
    if not data.startswith(magic):
        raise BrokenFileError(f"{path}: byte 0: expected {magic.decode().rstrip()}, got {data[: len(magic)]!r}")


def _check_packets(path: str | os.PathLike, data: bytes) -> None:
    """AEDAT 4's chain of packets is whole; the package aedat gives up on one that is not, but does not say where."""
    _expect(path, data, b"#!AER-DAT4.0\r\n")
    at, what = 14, "a header"
    end = len(data)
    while at < end or what == "a header":
        ahead = 4 if what == "a header" else 8  # a packet's size stands behind its stream
        size = int.from_bytes(data[at + ahead - 4 : at + ahead], "little")
        if len(data) - at < ahead + size:
            raise BrokenFileError(
                f"{path}: byte {at:,}: expected {what} of {ahead + size:,} bytes, "
                f"the file ends after {len(data) - at:,}"
            )
        if what == "a header":
            end = _table_position(data[at + 4 : at + 4 + size]) or end
        at, what = at + ahead + size, "a packet"


def _table_position(header: bytes) -> int | None:
    """Where the table behind the packets begins, by the second field of the flatbuffer IOHE; None without one."""

    def number(at: int, size: int) -> int:
        return int.from_bytes(header[at : at + size], "little", signed=size > 2)

    table = number(0, 4)
    fields = table - number(table, 4)
    field = number(fields + 6, 2) if number(fields, 2) > 6 else 0
    position = number(table + field, 8) if field else -1
    return position if position > 0 else None


def _after_comments(data: bytes) -> int:
    at = 0
    while data[at : at + 1] == b"#":
        at = data.find(b"\n", at) + 1 or len(data)
    return at
