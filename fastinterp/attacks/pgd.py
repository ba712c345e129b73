"""Projected gradient ascent: the loop under every inner maximisation, and PGD itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from fastinterp._checks import check_attack, check_images, check_labels
from fastinterp._state import attack_parameters, eval_mode, substituted
from fastinterp._timing import timed
from fastinterp.maps import CamNetwork
from fastinterp.ops.attack_step import attack_step, per_example


def random_start(
    x: torch.Tensor, eps: float, norm: str = "Linf", generator: torch.Generator | None = None
) -> torch.Tensor:
    """A random perturbation like x, uniform in the eps box (Linf) or in the eps ball (L2)."""
    if norm == "Linf":
        return torch.empty_like(x).uniform_(-eps, eps, generator=generator)
    direction = torch.empty_like(x).normal_(generator=generator).flatten(1)
    direction = F.normalize(direction, dim=1)
    radius = torch.empty_like(direction[:, :1]).uniform_(generator=generator)
    return (eps * radius ** (1 / direction.shape[1]) * direction).view_as(x)


@timed("attack")
def maximise(
    objective: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    *,
    eps: float | torch.Tensor,
    step_size: float | torch.Tensor,
    steps: int,
    norm: str = "Linf",
    clip: tuple[float, float] | None = (0.0, 1.0),
    start: torch.Tensor | None = None,
    restarts: int = 1,
) -> torch.Tensor:
    """The last iterate of projected gradient ascent on ``objective`` around x.

    Args:
        objective: maps a perturbed batch to one value per example, (N,); examples must not
            influence one another.
        x: (N, ...), the centre.
        eps, step_size: in units of x; numbers, or tensors of shape () or (N,).
        steps: number of gradient steps.
        norm: "Linf" or "L2", for the step and the projection.
        clip: bounds of valid inputs, or None.
        start: perturbation added before the first step (then clipped); None starts at x.
        restarts: ascents in all; from the second on they start at a random point of the ball, and
            each example keeps the iterate whose value is largest.

    Returns:
        (N, ...), detached.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError("an attack needs gradients: call it outside torch.inference_mode()")
    if restarts < 1:
        raise ValueError(f"restarts must be at least 1, got {restarts}")
    ascend = partial(
        _ascend, objective, x, eps=eps, step_size=step_size, steps=steps, norm=norm, clip=clip
    )
    best = ascend(start=start)
    if restarts == 1:
        return best
    highest = objective(best).detach()
    for _ in range(restarts - 1):
        z = ascend(start=random_start(x.detach(), eps, norm))
        value = objective(z).detach()
        better = value > highest
        highest = torch.where(better, value, highest)
        best = torch.where(better.view(-1, *[1] * (x.dim() - 1)), z, best)
    return best


def _ascend(objective, x, *, eps, step_size, steps, norm, clip, start):
    centre = x.detach()
    eps, step_size = per_example("eps", eps, centre), per_example("step_size", step_size, centre)
    z = centre.clone() if start is None else centre + start
    if start is not None and clip is not None:
        z.clamp_(*clip)
    for _ in range(steps):
        z.requires_grad_(True)
        with torch.enable_grad():
            (grad,) = torch.autograd.grad(objective(z).sum(), z)
        z = z.detach()
        attack_step(
            z, grad, centre, eps=eps, step_size=step_size, norm=norm, clip=clip, inplace=True
        )
    return z


def pgd(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    eps: float,
    step_size: float,
    steps: int,
    norm: str = "Linf",
    clip: tuple[float, float] | None = (0.0, 1.0),
    start: torch.Tensor | None = None,
    restarts: int = 1,
    network: CamNetwork | None = None,
) -> torch.Tensor:
    """Untargeted PGD on the cross-entropy; the last iterate.

    The model is attacked in evaluation mode and is left as it was.

    Args:
        model: images (N, C, H, W) -> logits (N, K).
        x: images within ``clip``.
        y: true classes, int64 (N,).
        eps, step_size: in units of x (1/255 is one grey level).
        steps: at least 1.
        norm: "Linf" or "L2".
        clip: bounds of valid images, or None.
        start: perturbation to start from, see random_start; None starts at x as the paper does.
        restarts: ascents in all, see maximise.
        network: the model's CamNetwork, if there is one: a foldable head makes each step cheaper.

    Returns:
        x', (N, C, H, W), detached.

    Raises:
        TypeError, ValueError: an argument is out of its range.

    Source: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks" (2018).
    """
    check_attack(eps, step_size, steps)
    check_images(x, bounds=clip)
    if len(x) == 0:
        return x.detach().clone()
    with attacked(model, network) as logits:
        with torch.no_grad():
            check_labels(y, len(x), logits(x[:1]).shape[1])
        return maximise(
            lambda z: F.cross_entropy(logits(z), y, reduction="none"),
            x,
            eps=eps,
            step_size=step_size,
            steps=steps,
            norm=norm,
            clip=clip,
            start=start,
            restarts=restarts,
        )


@contextmanager
def attacked(model: nn.Module, network: CamNetwork | None) -> Iterator:
    """Logits as an inner maximisation wants them: evaluation mode, no parameter gradients."""
    if network is not None:
        with network.attacked() as run:
            yield lambda z: run(z)[2]
    else:
        with substituted(model, attack_parameters(model)), eval_mode(model):
            yield model
