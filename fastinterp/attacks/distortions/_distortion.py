"""What a distortion is to the attack that searches in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from fastinterp.ops import attack_step


class Distortion(NamedTuple):
    """Images as a differentiable function of variables, and where the variables may go.

    Examples do not influence one another, and none of the numbers a distortion has drawn change
    while it is searched.
    """

    render: Callable[[torch.Tensor, torch.Tensor | slice], torch.Tensor]
    """(variables, rows) -> images (n, C, H, W) in [0,1], of the examples ``rows``."""
    start: torch.Tensor  # (N, ...), the variables to begin with
    centre: float  # of every variable
    radius: float  # of the ball around it
    reach: float  # a step is this over the root of the number of steps
    norm: str = "Linf"
    clip: tuple[float, float] | None = None
    step: Callable[..., torch.Tensor] = attack_step  # one step of the search, called as attack_step


def uniform(
    shape: tuple[int, ...], like: torch.Tensor, generator: torch.Generator | None
) -> torch.Tensor:
    """Numbers in [0, 1) of the dtype and device of ``like``, drawn where the generator is."""
    device = generator.device if generator else like.device
    return torch.rand(shape, dtype=like.dtype, device=device, generator=generator).to(like.device)
