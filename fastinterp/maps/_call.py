"""Borrowing somebody's model for a map, and differentiating what it says."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastinterp._state import eval_mode, uncounted

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)
_warned_of: weakref.WeakSet = weakref.WeakSet()


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside parallel wrappers and torch.compile."""
    while True:
        if isinstance(model, _WRAPPERS):
            model = model.module
        elif isinstance(inner := model._modules.get("_orig_mod"), nn.Module):
            model = inner
        else:
            return model


def _is_compiled(model: nn.Module) -> bool:
    return any(
        "_orig_mod" in module._modules or module._compiled_call_impl is not None
        for module in model.modules()
    )


def _is_distributed(model: nn.Module) -> bool:
    return any(isinstance(m, nn.parallel.DistributedDataParallel) for m in model.modules())


_COMPILED = (
    "the backward pass of a compiled model cannot be differentiated again: fastinterp runs the "
    "model without torch.compile (fastinterp.compile_step compiles a whole step)"
)
_PARALLEL = (
    "fastinterp runs the module inside DistributedDataParallel: its gradients are averaged over "
    "the processes only where the same step also calls the wrapper; wrap a module whose forward "
    "returns the loss instead (fastinterp.objectives are such)"
)


@contextmanager
def borrowed(
    model: nn.Module,
    x: torch.Tensor,
    *,
    differentiable: bool,
    evaluation: bool = False,
    counts: bool = False,
) -> Iterator[nn.Module]:
    """The model without its wrappers, to be called inside; afterwards it is as it was.

    Compiled parts run as they were written.

    Args:
        differentiable: a graph is recorded, and attention must have one that can be differentiated
            again.
        evaluation: run in evaluation mode rather than the model's own.
        counts: calls count as the owner's own, see fastinterp._state: running statistics move and
            random numbers are used up. Otherwise buffers are copies, and the random numbers drawn
            inside are drawn again by whoever draws next; not for a loss, as a loop that draws
            nothing else would drop the same units at every step.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    compiled = _is_compiled(model)
    if differentiable and model not in _warned_of:
        told = [_COMPILED] * compiled + [_PARALLEL] * _is_distributed(model)
        if told:
            _warned_of.add(model)
        for message in told:
            warnings.warn(message, RuntimeWarning, stacklevel=4)
    model = unwrapped(model)
    with ExitStack() as stack:
        if compiled:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if not counts:
            stack.enter_context(_same_random_numbers(x.device))
            stack.enter_context(uncounted(model))
        if evaluation:
            stack.enter_context(eval_mode(model))
        if differentiable:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield model


def _same_random_numbers(device: torch.device):
    if device.type == "cpu":
        return torch.random.fork_rng(devices=[])
    # The state cannot be read while a CUDA graph is captured.
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return nullcontext()
    return torch.random.fork_rng(devices=[device])


@contextmanager
def recording(detach: bool, what: str) -> Iterator[None]:
    """Gradients are recorded inside: for the map alone when ``detach``, else for its user too.

    Raises:
        RuntimeError: the user wants a graph where none is recorded.
    """
    if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        yield
        return
    if not detach:
        mode = "inference_mode" if torch.is_inference_mode_enabled() else "no_grad"
        raise RuntimeError(
            f"{what} was asked for a map with a graph inside torch.{mode}(): pass detach=True for "
            f"a constant map, or call it outside"
        )
    with torch.inference_mode(False), torch.enable_grad():
        yield


def constant(x: torch.Tensor) -> torch.Tensor:
    """x without its graph, as something that may be part of another."""
    return x.clone() if x.is_inference() else x.detach()


def leaf(x: torch.Tensor, detach: bool) -> torch.Tensor:
    """x as something to differentiate to: itself where its own graph is to go on."""
    return x if x.requires_grad and not detach else constant(x).detach().requires_grad_()


def run(model: nn.Module, z: torch.Tensor) -> torch.Tensor:
    """Logits (N, K) of z.

    Raises:
        ValueError: the model's output is something else.
    """
    logits = model(z)
    if (
        not isinstance(logits, torch.Tensor)
        or logits.dim() != 2
        or len(logits) != len(z)
        or not logits.is_floating_point()
    ):
        seen = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ValueError(
            f"the model must return logits (N, K) for N = {len(z)} images, got {seen}; wrap it in "
            "a module that returns the logits alone"
        )
    return logits


def gradients(scores: torch.Tensor, z: torch.Tensor, create_graph: bool) -> torch.Tensor:
    """d sum_n scores[n, c] / dz for each of the k columns, (N, k, *z.shape[1:]).

    One backward pass, for k > 1 of k gradients side by side.

    Raises:
        RuntimeError: scores do not depend on z through operations that autograd has seen.
    """
    k = scores.shape[1]
    if k == 1:
        return vjp(scores, z, torch.ones_like(scores), create_graph)[:, None]
    one_class = torch.eye(k, dtype=scores.dtype, device=scores.device)

    def backward(column):
        return vjp(scores, z, column.expand_as(scores), create_graph, retain_graph=True)

    # torch.vmap knows how to batch convolutions and norms; is_grads_batched of autograd.grad loops.
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop")
            return torch.vmap(backward, out_dims=1)(one_class)
    except (NoGradientError, torch.OutOfMemoryError):
        raise
    except RuntimeError as error:
        _warn_once(
            "the gradients of several classes are computed one after the other, as the model's "
            f"backward pass cannot be batched (that of fastinterp.fuse(model) may): {error}"
        )
        return torch.stack([backward(column) for column in one_class], 1)


_warnings: set[str] = set()


def _warn_once(message: str) -> None:
    # catch_warnings makes Python forget what it has shown.
    if message not in _warnings:
        _warnings.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=4)


class NoGradientError(RuntimeError):
    """What is to be differentiated has no gradient."""


_NO_GRAPH = (
    "the model's output has no gradient to its input: look for torch.no_grad(), detach() or an "
    "operation that is not differentiable in its forward"
)


def vjp(
    scores: torch.Tensor,
    z: torch.Tensor,
    cotangent: torch.Tensor,
    create_graph: bool,
    retain_graph: bool | None = None,
) -> torch.Tensor:
    """d <cotangent, scores> / dz.

    Raises:
        NoGradientError: scores do not depend on z through operations that autograd has seen.
    """
    if not scores.requires_grad:
        raise NoGradientError(_NO_GRAPH)
    (gradient,) = torch.autograd.grad(
        scores,
        z,
        cotangent,
        create_graph=create_graph,
        retain_graph=retain_graph,
        allow_unused=True,
    )
    if gradient is None:
        raise NoGradientError(_NO_GRAPH)
    return gradient
