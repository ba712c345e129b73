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


def without_gaps(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy in the same order of dimensions if it is a view with gaps or repeats."""
    out = torch.empty_like(x)
    return x if out.stride() == x.stride() else out.copy_(x)


def prefers_channels_last(x: torch.Tensor) -> bool:
    """Whether results made from the 4-D x should be channels_last; x need not be dense."""
    return 0 < x.stride(1) < x.stride(3)


def memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def unfilled(shape, like: torch.Tensor, channels_last: bool, dtype=None) -> torch.Tensor:
    """A 4-D tensor of ``like``'s dtype and device."""
    return torch.empty(
        shape,
        dtype=dtype or like.dtype,
        device=like.device,
        memory_format=memory_format(channels_last),
    )


def contiguous(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Each of them contiguous; None stays None."""
    return [None if t is None else t.contiguous() for t in tensors]


def filled(results, values):
    """``results``, with what was computed copied into those that are wanted, not empty."""
    for result, value in zip(results, values, strict=True):
        if result.numel():
            result.copy_(value)
    return results
