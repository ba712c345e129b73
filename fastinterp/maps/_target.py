"""Which classes a map explains, and the number that is differentiated for each."""

from __future__ import annotations

import operator
from typing import NamedTuple

import torch

from fastinterp._checks import extremes

OF = ("logit", "log_prob", "loss")


class Classes(NamedTuple):
    """Classes to explain, the same number for each example."""

    index: torch.Tensor | None  # (N, k) int64; None for every class
    single: bool  # one class per example, so maps have no class dimension of their own

    def of(self, values: torch.Tensor) -> torch.Tensor:
        """The columns of ``values`` (N, K) that belong to the classes, (N, k)."""
        return values if self.index is None else values.gather(1, self.index)

    def repeated(self, times: int) -> Classes:
        """For ``times`` copies of the batch, one behind the other."""
        index = None if self.index is None else self.index.repeat(times, 1)
        return Classes(index, self.single)

    def rows(self, rows: slice) -> Classes:
        return self if self.index is None else Classes(self.index[rows], self.single)

    def check_below(self, classes: int) -> None:
        """Raises ValueError unless every class is one of ``classes``."""
        if self.index is None and self.single and classes != 1:
            raise ValueError(f"target must be given: the model has {classes} outputs")
        if self.index is None or (values := extremes(self.index)) is None:
            return
        low, high = values
        if low < 0 or high >= classes:
            raise ValueError(
                f"target must be None, a class below {classes}, or one such class per example, "
                f"got {low if low < 0 else high}"
            )


@torch.inference_mode(False)  # so that the classes may be part of a graph
def parse(target, x: torch.Tensor) -> Classes:
    """``target`` as Classes for the batch x.

    Args:
        target: None for every class, a class, (N,) with one class per example, or (N, k).

    Raises:
        TypeError: target is no integer and not an int64 tensor.
        ValueError: target has another shape.
    """
    if target is None:
        return Classes(None, single=False)
    if not isinstance(target, torch.Tensor):
        try:
            target = torch.tensor(operator.index(target))
        except TypeError:
            raise TypeError(
                "target must be None, a class index or an int64 tensor of shape (N,) or (N, k), "
                f"got {type(target).__name__}"
            ) from None
    if target.dtype != torch.int64:
        raise TypeError(f"target must be int64, got {target.dtype}; convert it with target.long()")
    n = len(x)
    if target.dim() > 2 or (target.dim() and len(target) != n) or 0 in target.shape[1:]:
        raise ValueError(
            "target must be None, a class below the number of classes, or int64 of shape "
            f"({n},) or ({n}, k) for this batch, got shape {tuple(target.shape)}"
        )
    target = (target.clone() if target.is_inference() else target).to(x.device)
    if target.dim() == 2:
        return Classes(target, single=False)
    return Classes(target.expand(n)[:, None], single=True)


def check_of(of: str) -> None:
    if of not in OF:
        raise ValueError(f"of must be one of {', '.join(OF)}, got {of!r}")


def scores(logits: torch.Tensor, classes: Classes, of: str) -> torch.Tensor:
    """What a gradient map differentiates, (N, k), float32 at least.

    logit f_c, log_prob log softmax_c(f), loss -log softmax_c(f).
    """
    logits = at_least_float(logits)
    if of == "logit":
        return classes.of(logits)
    log_prob = classes.of(logits.log_softmax(1))
    return log_prob if of == "log_prob" else -log_prob


def at_least_float(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
