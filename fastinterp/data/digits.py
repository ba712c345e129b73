"""The 1,797 handwritten digits that scikit-learn ships: real images with nothing to download."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CLASSES = tuple("0123456789")
TEST_SIZE, VALIDATION_SIZE = 360, 137


def load(data_dir: Path, download: bool) -> list[tuple[Tensor, Tensor]]:
    """(images, labels) of train (1,300), validation (137) and test (360).

    Source: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998, the part
    that scikit-learn ships as 8x8 images; here bilinearly resized to 28x28, so that the networks
    for MNIST take them. The split is a fixed permutation.

    Args:
        data_dir, download: not used; the images come with scikit-learn.

    Returns:
        Images uint8 (N, 1, 28, 28), 0 background to 255 ink; labels int64 (N,), 0..9.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = _resize(torch.from_numpy(digits.images).unsqueeze(1))
    labels = torch.from_numpy(digits.target).long()

    order = torch.from_numpy(np.random.RandomState(99).permutation(len(labels)))
    test, validation, train = order.tensor_split((TEST_SIZE, TEST_SIZE + VALIDATION_SIZE))
    return [(images[index], labels[index]) for index in (train, validation, test)]


def _resize(images: Tensor) -> Tensor:
    """uint8 (N, 1, 28, 28), 0..255, of float64 (N, 1, 8, 8) whole numbers 0..16."""
    resized = F.interpolate(images, size=(28, 28), mode="bilinear", align_corners=False)
    # A resized value is a whole number of 1/196, and one of exactly 8 (127.5 of 255) is common.
    # Rounding to that grid first makes such ties round alike on every machine.
    return ((resized * 196).round() * 255 / (196 * 16)).round().to(torch.uint8)
