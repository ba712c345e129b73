"""JPEG: the quantised DCT coefficients of the image move.

    q = DCT(8x8 blocks of YCbCr, chroma at half size) / table
    x' = RGB(IDCT(table (q + z / 2)))

with the tables of quality 50 and without rounding, so that |z| <= 1 is what rounding may do. All of
it is linear: x' = round trip of x + L(z), cut at 0 and 1. A round trip loses the finer chroma; grey
images are luminance alone and lose nothing.
"""

from __future__ import annotations

import math
from functools import partial
from itertools import count

import torch
from torch.nn import functional as F

from fastinterp.attacks.ascent import random_start
from fastinterp.attacks.distortions._distortion import Distortion, uniform

BOX = 2.0  # no coefficient moves further in the l1 and l2 balls
# ITU-T T.81, tables K.1 and K.2; rows are vertical frequencies.
LUMINANCE = (
    *(16, 11, 10, 16, 24, 40, 51, 61),
    *(12, 12, 14, 19, 26, 58, 60, 55),
    *(14, 13, 16, 24, 40, 57, 69, 56),
    *(14, 17, 22, 29, 51, 87, 80, 62),
    *(18, 22, 37, 56, 68, 109, 103, 77),
    *(24, 35, 55, 64, 81, 104, 113, 92),
    *(49, 64, 78, 87, 103, 121, 120, 101),
    *(72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMINANCE = (
    *(17, 18, 24, 47, 99, 99, 99, 99),
    *(18, 21, 26, 66, 99, 99, 99, 99),
    *(24, 26, 56, 99, 99, 99, 99, 99),
    *(47, 66, 99, 99, 99, 99, 99, 99),
    *[99] * 32,
)
YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))  # JFIF


def jpeg(x: torch.Tensor, eps: float, generator: torch.Generator | None, norm: str) -> Distortion:
    """Coefficients within eps of their own, in the "Linf", "L2" or "L1" ball around them.

    Args:
        x: (N, C, H, W) in [0,1], C 1 or 3.
        eps: in halves of a quantisation step.
        generator: of the start, uniform in the ball.
        norm: of the ball; Linf and L2 take projected steps, L1 those of Frank and Wolfe.

    Raises:
        ValueError: images of another number of channels.
    """
    examples, channels, height, width = x.shape
    if channels not in (1, 3):
        raise ValueError(f"jpeg needs grey or RGB images, got {channels} channels")
    colour = channels == 3
    side = 16 if colour else 8  # the image is padded to whole units
    high, wide = (-(-n // side) * side for n in (height, width))
    planes = [(1, LUMINANCE)] + ([(2, CHROMINANCE)] * 2 if colour else [])
    grids = [(high // (8 * shrink), wide // (8 * shrink)) for shrink, _ in planes]
    halves = [x.new_tensor(table).view(8, 8) / 2 for _, table in planes]
    sizes = [64 * a * b for a, b in grids]
    basis = dct_matrix().to(x)
    to_ycc = torch.tensor(YCBCR, dtype=torch.float64)
    to_rgb = torch.linalg.inv(to_ycc).to(x)
    kept = x

    def to_image(luma, chroma):
        ycc = torch.cat([luma, F.interpolate(chroma, scale_factor=2, mode="nearest")], 1)
        return torch.einsum("rc,nchw->nrhw", to_rgb, ycc)[..., :height, :width]

    if colour:
        padded = F.pad(x, (0, wide - width, 0, high - height), "replicate")
        ycc = torch.einsum("yc,nchw->nyhw", to_ycc.to(x), padded)
        kept = to_image(ycc[:, :1], F.avg_pool2d(ycc[:, 1:], 2))

    def render(z, rows):
        moved = []
        for part, (a, b), half in zip(z.split(sizes, 1), grids, halves, strict=True):
            blocks = part.view(-1, a, b, 8, 8) * half
            plane = torch.einsum("ux,nabuv,vy->naxby", basis, blocks, basis)
            moved.append(plane.reshape(-1, 1, 8 * a, 8 * b))
        luma, *chroma = moved
        moved = to_image(luma, torch.cat(chroma, 1)) if colour else luma[..., :height, :width]
        return (kept[rows] + moved / 255).clamp(0, 1)

    shape = (examples, sum(sizes))
    if norm == "L1":
        start = eps * _in_l1_ball(shape, x, generator)
        return Distortion(
            render, start, 0.0, eps, eps, clip=(-BOX, BOX), step=partial(_frank_wolfe, count(1))
        )
    start = random_start(x.new_zeros(shape), eps, norm, generator)
    clip = (-BOX, BOX) if norm == "L2" else None
    return Distortion(render, start, 0.0, eps, eps, norm, clip)


def dct_matrix() -> torch.Tensor:
    """The orthonormal DCT-II of eight numbers, float64 (frequency, place)."""
    place = (torch.arange(8, dtype=torch.float64) + 0.5) * math.pi / 8
    rows = torch.cos(torch.arange(8, dtype=torch.float64)[:, None] * place) / 2
    rows[0] /= math.sqrt(2)
    return rows


def _in_l1_ball(shape, like, generator):
    """Uniform in the unit l1 ball (Barthe et al., arXiv math/0503650, theorem 1)."""
    sizes = -torch.log1p(-uniform((shape[0], shape[1] + 1), like, generator))
    signs = torch.where(uniform(shape, like, generator) < 0.5, -1.0, 1.0).to(like)
    return signs * sizes[:, 1:] / sizes.sum(1, keepdim=True)


def steepest_corner(grad: torch.Tensor, eps: float) -> torch.Tensor:
    """The point of the l1 ball of radius eps, cut by the box, with the largest product with grad.

    Args:
        grad: (N, D).

    Returns:
        (N, D): the box's bound where |grad| is largest, until eps is spent.
    """
    order = grad.abs().argsort(dim=1, descending=True)
    spent = BOX * torch.arange(grad.shape[1], dtype=grad.dtype, device=grad.device)
    sizes = (eps - spent).clamp(0, BOX).expand_as(grad)
    return grad.sign() * torch.zeros_like(grad).scatter_(1, order, sizes)


def _frank_wolfe(number, z, grad, centre, *, eps, inplace, **_):
    """z moves to the corner by 1 / k of the way in the k-th step, so it never leaves the ball."""
    return z.lerp_(steepest_corner(grad, eps), 1 / next(number))
