"""`spikecore events`: the pictures hold what was recorded."""

import numpy as np
import pytest

Image = pytest.importorskip("PIL.Image")

from spikecore.cli import main  # noqa: E402
from spikecore.data import draw  # noqa: E402
from spikecore.data.writers import random_events, write_aedat2, write_atis  # noqa: E402


def test_colours_tell_polarity_and_count():
    frames = np.zeros((2, 2, 4, 5), np.uint8)
    frames[0, 0, 1, 2], frames[0, 1, 3, 4], frames[1, :, 0, 0], frames[1, 1, 2, 2] = 9, 9, 9, 1
    first, second = (np.asarray(image).astype(int) for image in draw.frame_images(frames))
    assert first.shape == (256, 320, 3)  # enlarged 64 times
    back, off, on = first[0, 0], first[64, 128], first[255, 319]
    assert (first[127, 191] == off).all()
    assert (back == draw.BACK).all()
    assert off[0] > on[0] + 100
    assert on[2] > off[2] + 100
    both, faint = second[0, 0], second[128, 128]
    assert min(both) > 150
    assert back[2] < faint[2] < on[2]


@pytest.mark.parametrize(("size", "taken"), [((34, 34), (34, 34)), ((100, 50), (128, 128)), ((900, 30), (900, 30))])
def test_the_sensor_is_guessed(tmp_path, size, taken):
    events = random_events(3000, size)
    np.savez(tmp_path / "a.npz", **events._asdict())
    assert draw.load_frames(tmp_path / "a.npz", 3).shape[2:] == taken


def test_pngs(tmp_path, capsys):
    write_atis(tmp_path / "one.bin", random_events(500, (34, 34)))
    assert main(["events", str(tmp_path / "one.bin"), "--png", str(tmp_path / "out"), "--frames", "11"]) == 0
    assert capsys.readouterr().out == f"11 images: {tmp_path}/out/one_00.png to one_10.png\n"
    expected = draw.frame_images(draw.load_frames(tmp_path / "one.bin", 11))
    for t in range(11):
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / f"out/one_{t:02}.png")), np.asarray(expected[t]))


def test_gif(tmp_path, capsys):
    write_aedat2(tmp_path / "one.aedat", random_events(500, (128, 128)))
    out = tmp_path / "new" / "one.gif"
    assert main(["events", str(tmp_path / "one.aedat"), "--gif", str(out), "--duration", "50000"]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    with Image.open(out) as gif:
        assert (gif.n_frames, gif.size, gif.info["duration"], gif.info["loop"]) == (6, (256, 256), 50, 0)
        shown = np.asarray(gif.convert("RGB")).astype(int)
    expected = np.asarray(draw.frame_images(draw.load_frames(tmp_path / "one.aedat", None, "duration", 50_000))[0])
    assert np.abs(shown - expected).max() <= 40  # a palette of 256 colours
    assert [path.name for path in out.parent.iterdir()] == ["one.gif"]


def test_frames_ready_made(tmp_path):
    frames = np.random.default_rng(0).integers(0, 3, (5, 2, 34, 34)).astype(np.float32)
    np.savez(tmp_path / "a.npz", frames=frames)
    np.testing.assert_array_equal(draw.load_frames(tmp_path / "a.npz"), frames)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.bin", b"123", "a.bin: byte 0: expected an event of 5 bytes, the file ends after 3"),
        ("a.wav", b"RIFF", "a.wav: expected a file of events: .aedat, .aedat4, .bin, .mat, .npz"),
        ("a.npz", b"123", "a.npz: expected a numpy archive with t, x, y, p: "),
        ("a.bin", None, "a.bin: No such file or directory"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, name, content, said):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert main(["events", str(tmp_path / name), "--gif", str(tmp_path / "out.gif")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"spikecore: error: {tmp_path}/{said}")
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "out.gif").exists()


@pytest.mark.parametrize("argv", ["", "--png x --gif y", "--png x --frames 0", "--png x --by time --duration 5"])
def test_usage(capsys, argv):
    with pytest.raises(SystemExit) as exit:
        main(["events", "a.bin", *argv.split()])
    assert exit.value.code == 2
