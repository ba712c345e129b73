"""What a good explanation looks like, as a penalty: smooth, sparse, enough for the prediction."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from fastinterp import maps
from fastinterp.maps._target import at_least_float, check_of
from fastinterp.regularizers._gradient import Borrowed, check_recording, one_of
from fastinterp.regularizers.gradient import Value

PRIORS = ("total_variation", "gini")
FILLS = ("uniform", "mean")


def total_variation(attribution: torch.Tensor) -> torch.Tensor:
    """Anisotropic total variation, the pixel prior of attribution maps.

        mean_n sum_ij |m[i+1,j] - m[i,j]| + |m[i,j+1] - m[i,j]|     (summed over channels)

    Args:
        attribution: (N, ..., H, W).

    Returns:
        A scalar, float32 at least, differentiable.

    Source: Erion et al., "Improving Performance of Deep Learning Models with Axiomatic Attribution
    Priors and Expected Gradients" (2021).
    """
    _check_attribution(attribution, "(N, ..., H, W)", 3)
    attribution = at_least_float(attribution)
    down, right = (attribution.diff(dim=dim).abs().sum() for dim in (-2, -1))
    return (down + right) / len(attribution)


def gini(attribution: torch.Tensor) -> torch.Tensor:
    """Gini coefficient of the mean absolute attribution, the sparsity prior turned round.

        a_i = mean_n |m_ni|,   G = sum_ij |a_i - a_j| / (2 p sum_i a_i),   i, j = 1..p

    0 when all p features matter equally, 1 - 1/p when only one does. The prior of the paper rewards
    sparsity: it adds -2 G. Computed from sorted a, without the p^2 differences.

    Args:
        attribution: (N, ...); the features are all dimensions but the first.

    Returns:
        A scalar, float32 at least, differentiable; 0 where every attribution is 0.

    Source: Erion et al. (2021), see total_variation.
    """
    _check_attribution(attribution, "(N, ...)", 2)
    size = at_least_float(attribution).abs().mean(0).flatten().sort().values
    p = len(size)
    rank = torch.arange(1 - p, p, 2, dtype=size.dtype, device=size.device)
    total = size.sum().clamp(min=torch.finfo(size.dtype).tiny)
    return (rank * size).sum() / (p * total)


def _check_attribution(attribution, shape, least):
    tensor = isinstance(attribution, torch.Tensor)
    if not tensor or not attribution.is_floating_point() or attribution.dim() < least:
        seen = (
            f"{tuple(attribution.shape)}, {attribution.dtype}"
            if tensor
            else type(attribution).__name__
        )
        raise ValueError(f"attribution must be a floating point tensor {shape}, got {seen}")


def expected_gradients_prior(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    baselines: torch.Tensor,
    prior: str | Callable[[torch.Tensor], torch.Tensor] = "total_variation",
    samples: int = 1,
    of: str = "logit",
    generator: torch.Generator | None = None,
    internal_batch_size: int | None = None,
) -> torch.Tensor:
    """A prior on the expected gradients of the true class.

        R = prior(E),   E_n = mean over samples of (x_n - b) ds(b + t (x_n - b))/dx,
        b drawn from the baselines, t uniform in [0,1]

    The path points are run in evaluation mode, see fastinterp.maps.expected_gradients, so no logits
    of the model's own mode come out of it. "total_variation" is the smoothness prior; its minimum
    is also reached by maps that vanish, which is why the authors standardise each map first in
    their MNIST code: pass such a function where that matters.

    Args:
        model: images (N, C, H, W) -> logits (N, K).
        x: images in [0,1].
        y: classes to explain, int64 (N,).
        baselines: images (M, C, H, W) to draw from, as a rule training images.
        prior: "total_variation" (adds it), "gini" (adds -2 times it), or a function from maps
            (N, C, H, W) to a scalar.
        samples: per example; the authors train with 1.
        of: "logit", "log_prob" or "loss".
        generator: where b and t come from; None: the global generator.
        internal_batch_size: see fastinterp.maps.expected_gradients.

    Returns:
        A scalar, differentiable once to the parameters.

    Source: Erion et al. (2021), see total_variation.
    """
    check_of(of)
    check_recording()
    if not callable(prior):
        one_of("prior", prior, PRIORS)
    attribution = maps.expected_gradients(
        model,
        x,
        y,
        baselines=baselines,
        samples=samples,
        generator=generator,
        internal_batch_size=internal_batch_size,
        of=of,
    )
    if callable(prior):
        return prior(attribution)
    return total_variation(attribution) if prior == "total_variation" else -2 * gini(attribution)


def saliency_guided(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    fraction: float = 0.5,
    fill: str = "uniform",
    absolute: bool = False,
    of: str = "logit",
    generator: torch.Generator | None = None,
    return_logits: bool = False,
) -> Value:
    """Saliency-guided training: pixels of low gradient should not matter for the output.

        R = mean_n KL( p(x_n) || p(x~_n) ),   x~ = x with its k pixels of lowest gradient replaced

    The gradient of the true class's score, averaged over channels, ranks the pixels; ranking and
    x~ are held constant, so that this needs no second derivative. p(x) and p(x~) are both
    differentiated. The authors rank in evaluation mode; here the forward pass of x is shared.

    Args:
        model: images (N, C, H, W) -> logits (N, K).
        x: images in [0,1].
        y: true classes, int64 (N,).
        fraction: k / (H W), in (0, 1]; at least one pixel is replaced.
        fill: "uniform" (noise between the least and the greatest value of the image's channel), or
            "mean" (of the channel).
        absolute: rank by the gradient's size, not by its signed value as the authors' code does
            unless told otherwise.
        of: "logit", "log_prob" or "loss".
        generator: where the noise comes from, on x's device; None: the global generator.
        return_logits: also return the logits of x, (N, K), with their graph.

    Returns:
        A scalar, differentiable to the parameters; or (scalar, logits).

    Source: Ismail, Corrada Bravo and Feizi, "Improving Deep Learning Interpretability by Saliency
    Guided Training" (2021).
    """
    check_of(of)
    one_of("fill", fill, FILLS)
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must lie in (0, 1], got {fraction}")
    with Borrowed(model, x, y) as net:
        gradient, logits = net.gradient(x, of, counts=return_logits, create_graph=False)
        score = gradient.mean(1)
        lowest = _lowest(score.abs() if absolute else score, fraction)
        masked = torch.where(lowest, _filled(x.detach(), fill, generator), x.detach())
        masked_logits = net.logits(masked)
    value = F.kl_div(
        masked_logits.log_softmax(1), logits.log_softmax(1), reduction="batchmean", log_target=True
    )
    return (value, logits) if return_logits else value


def _lowest(score, fraction):
    """(N, 1, H, W), True at the lowest pixels of score (N, H, W); ties as topk breaks them."""
    pixels = score.flatten(1)
    k = max(1, int(fraction * pixels.shape[1]))
    lowest = pixels.topk(k, dim=1, largest=False).indices
    return (
        torch.zeros_like(pixels, dtype=torch.bool).scatter(1, lowest, True).view_as(score)[:, None]
    )


def _filled(x, fill, generator):
    if fill == "mean":
        return at_least_float(x).mean((2, 3), keepdim=True).to(x)
    low, high = torch.aminmax(x.flatten(2), dim=2, keepdim=True)
    noise = torch.empty_like(x).uniform_(generator=generator)
    return low[..., None] + (high - low)[..., None] * noise
