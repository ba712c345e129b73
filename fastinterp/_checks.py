"""Checks of what users pass in; each error names the argument, what was seen and what to do."""

from __future__ import annotations

import math

import torch


def check_images(x: torch.Tensor, name: str = "x", bounds: tuple[float, float] | None = (0.0, 1.0)):
    """Raises TypeError or ValueError unless x is (N, C, H, W), floating, finite and in bounds."""
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        seen = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
        raise TypeError(
            f"{name} must be a floating point tensor of images, got {seen}; "
            "convert uint8 images with x.float() / 255"
        )
    if x.dim() != 4:
        raise ValueError(f"{name} must be images (N, C, H, W), got shape {tuple(x.shape)}")
    if x.numel() == 0:
        return
    low, high = (v.item() for v in torch.aminmax(x.detach()))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"{name} holds NaN or infinite values; look at the images or the loader")
    if bounds is not None and (low < bounds[0] or high > bounds[1]):
        raise ValueError(
            f"{name} must lie in [{bounds[0]:g}, {bounds[1]:g}], got values from {low:g} to "
            f"{high:g}; put any normalisation inside the model"
        )


def check_labels(y: torch.Tensor, examples: int, classes: int, name: str = "y") -> None:
    """Raises TypeError or ValueError unless y is int64, (N,), with values in [0, K)."""
    if not isinstance(y, torch.Tensor) or y.dtype != torch.int64:
        seen = y.dtype if isinstance(y, torch.Tensor) else type(y).__name__
        raise TypeError(f"{name} must be an int64 tensor of class indices, got {seen}")
    if tuple(y.shape) != (examples,):
        raise ValueError(f"{name} must have shape ({examples},), got {tuple(y.shape)}")
    if examples == 0:
        return
    low, high = (v.item() for v in torch.aminmax(y))
    if low < 0 or high >= classes:
        raise ValueError(f"{name} must lie in [0, {classes - 1}], got {low} to {high}")


def check_attack(eps: float, step_size: float, steps: int) -> None:
    """Raises ValueError unless eps >= 0, step_size > 0 and steps >= 1."""
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be a finite number >= 0, got {eps}")
    if not 0 < step_size < math.inf:
        raise ValueError(f"step_size must be a finite number > 0, got {step_size}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
