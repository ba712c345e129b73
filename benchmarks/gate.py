"""What a side must pass before it is timed: the parameter gradients of a float64 eager step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

FACTOR = 4  # times the error of eager in the same dtype


def relative_error(gradients: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> float:
    """Relative l2 distance over all parameters at once.

    Raises:
        ValueError: another number of gradients, or other shapes.
    """
    if [g.shape for g in gradients] != [e.shape for e in exact]:
        raise ValueError("the gradients are of other parameters than the exact ones")
    difference = sum(
        (g.double() - e.double()).square().sum() for g, e in zip(gradients, exact, strict=True)
    )
    return (difference.sqrt() / sum(e.double().square().sum() for e in exact).sqrt()).item()


def allowed(eager_error: float, dtype: torch.dtype) -> float:
    """The largest relative error that passes, given that of eager in the same dtype.

    The floor is for an eager side that is lucky, or in float64 is the exact one itself. Half of
    the gradient is never passed unless eager is that far off itself.
    """
    floor = math.sqrt(torch.finfo(dtype).eps) / 100
    return max(min(FACTOR * eager_error + floor, 0.5), 1.1 * eager_error)
