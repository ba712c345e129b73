"""Memory layouts: the two dense ones the kernels read, and the copies that lead to them."""

from __future__ import annotations

import torch


def is_channels_last(x: torch.Tensor) -> bool:
    """Whether x, dense, is to be read as rows of channels; with one pixel it always can."""
    if x.dim() == 2:
        return True
    if x.dim() != 4 or not x.is_contiguous(memory_format=torch.channels_last):
        return x.shape[2:].numel() == 1
    return not x.is_contiguous() or x.shape[2] * x.shape[3] == 1


def dense(x: torch.Tensor) -> torch.Tensor:
    """x itself if it is contiguous or channels_last, else a copy in the nearer of the two."""
    if x.is_contiguous():
        return x
    if x.dim() == 4:
        if x.is_contiguous(memory_format=torch.channels_last):
            return x
        if x.stride(1) == 1 and x.shape[1] > 1:
            return x.contiguous(memory_format=torch.channels_last)
    return x.contiguous()


def dense_as(t: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    """t, of the shape of the dense x, in x's memory order; None stays None."""
    if t is None or t.stride() == x.stride():
        return t
    same = (t.is_contiguous() and x.is_contiguous()) or (
        t.dim() == 4
        and t.is_contiguous(memory_format=torch.channels_last)
        and x.is_contiguous(memory_format=torch.channels_last)
    )
    return t if same else torch.empty_like(x, dtype=t.dtype).copy_(t)
