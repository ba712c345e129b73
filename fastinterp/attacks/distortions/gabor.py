"""Gabor: procedural noise, a random Gabor kernel at sparse points whose weights are the variables.

x' = x + e N, cut at 0 and 1, with e = eps / 255 and N in [0,1]: g = K * z is evened out to the
variance 1 wherever it is not 0, (g - m) 1.001 / (.001 + |g - m| / max |g - m|), and scaled.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from fastinterp.attacks.distortions._distortion import Distortion, uniform

SIZE = 23  # of the kernel
SPARSITY = 14  # one pixel of so many has a kernel
MOST_SIDES = 10  # kernels at several angles are added up
LEAST = 1e-3
REACH = 1000**-0.5  # a step of .002236 with 200 steps


def gabor(x: torch.Tensor, eps: float, generator: torch.Generator | None) -> Distortion:
    """Noise of the height eps; the variables in [-1,1] are the weights of its kernels.

    Args:
        x: (N, C, H, W) in [0,1].
        eps: in grey levels (0 .. 255 is the range of x).
        generator: of the kernels and their places, and of the start, uniform in [-1,1].
    """
    examples, _, height, width = x.shape
    kernels = gabor_kernels(x, generator)
    order = uniform((examples, height * width), x, generator).argsort(1)
    number = max(1, round(height * width / SPARSITY))
    places = torch.zeros_like(order).scatter_(1, order[:, :number], 1).to(x)
    places = places.view(examples, 1, height, width)

    def render(z, rows):
        weights = (z * places[rows]).view(1, -1, height, width)
        g = F.conv2d(weights, kernels[rows], padding=SIZE // 2, groups=len(z))
        noise = even_out(g.view(-1, 1, height, width))
        return (x[rows] + eps / 255 * noise).clamp(0, 1)

    start = places * (2 * uniform(places.shape, x, generator) - 1)
    return Distortion(render, start, 0.0, 1.0, REACH)


def gabor_kernels(x: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """A kernel for every image, (N, 1, 23, 23): Gaussian times a sum of waves at even angles."""

    def draw(low, high):
        return low + (high - low) * uniform((len(x), 1, 1, 1), x, generator)

    sides = draw(1, MOST_SIDES + 1).floor()
    std, frequency, first = draw(0.1, 0.4), draw(3, SIZE / 4), draw(0, math.pi)
    number = torch.arange(MOST_SIDES, dtype=x.dtype, device=x.device).view(1, -1, 1, 1)
    angle = first + math.pi * number / sides
    place = torch.linspace(-0.5, 0.5, SIZE, dtype=x.dtype, device=x.device)
    rows, columns = place[:, None], place
    waves = torch.cos(2 * math.pi * frequency * (columns * angle.cos() + rows * angle.sin()))
    waves = (waves * (number < sides)).sum(1, keepdim=True)
    return waves * torch.exp(-(rows**2 + columns**2) / (2 * (std + LEAST) ** 2))


def even_out(g: torch.Tensor) -> torch.Tensor:
    """Noise (N, 1, H, W) of one height everywhere, scaled to [0,1]; the scales are constants."""
    tiny = torch.finfo(g.dtype).tiny
    with torch.no_grad():
        mean = g.mean((2, 3), keepdim=True)
        height = (g - mean).abs()
        gain = (1 + LEAST) / (LEAST + height / height.amax((2, 3), keepdim=True).clamp_min(tiny))
    g = mean + (g - mean) * gain
    low, high = (f(g.detach(), (2, 3), keepdim=True) for f in (torch.amin, torch.amax))
    return (g - low) / (high - low).clamp_min(tiny)
