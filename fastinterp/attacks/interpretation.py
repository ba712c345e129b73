"""Attacks against interpretability (AAI): x' close to x whose map is another.

With I the map of the true class, T the k largest cells of I(x), m the target map and
C(I) = sum_p p |I_p| / sum_p |I_p| a map's centre of mass, in cells:

    top_k           lower sum_{p in T} I_p(x')
    mass_center     raise ||C(I(x')) - C(I(x))||_2
    target          lower ||I(x') - m||_2^2

Sources: Ghorbani et al., "Interpretation of Neural Networks Is Fragile" (2019), and for CAM
Boopathy et al. (ICML 2020); target, Dombrowski et al., "Explanations can be manipulated and
geometry is to blame" (2019).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from fastinterp._checks import check_attack, check_images, check_labels
from fastinterp._state import attack_parameters, eval_mode, substituted
from fastinterp.attacks.ascent import maximise
from fastinterp.attacks.ascent import random_start as draw_start
from fastinterp.maps import CamNetwork, softplus_surrogate
from fastinterp.maps._target import parse
from fastinterp.maps.grad_cam import explain_layer, mean_gradient
from fastinterp.maps.integrated import along_path

GOALS = ("top_k", "mass_center", "target")
MAPS = ("cam", "grad_cam", "integrated_gradients")


class InterpretationAttack(NamedTuple):
    """Images and maps before and after the attack; maps are those of the network itself."""

    x_adv: torch.Tensor  # (N, C, H, W)
    maps: torch.Tensor  # of the true class of x, (N, h, w), or (N, C, H, W) for pixels
    maps_adv: torch.Tensor  # of x'
    unchanged: torch.Tensor  # bool (N,), the predicted class is that of x: the ones to score


def attack_interpretation(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    eps: float,
    step_size: float = 0.01,
    steps: int = 200,
    goal: str = "top_k",
    k: int = 8,
    target_map: torch.Tensor | None = None,
    map: str = "cam",
    map_options: dict | None = None,
    softplus_beta: float | None = None,
    keep_prediction: float = 0.0,
    norm: str = "Linf",
    clip: tuple[float, float] | None = (0.0, 1.0),
    random_start: bool = True,
    start: torch.Tensor | None = None,
    restarts: int = 1,
    best: bool = False,
    generator: torch.Generator | None = None,
) -> InterpretationAttack:
    """Moves the map of the true class; the defaults are the paper's top-k attack on CAM.

    The model is attacked in evaluation mode and is left as it was.

    Args:
        model: images (N, C, H, W) -> logits (N, K); for "cam" with global average pooling and a
            linear head.
        x: images within ``clip``.
        y: true classes, int64 (N,), whose maps are attacked.
        eps, step_size: in units of x.
        steps: at least 1.
        goal: "top_k", "mass_center" or "target".
        k: cells of "top_k", counted in all channels of a map of pixels.
        target_map: the map to reach for "target", broadcastable to the maps.
        map: "cam", "grad_cam" or "integrated_gradients".
        map_options: further keyword arguments of the map, e.g. ``dict(steps=20)``.
        softplus_beta: ReLUs are softplus(beta) while the map is attacked; None is 10 for
            integrated gradients, whose derivative to x says nothing with ReLUs, and ReLU else;
            math.inf keeps ReLUs.
        keep_prediction: weight of the cross-entropy of x's predicted class, which is lowered too;
            0 in the paper.
        norm, clip, restarts, best, generator: as in pgd.
        random_start: start at a random point of the ball, as the paper does.
        start: perturbation to start from instead.

    Returns:
        InterpretationAttack. Score the images where ``unchanged`` holds, as the paper does.

    Raises:
        TypeError, ValueError: an argument is out of its range.
        UnsupportedModelError: the model has no map of this kind.
    """
    check_attack(eps, step_size, steps)
    check_images(x, bounds=clip)
    for name, value, allowed in (("goal", goal, GOALS), ("map", map, MAPS)):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    if (goal == "target") != (target_map is not None):
        raise ValueError('target_map and goal="target" go together: give both or neither')
    if len(x) == 0:
        raise ValueError("x holds no images")
    with torch.no_grad(), eval_mode(model):
        check_labels(y, len(x), model(x[:1]).shape[1])
    if softplus_beta is None:
        softplus_beta = 10.0 if map == "integrated_gradients" else math.inf
    how = (model, x, y, map, map_options or {})
    with _explaining(*how) as explain:
        maps, logits = explain(x, detach=True)
        predicted = logits.argmax(1)
    if goal == "top_k" and not 1 <= k <= maps[0].numel():
        raise ValueError(f"k must lie between 1 and the map's {maps[0].numel()} cells, got {k}")
    if start is None and random_start:
        start = draw_start(x.detach(), eps, norm, generator)
    raised = _goal(goal, maps, k, target_map)

    with _explaining(*how, softplus_beta) as explain:

        def objective(z):
            moved, logits = explain(z)
            value = raised(moved)
            if keep_prediction:
                ce = F.cross_entropy(logits, predicted, reduction="none")
                value = value - keep_prediction * ce
            return value

        x_adv = maximise(
            objective,
            x,
            eps=eps,
            step_size=step_size,
            steps=steps,
            norm=norm,
            clip=clip,
            start=start,
            restarts=restarts,
            best=best,
            generator=generator,
        )
    with _explaining(*how) as explain:
        maps_adv, logits = explain(x_adv, detach=True)
    return InterpretationAttack(x_adv, maps, maps_adv, logits.argmax(1) == predicted)


def _goal(goal, maps, k, target_map):
    """What is raised, per example, as a function of the maps of x'."""
    if goal == "top_k":
        top = maps.flatten(1).topk(k, dim=1).indices
        return lambda moved: -moved.flatten(1).gather(1, top).sum(1)
    if goal == "target":
        wanted = torch.as_tensor(target_map, dtype=maps.dtype, device=maps.device)
        try:
            wanted = wanted.expand_as(maps)
        except RuntimeError:
            raise ValueError(
                f"target_map must be broadcastable to the maps {tuple(maps.shape)}, got "
                f"{tuple(wanted.shape)}"
            ) from None
        return lambda moved: -(moved - wanted).flatten(1).square().sum(1)
    clean = mass_center(maps)
    tiny = torch.finfo(maps.dtype).tiny
    # squares under a root have no derivative at 0, where an attack without random start begins
    return lambda moved: ((mass_center(moved) - clean).square().sum(1) + tiny).sqrt()


def mass_center(maps: torch.Tensor) -> torch.Tensor:
    """Row and column of the centre of mass of |map|, (N, 2), in cells from the upper left one.

    Args:
        maps: (N, h, w), or (N, C, H, W), whose channels are added up.
    """
    weight = maps.abs()
    weight = weight.sum(1) if maps.dim() == 4 else weight
    total = weight.sum((1, 2)).clamp(min=torch.finfo(weight.dtype).tiny)
    cells = [torch.arange(n, dtype=weight.dtype, device=weight.device) for n in weight.shape[1:]]
    row = (weight.sum(2) * cells[0]).sum(1)
    column = (weight.sum(1) * cells[1]).sum(1)
    return torch.stack([row, column], 1) / total[:, None]


@contextmanager
def _explaining(model, x, y, map, options, softplus_beta=math.inf) -> Iterator:
    """Inside, a function z -> (maps of class y, logits), differentiable to z unless ``detach``."""
    with ExitStack() as stack:
        if softplus_beta != math.inf:
            stack.enter_context(softplus_surrogate(model, softplus_beta))
        if map == "cam":
            run = stack.enter_context(CamNetwork(model, x).attacked())

            def explain(z, detach=False):
                with torch.set_grad_enabled(not detach):
                    features, head, logits = run(z)
                    if head is None:
                        value = features[torch.arange(len(z), device=z.device), y]
                    else:
                        value = torch.einsum("nc,nchw->nhw", head[y], features)
                return value, logits
        else:
            stack.enter_context(substituted(model, attack_parameters(model)))
            stack.enter_context(eval_mode(model))
            classes = parse(y, x)

            def explain(z, detach=False):
                if map == "grad_cam":
                    value, logits = explain_layer(
                        "grad_cam",
                        mean_gradient,
                        model,
                        z,
                        classes,
                        detach=detach,
                        return_logits=True,
                        **options,
                    )
                    return value[:, 0], logits
                value = along_path(map, model, z, classes, detach=detach, **options)
                with torch.set_grad_enabled(not detach):
                    return value, model(z)

        yield explain
