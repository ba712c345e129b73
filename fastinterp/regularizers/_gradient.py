"""What the regularizers share: a model on loan, its input gradients, distances between them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext

import torch
from torch import nn
from torch.nn import functional as F

from fastinterp._checks import check_images, check_labels
from fastinterp._state import uncounted
from fastinterp.maps._call import borrowed, leaf, run, vjp
from fastinterp.maps._target import Classes, at_least_float, scores

NORMS = ("l1", "l2", "squared")
_PIXELS = (1, 2, 3)


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> str:
    """``value``, or ValueError unless it is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    return value


def positive(name: str, value: float) -> float:
    """``value``, or ValueError unless it is a finite number above 0."""
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be a finite number > 0, got {value}")
    return value


def check_recording() -> None:
    """Raises RuntimeError where no graph is recorded."""
    if not torch.is_grad_enabled():
        raise RuntimeError(
            "a regularizer differentiates the model: call it outside torch.no_grad() and "
            "torch.inference_mode()"
        )


class Borrowed:
    """A model for several differentiable passes; afterwards it is as it was, exceptions included.

    It runs in its own mode, see fastinterp.maps._call.borrowed. No pass but those with ``counts``
    moves running statistics, see fastinterp._state. ``model`` is what it calls: the model without
    wrappers.

    Args:
        model: images (N, C, H, W) -> logits (N, K).
        x: images within ``bounds``.
        y: true classes, int64 (N,), or None where no class is singled out.
        bounds: of valid images, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        x: torch.Tensor,
        y: torch.Tensor | None,
        bounds: tuple[float, float] | None = (0.0, 1.0),
    ):
        check_recording()
        check_images(x, bounds=bounds)
        if x.is_inference():
            raise RuntimeError("x was made under torch.inference_mode(); pass x.clone()")
        self._examples, self._y, self._y_checked = len(x), y, False
        self._loan = borrowed(model, x, differentiable=True, counts=True)

    def __enter__(self) -> Borrowed:
        with ExitStack() as stack:
            self.model = stack.enter_context(self._loan)
            self._counted = stack.enter_context(uncounted(self.model))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error) -> None:
        self._stack.__exit__(*error)

    def logits(self, z: torch.Tensor, *, counts: bool = False) -> torch.Tensor:
        """Logits of z, (N, K), float32 at least."""
        with self._counted() if counts else nullcontext():
            logits = run(self.model, z)
        if self._y is not None and not self._y_checked:
            check_labels(self._y, self._examples, logits.shape[1])
            self._y_checked = True
        return at_least_float(logits)

    def gradient(
        self,
        z: torch.Tensor,
        of: str | Callable[[torch.Tensor], torch.Tensor] = "loss",
        *,
        counts: bool = False,
        create_graph: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradient with respect to z of a score made of the logits, and the logits.

        Args:
            z: images, any range; the result depends on them where they require grad.
            of: one of fastinterp.maps' scores of the true class, so that each example's gradient is
                that of its own score; or a function from logits to scores, which are summed.
            counts: whether this pass is the owner's model(z), whose logits are returned.
            create_graph: whether the gradient is to be differentiated.

        Returns:
            (N, C, H, W) and (N, K), float32 at least; the logits keep their graph in any case.
        """
        z = leaf(z, False)
        logits = self.logits(z, counts=counts)
        score = of(logits) if callable(of) else scores(logits, Classes(self._y[:, None], True), of)
        return derivative(score, z, create_graph=create_graph), logits

    def losses(self, logits: torch.Tensor) -> torch.Tensor:
        """Cross-entropy per example, (N,)."""
        return F.cross_entropy(logits, self._y, reduction="none")


def derivative(
    output: torch.Tensor,
    z: torch.Tensor,
    cotangent: torch.Tensor | None = None,
    *,
    create_graph: bool = True,
) -> torch.Tensor:
    """d <cotangent, output> / dz, float32 at least; the graph of output is kept."""
    cotangent = torch.ones_like(output) if cotangent is None else cotangent
    with torch.autocast(z.device.type, enabled=False):
        return at_least_float(vjp(output, z, cotangent, create_graph, retain_graph=True))


def norms(gradient: torch.Tensor, norm: str) -> torch.Tensor:
    """Per example, (N,): sum of absolute values, Euclidean length, or its square."""
    if norm == "l1":
        return gradient.abs().sum(_PIXELS)
    if norm == "l2":
        return torch.linalg.vector_norm(gradient, dim=_PIXELS)
    return gradient.square().sum(_PIXELS)


def dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Inner product per example, (N,)."""
    return (a * b).sum(_PIXELS)


def unit(gradient: torch.Tensor) -> torch.Tensor:
    """Each example at Euclidean length 1; zero stays zero.

    Divided by its largest entry first, which changes nothing but keeps the squares of the tiny
    gradients of well fitted examples from underflowing.
    """
    largest = gradient.detach().abs().amax(_PIXELS, keepdim=True)
    zero = largest == 0
    scaled = gradient / largest.masked_fill(zero, 1)
    # where, not masked_fill of the result: the derivative of the length of 0 would be NaN
    length = torch.linalg.vector_norm(
        torch.where(zero, torch.ones_like(scaled), scaled), dim=_PIXELS, keepdim=True
    )
    return torch.where(zero, torch.zeros_like(scaled), scaled / length)


def cosine_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mean of 1 - cos(a_n, b_n) over the examples where neither is zero; 0 if there are none."""
    a, b = at_least_float(a), at_least_float(b)
    both = a.detach().ne(0).flatten(1).any(1) & b.detach().ne(0).flatten(1).any(1)
    distance = (1 - dot(unit(a), unit(b))).masked_fill(~both, 0)
    return distance.sum() / both.sum().clamp(min=1)
