"""Elastic: pixels are fetched from where a smooth flow points.

x'(p) = x(p + G z(p)), bilinear, black outside; G smooths with a Gaussian and |z| <= eps pixels.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from fastinterp.attacks.ascent import random_start
from fastinterp.attacks.distortions._distortion import Distortion

STD = 3 / 224  # of the Gaussian, in longer sides of the image
CUT = 4  # standard deviations


def elastic(x: torch.Tensor, eps: float, generator: torch.Generator | None) -> Distortion:
    """A flow of at most eps pixels along each axis, before it is smoothed.

    Args:
        x: (N, C, H, W) in [0,1], H and W at least 2.
        eps: in pixels.
        generator: of the start, uniform in the box.
    """
    examples, _, height, width = x.shape
    if min(height, width) < 2:
        raise ValueError(f"elastic needs images of at least 2x2 pixels, got {width}x{height}")
    std = max(height, width) * STD
    # Rounded first: 4 standard deviations of 224 pixels are 12, not 12 and a bit.
    radius = min(math.ceil(round(CUT * std, 6)), height - 1, width - 1)
    offsets = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device)
    line = torch.exp(-((offsets / std) ** 2) / 2)
    line = (line / line.sum()).expand(2, 1, -1)
    axes = [torch.linspace(-1, 1, n, dtype=x.dtype, device=x.device) for n in (height, width)]
    here = torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1], -1)  # (H, W, 2), column first
    scale = x.new_tensor([2 / width, 2 / height])

    def render(z, rows):
        flow = F.pad(z, [radius] * 4, "reflect")
        flow = F.conv2d(flow, line[:, :, None, :], groups=2)
        flow = F.conv2d(flow, line[:, :, :, None], groups=2)
        there = here + flow.permute(0, 2, 3, 1) * scale
        return F.grid_sample(x[rows], there, align_corners=True).clamp(0, 1)

    start = random_start(x.new_zeros(examples, 2, height, width), eps, generator=generator)
    return Distortion(render, start, 0.0, eps, eps)
