"""Event sets: frames, folders, SpikingJelly's trees, splits, the cache."""

import os
import pickle
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")

from spikecore.data import BrokenFileError, create_dataset
from spikecore.data.events import CIFAR10_CLASSES, GESTURES
from spikecore.data.formats import Events, read_events
from spikecore.data.frames import events_to_frames
from spikecore.data.splits import FIXED, read_split, save_split, split_files
from spikecore.data.writers import random_events, write_aedat2, write_aedat3, write_atis


def tree(root, files):
    """Files by their relative paths: events to be written by extension, or text."""
    for place, content in files.items():
        path = root / place
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            path.write_text(content)
        elif path.suffix == ".npz":
            np.savez(path, **content)
        else:
            {".bin": write_atis, ".aedat": write_aedat2}[path.suffix](path, content)
    return root


def n_mnist(root, per_digit=1):
    size = (34, 34)
    return tree(root, {
        f"{part}/{digit}/{i:05}.bin": random_events(200 + digit, size, seed=10 * i + digit)
        for part in ("Train", "Test") for digit in range(10) for i in range(per_digit)
    })  # fmt: skip


# ---- frames ----------------------------------------------------------------------------------------------------------


def test_hand_counted_frames():
    events = Events(
        *(np.array(column) for column in ([0, 10, 20, 30, 99], [0, 1, 1, 1, 2], [0, 0, 0, 0, 1], [1, 0, 0, 0, 1]))
    )
    x = events_to_frames(events, (2, 3), 2)
    assert x.shape == (2, 2, 2, 3)
    assert (x[0, 1, 0, 0], x[0, 0, 0, 1], x[0].sum()) == (1, 1, 2)  # 5 // 2 events
    assert (x[1, 0, 0, 1], x[1, 1, 1, 2], x[1].sum()) == (2, 1, 3)  # and the rest
    assert events_to_frames(events, (2, 3), 3, "time").sum(axis=(1, 2, 3)).tolist() == [4, 0, 1]
    assert events_to_frames(events, (2, 3), None, "duration", 25).sum(axis=(1, 2, 3)).tolist() == [3, 1, 0, 1]
    assert events_to_frames(events, (2, 3), 2, "duration", 25).sum(axis=(1, 2, 3)).tolist() == [3, 1]
    assert events_to_frames(events, (2, 3), 6, "duration", 25).sum(axis=(1, 2, 3)).tolist() == [3, 1, 0, 1, 0, 0]


@pytest.mark.parametrize("n", [3, 16, 1000])
def test_frames_are_spikingjellys(n):
    utils = pytest.importorskip("spikingjelly.datasets.utils")
    events = random_events(n, (20, 30), seed=n)
    theirs = events._asdict()
    by_number = utils.integrate_events_by_fixed_frames_number(theirs, "number", 8, 20, 30)
    np.testing.assert_array_equal(events_to_frames(events, (20, 30), 8), by_number)
    for duration in (1000, 70_000, 10**6):
        expected = utils.integrate_events_by_fixed_duration(theirs, duration, 20, 30)
        np.testing.assert_array_equal(events_to_frames(events, (20, 30), None, "duration", duration), expected)
    if n == 1000:  # SpikingJelly's knows no empty frame
        by_time = utils.integrate_events_by_fixed_frames_number(theirs, "time", 8, 20, 30)
        np.testing.assert_array_equal(events_to_frames(events, (20, 30), 8, "time"), by_time)


@pytest.mark.parametrize("how", [(4, "number", None), (4, "time", None), (None, "duration", 50_000)])
def test_odd_recordings(how):
    nothing = random_events(0, (5, 5))
    assert events_to_frames(nothing, (5, 5), *how).sum() == 0
    at_once = Events(*(np.full(7, value) for value in (9, 1, 2, 0)))
    assert events_to_frames(at_once, (5, 5), *how)[:, 0, 2, 1].sum() == 7
    many = Events(np.arange(70_000), *(np.full(70_000, value) for value in (1, 2, 1)))
    assert events_to_frames(many, (5, 5), *how)[:, 1, 2, 1].astype(int).sum() == 70_000
    events = random_events(500, (5, 5))
    shuffled = Events(*(column[np.random.default_rng(0).permutation(500)] for column in events))
    if how[1] != "number":
        np.testing.assert_array_equal(events_to_frames(shuffled, (5, 5), *how), events_to_frames(events, (5, 5), *how))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ((0, "number", None), "frames must be a whole number from 1 on, got 0"),
        ((None, "time", None), "frames must be a whole number from 1 on, got None"),
        ((4, "event", None), "by must be 'number', 'time' or 'duration', got 'event'"),
        ((4, "number", 5), "duration must be whole microseconds with by='duration' and None otherwise, got 5"),
        ((4, "duration", None), "duration must be .* got None"),
        ((4, "duration", 0), "duration must be .* got 0"),
        ((4, "duration", "30 ms"), "duration must be .* got '30 ms'"),
    ],
)
def test_wrong_frames(how, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        events_to_frames(random_events(5, (5, 5)), (5, 5), *how)
    with pytest.raises(ValueError, match=said):
        create_dataset("n_mnist", n_mnist(tmp_path), frames=how[0], by=how[1], duration=how[2])


# ---- sets ------------------------------------------------------------------------------------------------------------


def test_n_mnist(tmp_path):
    n_mnist(tmp_path, 2)
    train = create_dataset("n_mnist", tmp_path, frames=4, by="time")
    assert (train.kind, train.name, train.classes[3], len(train)) == ("events", "n_mnist", "3", 20)
    assert train.targets == [digit for digit in range(10) for _ in range(2)]
    x, label = train[7]
    assert (label, x.dtype, x.shape) == (3, torch.float32, (4, 2, 34, 34))
    np.testing.assert_array_equal(x, events_to_frames(read_events(tmp_path / "Train/3/00001.bin"), (34, 34), 4, "time"))
    few = create_dataset("n_mnist", tmp_path, "test", classes=["7", "2"], transform=lambda x: x.sum().item())
    assert [few[i] for i in range(4)] == [(202.0, 1), (202.0, 1), (207.0, 0), (207.0, 0)]
    lasting = create_dataset("n_mnist", tmp_path, frames=None, by="duration", duration=30_000)
    assert lasting[0][0].shape[0] in (9, 10)
    assert len(made(tmp_path / ".spikecore")) == 3


def test_n_caltech101(tmp_path):
    tree(tmp_path, {
        f"Caltech101/{of}/image_{i:04}.bin": random_events(50, (180, 240), seed=i)
        for of in ("airplanes", "BACKGROUND_Google", "zebra") for i in range(5)
    })  # fmt: skip
    train = create_dataset("n_caltech101", tmp_path, frames=2, test_share=0.2)
    test = create_dataset("n_caltech101", tmp_path, "test", frames=2, test_share=0.2)
    assert (len(train), len(test), train.classes) == (12, 3, ["BACKGROUND_Google", "airplanes", "zebra"])
    assert test[0][0].shape == (2, 2, 180, 240)
    last = events_to_frames(read_events(tmp_path / "Caltech101/zebra/image_0004.bin"), (180, 240), 2)
    np.testing.assert_array_equal(test[2][0], last)


def gesture_tree(root):
    folder = root / "DvsGesture"
    folder.mkdir(parents=True)
    for user in ("user01", "user02"):
        write_aedat3(folder / f"{user}_led.aedat", random_events(3000, (128, 128), seed=ord(user[-1])), packet=700)
        (folder / f"{user}_led_labels.csv").write_text(
            "class,startTime_usec,endTime_usec\n11,1000,90000\n2,100000,150000\n2,150000,300000\n"
        )
    (folder / "trials_to_train.txt").write_text("user01_led.aedat\n\n")
    (folder / "trials_to_test.txt").write_text("user02_led.aedat\n")
    return folder


def test_dvs128_gesture(tmp_path):
    folder = gesture_tree(tmp_path)
    test = create_dataset("dvs128_gesture", tmp_path, "test", frames=3)
    assert (test.targets, test.classes, len(test)) == ([10, 1, 1], GESTURES, 3)
    events = read_events(folder / "user02_led.aedat")
    inside = (events.t >= 100_000) & (events.t < 150_000)
    expected = events_to_frames(Events(*(column[inside] for column in events)), (128, 128), 3)
    np.testing.assert_array_equal(test[1][0], expected)
    assert len(create_dataset("dvs128_gesture", folder, "train", frames=3)) == 3
    (folder / "user01_led_labels.csv").write_text("class,startTime_usec,endTime_usec\n12,5,9\n")
    with pytest.raises(BrokenFileError, match=r"user01_led_labels\.csv: line 2: expected class 1 to 11, .* got 12,5,9"):
        create_dataset("dvs128_gesture", tmp_path)
    (folder / "user01_led_labels.csv").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"expected user01_led\.aedat and user01_led_labels\.csv, which trials_to"
    ):
        create_dataset("dvs128_gesture", tmp_path)


def test_gestures_are_spikingjellys(tmp_path):
    module = pytest.importorskip("spikingjelly.datasets.dvs128_gesture")
    folder = gesture_tree(tmp_path / "ours")
    theirs = tmp_path / "theirs"
    for label in range(11):
        (theirs / "events_np" / "train" / str(label)).mkdir(parents=True)
    labels = folder / "user01_led_labels.csv"
    module._split_aedat_files_to_np("user01_led", folder / "user01_led.aedat", labels, theirs / "events_np" / "train")
    a = create_dataset("dvs128_gesture", tmp_path / "ours", frames=3)
    b = create_dataset("dvs128_gesture", theirs, frames=3)
    assert a.classes == b.classes
    samples = [sorted((label, x.numpy().tobytes()) for x, label in (d[i] for i in range(3))) for d in (a, b)]
    assert samples[0] == samples[1]


def test_spikingjellys_trees_as_they_are(tmp_path):
    """Written by SpikingJelly's own classes from the events they share."""
    base = pytest.importorskip("spikingjelly.datasets.n_mnist")
    events = {
        f"events_np/{part}/{digit}/{i}.npz": random_events(100, (34, 34), seed=10 * i + digit)._asdict()
        for part in ("train", "test") for digit in range(10) for i in range(2)
    }  # fmt: skip
    tree(tmp_path, events)
    theirs = base.NMNIST(str(tmp_path), train=False, data_type="frame", frames_number=4, split_by="number")
    ours = create_dataset("n_mnist", tmp_path, "test", frames=4)  # the frames
    assert not (tmp_path / ".spikecore").exists()
    made = create_dataset("n_mnist", tmp_path, "test", frames=4, by="time")  # the events
    assert (tmp_path / ".spikecore").is_dir()
    expected = [theirs[i] for i in range(20)]
    for i, (x, label) in enumerate(expected):
        assert ours.targets[i] == made.targets[i] == label
        np.testing.assert_array_equal(ours[i][0], x)
    shutil.rmtree(tmp_path / "frames_number_4_split_by_number")
    again = create_dataset("n_mnist", tmp_path, "test", frames=4)
    for i, (x, _) in enumerate(expected):
        np.testing.assert_array_equal(again[i][0], x)


def test_saved_frames_of_another_shape(tmp_path):
    frames = {"frames": np.zeros((4, 2, 34, 35))}
    tree(tmp_path, {"frames_number_4_split_by_number/train/0/1.npz": frames})
    with pytest.raises(BrokenFileError, match=r"1\.npz: expected frames of \[4, 2, 34, 34\], got \[4, 2, 34, 35\]"):
        create_dataset("n_mnist", tmp_path, frames=4)[0]
    tree(tmp_path, {"frames_number_4_split_by_number/train/0/2.npz": {"frames": np.ones((4, 2, 34, 34))}})
    with pytest.warns(UserWarning, match="left out 1 of 2 samples"):
        assert len(create_dataset("n_mnist", tmp_path, frames=4, on_error="skip")) == 1


def test_below_spikingjellys_extract(tmp_path):
    n_mnist(tmp_path / "n_mnist/extract")
    (tmp_path / "n_mnist/download").mkdir()
    assert len(create_dataset("n_mnist", tmp_path / "n_mnist", "test", frames=2)) == 10
    cifar10_dvs(tmp_path / "cifar/extract", range(2))
    assert len(create_dataset("cifar10_dvs", tmp_path / "cifar", "test", frames=2, test_share=0.5)) == 10
    tree(tmp_path, {f"caltech/extract/Caltech101/ant/{i}.bin": random_events(9, (180, 240)) for i in range(2)})
    frames = {"frames": np.zeros((3, 2, 180, 240))}
    tree(tmp_path, {"caltech/frames_number_3_split_by_time/ant/1.npz": frames})  # of another number
    dataset = create_dataset("n_caltech101", tmp_path / "caltech", "test", frames=2, test_share=0.5)
    assert (len(dataset), dataset.classes) == (1, ["ant"])
    gesture_tree(tmp_path / "gesture/extract")
    assert len(create_dataset("dvs128_gesture", tmp_path / "gesture", frames=2)) == 3


def test_event_folder(tmp_path):
    tree(tmp_path, {
        "train/a/1.bin": random_events(9, (10, 12)), "train/b/1.npz": random_events(9, (10, 12))._asdict(),
        "val/b/1.bin": random_events(9, (10, 12)),
    })  # fmt: skip
    train = create_dataset("event_folder", tmp_path, height=10, width=12, frames=3)
    val = create_dataset("event_folder", tmp_path, "val", height=10, width=12, frames=3)
    assert (train.targets, val.targets, val.classes, train[1][0].shape) == ([0, 1], [1], ["a", "b"], (3, 2, 10, 12))


def test_event_outside_the_sensor(tmp_path):
    tree(tmp_path, {"train/a/1.bin": random_events(50, (10, 12))})
    with pytest.raises(BrokenFileError, match=r"1\.bin: event [\d]+: expected x below 11 \(sensor 10x11\), got 11"):
        create_dataset("event_folder", tmp_path, height=10, width=11)


# ---- CIFAR10-DVS and splits ------------------------------------------------------------------------------------------


def cifar10_dvs(root, numbers, name="cifar10_{}_{}.aedat"):
    events = random_events(20, (128, 128))
    return tree(root, {f"{of}/{name.format(of, i)}": events for of in CIFAR10_CLASSES for i in numbers})


def test_cifar10_dvs_by_share(tmp_path):
    cifar10_dvs(tmp_path, range(12))
    options = {"frames": 2, "test_share": 0.25}
    train, test = (create_dataset("cifar10_dvs", tmp_path, part, **options) for part in ("train", "test"))
    assert (len(train), len(test), train.classes) == (90, 30, CIFAR10_CLASSES)
    assert test[0][0].shape == (2, 2, 128, 128)
    with pytest.raises(
        ValueError, match=r"1,000 test samples of .*cifar10_dvs\.json are not there, first airplane/909; other files"
    ):
        create_dataset("cifar10_dvs", tmp_path)


def test_fixed_split_of_cifar10_dvs():
    """The first 900 of each class in the order of their names as text, as SpikingJelly's split_to_train_test_set."""
    count, test = read_split(FIXED / "cifar10_dvs.json")
    assert (count, len(test)) == (10_000, 1000)
    last = sorted(map(str, range(1000)))[900:]
    assert test == {f"{of}/{i}" for of in CIFAR10_CLASSES for i in last}
    for name in ("cifar10_{}_{}.aedat", "{1}.mat"):
        files = {of: [f"/data/{of}/{name.format(of, i)}" for i in range(1000)] for of in CIFAR10_CLASSES}
        parts = [
            split_files("cifar10_dvs", files, part, None, FIXED / "cifar10_dvs.json") for part in ("train", "test")
        ]
        sets = [{file for paths in part.values() for file in paths} for part in parts]
        assert [len(part) for part in sets] == [9000, 1000]
        assert not sets[0] & sets[1]
        files["dog"] = files["dog"][:-3]
        with pytest.raises(ValueError, match=r"3 test samples .* are not there, first dog/997"):
            split_files("cifar10_dvs", files, "train", None, FIXED / "cifar10_dvs.json")
        files["dog"] = [f"/data/dog/{name.format('dog', i)}" for i in range(1, 1000)]
        with pytest.raises(ValueError, match="divides 10,000 samples, but 9,999 are there"):
            split_files("cifar10_dvs", files, "train", None, FIXED / "cifar10_dvs.json")


def test_own_split_file(tmp_path):
    root = cifar10_dvs(tmp_path / "set", range(4))
    files = {of: sorted(map(str, (root / of).iterdir())) for of in CIFAR10_CLASSES}
    chosen = {of: paths[1:3] for of, paths in files.items()}
    digest = save_split(tmp_path / "split.json", files, chosen)
    train, test = (
        create_dataset("cifar10_dvs", root, part, frames=2, split_file=tmp_path / "split.json")
        for part in ("train", "test")
    )
    assert (len(train), len(test)) == (20, 20)
    text = (tmp_path / "split.json").read_text()
    assert digest in text
    (tmp_path / "split.json").write_text(text.replace("airplane/1", "airplane/3"))
    with pytest.raises(ValueError, match=r"split\.json: its lists are not those of its sha256"):
        create_dataset("cifar10_dvs", root, split_file=tmp_path / "split.json")
    (tmp_path / "split.json").write_text("{}")
    with pytest.raises(ValueError, match=r"split\.json: expected a split file with 'samples', 'test' and 'sha256'"):
        create_dataset("cifar10_dvs", root, split_file=tmp_path / "split.json")
    with pytest.raises(ValueError, match="is in the test part but not among the files"):
        save_split(tmp_path / "other.json", {"dog": []}, chosen)


@pytest.mark.parametrize("share", [0, 1, -1, None, "0.1"])
def test_wrong_share(share):
    with pytest.raises(ValueError, match="test_share must be between 0 and 1"):
        split_files("x", {"a": ["1"]}, "train", share)


@pytest.mark.parametrize("share", [0.1, 0.2, 0.3, 0.35])
def test_shares_divide_every_class(share):
    files = {of: [f"{i:03}" for i in range(n)] for n, of in enumerate("abcdefghijklmnopqrstuvwxyz", 1)}
    train, test = (split_files("x", files, part, share) for part in ("train", "test"))
    for of, paths in files.items():
        assert train[of] + test[of] == paths
        assert len(train[of]) == -(-len(paths) * round(100 * (1 - share)) // 100)


# ---- the cache -------------------------------------------------------------------------------------------------------


def made(cache):
    """What is in it, unfinished folders too."""
    return [path for path in sorted(cache.iterdir()) if path.suffix != ".lock"]


def test_made_once(tmp_path, monkeypatch):
    n_mnist(tmp_path)
    first = create_dataset("n_mnist", tmp_path, frames=4)
    (folder,) = made(tmp_path / ".spikecore")
    stamps = [path.stat().st_mtime_ns for path in sorted(folder.iterdir())]
    again = create_dataset("n_mnist", tmp_path, frames=4)
    assert [path.stat().st_mtime_ns for path in sorted(folder.iterdir())] == stamps
    assert all(torch.equal(first[i][0], again[i][0]) for i in range(10))
    create_dataset("n_mnist", tmp_path, frames=5)  # other options
    write_atis(tmp_path / "Train/0/00000.bin", random_events(77, (34, 34)))  # other files
    changed = create_dataset("n_mnist", tmp_path, frames=4)
    assert (changed[0][0].sum(), first[0][0].sum()) == (77, 200)
    monkeypatch.setattr("spikecore.data._cache.VERSION", 0)  # other code
    create_dataset("n_mnist", tmp_path, frames=4)
    assert len(made(tmp_path / ".spikecore")) == 4
    elsewhere = create_dataset("n_mnist", tmp_path, frames=4, cache=tmp_path / "elsewhere")
    assert len(made(tmp_path / "elsewhere")) == 1
    assert elsewhere[0][0].sum() == 77


def test_interrupted_making_leaves_nothing(tmp_path, monkeypatch):
    n_mnist(tmp_path)
    calls = []

    def stopped(path):
        calls.append(path)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return read_events(path)

    monkeypatch.setattr("spikecore.data.events.read_events", stopped)
    with pytest.raises(KeyboardInterrupt):
        create_dataset("n_mnist", tmp_path, frames=4)
    assert made(tmp_path / ".spikecore") == []
    assert len(create_dataset("n_mnist", tmp_path, frames=4)) == 10


def test_made_once_by_several_at_once(tmp_path, monkeypatch):
    n_mnist(tmp_path)
    read = []
    monkeypatch.setattr("spikecore.data.events.read_events", lambda path: read.append(path) or read_events(path))
    with ThreadPoolExecutor(3) as pool:
        datasets = list(pool.map(lambda _: create_dataset("n_mnist", tmp_path, frames=4), range(3)))
    assert len(read) == 10
    assert all(torch.equal(dataset[3][0], datasets[0][3][0]) for dataset in datasets)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_cache_that_cannot_be_written(tmp_path):
    n_mnist(tmp_path)
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match=r"cannot write to the cache .* choose another with cache="):
        create_dataset("n_mnist", tmp_path)
    tmp_path.chmod(0o700)


def test_cache_in_the_way_of_a_file(tmp_path):
    n_mnist(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write to the cache .*file .*; choose another with cache="):
        create_dataset("n_mnist", tmp_path, cache=tmp_path / "file")


def test_broken_recordings(tmp_path):
    n_mnist(tmp_path)
    (tmp_path / "Train/4/00000.bin").write_bytes(b"12")
    (tmp_path / "Train/8/00000.bin").write_bytes(b"")
    with pytest.raises(
        BrokenFileError, match=r"4/00000\.bin: byte 0: expected an event of 5 bytes, the file ends after 2"
    ):
        create_dataset("n_mnist", tmp_path, frames=4)
    for _ in range(2):  # made, then from the cache
        with pytest.warns(
            UserWarning, match=r"n_mnist: left out 2 of 10 samples that cannot be read; first .*4/00000\.bin"
        ):
            some = create_dataset("n_mnist", tmp_path, frames=4, on_error="skip")
        assert some.targets == [0, 1, 2, 3, 5, 6, 7, 9]
        assert [line[-1] for line in some.skipped] == ["2", "0"]
        assert [int(some[i][0].sum()) for i in range(8)] == [200, 201, 202, 203, 205, 206, 207, 209]
    with pytest.raises(BrokenFileError, match=r"4/00000\.bin: byte 0"):
        create_dataset("n_mnist", tmp_path, frames=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(create_dataset("n_mnist", tmp_path, "test", frames=4, on_error="skip")) == 10


def test_loader_processes(tmp_path):
    dataset = pickle.loads(pickle.dumps(create_dataset("n_mnist", n_mnist(tmp_path), frames=2)))  # as spawn does
    x, labels = next(iter(torch.utils.data.DataLoader(dataset, batch_size=5, num_workers=1)))
    assert (x.shape, labels.tolist()) == ((5, 2, 2, 34, 34), [0, 1, 2, 3, 4])
    assert x.sum(dim=(1, 2, 3, 4)).tolist() == [200, 201, 202, 203, 204]
