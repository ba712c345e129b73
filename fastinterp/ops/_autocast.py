"""Autocast for the ops that torch runs in its lower dtype."""

from __future__ import annotations

import torch


def lowered(x: torch.Tensor, *others: torch.Tensor | None) -> list[torch.Tensor | None]:
    """All of them in autocast's dtype where it is on, unless x is float64; None stays None."""
    device = x.device.type
    # torch.amp.is_autocast_available would ask better, but torch.compile of torch 2.11 stops at it.
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    if not autocast or x.dtype == torch.float64:
        return [x, *others]
    dtype = torch.get_autocast_dtype(device)
    return [None if t is None else t.to(dtype) for t in (x, *others)]
