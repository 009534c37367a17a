"""Random transforms of event frames ``[T, 2, H, W]``, the same for all frames of a recording.

"Neuromorphic Data Augmentation for Training Spiking Neural Networks", Li et al., ECCV 2022. Counts stay counts:
rotation and shear take the nearest cell. Each is a transform as it is (``transform=nda``), or with its settings
(``transform=partial(nda, pixels=3)``). Randomness is torch's, so that data loaders seed it.
"""

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

__all__ = ["cutout", "flip", "nda", "roll", "rotate", "shear"]


def flip(x: Tensor, p: float = 0.5) -> Tensor:
    """Left and right exchanged with probability `p`."""
    return x.flip(-1) if torch.rand(()) < p else x


def roll(x: Tensor, pixels: int = 5) -> Tensor:
    """Moved by up to `pixels` along each axis; what leaves on one side enters on the other."""
    dy, dx = torch.randint(-pixels, pixels + 1, (2,)).tolist()
    return x.roll((dy, dx), (-2, -1))


def rotate(x: Tensor, degrees: float = 30) -> Tensor:
    """Turned about the centre by up to `degrees` either way."""
    return F.rotate(x, _between(-degrees, degrees))


def shear(x: Tensor, degrees: float = 30) -> Tensor:
    """Rows moved in proportion to their distance from the middle one, by up to `degrees` either way."""
    return F.affine(x, angle=0.0, translate=[0, 0], scale=1.0, shear=[_between(-degrees, degrees), 0.0])


def cutout(x: Tensor, side: int = 16) -> Tensor:
    """A square of up to `side` cells without events, centred anywhere."""
    h, w = x.shape[-2:]
    half = int(torch.randint(1, side + 1, ())) / 2
    cy, cx = _between(0, h), _between(0, w)
    top, left = max(round(cy - half), 0), max(round(cx - half), 0)
    x = x.clone()
    x[..., top : max(round(cy + half), 0), left : max(round(cx + half), 0)] = 0
    return x


def nda(x: Tensor, *, n: int = 1, p: float = 0.5, pixels: int = 5, degrees: float = 30, side: int = 16) -> Tensor:
    """`flip` with probability `p`, then `n` different ones of `roll`, `rotate`, `shear` and `cutout`, chosen at random.

    Args:
        pixels, degrees, side: the settings of `roll`, of `rotate` and `shear`, and of `cutout`.

    Raises:
        ValueError: `x` is not ``[T, 2, H, W]``, or `n` not 0 to 4.
    """
    if x.dim() != 4 or x.shape[1] != 2:
        raise ValueError(f"nda: x must be [T, 2, H, W], got {list(x.shape)}")
    if n not in range(5):
        raise ValueError(f"nda: n must be 0 to 4, got {n}")
    x = flip(x, p)
    ways = [(roll, pixels), (rotate, degrees), (shear, degrees), (cutout, side)]
    for i in torch.randperm(len(ways))[:n].tolist():
        way, setting = ways[i]
        x = way(x, setting)
    return x


def _between(low: float, high: float) -> float:
    return low + (high - low) * torch.rand(()).item()
