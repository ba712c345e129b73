"""group_norm_act, group norm + residual + activation in one pass; see norm_act."""

from __future__ import annotations

import torch

from fastinterp.ops._activations import value
from fastinterp.ops.norm_act import autocast, checked_options, norm_act, plain_is_faster


def group_norm_act(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    residual: torch.Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "identity",
    alpha: float | None = None,
) -> torch.Tensor:
    """activation(group_norm(x) + residual) in one pass, with fused first and second derivatives.

    Args:
        x: (N, C) or (N, C, ...), float32, float64, bfloat16 or float16; NCHW or channels_last.
        num_groups: divides C. Each example's groups of C / num_groups channels with all their
            pixels are normalised with their own mean and variance.
        weight, bias: (C,), or None for ones and zeros.
        residual: added before the activation, shape and dtype of x; or None.
        eps: added to the variance, >= 0.
        activation: "identity", "relu", "leaky_relu", "softplus", "silu" or "gelu" (exact).
        alpha: slope of leaky_relu (0.01) or beta of softplus (1).

    Returns:
        y like x. Statistics and sums are in float32 (float64 for float64 x). Differentiable twice
        with respect to x, residual, weight and bias; a third derivative raises. Under autocast on
        CUDA a half precision x is computed, and answered, in float32, as torch does.

    Raises:
        ValueError: shapes or options are not as described.
        TypeError: x is not floating point, or residual has another dtype.

    Source: Wu & He, "Group Normalization" (2018); the second order is derived from it.
    """
    if x.dim() < 2:
        raise ValueError(f"x must be (N, C) or (N, C, ...), got {tuple(x.shape)}")
    channels = x.shape[1]
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"num_groups must divide the {channels} channels of x, got {num_groups}")
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None and vector.shape != (channels,):
            raise ValueError(f"{name} must be ({channels},) or None, got {tuple(vector.shape)}")
    alpha = checked_options(x, residual, eps, activation, alpha)
    x, residual = autocast(x, residual)
    if plain_is_faster(x, weight, bias, activation):
        y = torch.group_norm(x, num_groups, weight, bias, eps)
        return value(y if residual is None else y + residual, activation, alpha)
    return norm_act(x, residual, weight, bias, num_groups, eps, activation, alpha)
