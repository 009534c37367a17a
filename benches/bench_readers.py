"""Times the readers of event files against SpikingJelly's: python benches/bench_readers.py [--quick] [--json FILE]

On generated files of the true formats and sizes, contestants taking turns in one run (spikecore.testing.timing), in
millions of events a second. Four ways through them:

  events    a file to arrays of events; beside it what reading its bytes alone takes, which no reader can undercut
  frames    a file to 16 frames by number
  prepare   a folder of files to what is kept on disk: ours writes frames, SpikingJelly events and frames
  sample    one sample out of that, float32, as each epoch asks for it

First both must give equal events and equal frames: a reader that does not gets no number. Peer: pip install
"spikecore[bench]".
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from spikecore.data import create_dataset
from spikecore.data.formats import Events, read_aedat2, read_aedat3, read_atis
from spikecore.data.frames import events_to_frames
from spikecore.data.writers import random_events, write_aedat2, write_aedat3, write_atis
from spikecore.testing import timing

BAR = 10  # how many times as many events a second ours should read
FRAMES = 16


@dataclass(frozen=True)
class Kind:
    """A published set: sensor, events of a typical recording, and both readers of its files."""

    extension: str
    size: tuple[int, int]
    n: int
    write: Callable[[Path, Events], None]
    ours: Callable[[Path], Events]
    peer: Callable[[Path], dict[str, np.ndarray]]


def kinds() -> dict[str, Kind]:
    from spikingjelly.datasets import utils
    from spikingjelly.datasets.cifar10_dvs import _load_origin_data

    return {
        "N-MNIST, ATIS": Kind(".bin", (34, 34), 4_200, write_atis, read_atis, utils.load_ATIS_bin),
        "N-Caltech101, ATIS": Kind(".bin", (180, 240), 115_000, write_atis, read_atis, utils.load_ATIS_bin),
        "CIFAR10-DVS, AEDAT 2": Kind(".aedat", (128, 128), 205_000, write_aedat2, read_aedat2, _load_origin_data),
        "DVS128 Gesture, AEDAT 3.1": Kind(
            ".aedat", (128, 128), 300_000, write_aedat3, read_aedat3, utils.load_aedat_v3
        ),
    }


def peer_frames(kind: Kind, path: Path) -> np.ndarray:
    from spikingjelly.datasets import utils

    return utils.integrate_events_by_fixed_frames_number(kind.peer(path), "number", FRAMES, *kind.size)


def peer_prepare(kind: Kind, paths: list[Path], out: Path) -> None:
    """As SpikingJelly's classes do for each file, in this thread."""
    from spikingjelly.datasets import utils
    from spikingjelly.datasets.base import _load_events

    for folder in ("events", "frames"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for path in paths:
        events = out / "events" / f"{path.stem}.npz"
        utils.np_savez(events, **kind.peer(path))
        utils.integrate_events_file_to_frames_file_by_fixed_frames_number(
            _load_events, str(events), str(out / "frames"), "number", FRAMES, *kind.size
        )


def our_dataset(kind: Kind, root: Path) -> Any:
    h, w = kind.size
    return create_dataset("event_folder", root, height=h, width=w, frames=FRAMES)


def our_prepare(kind: Kind, root: Path) -> None:
    shutil.rmtree(root / ".spikecore", ignore_errors=True)
    our_dataset(kind, root)


def read_bytes(path: Path) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.read()


def parity(kind: Kind, path: Path) -> None:
    ours, peer = kind.ours(path), kind.peer(path)
    for column in Events._fields:
        np.testing.assert_array_equal(np.asarray(getattr(ours, column), np.int64), peer[column].astype(np.int64))
    np.testing.assert_array_equal(events_to_frames(ours, kind.size, FRAMES), peer_frames(kind, path))


def measure(name: str, kind: Kind, quick: bool) -> list[dict[str, Any]]:
    from spikingjelly.datasets import utils

    with tempfile.TemporaryDirectory() as folder:
        root, out = Path(folder) / "ours", Path(folder) / "peer"
        (root / "train" / "one").mkdir(parents=True)
        paths = [root / "train" / "one" / f"{i}{kind.extension}" for i in range(max(4, 160_000 // kind.n))]
        for i, path in enumerate(paths):
            kind.write(path, random_events(kind.n, kind.size, seed=i))
            parity(kind, path)
        peer_prepare(kind, paths, out)
        dataset, saved = our_dataset(kind, root), str(out / "frames" / "0.npz")
        path, load = paths[0], utils.load_npz_frames
        np.testing.assert_array_equal(dataset[0][0].numpy(), load(saved))
        ways: dict[str, tuple[int, dict[str, Callable[[], Any]]]] = {
            "events": (kind.n, {"spikecore": partial(kind.ours, path), "spikingjelly": partial(kind.peer, path),
                                "bytes": partial(read_bytes, path)}),
            "frames": (kind.n, {"spikecore": lambda: events_to_frames(kind.ours(path), kind.size, FRAMES),
                                "spikingjelly": partial(peer_frames, kind, path)}),
            "prepare": (len(paths) * kind.n, {"spikecore": partial(our_prepare, kind, root),
                                         "spikingjelly": partial(peer_prepare, kind, paths, out)}),
            "sample": (kind.n, {"spikecore": lambda: dataset[0], "spikingjelly": partial(load, saved)}),
        }  # fmt: skip
        rows = []
        for way, (n, calls) in ways.items():
            times = timing.bench(calls, warmup=0.0 if quick else 0.2, duration=0.0 if quick else 1.5, turn=0.02)
            rate = {contestant: n / t.median / 1e6 for contestant, t in times.items()}
            faster = 1 / times["spikecore"].over(times["spikingjelly"])
            rows.append({"files": name, "events": kind.n, "way": way, "million_per_s": rate, "faster": faster})
        return rows


def line(row: dict[str, Any]) -> str:
    rate = row["million_per_s"]
    floor = f"   bytes alone {rate['bytes']:8.1f}" if "bytes" in rate else ""
    return (
        f"{row['files']:<27}{row['way']:<9}{rate['spikecore']:9.2f} {rate['spikingjelly']:9.2f} M events/s "
        f"{row['faster']:7.1f}x{' ' if row['faster'] >= BAR else '*'}{floor}"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few calls: that it runs, not how fast")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(argv)
    machine = timing.machine("numpy", "spikingjelly")
    print(timing.machine_line(machine))
    print(f"{'':<36}{'spikecore':>9} {'peer':>9}              (* below {BAR}x)")
    rows = []
    for name, kind in kinds().items():
        for row in measure(name, kind, args.quick):
            rows.append(row)
            print(line(row), flush=True)
    for way in dict.fromkeys(row["way"] for row in rows):
        mean = statistics.geometric_mean(row["faster"] for row in rows if row["way"] == way)
        print(f"{way:<9}{mean:7.1f}x, geometric mean")
    if args.json:
        unfinished = f"{args.json}.unfinished"
        Path(unfinished).write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))
        os.replace(unfinished, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
