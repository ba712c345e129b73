"""The activation functions and their derivatives in plain torch, and what the kernels call them."""

from __future__ import annotations

import math

import torch

# Codes of csrc/kernels.h, what alpha is when it is not given, and which have a second derivative.
ACTIVATIONS = {"identity": 0, "relu": 1, "leaky_relu": 2, "softplus": 3, "silu": 4, "gelu": 5}
DEFAULT_ALPHA = {"leaky_relu": 0.01, "softplus": 1.0}
SMOOTH = ("softplus", "silu", "gelu")


def checked_alpha(activation: str, alpha: float | None) -> float:
    """``alpha``, or the default where it is None; 0 for activations that have none.

    Raises:
        ValueError: alpha is out of range, or given for an activation that has none.
    """
    if alpha is not None and activation not in DEFAULT_ALPHA:
        raise ValueError(f"{activation} has no alpha, got {alpha}")
    alpha = float(DEFAULT_ALPHA.get(activation, 0.0) if alpha is None else alpha)
    if not math.isfinite(alpha) or (activation == "softplus" and alpha <= 0):
        allowed = "> 0" if activation == "softplus" else "finite"
        raise ValueError(f"alpha of {activation} must be {allowed}, got {alpha}")
    return alpha


def value(z, activation, alpha):
    """phi(z)."""
    functional = torch.nn.functional
    if activation == "identity":
        return z
    if activation == "leaky_relu":
        return functional.leaky_relu(z, alpha)
    if activation == "softplus":
        return functional.softplus(z, alpha)
    return getattr(functional, activation)(z)


def slope(z, activation, alpha):
    """phi'(z); the one below at a kink."""
    if activation == "relu":
        return (z > 0).to(z.dtype)
    if activation == "leaky_relu":
        return torch.where(z > 0, torch.ones_like(z), alpha)  # not of two numbers: float32
    if activation == "softplus":
        return torch.sigmoid(alpha * z)
    if activation == "silu":
        s = torch.sigmoid(z)
        return s * (1 + z * (1 - s))
    if activation == "gelu":
        return torch.special.ndtr(z) + z * _density(z)
    return torch.ones_like(z)


def curvature(z, activation, alpha):
    """phi''(z) of a smooth phi."""
    if activation == "softplus":
        s = torch.sigmoid(alpha * z)
        return alpha * s * (1 - s)
    if activation == "silu":
        s = torch.sigmoid(z)
        return s * (1 - s) * (2 + z * (1 - 2 * s))
    return _density(z) * (2 - z * z)


def _density(z):
    return torch.exp(-0.5 * z * z) * 0.3989422804014327
