"""Sizes of input gradients: double backprop, Jacobian, right for the right reasons."""

from __future__ import annotations

import warnings
from contextlib import nullcontext

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastinterp.maps._call import gradients, leaf
from fastinterp.maps._target import at_least_float, check_of
from fastinterp.regularizers._gradient import (
    NORMS,
    Borrowed,
    derivative,
    norms,
    one_of,
    positive,
    unit,
)

Value = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


def input_gradient_norm(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    norm: str = "squared",
    of: str = "loss",
    return_logits: bool = False,
) -> Value:
    """Double backprop: the size of the input gradient.

        R = mean_n || d s_n / d x_n ||

    with s the cross-entropy, the logit or the log-probability of the true class. The paper has the
    squared gradient of the loss.

    Args:
        model: images (N, C, H, W) -> logits (N, K).
        x: images in [0,1].
        y: true classes, int64 (N,).
        norm: "l1", "l2" or "squared", over the pixels and channels of an example.
        of: "loss", "logit" or "log_prob".
        return_logits: also return the logits of x, (N, K), with their graph.

    Returns:
        A scalar, differentiable once to the parameters and to x; or (scalar, logits).

    Source: Drucker and LeCun, "Improving Generalization Performance Using Double Backpropagation"
    (1992).

    Example:
        >>> value, logits = input_gradient_norm(model, x, y, return_logits=True)
        >>> loss = F.cross_entropy(logits, y) + 0.1 * value
    """
    one_of("norm", norm, NORMS)
    check_of(of)
    with Borrowed(model, x, y) as net:
        gradient, logits = net.gradient(x, of, counts=return_logits)
    value = norms(gradient, norm).mean()
    return (value, logits) if return_logits else value


def jacobian_norm(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor | None = None,
    *,
    n_proj: int = 1,
    exact: bool = False,
    generator: torch.Generator | None = None,
    return_logits: bool = False,
) -> Value:
    """Squared Frobenius norm of the Jacobian of the logits.

        R = mean_n sum_ck (df_c/dx_k)^2  =  mean_n K E_v || v^T df/dx ||^2,   v uniform, ||v|| = 1

    The expectation is taken over ``n_proj`` independent directions per example, one backward pass
    each, or is exact with one batched backward pass of all classes. The paper's penalty has a
    factor 1/2 more.
    Where examples influence one another (batch norm in training mode) the two differ, as in the
    authors' code: the exact form then has d(sum_n f_nc)/dx, the random one the whole derivative of
    the batch's logits by the batch.

    Args:
        model: images (N, C, H, W) -> logits (N, K).
        x: images in [0,1].
        y: not used; every regularizer takes (model, x, y).
        n_proj: random directions, at least 1.
        exact: all K classes instead of random directions.
        generator: where the directions come from, on x's device; None: the global generator.
        return_logits: also return the logits of x, (N, K), with their graph.

    Returns:
        A scalar, differentiable once to the parameters and to x; or (scalar, logits).

    Source: Hoffman, Roberts and Yaida, "Robust Learning with Jacobian Regularization" (2019),
    algorithm 1.
    """
    if not exact and n_proj < 1:
        raise ValueError(f"n_proj must be at least 1, got {n_proj}; exact=True takes every class")
    with Borrowed(model, x, y) as net:
        z = leaf(x, False)
        logits = net.logits(z, counts=return_logits)
        classes = logits.shape[1]
        if exact:
            with torch.autocast(x.device.type, enabled=False):
                rows = gradients(logits, z, create_graph=True).unbind(1)
        else:
            rows = [derivative(logits, z, v) for v in _directions(logits, n_proj, generator)]
    value = sum(norms(at_least_float(row), "squared").mean() for row in rows)
    value = value if exact else value * (classes / n_proj)
    return (value, logits) if return_logits else value


def _directions(logits, n_proj, generator):
    """Uniform on the unit sphere, (n_proj, N, K)."""
    v = torch.empty(n_proj, *logits.shape, dtype=logits.dtype, device=logits.device)
    return nn.functional.normalize(v.normal_(generator=generator), dim=2)


def right_for_right_reasons(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor | None = None,
    *,
    mask: torch.Tensor,
    return_logits: bool = False,
) -> Value:
    """Keeps input gradients small where the annotator says that they should not matter.

        R = mean_n sum_k ( mask_nk d/dx_nk sum_c log p_nc )^2

    The gradient is that of the log-probabilities summed over all classes, so no label enters. The
    paper sums over the examples where this has a mean.

    Args:
        model: images (N, C, H, W) -> logits (N, K).
        x: images in [0,1].
        y: not used; every regularizer takes (model, x, y).
        mask: (N, 1, H, W) or (N, C, H, W), bool or a number type: 1 where the gradient should be
            small, 0 where it is free.
        return_logits: also return the logits of x, (N, K), with their graph.

    Returns:
        A scalar, differentiable once to the parameters and to x; or (scalar, logits).

    Source: Ross, Hughes and Doshi-Velez, "Right for the Right Reasons: Training Differentiable
    Models by Constraining their Explanations" (2017).
    """
    with Borrowed(model, x, y) as net:
        n, channels, *size = x.shape
        if tuple(mask.shape) not in ((n, 1, *size), (n, channels, *size)):
            raise ValueError(
                f"mask must be {(n, 1, *size)} or {tuple(x.shape)}, got {tuple(mask.shape)}"
            )
        gradient, logits = net.gradient(
            x, lambda logits: logits.log_softmax(1).sum(), counts=return_logits
        )
    value = norms(gradient * mask.to(gradient), "squared").mean()
    return (value, logits) if return_logits else value


def finite_difference_gradient_norm(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    step: float = 1e-2,
    norm: str = "squared",
    kinks: str = "raise",
    return_logits: bool = False,
) -> Value:
    """The size of the loss's input gradient without double backprop, for SMOOTH networks only.

        R = mean_n ( l(x_n + h u_n) - l(x_n - h u_n) ) / 2h,     u held constant:
        u = sign g  ("l1"),   u = g / ||g||_2  ("l2"),   g = dl/dx

    and "squared" the same with u = g / max_n ||g_n||_2, times that maximum. In a smooth network
    value and parameter gradient are those of ``input_gradient_norm`` up to O(h^2), batch norm in
    training mode included. In a network of ReLUs this is a DIFFERENT regularizer: each kink that
    the segment x +- h u happens to cross adds a term in 1/h to the parameters' derivative, which
    double backprop does not have. Shrinking h makes fewer and larger ones of them: the cosine
    between the two derivatives was measured at 0.6, falling to 0.02 with the step. Such networks
    are therefore refused.

    Args:
        model: images (N, C, H, W) -> logits (N, K).
        x: images in [0,1]; x +- h u may lie a step outside.
        y: true classes, int64 (N,).
        step: h, in units of x. Rounding errors grow as 1/h: below 1e-3 float32 has few digits left.
        norm: "l1", "l2" or "squared".
        kinks: "raise", "warn" or "ignore" where the model calls a piecewise linear activation or
            max pooling, as a module, as a function or fused.
        return_logits: also return the logits of x, (N, K), with their graph.

    Returns:
        A scalar, differentiable once to the parameters; or (scalar, logits).

    Raises:
        ValueError: the model has kinks.

    Source: Finlay and Oberman, "Scaleable input gradient regularization for adversarial robustness"
    (2019), who difference forward; the central difference has an error one order smaller.
    """
    positive("step", step)
    one_of("norm", norm, NORMS)
    one_of("kinks", kinks, ("raise", "warn", "ignore"))
    with Borrowed(model, x, y) as net:
        with nullcontext(None) if kinks == "ignore" else _KinkFinder() as finder:
            gradient, logits = net.gradient(x, counts=return_logits, create_graph=False)
        if finder is not None:
            _report(finder.found, kinks)
        scale = gradient.new_ones(())
        if norm == "l1":
            u = gradient.sign()
        elif norm == "l2":
            u = unit(gradient)
        else:
            scale = norms(gradient, "l2").max().clamp(min=torch.finfo(gradient.dtype).tiny)
            u = gradient / scale
        u = u.to(x)
        above, below = (net.losses(net.logits(x + sign * step * u)) for sign in (1, -1))
    value = scale * (above - below).mean() / (2 * step)
    if norm == "squared":
        # u, held constant, is a factor of it: half of the derivative would be missing.
        value = 2 * value - value.detach()
    return (value, logits) if return_logits else value


_KINKED = {
    *("relu", "leaky_relu", "_prelu_kernel", "prelu", "threshold", "hardtanh", "hardswish"),
    *("hardsigmoid", "hardshrink", "softshrink", "rrelu_with_noise", "max_pool2d"),
    *("max_pool2d_with_indices", "adaptive_max_pool2d", "mkldnn_max_pool2d"),
}


_FUSED = ("activation", "batch_norm_act", "norm_act")


class _KinkFinder(TorchDispatchMode):
    """Notes piecewise linear ops, however the model comes to call them."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, name = func._schema.name.split("::")
        name = name.removesuffix("_")
        if name in _KINKED:
            self.found.add(name)
        elif name in ("clamp", "clamp_min") and len(args) > 1 and args[1] == 0:
            self.found.add("clamp at 0")
        elif namespace == "fastinterp" and name in _FUSED:
            self.found.update(kind for kind in ("relu", "leaky_relu") if kind in args)
        return func(*args, **(kwargs or {}))


def _report(found, kinks):
    if not found:
        return
    message = (
        f"the model has kinks ({', '.join(sorted(found))}), where finite differences are a "
        "different regularizer than the gradient's norm; use input_gradient_norm, or smooth "
        "activations such as softplus, silu or gelu"
    )
    if kinks == "raise":
        raise ValueError(message + '; kinks="warn" goes on all the same')
    warnings.warn(message, stacklevel=3)
