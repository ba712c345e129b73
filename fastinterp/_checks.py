"""Checks of what users pass in; each error names the argument, what was seen and what to do."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_read_values = True


@contextmanager
def values_unread() -> Iterator[None]:
    """Inside, checks look at shapes and dtypes alone: reading values waits for a GPU."""
    global _read_values
    before, _read_values = _read_values, False
    try:
        yield
    finally:
        _read_values = before


def extremes(t: torch.Tensor) -> tuple[float, float] | None:
    """The least and the largest value; None where there are none, or they are not to be read."""
    if t.numel() == 0 or not _read_values:
        return None
    low, high = (v.item() for v in torch.aminmax(t.detach()))
    return low, high


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
    if (seen := extremes(x)) is None:
        return
    low, high = seen
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
    if (values := extremes(y)) is None:
        return
    low, high = values
    if low < 0 or high >= classes:
        raise ValueError(f"{name} must lie in [0, {classes - 1}], got {low} to {high}")


def check_attack(eps: float | torch.Tensor, step_size: float | torch.Tensor, steps: int) -> None:
    """Raises ValueError unless eps >= 0, step_size > 0 and steps >= 1.

    Of tensors nothing is read, as that would wait for a GPU.
    """
    if not isinstance(eps, torch.Tensor) and not 0 <= eps < math.inf:
        raise ValueError(f"eps must be a finite number >= 0, got {eps}")
    if not isinstance(step_size, torch.Tensor) and not 0 < step_size < math.inf:
        raise ValueError(f"step_size must be a finite number > 0, got {step_size}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
