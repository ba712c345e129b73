"""What the pooling ops check and compute about their windows."""

from __future__ import annotations

import torch

from fastinterp.ops import _backend


def check_map(x: torch.Tensor) -> None:
    """Raises ValueError unless x is 4-D, TypeError unless it is floating point."""
    if x.dim() != 4:
        raise ValueError(f"x must be (N, C, H, W), got {tuple(x.shape)}")
    if x.dtype not in _backend.DTYPE_CODES:
        raise TypeError(f"x must be a floating point tensor, got {x.dtype}")


def pair(name: str, value: int | tuple[int, int], low: int) -> list[int]:
    """``value`` as two integers >= low."""
    both = [value, value] if isinstance(value, int) else list(value)
    if len(both) == 1:
        both *= 2
    if len(both) != 2 or any(v < low for v in both):
        raise ValueError(f"{name} must be an integer >= {low} or a pair of them, got {value}")
    return both


def check_window(kernel_size, stride, padding) -> tuple[list[int], list[int], list[int]]:
    """Kernel size, stride and padding as pairs."""
    kernel_size = pair("kernel_size", kernel_size, 1)
    stride = kernel_size if stride is None else pair("stride", stride, 1)
    padding = pair("padding", padding, 0)
    if any(2 * p > k for p, k in zip(padding, kernel_size, strict=True)):
        raise ValueError(
            f"padding must be at most half of kernel_size {kernel_size}, got {padding}"
        )
    return kernel_size, stride, padding


def pooled_size(size, kernel_size, stride, padding, dilation, ceil_mode) -> list[int]:
    """Rows and columns of the output."""
    result = []
    for n, k, s, p, d in zip(size, kernel_size, stride, padding, dilation, strict=True):
        room = n + 2 * p - d * (k - 1) - 1
        count = room // s + 1
        # One more window if it begins inside the map or the padding before it.
        if ceil_mode and room % s != 0 and count * s < n + p:
            count += 1
        result.append(count)
    return result
