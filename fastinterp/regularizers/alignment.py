"""Explanations of x and of a neighbour of x should point the same way."""

from __future__ import annotations

import torch
from torch import nn

from fastinterp import maps
from fastinterp._checks import check_images
from fastinterp.attacks import random_start
from fastinterp.maps._target import check_of
from fastinterp.regularizers._gradient import (
    Borrowed,
    check_recording,
    cosine_distance,
    norms,
    positive,
)
from fastinterp.regularizers.gradient import Value


def grad_align(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    eps: float,
    generator: torch.Generator | None = None,
    return_logits: bool = False,
) -> Value:
    """GradAlign: input gradients of the loss should agree across the eps box.

        R = mean_n 1 - cos( grad l(x_n), grad l(x_n + eta_n) ),   eta uniform in [-eps, eps]

    Both gradients are differentiated. The mean is over the examples with two nonzero gradients, as
    in the authors' code; x + eta is not clipped there nor here.

    Args:
        model: images (N, C, H, W) -> logits (N, K).
        x: images in [0,1].
        y: true classes, int64 (N,).
        eps: radius of the noise, in units of x.
        generator: where the noise comes from, on x's device; None: the global generator.
        return_logits: also return the logits of x, (N, K), with their graph.

    Returns:
        A scalar in [0, 2], differentiable once to the parameters and to x; or (scalar, logits).

    Source: Andriushchenko and Flammarion, "Understanding and Improving Fast Adversarial Training"
    (2020).
    """
    positive("eps", eps)
    with Borrowed(model, x, y) as net:
        gradient, logits = net.gradient(x, counts=return_logits)
        noisy, _ = net.gradient(x + random_start(x.detach(), eps, generator=generator))
    value = cosine_distance(gradient, noisy)
    return (value, logits) if return_logits else value


def local_gradient_alignment(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    eps: float | None = None,
    x_adv: torch.Tensor | None = None,
    l2_weight: float = 1.0,
    cosine_weight: float = 1.0,
    of: str = "logit",
    detach_clean: bool = False,
    generator: torch.Generator | None = None,
    return_logits: bool = False,
) -> Value:
    """Length and direction of the input gradient should not change nearby.

        R = mean_n  a || g_n - g'_n ||_2^2 + b (1 - cos(g_n, g'_n)) / 2,   g = ds(x)/dx, g' at x'

    with s the logit of the true class. Of a network that is positively homogeneous, the first term
    alone shrinks when the logits do; the cosine does not see their scale. Means of the cosine are
    over examples with two nonzero gradients.

    Args:
        model: images (N, C, H, W) -> logits (N, K).
        x: images in [0,1].
        y: true classes, int64 (N,).
        eps: x' = x + uniform noise in [-eps, eps], not clipped; the authors' usual choice.
        x_adv: x' itself, in the place of eps: images like x, held constant.
        l2_weight, cosine_weight: a and b.
        of: "logit", "log_prob" or "loss".
        detach_clean: hold g constant, so that only g' is trained; the default of the authors' code.
        generator: where the noise comes from, on x's device; None: the global generator.
        return_logits: also return the logits of x, (N, K), with their graph.

    Returns:
        A scalar, differentiable once to the parameters; or (scalar, logits).

    Source: Joo, Jeong, Heo, Weller and Moon, "Towards More Robust Interpretation via Local Gradient
    Alignment" (2023); squared length and the halved cosine distance as in their code (RobustAGA).
    They replace ReLUs by softplus(3) for training, see fastinterp.maps.softplus_surrogate.
    """
    check_of(of)
    if (eps is None) == (x_adv is None):
        raise ValueError("give either eps, the radius of uniform noise, or x_adv, the neighbour")
    if eps is not None:
        positive("eps", eps)
    with Borrowed(model, x, y) as net:
        if x_adv is None:
            x_adv = x + random_start(x.detach(), eps, generator=generator)
        else:
            _check_neighbour(x_adv, x)
            x_adv = x_adv.detach()
        clean, logits = net.gradient(x, of, counts=return_logits)
        if detach_clean:
            clean = clean.detach()
        moved, _ = net.gradient(x_adv, of)
    value = l2_weight * norms(clean - moved, "squared").mean()
    value = value + cosine_weight / 2 * cosine_distance(clean, moved)
    return (value, logits) if return_logits else value


def integrated_gradients_alignment(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    x_adv: torch.Tensor,
    steps: int = 10,
    method: str = "right",
    baseline: float | torch.Tensor = 0.0,
    of: str = "logit",
    internal_batch_size: int | None = None,
) -> torch.Tensor:
    """IGR: the integrated gradients of x and of an attacked x' should be parallel.

        R = mean_n 1 - cos( IG(x_n), IG(x'_n) )

    Both maps are differentiated; the mean is over examples with two nonzero maps. The path points
    are run in evaluation mode, see fastinterp.maps.integrated_gradients, so no logits of the
    model's own mode come out of it.

    Args:
        model: images (N, C, H, W) -> logits (N, K).
        x: images in [0,1].
        y: classes to explain, int64 (N,).
        x_adv: x', images like x, held constant; fastinterp.attacks.pgd gives them as the authors'
            adversarial training does.
        steps, method, baseline, of, internal_batch_size: see fastinterp.maps.integrated_gradients.

    Returns:
        A scalar in [0, 2], differentiable once to the parameters.

    Source: Wang and Kong, "Exploiting the Relationship Between Kendall's Rank Correlation and
    Cosine Similarity for Attribution Protection" (2022).
    """
    check_recording()
    _check_neighbour(x_adv, x, bounds=(0.0, 1.0))
    how = dict(
        steps=steps,
        method=method,
        baseline=baseline,
        of=of,
        internal_batch_size=internal_batch_size,
    )
    clean, moved = (maps.integrated_gradients(model, z, y, **how) for z in (x, x_adv.detach()))
    return cosine_distance(clean, moved)


def _check_neighbour(x_adv, x, bounds=None):
    check_images(x_adv, "x_adv", bounds=bounds)
    if x_adv.shape != x.shape or x_adv.dtype != x.dtype:
        raise ValueError(
            f"x_adv must be {tuple(x.shape)}, {x.dtype}, like x, "
            f"got {tuple(x_adv.shape)}, {x_adv.dtype}"
        )
