"""Fog: plasma in front of the image, whose random numbers are the variables.

x' = (x + e F) / (max x + e), by channel, with e = eps / 255 and F in [0,1] a diamond-square
fractal: a point halfway between four others is their mean + (2 z - 1) w, w falling by
half with the scale. Even with eps 0 every channel is stretched to 1.
"""

from __future__ import annotations

import torch

from fastinterp.attacks.distortions._distortion import Distortion, uniform

WIBBLE, DECAY = 100.0, 2.0
REACH = 1000**-0.5  # a step of .002236 with 200 steps


def fog(x: torch.Tensor, eps: float, generator: torch.Generator | None) -> Distortion:
    """Fog of the thickness eps; the variables in [0,1] shape it.

    Args:
        x: (N, C, H, W) in [0,1].
        eps: in grey levels (0 .. 255 is the range of x).
        generator: of the start, uniform in [0,1].
    """
    examples, _, height, width = x.shape
    levels = max(height, width).bit_length()  # a map of more than the longer side
    sizes = [4**i for i in range(levels) for _ in range(3)]
    top, left = (2**levels - height) // 2, (2**levels - width) // 2
    thick = eps / 255
    full = (x.amax((2, 3), keepdim=True) + thick).clamp_min(torch.finfo(x.dtype).tiny)

    def render(z, rows):
        plasma = diamond_square(z.split(sizes, 1))
        low, high = (f(plasma, (1, 2), keepdim=True) for f in (torch.amin, torch.amax))
        cloud = (plasma - low) / (high - low).clamp_min(torch.finfo(z.dtype).tiny)
        cloud = cloud[:, None, top : top + height, left : left + width]
        return ((x[rows] + thick * cloud) / full[rows]).clamp(0, 1)

    start = uniform((examples, sum(sizes)), x, generator)
    return Distortion(render, start, 0.5, 0.5, REACH, clip=(0.0, 1.0))


def diamond_square(numbers: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The fractal of periodic maps, from coarse to fine, before it is scaled.

    Args:
        numbers: three tensors (N, 4^i) in [0,1] for each level i: of the points amid four, of
            those amid two of a row, of those amid two of a column.

    Returns:
        (N, S, S), S being 2 to the number of levels.
    """
    known = numbers[0].new_zeros(len(numbers[0]), 1, 1)
    wibble = WIBBLE
    for i in range(0, len(numbers), 3):
        side = known.shape[1]
        amid, along, down = ((2 * n.view(-1, side, side) - 1) * wibble for n in numbers[i : i + 3])
        right, below = known.roll(-1, 2), known.roll(-1, 1)
        amid = amid + (known + right + below + right.roll(-1, 1)) / 4
        along = along + (known + right + amid + amid.roll(1, 1)) / 4
        down = down + (known + below + amid + amid.roll(1, 2)) / 4
        lines = [torch.stack(pair, -1).flatten(2) for pair in ((known, along), (down, amid))]
        known = torch.stack(lines, 2).flatten(1, 2)
        wibble /= DECAY
    return known
