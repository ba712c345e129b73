"""What a side must pass before it is timed: the parameter gradients of a float64 eager step."""

from __future__ import annotations

from collections.abc import Sequence

import torch

FACTOR = 4  # times the error of eager in the same dtype
# One ReLU or one |.| near zero that rounding turns over moves the gradient by some thousandths, and
# eager may have been spared. The known wrong derivatives of other tools are off by 5 % and more.
FLOOR = {torch.float64: 1e-7, torch.float32: 1e-2, torch.bfloat16: 2e-2}
CEILING = 0.5  # never passed, unless eager is as far off itself


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
    """The largest relative error that passes, given that of eager in the same dtype."""
    return max(min(FACTOR * eager_error + FLOOR[dtype], CEILING), 1.1 * eager_error)
