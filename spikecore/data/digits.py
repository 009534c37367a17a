"""The 1,797 real handwritten digits of 8x8 pixels that scikit-learn ships (UCI, Alpaydin & Kaynak 1998).

The split is fixed: scikit-learn's stratified one of random state 0, 1,437 to train on and 360 to test on.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["SPLIT_SHA256", "Digits", "load_digits"]

TEST_SIZE = 360
SPLIT_SHA256 = "6b26c07f62fde5af2dd8f89514ca6066a36456d5fd46ea6974d5f8498ab0c0f7"


@dataclass(frozen=True)
class Digits:
    """Images ``[n, 1, 8, 8]`` float32 in [0, 1], labels ``[n]`` int64, and the hash of the split."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    split_sha256: str


def load_digits() -> Digits:
    """The digits in their fixed split.

    Raises:
        ImportError: scikit-learn is missing.
        RuntimeError: this scikit-learn splits differently, so that accuracies could not be compared.
    """
    try:
        from sklearn.datasets import load_digits as sklearn_digits
        from sklearn.model_selection import train_test_split
    except ImportError as e:
        raise ImportError('the digits need scikit-learn: pip install "spikecore[train]"') from e
    digits = sklearn_digits()
    train, test = train_test_split(
        np.arange(len(digits.target)), test_size=TEST_SIZE, stratify=digits.target, random_state=0
    )
    sha256 = split_hash(train, test)
    if sha256 != SPLIT_SHA256:
        raise RuntimeError(f"the digits' split is not the fixed one: sha256 {sha256}, expected {SPLIT_SHA256}")
    x = torch.from_numpy(digits.images).float().unsqueeze(1) / 16  # grey levels 0..16
    y = torch.from_numpy(digits.target).long()
    return Digits(x[train], y[train], x[test], y[test], sha256)


def split_hash(train: np.ndarray, test: np.ndarray) -> str:
    """sha256 over the sorted indices of the training part, then of the test part, as little-endian int64."""
    return hashlib.sha256(b"".join(np.sort(part).astype("<i8").tobytes() for part in (train, test))).hexdigest()
