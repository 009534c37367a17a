"""Readers of event files: what was written is read, by ours as by SpikingJelly's; broken files say where."""

import re
import struct

import numpy as np
import pytest

from spikecore.data import BrokenFileError
from spikecore.data.formats import Events, read_aedat2, read_aedat3, read_atis, read_events, read_mat
from spikecore.data.writers import random_events, write_aedat2, write_aedat3, write_aedat4, write_atis

WRITERS = {"a.bin": write_atis, "a2.aedat": write_aedat2, "a3.aedat": write_aedat3}


def assert_equal(found, expected):
    for name, a, b in zip(Events._fields, found, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(a).astype(np.int64), np.asarray(b).astype(np.int64), err_msg=name)


@pytest.mark.parametrize(
    ("name", "n"), [(name, n) for name in WRITERS for n in (0, 1, 999, 2500) if n or name[1] != "."]
)
def test_reads_what_was_written(tmp_path, name, n):
    events = random_events(n, (128, 128))
    WRITERS[name](tmp_path / name, events)
    assert_equal(read_events(tmp_path / name), events)


@pytest.mark.parametrize("name", WRITERS)
def test_reads_as_spikingjelly(tmp_path, name):
    utils = pytest.importorskip("spikingjelly.datasets.utils")
    from spikingjelly.datasets.cifar10_dvs import _load_origin_data

    peers = {"a.bin": utils.load_ATIS_bin, "a2.aedat": _load_origin_data, "a3.aedat": utils.load_aedat_v3}
    WRITERS[name](tmp_path / name, random_events(2500, (128, 128), last=8_000_000))
    theirs = peers[name](tmp_path / name)
    assert_equal(read_events(tmp_path / name), [theirs[column] for column in Events._fields])


def test_hand_written_bytes(tmp_path):
    """One event of each format, its bytes from the formats' own descriptions."""
    (tmp_path / "a.bin").write_bytes(bytes([3, 7, 0x80 | 0x12, 0x34, 0x56]))
    assert_equal(read_atis(tmp_path / "a.bin"), ([0x123456], [3], [7], [1]))
    # address 0x0A0D: bits 8..14 are 10, bits 1..7 are 6, bit 0 is 1
    (tmp_path / "a2.aedat").write_bytes(b"#!AER-DAT2.0\r\n# text\r\n" + struct.pack(">II", 0x0A0D, 77))
    assert_equal(read_aedat2(tmp_path / "a2.aedat"), ([77], [117], [121], [0]))
    head = b"#!AER-DAT3.1\r\n#Format: RAW\r\n#!END-HEADER\r\n"
    packet = struct.pack("<hhiiiiii", 1, 0, 8, 4, 1, 1, 1, 1) + struct.pack("<II", 5 << 17 | 9 << 2 | 2 | 1, 42)
    (tmp_path / "a3.aedat").write_bytes(head + packet)
    assert_equal(read_aedat3(tmp_path / "a3.aedat"), ([42 + 2**31], [5], [9], [1]))


def test_atis_clock_that_skipped(tmp_path):
    rows = [(1, 2, 0, 0, 5), (0, 240, 0, 0, 0), (3, 4, 0x80, 0, 6), (0, 240, 0, 0, 0), (5, 6, 0, 0, 7)]
    (tmp_path / "a.bin").write_bytes(bytes(np.array(rows, np.uint8)))
    assert_equal(read_atis(tmp_path / "a.bin"), ([5, 6 + 8192, 7 + 16384], [1, 3, 5], [2, 4, 6], [0, 1, 0]))


def test_aedat2_leaves_out_synchronisation(tmp_path):
    events = random_events(3, (128, 128))
    write_aedat2(tmp_path / "a.aedat", events)
    with open(tmp_path / "a.aedat", "ab") as file:
        file.write(struct.pack(">II", 0x8000, 1))
    assert_equal(read_aedat2(tmp_path / "a.aedat"), events)


def test_aedat3_leaves_out_what_is_invalid_or_beyond_the_number(tmp_path):
    words = np.array([[1 << 17 | 1, 10], [2 << 17, 11], [3 << 17 | 1, 12], [0, 0]], "<u4")  # the second is invalid
    head = b"#!AER-DAT3.1\r\n#Format: RAW\r\n#!END-HEADER\r\n"
    packet = struct.pack("<hhiiiiii", 1, 0, 8, 4, 0, 4, 3, 2) + words.tobytes()
    (tmp_path / "a.aedat").write_bytes(head + packet * 2)
    assert_equal(read_aedat3(tmp_path / "a.aedat"), ([10, 12] * 2, [1, 3] * 2, [0] * 4, [0] * 4))


def test_aedat4(tmp_path):
    pytest.importorskip("aedat")
    events = random_events(2500, (34, 40))
    write_aedat4(tmp_path / "a.aedat4", events, (34, 40))
    assert_equal(read_events(tmp_path / "a.aedat4"), events)


def test_aedat4_that_its_package_cannot_read(tmp_path):
    """It panics, with an exception that is none of Python's usual ones."""
    pytest.importorskip("aedat")
    path = tmp_path / "a.aedat4"
    write_aedat4(path, random_events(6, (34, 40)), (34, 40))
    path.write_bytes(path.read_bytes().replace(b"<node name", "<nöde name".encode()[:10]))
    with pytest.raises(BrokenFileError, match=r"a\.aedat4: expected an AEDAT 4 file that the package aedat can read: "):
        read_events(path)


def test_aedat4_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "aedat", None)
    write_aedat4(tmp_path / "a.aedat", random_events(5, (34, 34)), (34, 34))
    with pytest.raises(ImportError, match=r'a\.aedat: AEDAT 4 needs .* pip install "spikecore\[aedat\]"'):
        read_events(tmp_path / "a.aedat")


def test_mat(tmp_path):
    scipy_io = pytest.importorskip("scipy.io")
    events = random_events(100, (128, 128))
    t, x, y, p = events
    path = tmp_path / "a.mat"
    scipy_io.savemat(path, {"out1": np.stack((t, x, y, p), axis=1)})
    assert_equal(read_events(path), events)
    signed = np.stack((t, 0 * t - 1, 0 * t - 1, x, y, 2 * p - 1), axis=1)  # as dat2mat gives them
    scipy_io.savemat(path, {"out1": signed.astype(np.float64)})
    assert_equal(read_events(path), events)
    scipy_io.savemat(path, {"TD": {"ts": t, "x": x + 1, "y": y + 1, "p": p + 1}})
    assert_equal(read_events(path), events)
    for content in ({"other": t}, {"out1": signed[:, :5]}):
        scipy_io.savemat(path, content)
        with pytest.raises(BrokenFileError, match=r"a\.mat: expected out1 with 4 or 6 columns, .* found (other|out1)"):
            read_mat(path)
    for broken in (b"", b"MATLAB 5.0", b"no such thing" * 100, (tmp_path / "a.mat").read_bytes()[:300]):
        path.write_bytes(broken)
        with pytest.raises(BrokenFileError, match=r"a\.mat: expected"):
            read_mat(path)


def test_npz(tmp_path):
    events = random_events(100, (34, 34))
    np.savez_compressed(tmp_path / "a.npz", **events._asdict())
    assert_equal(read_events(tmp_path / "a.npz"), events)
    np.savez(tmp_path / "less.npz", t=events.t, x=events.x)
    np.savez(tmp_path / "objects.npz", **{**events._asdict(), "p": np.array([print], object)})
    (tmp_path / "cut.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:-50])
    (tmp_path / "text.npz").write_bytes(b"hello")
    for name, said in {
        "less": "expected the array 'y', found t, x", "objects": "Object arrays cannot be loaded",
        "cut": "expected a numpy archive with t, x, y, p", "text": "expected a numpy archive with t, x, y, p",
    }.items():  # fmt: skip
        with pytest.raises(BrokenFileError, match=rf"{name}\.npz: .*{said}"):
            read_events(tmp_path / f"{name}.npz")


@pytest.mark.parametrize("name", [*WRITERS, "a4.aedat4"])
def test_any_cut_is_told_with_its_byte(tmp_path, name):
    """Cut anywhere, a file is either one with fewer events or named with the byte from which it is not."""
    events = random_events(7, (128, 128))
    path = tmp_path / name
    if name == "a4.aedat4":
        write_aedat4(path, events, (128, 128), packet=3)
    else:
        WRITERS[name](path, events, **({"packet": 3} if name == "a3.aedat" else {}))
    whole = path.read_bytes()
    said = []
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        try:
            found = read_events(path)
        except BrokenFileError as e:
            said.append((length, str(e)))
        except ImportError:
            continue  # whole as far as it goes, but without aedat it cannot be read
        else:
            assert_equal(found, [column[: len(found.t)] for column in events])
    assert len(whole) - len(said) <= 7 + 3  # cut behind an event, a packet, a line of comment
    for length, line in said:
        match = re.fullmatch(rf"{re.escape(str(path))}: byte ([\d,]+): expected .*", line)
        assert match, line
        assert int(match[1].replace(",", "")) <= length


def test_foreign_files(tmp_path):
    for name, content, said in [
        ("a.aedat", b"RIFF0000WAVE", "byte 0: expected #!AER-DAT2, 3 or 4, got b'RIFF0000WA'"),
        ("b.aedat", b"", "byte 0: expected #!AER-DAT2, 3 or 4, got b''"),
        ("c.txt", b"1 2 3", r"expected a file of events: \.aedat"),
        ("d.aedat", b"#!AER-DAT2.0\r\n" + struct.pack(">IIII", 5, 1, 0x80400000, 2),
         "byte 22: expected an address of a DVS128, below 0x10000, got 0x80400000"),
        ("e.aedat", b"#!AER-DAT3.1\r\n#Format: Serial-TS\r\n#!END-HEADER\r\n", "byte 14: expected '#Format: RAW'"),
        ("f.aedat", b"#!AER-DAT3.1\r\n#!END-HEADER\r\n" + struct.pack("<hhiiiiii", 1, 0, 12, 4, 0, 5, 5, 5) + bytes(60),
         "byte 28: expected a packet of at most 5 events of 8 bytes, got 5 of 12"),
    ]:  # fmt: skip
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BrokenFileError, match=rf"{re.escape(str(tmp_path / name))}: {said}"):
            read_events(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        read_events(tmp_path / "absent.bin")
