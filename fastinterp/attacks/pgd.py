"""Projected gradient descent, and the form in which a model is attacked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from fastinterp._checks import check_attack, check_images, check_labels
from fastinterp._state import attack_parameters, eval_mode, substituted
from fastinterp.attacks.ascent import maximise
from fastinterp.attacks.ascent import random_start as draw_start
from fastinterp.attacks.losses import LOSSES, beaten, loss_function
from fastinterp.folding import Chain, find_attack_form
from fastinterp.maps import find_cam_network


def pgd(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    eps: float,
    step_size: float,
    steps: int,
    loss: str = "ce",
    target: torch.Tensor | None = None,
    final_step_size: float | None = None,
    norm: str = "Linf",
    clip: tuple[float, float] | None = (0.0, 1.0),
    random_start: bool = False,
    start: torch.Tensor | None = None,
    restarts: int = 1,
    best: bool = False,
    early_stop: bool = False,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Projected gradient descent; by default the paper's, the last iterate from x itself.

    The model is attacked in evaluation mode and is left as it was. Of several points (``best``,
    ``restarts``) each image keeps one that is misclassified (classified as its target) before one
    that is not, then the one of the largest loss.

    Args:
        model: images (N, C, H, W) -> logits (N, K).
        x: images within ``clip``.
        y: true classes, int64 (N,).
        eps, step_size: in units of x (1/255 is one grey level).
        steps: at least 1.
        loss: "ce", "margin" or "dlr", see fastinterp.attacks.losses.
        target: int64 (N,), classes to reach instead of leaving y.
        final_step_size: the step size falls linearly to this value; None keeps it.
        norm: "Linf" or "L2".
        clip: bounds of valid images, or None.
        random_start: start at a random point of the ball; False starts at x as the paper does.
        start: perturbation to start from instead.
        restarts: ascents in all; from the second on they start at a random point.
        best: choose among all iterates rather than the last ones.
        early_stop: an image leaves the batch as soon as it is misclassified, and that point is
            returned.
        generator: where random numbers come from; by default torch's global one.

    Returns:
        x', (N, C, H, W), detached.

    Raises:
        TypeError, ValueError: an argument is out of its range.

    Source: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks" (2018).

    Example, the strong check of a defence:
        >>> x_adv = pgd(model, x, y, eps=0.3, step_size=0.01, final_step_size=0.002, steps=200,
        ...             loss="margin", random_start=True, restarts=5, best=True, early_stop=True)
    """
    check_attack(eps, step_size, steps)
    check_images(x, bounds=clip)
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")
    if len(x) == 0:
        return x.detach().clone()
    if start is None and random_start:
        start = draw_start(x.detach(), eps, norm, generator)
    goal = y if target is None else target
    with attacked(model, x) as logits:
        with torch.no_grad():
            classes = logits(x[:1]).shape[1]
        check_labels(y, len(x), classes)
        if target is not None:
            check_labels(target, len(x), classes, "target")
        raised = loss_function(loss, classes, targeted=target is not None)
        only_value = not (best or early_stop or restarts > 1)

        def objective(z, rows=slice(None)):
            f, classes = logits(z), goal[rows]
            if only_value:
                return raised(f, y[rows], classes)
            return raised(f, y[rows], classes), beaten(f, classes, targeted=target is not None)

        if loss == "ce" and target is None:
            objective = as_cross_entropy(objective, logits, y)
        return maximise(
            objective,
            x,
            eps=eps,
            step_size=step_size,
            steps=steps,
            final_step_size=final_step_size,
            norm=norm,
            clip=clip,
            start=start,
            restarts=restarts,
            best=best,
            early_stop=early_stop,
            generator=generator,
        )


class _Logits(nn.Module):
    """Of an AttackForm the logits alone."""

    def __init__(self, run: nn.Module):
        super().__init__()
        self.run = run

    def forward(self, x):
        return self.run(x)[1]


def as_cross_entropy(objective: Callable, logits: nn.Module, y: torch.Tensor) -> Callable:
    """``objective``, known to ``maximise`` as the cross-entropy of what ``attacked`` gave."""
    if isinstance(logits, _Logits) and isinstance(logits.run, Chain):
        objective.ascend = partial(logits.run.ascend, y=y)
    return objective


@contextmanager
def attacked(model: nn.Module, x: torch.Tensor) -> Iterator[nn.Module]:
    """The model as an inner maximisation wants it: evaluation mode, no parameter gradients.

    Inside, the module that it gives computes the model's logits, in the form of fastinterp.folding
    where there is one, with the head folded in where the model has CAM; x are images (N, C, H, W).
    """
    network = find_cam_network(model, x)
    form = find_attack_form(model) if network is None else network.form
    if form is not None and form.fits():
        with form.made() as run:
            yield _Logits(run)
    else:
        with substituted(model, attack_parameters(model)), eval_mode(model):
            yield model
