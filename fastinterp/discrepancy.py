"""Distances between the interpretation maps of two images, weighted over classes.

With d_c the distance between the maps of class c, t the true class and t' the predicted class of x'
(Boopathy et al., ICML 2020):

    one       d_t
    two       (d_t + d_t') / 2
    all       mean_c d_c
    weighted  d_t + sum_{i != t} q_i d_i,  q = softmax of f(x') over the classes other than t
"""

from __future__ import annotations

import torch

from fastinterp.ops import cam_discrepancy

CLASSES = ("one", "two", "all", "weighted")
NORMALIZE = ("none", "pixels")


def class_weights(classes: str, logits_adv: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Weight of every class in the discrepancy.

    Args:
        classes: one of CLASSES.
        logits_adv: logits of x', (N, K).
        y: true classes, int64 (N,).

    Returns:
        (N, K) in the dtype of logits_adv; for "weighted" it carries the gradient to logits_adv.

    Raises:
        ValueError: unknown ``classes``.
    """
    every_class = torch.arange(logits_adv.shape[1], device=logits_adv.device)
    is_true = y[:, None] == every_class
    true = is_true.to(logits_adv.dtype)
    if classes == "one":
        return true
    if classes == "two":
        predicted = logits_adv.argmax(1, keepdim=True) == every_class
        return (true + predicted) / 2
    if classes == "all":
        return torch.full_like(true, 1 / len(every_class))
    if classes == "weighted":
        # softmax_i / sum_{j != t} softmax_j is the softmax without class t.
        return true + logits_adv.masked_fill(is_true, -torch.inf).softmax(1)
    raise ValueError(f"classes must be one of {', '.join(CLASSES)}, got {classes!r}")


def discrepancy(
    features: torch.Tensor,
    features_adv: torch.Tensor,
    head: torch.Tensor | None,
    logits_adv: torch.Tensor,
    y: torch.Tensor,
    *,
    classes: str = "weighted",
    norm: str = "l1",
    normalize: str = "none",
) -> torch.Tensor:
    """CAM discrepancy D between x and x', per example.

    Args:
        features, features_adv: last feature maps of x and x', (N, C, h, w).
        head: weight of the linear head, (K, C), or None when the features are the class maps.
        logits_adv: logits of x', (N, K).
        y: true classes, int64 (N,).
        classes: one of CLASSES; the paper trains with "weighted".
        norm: "l1" or "l2" over the pixels.
        normalize: "none" (released code) or "pixels" (divide by h w, which makes a map sum to its
            logit and Proposition 1 hold).

    Returns:
        (N,), float32 or float64; differentiable once with respect to features, head and logits.
    """
    if normalize not in NORMALIZE:
        raise ValueError(f"normalize must be one of {', '.join(NORMALIZE)}, got {normalize!r}")
    weights = class_weights(classes, logits_adv, y)
    value, _ = cam_discrepancy(features, features_adv, head, weights, norm)
    return value if normalize == "none" else value / (features.shape[2] * features.shape[3])
