"""Activations computed anew in the backward passes instead of being kept for them."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

_thread = threading.local()  # as are the hooks of autograd


class _Recipe(NamedTuple):
    version: int  # of the tensor that it makes
    make: Callable[[], torch.Tensor]


@contextmanager
def recompute() -> Iterator[None]:
    """Inside, the outputs of fused batch norms are not kept for the backward passes.

    A backward pass that needs one, such as a convolution's weight gradient, makes it again from the
    batch norm's input, which is kept anyway: one more pass of normalisation and activation, to the
    same values up to rounding. In double backprop of a network of convolutions and batch norms this
    is about a quarter of what lives at the peak. Put the forward pass inside, as with
    ``torch.autograd.graph.save_on_cpu``; where a backward pass runs makes no difference. Outputs of
    batch norms with a residual are kept, as making them again would keep the residual.

    Not inside ``torch.compile``, which decides by itself what to keep.

    Example:
        >>> with fastinterp.recompute():
        ...     loss = F.cross_entropy(model(x), y)
        >>> loss.backward()

    Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost" (2016).
    """
    outer = getattr(_thread, "made", None)
    _thread.made = weakref.WeakValueDictionary()  # address -> tensor with a recipe
    try:
        with torch.autograd.graph.saved_tensors_hooks(_pack, _unpack):
            yield
    finally:
        _thread.made = outer


def recomputing() -> bool:
    """Whether this thread is inside of ``recompute``."""
    return getattr(_thread, "made", None) is not None


def can_be_made_again(y: torch.Tensor, make: Callable[[], torch.Tensor]) -> None:
    """Tells the running ``recompute`` how to make y, by a function that keeps what others keep."""
    if y.requires_grad:
        y._fastinterp_recipe = _Recipe(y._version, make)
        _thread.made[y.data_ptr()] = y


def _pack(t: torch.Tensor):
    # What is saved is another tensor on the same memory.
    y = _thread.made.get(t.data_ptr()) if _thread.made else None
    if y is None or (y.shape, y.stride(), y.dtype) != (t.shape, t.stride(), t.dtype):
        return t
    recipe = y._fastinterp_recipe
    return recipe if recipe.version == y._version else t


def _unpack(kept) -> torch.Tensor:
    return kept.make() if isinstance(kept, _Recipe) else kept
