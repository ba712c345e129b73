"""Distances between the interpretation maps of two images, weighted over classes.

With d_c the distance between the maps of class c, t the true class and t' the predicted class of x'
(Boopathy et al., ICML 2020):

    one       d_t
    two       (d_t + d_t') / 2
    all       mean_c d_c
    weighted  d_t + sum_{i != t} q_i d_i,  q = softmax of f(x') over the classes other than t

    l1  sum |a - b|     l2  ||a - b||     squared_l2  ||a - b||^2
    cosine  1 - a.b / (||a|| ||b||)       pearson  the same of a and b less their means
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from fastinterp.ops import cam_discrepancy
from fastinterp.ops.cam_discrepancy import NORMS as FUSED_NORMS

CLASSES = ("one", "two", "all", "weighted")
NORMS = ("l1", "l2", "squared_l2", "cosine", "pearson")
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


def map_distance(
    maps: torch.Tensor, maps_adv: torch.Tensor, norm: str = "l1", normalize: str = "none"
) -> torch.Tensor:
    """Distance between two maps of every class.

    Args:
        maps, maps_adv: (N, k, ...), the maps of k classes of x and of x', same shape.
        norm: one of NORMS.
        normalize: "none", or "pixels" to divide by the number of values of a map, (...).

    Returns:
        (N, k), float32 or float64, >= 0; differentiable with respect to both any number of times.
        A constant map has no direction: its cosine or Pearson distance is 1, its gradient 0.

    Raises:
        ValueError: shapes differ, or norm or normalize is unknown.
    """
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
    if normalize not in NORMALIZE:
        raise ValueError(f"normalize must be one of {', '.join(NORMALIZE)}, got {normalize!r}")
    if maps.dim() < 3 or maps.shape != maps_adv.shape:
        raise ValueError(
            "maps and maps_adv must both be (N, k, ...), got "
            f"{tuple(maps.shape)} and {tuple(maps_adv.shape)}"
        )
    a, b = (m.flatten(2).to(torch.promote_types(m.dtype, torch.float32)) for m in (maps, maps_adv))
    if norm == "l1":
        distance = (a - b).abs().sum(2)
    elif norm == "l2":
        distance = torch.linalg.vector_norm(a - b, dim=2)
    elif norm == "squared_l2":
        distance = (a - b).square().sum(2)
    else:
        if norm == "pearson":
            a, b = (m - m.mean(2, keepdim=True) for m in (a, b))
        distance = 1 - F.cosine_similarity(a, b, dim=2)
    return distance if normalize == "none" else distance / a.shape[2]


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
    """CAM discrepancy D between x and x', per example; l1 and l2 never hold the class maps.

    Args:
        features, features_adv: last feature maps of x and x', (N, C, h, w).
        head: weight of the linear head, (K, C), or None when the features are the class maps.
        logits_adv: logits of x', (N, K).
        y: true classes, int64 (N,).
        classes: one of CLASSES; the paper trains with "weighted".
        norm: one of NORMS, over the pixels.
        normalize: "none" (released code) or "pixels" (divide by h w, which makes a map sum to its
            logit and Proposition 1 hold).

    Returns:
        (N,), float32 or float64; differentiable once with respect to features, head and logits.
    """
    if normalize not in NORMALIZE:
        raise ValueError(f"normalize must be one of {', '.join(NORMALIZE)}, got {normalize!r}")
    weights = class_weights(classes, logits_adv, y)
    if norm in FUSED_NORMS:
        value, _ = cam_discrepancy(features, features_adv, head, weights, norm)
        return value if normalize == "none" else value / features.shape[2:].numel()
    maps = (class_maps(f, head) for f in (features, features_adv))
    return (weights * map_distance(*maps, norm, normalize)).sum(1)


def class_maps(features: torch.Tensor, head: torch.Tensor | None) -> torch.Tensor:
    """I_k = sum_c head[k, c] features[:, c], (N, K, h, w); the features themselves for None."""
    return features if head is None else torch.einsum("kc,nchw->nkhw", head, features)
