"""The random numbers of the paper's released evaluation, from numpy's legacy generator."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch


class Draws(NamedTuple):
    """What the released evaluation draws, in its order."""

    index: torch.Tensor  # int64 (n,), the evaluated images
    shift: torch.Tensor  # int64 (n,), 0 .. classes - 2: the target class is (y + 1 + shift) % K
    unit: torch.Tensor  # float64 (n, C, H, W) in [0,1)

    def target(self, y: torch.Tensor, classes: int) -> torch.Tensor:
        """Wrong classes, int64 (n,), for the true classes y (n,)."""
        return (y + 1 + self.shift.to(y.device)) % classes

    def start(self, eps: float) -> torch.Tensor:
        """The random start, uniform in the eps box, float64 (n, C, H, W)."""
        return -eps + 2 * eps * self.unit


def released_draws(
    size: int, examples: int, shape: tuple[int, int, int], classes: int = 10, seed: int = 99
) -> Draws:
    """The random numbers that the released evaluation of ``examples`` images uses.

    Args:
        size: images of the test split (10,000).
        examples: how many are evaluated (200).
        shape: (C, H, W) of an image; the numbers are drawn as (H, W, C).
        classes: of the model.
        seed: of numpy's legacy generator.
    """
    rng = np.random.RandomState(seed)
    index = rng.permutation(size)[:examples]
    shift = rng.randint(classes - 1, size=examples)
    channels, height, width = shape
    unit = rng.random_sample((examples, height, width, channels)).transpose(0, 3, 1, 2)
    return Draws(*(torch.from_numpy(np.ascontiguousarray(a)) for a in (index, shift, unit)))
