"""Event augmentations: the same for all frames, counts stay counts, settings are bounds."""

import pytest
import torch

pytest.importorskip("torchvision")

from spikecore.data.augment import cutout, flip, nda, roll, rotate, shear


def recording(T=3, h=20, w=24):
    """The same picture in each frame, so that what is done to all alike stays alike."""
    torch.manual_seed(1)
    return torch.randint(0, 5, (1, 2, h, w)).float().expand(T, 2, h, w).clone()


@pytest.mark.parametrize("way", [flip, roll, rotate, shear, cutout, nda])
def test_all_frames_alike_and_counts_stay_counts(way):
    x = recording()
    before, changed = x.clone(), 0
    for seed in range(20):
        torch.manual_seed(seed)
        y = way(x)
        assert y.shape == x.shape
        assert y.dtype == x.dtype
        assert all(torch.equal(y[0], frame) for frame in y[1:])
        assert set(y.unique().tolist()) <= set(range(5))
        torch.manual_seed(seed)
        assert torch.equal(way(x), y), "torch's seed decides"
        changed += not torch.equal(y, x)
    assert torch.equal(x, before), "the input changed"
    assert changed >= 5


def test_flip():
    x = recording()
    assert torch.equal(flip(x, p=1.0), x.flip(-1))
    assert torch.equal(flip(x, p=0.0), x)


def test_roll_moves_as_far_as_it_may():
    x = torch.zeros(1, 2, 20, 20)
    x[..., 10, 10] = 1
    torch.manual_seed(0)
    moved = torch.stack([roll(x, 2)[0, 0].nonzero()[0] - 10 for _ in range(200)])
    assert moved.amin(0).tolist() == [-2, -2]
    assert moved.amax(0).tolist() == [2, 2]
    assert torch.equal(roll(x, 0), x)


def test_rotate_and_shear_turn_as_far_as_they_may():
    """A dot right of the middle shows the angle; one above it the shear."""
    h = 201
    x = torch.zeros(1, 2, h, h)
    x[..., 98:103, 178:183] = 1  # 80 to the right
    torch.manual_seed(0)
    angles = []
    for _ in range(60):
        at = rotate(x, 30)[0, 0].nonzero().float().mean(0) - 100
        assert at.norm() == pytest.approx(80, abs=2)
        angles.append(torch.atan2(at[0], at[1]).rad2deg().item())
    assert -31 < min(angles) < -22
    assert 22 < max(angles) < 31
    x = torch.zeros(1, 2, h, h)
    x[..., 38:43, 98:103] = 1  # 60 above
    slopes = []
    for _ in range(60):
        at = shear(x, 30)[0, 0].nonzero().float().mean(0) - 100
        assert at[0] == pytest.approx(-60, abs=1)
        slopes.append(torch.atan2(at[1], torch.tensor(60.0)).rad2deg().item())
    assert -31 < min(slopes) < -22
    assert 22 < max(slopes) < 31


def test_cutout_takes_one_rectangle_of_at_most_its_side():
    x = torch.ones(2, 2, 30, 40)
    torch.manual_seed(0)
    sides = set()
    for _ in range(300):
        gone = (cutout(x, 6)[0, 0] == 0).nonzero()
        if len(gone):
            (top, left), (bottom, right) = gone.amin(0).tolist(), gone.amax(0).tolist()
            assert len(gone) == (bottom - top + 1) * (right - left + 1)
            sides |= {bottom - top + 1, right - left + 1}
    assert sides == {1, 2, 3, 4, 5, 6}


def test_nda_applies_n_ways(monkeypatch):
    from spikecore.data import augment

    called = []
    for name in ("roll", "rotate", "shear", "cutout"):
        monkeypatch.setattr(augment, name, lambda x, setting, name=name: called.append((name, setting)) or x)
    seen, x = set(), recording()
    for seed in range(40):
        torch.manual_seed(seed)
        called.clear()
        nda(x, n=2, pixels=3, degrees=15, side=8)
        assert len({name for name, _ in called}) == 2
        seen |= set(called)
    assert seen == {("roll", 3), ("rotate", 15), ("shear", 15), ("cutout", 8)}
    torch.manual_seed(0)
    assert torch.equal(nda(recording(), n=0, p=0.0), recording())


@pytest.mark.parametrize(("x", "n", "said"), [
    (torch.zeros(2, 5, 5), 1, r"x must be \[T, 2, H, W\], got \[2, 5, 5\]"),
    (torch.zeros(4, 3, 5, 5), 1, r"x must be \[T, 2, H, W\], got \[4, 3, 5, 5\]"),
    (torch.zeros(4, 2, 5, 5), 5, "n must be 0 to 4, got 5"),
])  # fmt: skip
def test_wrong_arguments(x, n, said):
    with pytest.raises(ValueError, match=said):
        nda(x, n=n)
