"""What the regularizers share: a model on loan, its input gradients, distances between them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastinterp._checks import check_images, check_labels
from fastinterp._state import cloned_buffers, substituted

OF = ("loss", "logit", "log_prob")
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


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` in float32 at least, where sums over pixels and classes belong."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside parallel wrappers, whose forward expects one backward of its own, and
    inside torch.compile, whose graphs cannot be differentiated twice."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif hasattr(model, "_orig_mod"):  # its class would import torch._dynamo
            warnings.warn(
                "a torch.compile'd model cannot be differentiated twice: the regularizer calls the "
                "model inside it, uncompiled; fastinterp.compile_step compiles a whole step",
                stacklevel=4,
            )
            model = model._orig_mod
        else:
            return model


class Borrowed:
    """A model for several differentiable passes; afterwards it is as it was, exceptions included.

    It runs in its own mode, on copies of its buffers. Attention takes the math backend, the only
    one that can be differentiated twice. ``model`` is the one it calls, see unwrapped.

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
        if not torch.is_grad_enabled():
            raise RuntimeError(
                "a regularizer differentiates the model: call it outside torch.no_grad() and "
                "torch.inference_mode()"
            )
        check_images(x, bounds=bounds)
        if x.is_inference():
            raise RuntimeError("x was made under torch.inference_mode(); pass x.clone()")
        self._examples, self._y, self._y_checked = len(x), y, False
        self.model = unwrapped(model)

    def __enter__(self) -> Borrowed:
        with ExitStack() as stack:
            stack.enter_context(substituted(self.model, cloned_buffers(self.model)))
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            self._return = stack.pop_all()
        return self

    def __exit__(self, *error) -> None:
        self._return.__exit__(*error)

    def logits(self, z: torch.Tensor) -> torch.Tensor:
        """Logits of z, (N, K), float32 at least."""
        logits = self.model(z)
        if not isinstance(logits, torch.Tensor) or logits.dim() != 2 or len(logits) != len(z):
            seen = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits)
            raise ValueError(
                f"the model must give logits ({len(z)}, K), got {seen}; wrap it in a module that "
                "returns them alone"
            )
        if self._y is not None and not self._y_checked:
            check_labels(self._y, self._examples, logits.shape[1])
            self._y_checked = True
        return wide(logits)

    def gradient(
        self,
        z: torch.Tensor,
        of: str | Callable[[torch.Tensor], torch.Tensor] = "loss",
        *,
        create_graph: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradient with respect to z of a scalar made of the logits, and the logits.

        Args:
            z: images, any range; the result depends on them where they require grad.
            of: one of OF, of the true class and summed over the batch, so that each example's
                gradient is that of its own score; or a function from logits to a scalar.
            create_graph: whether the gradient is to be differentiated.

        Returns:
            (N, C, H, W) and (N, K), float32 at least; the logits keep their graph in any case.
        """
        z = z if z.requires_grad else z.detach().requires_grad_()
        logits = self.logits(z)
        return self.derivative(self._score(logits, of), z, create_graph=create_graph), logits

    def _score(self, logits, of):
        if callable(of):
            return of(logits)
        if of == "loss":
            return F.cross_entropy(logits, self._y, reduction="sum")
        scores = logits if of == "logit" else logits.log_softmax(1)
        return scores.gather(1, self._y[:, None]).sum()

    def losses(self, logits: torch.Tensor) -> torch.Tensor:
        """Cross-entropy per example, (N,)."""
        return F.cross_entropy(logits, self._y, reduction="none")

    def derivative(
        self,
        output: torch.Tensor,
        z: torch.Tensor,
        cotangent: torch.Tensor | None = None,
        *,
        create_graph: bool = True,
    ) -> torch.Tensor:
        """d<cotangent, output>/dz, like z, float32 at least; the graph of output is kept."""
        grad = None
        if output.requires_grad:
            (grad,) = torch.autograd.grad(
                output,
                z,
                cotangent,
                create_graph=create_graph,
                retain_graph=True,
                allow_unused=True,
            )
        if grad is None:
            raise RuntimeError(
                f"the output of {type(self.model).__name__} has no graph back to x: it detaches, "
                "rounds or runs under no_grad on the way; remove that, or give the part behind it"
            )
        return wide(grad)


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
    a, b = wide(a), wide(b)
    both = a.detach().ne(0).flatten(1).any(1) & b.detach().ne(0).flatten(1).any(1)
    distance = (1 - dot(unit(a), unit(b))).masked_fill(~both, 0)
    return distance.sum() / both.sum().clamp(min=1)
