"""How far the loss is from linear around x: curvature and local linearity."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from fastinterp._checks import check_attack
from fastinterp._state import attack_parameters, depends_on_mode, eval_mode, substituted
from fastinterp.attacks import maximise, random_start
from fastinterp.regularizers._gradient import Borrowed, dot, norms, one_of, positive, unit
from fastinterp.regularizers.gradient import Value


def cure(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    h: float = 1.5,
    norm: str = "squared",
    return_logits: bool = False,
) -> Value:
    """Curvature of the loss along its sign gradient.

        R = mean_n || grad l(x_n + h z_n) - grad l(x_n) ||_2^2,   z = sign(g) / || sign(g) ||_2,
                                                                   g = grad l(x_n)

    z is held constant; both gradients are differentiated. As in the paper R is not divided by h^2,
    so a weight belongs to its h. The authors' code uses the length, not its square ("l2"), of
    batch-mean losses in evaluation mode; here each example has its own loss, in the model's mode.

    Args:
        model: images (N, C, H, W) -> logits (N, K).
        x: images in [0,1]; x + h z is not clipped.
        y: true classes, int64 (N,).
        h: length of the displacement, Euclidean, in units of x.
        norm: "squared" or "l2".
        return_logits: also return the logits of x, (N, K), with their graph.

    Returns:
        A scalar, differentiable once to the parameters; or (scalar, logits).

    Source: Moosavi-Dezfooli, Fawzi, Uesato and Frossard, "Robustness via Curvature Regularization,
    and Vice Versa" (2019).
    """
    positive("h", h)
    one_of("norm", norm, ("squared", "l2"))
    with Borrowed(model, x, y) as net:
        gradient, logits = net.gradient(x, counts=return_logits)
        z = unit(gradient.detach().sign()).to(x)
        displaced, _ = net.gradient(x + h * z)
    value = norms(displaced - gradient, norm).mean()
    return (value, logits) if return_logits else value


def local_linearity(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    eps: float,
    step_size: float,
    steps: int = 10,
    lambda_: float = 4.0,
    mu: float = 3.0,
    clip: tuple[float, float] | None = (0.0, 1.0),
    generator: torch.Generator | None = None,
    return_logits: bool = False,
) -> Value:
    """LLR: the worst departure of the loss from its tangent, and the tangent's own rise there.

        gap(d) = | l(x + d) - l(x) - d^T grad l(x) |,    d* = argmax gap(d) over ||d||_inf <= eps
        R = mean_n lambda gap(d*) + mu | d*^T grad l(x) |

    d* is found by sign steps from a random start (at d = 0 the gap is flat) with the parameters
    constant and the model in evaluation mode, then held constant; everything else is
    differentiated, in the model's own mode. The defaults of lambda and mu are the paper's for
    CIFAR-10; its loss adds the cross-entropy of x.

    Args:
        model: images (N, C, H, W) -> logits (N, K).
        x: images within ``clip``.
        y: true classes, int64 (N,).
        eps, step_size: radius and step, in units of x.
        steps: of the inner maximisation, at least 1.
        lambda_, mu: the two weights, >= 0.
        clip: bounds of valid images, or None.
        generator: where the random start comes from, on x's device; None: the global generator.
        return_logits: also return the logits of x, (N, K), with their graph.

    Returns:
        A scalar, differentiable once to the parameters; or (scalar, logits).

    Source: Qin et al., "Adversarial Robustness through Local Linearization" (2019).
    """
    check_attack(eps, step_size, steps)
    for name, weight in (("lambda_", lambda_), ("mu", mu)):
        if not 0 <= weight < float("inf"):
            raise ValueError(f"{name} must be a finite number >= 0, got {weight}")
    with Borrowed(model, x, y, bounds=clip) as net:
        start = random_start(x.detach(), eps, generator=generator)
        # Of a model that depends on its mode, the pass in its own mode comes after the ascent: it
        # moves the running statistics that the ascent computes with.
        clean_pass = partial(net.gradient, x, counts=return_logits)
        clean = None if depends_on_mode(net.model) else clean_pass()
        x_worst = _least_linear(
            net,
            x.detach(),
            clean,
            dict(eps=eps, step_size=step_size, steps=steps, clip=clip, start=start),
        )
        gradient, logits = clean or clean_pass()
        d = x_worst - x.detach()
        rise = dot(d, gradient)
        gap = (net.losses(net.logits(x + d)) - net.losses(logits) - rise).abs()
    value = (lambda_ * gap + mu * rise.abs()).mean()
    return (value, logits) if return_logits else value


def _least_linear(net, x, clean, attack):
    """x + d*; ``clean`` is the gradient and logits of x, where they are known."""
    with substituted(net.model, attack_parameters(net.model)), eval_mode(net.model):
        gradient, logits = clean or net.gradient(x, create_graph=False)
        gradient, loss = gradient.detach(), net.losses(logits).detach()

        def gap(z):
            return (net.losses(net.logits(z)) - loss - dot(z - x, gradient)).abs()

        return maximise(gap, x, **attack)
