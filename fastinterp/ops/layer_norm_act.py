"""layer_norm_act, layer norm + residual + activation in one pass; see norm_act."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fastinterp.ops._activations import value
from fastinterp.ops.norm_act import autocast, checked_options, norm_act, plain_is_faster


def layer_norm_act(
    x: torch.Tensor,
    normalized_shape: int | Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    residual: torch.Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "identity",
    alpha: float | None = None,
) -> torch.Tensor:
    """activation(layer_norm(x) + residual) in one pass, with fused first and second derivatives.

    Args:
        x: (..., *normalized_shape), float32, float64, bfloat16 or float16.
        normalized_shape: the last sizes of x, or the last one. All elements along these dimensions
            are normalised with their own mean and variance.
        weight, bias: normalized_shape, or None for ones and zeros.
        residual: added before the activation, shape and dtype of x; or None.
        eps: added to the variance, >= 0.
        activation: "identity", "relu", "leaky_relu", "softplus", "silu" or "gelu" (exact).
        alpha: slope of leaky_relu (0.01) or beta of softplus (1).

    Returns:
        y, contiguous, shape and dtype of x. Statistics and sums are in float32 (float64 for float64
        x). Differentiable twice with respect to x, residual, weight and bias; a third derivative
        raises. Under autocast on CUDA a half precision x is computed, and answered, in float32, as
        torch does.

    Raises:
        ValueError: shapes or options are not as described.
        TypeError: x is not floating point, or residual has another dtype.

    Source: Ba, Kiros & Hinton, "Layer Normalization" (2016); the second order is derived from it.
    """
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    if not shape or x.shape[-len(shape) :] != shape:
        raise ValueError(f"the last sizes of x must be {shape}, got {tuple(x.shape)}")
    for name, values in (("weight", weight), ("bias", bias)):
        if values is not None and values.shape != shape:
            raise ValueError(f"{name} must be {shape} or None, got {tuple(values.shape)}")
    alpha = checked_options(x, residual, eps, activation, alpha)
    x, residual = autocast(x, residual)
    if plain_is_faster(x, weight, bias, activation):
        y = torch.layer_norm(x, shape, weight, bias, eps)
        return value(y if residual is None else y + residual, activation, alpha)
    rows = x.shape[: -len(shape)].numel(), math.prod(shape)
    flat = (None if t is None else t.reshape(rows) for t in (x, residual))
    affine = (None if t is None else t.reshape(-1) for t in (weight, bias))
    return norm_act(*flat, *affine, 1, eps, activation, alpha).view(x.shape)
