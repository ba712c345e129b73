"""Snow: flakes on a grid, blurred by their motion, whose brightness is the variable.

x' = 3/4 x + 1/4 max(x, 1.5 grey(x) + .5) + eps S, S = sum over 7 grids of K * z^4: every grid has a
flake in one of 16 pixels and a streak K of its own. The flakes' mean brightness stays within a
budget in each region. Even with eps 0 the image is paled.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from fastinterp.attacks.distortions._distortion import Distortion, uniform
from fastinterp.ops import attack_step

GREY = (0.2126, 0.7152, 0.0722)
PALE = 0.25
SPACING = 4  # pixels between flakes
# Where the flakes of a grid begin, in rows and columns.
OFFSETS = ((0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (2, 0), (3, 0))
STREAK = 6  # pixels to either side of a flake
WIDTHS, CHANCES = (1, 3, 5), (0.6, 0.3, 0.1)
BUDGET, REGION = 0.2, 8  # mean brightness, flakes along a region's side
LEAST = 1e-9
REACH = 1000**-0.5  # a step of .002236 with 200 steps


def snow(x: torch.Tensor, eps: float, generator: torch.Generator | None) -> Distortion:
    """Snow of the brightness eps.

    Args:
        x: (N, C, H, W) in [0,1], C 1 or 3.
        eps: the brightness of a full flake, 1 being white.
        generator: of the streaks and of the start, exp(-5 u) with u uniform.

    Raises:
        ValueError: images of another number of channels.
    """
    examples, channels, height, width = x.shape
    if channels not in (1, 3):
        raise ValueError(f"snow needs grey or RGB images, got {channels} channels")
    high, wide = (-(-n // SPACING) for n in (height, width))
    grey = x
    if channels == 3:
        grey = (x * x.new_tensor(GREY).view(3, 1, 1)).sum(1, keepdim=True)
    pale = torch.lerp(x, torch.maximum(x, 1.5 * grey + 0.5), PALE)
    # The streaks of a grid in the place of its flakes, so that one transposed convolution lays all.
    stamps = torch.stack(
        [
            F.pad(streak, (column, SPACING - 1 - column, row, SPACING - 1 - row))
            for streak, (row, column) in zip(
                motion_streaks(x, generator).unbind(1), OFFSETS, strict=True
            )
        ],
        1,
    )

    def render(z, rows):
        fallen = F.conv_transpose2d(
            (z**4).view(1, -1, high, wide),
            stamps[rows].flatten(0, 1)[:, None],
            stride=SPACING,
            groups=len(z),
        )
        fallen = fallen[0, :, None, STREAK : STREAK + height, STREAK : STREAK + width]
        return (pale[rows] + eps * fallen).clamp(0, 1)

    start = torch.exp(-uniform((examples, len(OFFSETS), high, wide), x, generator) / BUDGET)
    return Distortion(render, within_budget(start), 0.5, 0.5, REACH, clip=(LEAST, 1.0), step=_step)


def _step(z, grad, centre, **how):
    return z.copy_(within_budget(attack_step(z, grad, centre, **how)))


def within_budget(z: torch.Tensor) -> torch.Tensor:
    """Brightness (N, 7, h, w), scaled down in the regions whose mean is above the budget."""
    mean = F.avg_pool2d(z, REGION, ceil_mode=True)
    share = BUDGET / mean.clamp_min(BUDGET)
    for axis in (2, 3):
        share = share.repeat_interleave(REGION, axis).narrow(axis, 0, z.shape[axis])
    return z * share


def motion_streaks(x: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """The seven streaks of every image, (N, 7, 13, 13).

    Each is a line through the middle, of random slope, length and width, softly cut at its sides
    and blurred by a 3x3 Gaussian; those of an image all slope up or all slope down.
    """
    shape = (len(x), len(OFFSETS), 1, 1)

    def draw(low, high):
        return low + (high - low) * uniform(shape, x, generator)

    down, across = (draw(2, STREAK + 1).floor() for _ in range(2))
    bounds = x.new_tensor(CHANCES).cumsum(0)[:-1]
    wide = x.new_tensor(WIDTHS)[torch.bucketize(draw(0, 1), bounds, right=True)]
    place = torch.arange(-STREAK, STREAK + 1, dtype=x.dtype, device=x.device)
    rows, columns = place[:, None].abs(), place.abs()
    flat = across >= down
    slope = torch.where(flat, down / across, across / down)
    major, minor = torch.where(flat, columns, rows), torch.where(flat, rows, columns)
    half = wide * (1 + slope).sqrt() / 4
    streaks = (1 + half - (minor - slope * major).abs()).clamp(0, 1)
    streaks = streaks * (major <= torch.maximum(down, across)) * (place[:, None] * place >= 0)
    upward = uniform((len(x), 1, 1, 1), x, generator) < 0.5
    streaks = torch.where(upward, streaks.flip(3), streaks)

    blur = torch.exp(-((x.new_tensor([-1, 0, 1]) / draw(0.41, 0.6)) ** 2) / 2)
    blur = blur / blur.sum(3, keepdim=True)  # (N, 7, 1, 3)
    size = streaks.shape[2:]
    blurred = F.conv2d(
        streaks.reshape(1, -1, *size),
        (blur.transpose(2, 3) * blur).reshape(-1, 1, 3, 3),
        padding=1,
        groups=streaks.shape[0] * streaks.shape[1],
    )
    return blurred.view_as(streaks)
