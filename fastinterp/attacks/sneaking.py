"""Interpretability sneaking attack (ISA): another class, as nearly as possible the same map.

With f the logits, c the class to reach and D the CAM discrepancy between x and x', every search
tries points of the eps box that were found by descending

    max(max_{i != c} f_i(x') - f_c(x'), -kappa) + gamma D(I(x), I(x'))

First the least eps is searched at which gamma = 0 reaches c, then, at an eps that is no less, the
largest gamma that still does. Without c the attack only leaves the true class.

Source: Boopathy et al., "Proper Network Interpretability Helps Adversarial Robustness in
Classification" (ICML 2020).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from fastinterp._checks import check_images, check_labels
from fastinterp.attacks.ascent import maximise
from fastinterp.attacks.losses import beaten, margin
from fastinterp.attacks.pgd import attacked
from fastinterp.discrepancy import discrepancy
from fastinterp.maps import CamNetwork
from fastinterp.ops.attack_step import columns, per_example

CLASSES = ("one", "two", "all")
NORMS = ("l1", "l2")
# Doubled as eps is, ten rounds from 5e-5 would end at a gamma that no image has failed yet.
GAMMA_GROWTH = 10


class LeastEps(NamedTuple):
    """Where the prediction turns."""

    x_adv: torch.Tensor  # (N, C, H, W), x itself where no eps was found
    eps: torch.Tensor  # (N,), infinite where no eps up to ``largest`` was found
    correct: torch.Tensor  # bool (N,), x is classified y: the ones to count


class SneakingAttack(NamedTuple):
    """The images of another class whose maps moved least."""

    x_adv: torch.Tensor  # (N, C, H, W), x itself where none was found
    gamma: torch.Tensor  # (N,), the largest that reached the class, 0 where only gamma = 0 did
    discrepancy: torch.Tensor  # D between x and x_adv, (N,)
    flipped: torch.Tensor  # bool (N,), x_adv is of the target class: the ones to count


def least_eps(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    target: torch.Tensor | None = None,
    kappa: float = 0.1,
    first: float = 0.05,
    largest: float = 1.0,
    rounds: int = 10,
    steps: int = 10,
    step_share: float = 0.2,
    clip: tuple[float, float] | None = (0.0, 1.0),
) -> LeastEps:
    """The least eps of every image at which sign steps on the margin loss change its class.

    An eps that fails is doubled until one succeeds, and from there on the bracket is halved. The
    model is attacked in evaluation mode and is left as it was.

    Args:
        model: images (N, C, H, W) -> logits (N, K).
        x: images within ``clip``.
        y: true classes, int64 (N,).
        target: int64 (N,), classes to reach; None for any but y.
        kappa: >= 0, the margin in logits beyond which nothing is gained.
        first, largest: the first and the largest eps tried, in units of x.
        rounds: of the search; each is an attack of ``steps`` steps from x.
        step_share: size of a step in units of eps.
        clip: bounds of valid images, or None.

    Returns:
        LeastEps.

    Raises:
        TypeError, ValueError: an argument is out of its range.
    """
    _check(x, clip, kappa, rounds, steps, step_share)
    if not 0 < first <= largest < math.inf:
        raise ValueError(f"0 < first <= largest < inf must hold, got {first} and {largest}")
    goal = y if target is None else target
    search = partial(maximise, steps=steps, clip=clip, best=True)
    with attacked(model, x) as logits:
        correct = _correct(logits, x, y, target)

        def objective(z):
            f = logits(z)
            reached = beaten(f, goal, target is not None)
            return margin(f, y, goal, target is not None).clamp(max=kappa), reached

        def attempt(eps):
            z = search(objective, x, eps=eps, step_size=step_share * eps)
            with torch.no_grad():
                return z, beaten(logits(z), goal, target is not None)

        x_adv = x.detach().clone()

        def keep(z, won):
            nonlocal x_adv
            x_adv = torch.where(columns(won, x), z, x_adv)

        start = torch.full((len(x),), first, device=x.device)
        _, high = _bisect(attempt, keep, start, rounds, 2, largest=largest, seek_least=True)
    return LeastEps(x_adv, high, correct)


def attack_sneaking(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    target: torch.Tensor,
    *,
    eps: float | torch.Tensor,
    classes: str = "two",
    norm: str = "l1",
    kappa: float = 0.1,
    first_gamma: float = 5e-5,
    rounds: int = 10,
    steps: int = 10,
    step_share: float = 0.2,
    known: torch.Tensor | None = None,
    clip: tuple[float, float] | None = (0.0, 1.0),
) -> SneakingAttack:
    """Images of the target class, in the eps box, whose CAMs are as near those of x as was found.

    D is that of CAM / (h w), which adds up to its logit, so that Proposition 1 bounds the two-class
    D of a flipped image from below. Of all points of the target class that the search for gamma
    tried, the one of the least D is kept. The model is attacked in evaluation mode and is left as
    it was.

    Args:
        model: images (N, C, H, W) -> logits (N, K), with global average pooling and a linear head.
        x: images within ``clip``.
        y: true classes, int64 (N,).
        target: int64 (N,), the classes to reach, other than y.
        eps: radius in units of x, a number or a tensor of shape () or (N,), as of ``least_eps``.
        classes: whose maps count: "one" is y, "two" is y and the target, "all" is every class.
        norm: "l1" or "l2", over the cells of a map.
        kappa: >= 0, the margin in logits beyond which nothing is gained.
        first_gamma: the first gamma tried, times 10 until one fails to reach the target.
        rounds: of the search for gamma; each is an attack of ``steps`` steps from x.
        step_share: size of a step in units of eps.
        known: points of the box, (N, C, H, W), as from a smaller eps; those of the target class are
            candidates too.
        clip: bounds of valid images, or None.

    Returns:
        SneakingAttack.

    Raises:
        TypeError, ValueError: an argument is out of its range.
        UnsupportedModelError: the model has no CAM.
    """
    _check(x, clip, kappa, rounds, steps, step_share)
    for name, value, allowed in (("classes", classes, CLASSES), ("norm", norm, NORMS)):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    if not 0 < first_gamma < math.inf:
        raise ValueError(f"first_gamma must be a finite number > 0, got {first_gamma}")
    eps = per_example("eps", eps, x).expand(len(x))
    if not eps.isfinite().all():
        raise ValueError(
            "eps must be finite; least_eps gives inf where it found none: leave these images out"
        )
    search = partial(maximise, steps=steps, clip=clip, best=True)
    with CamNetwork(model, x).attacked() as run:
        _correct(lambda z: run(z)[2], x, y, target)
        with torch.no_grad():
            features, _, logits = run(x.detach())
        # The discrepancy's second class is the predicted one of the logits it is given; here it is
        # the target from the start.
        wanted = F.one_hot(target, logits.shape[1]).to(logits.dtype)

        def look(z):
            moved, head, f = run(z)
            d = discrepancy(
                features, moved, head, wanted, y, classes=classes, norm=norm, normalize="pixels"
            )
            return d, margin(f, y, target, True).clamp(max=kappa), beaten(f, target, True)

        def attempt(gamma):
            def objective(z):
                d, ahead, reached = look(z)
                return ahead - gamma * d, reached

            z = search(objective, x, eps=eps, step_size=step_share * eps)
            with torch.no_grad():
                return z, look(z)[2]

        x_adv, least = x.detach().clone(), torch.full_like(eps, torch.inf)
        flipped = torch.zeros(len(x), dtype=torch.bool, device=x.device)

        def keep(z, won):
            nonlocal x_adv, least, flipped
            with torch.no_grad():
                d = look(z)[0].to(least)
            nearer = won & (d < least)
            x_adv = torch.where(columns(nearer, x), z, x_adv)
            least, flipped = torch.where(nearer, d, least), flipped | won

        keep(*attempt(torch.zeros_like(eps)))
        if known is not None:
            with torch.no_grad():
                keep(known.detach(), look(known.detach())[2])
        low, _ = _bisect(attempt, keep, torch.full_like(eps, first_gamma), rounds, GAMMA_GROWTH)
    return SneakingAttack(x_adv, low, torch.where(flipped, least, 0), flipped)


def _bisect(
    attempt: Callable,
    keep: Callable,
    value: torch.Tensor,
    rounds: int,
    growth: float,
    largest: float = math.inf,
    seek_least: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Brackets (low, high) of every example's turning point, from 0 and infinity.

    Below it ``attempt`` succeeds when the largest value is sought, above it when the least is.
    """
    low, high = torch.zeros_like(value), torch.full_like(value, torch.inf)
    for _ in range(rounds):
        z, won = attempt(value)
        keep(z, won)
        rises = ~won if seek_least else won
        low, high = torch.where(rises, value, low), torch.where(rises, high, value)
        value = torch.where(high.isfinite(), (low + high) / 2, growth * value).clamp(max=largest)
    return low, high


def _check(x, clip, kappa, rounds, steps, step_share) -> None:
    check_images(x, bounds=clip)
    if len(x) == 0:
        raise ValueError("x holds no images")
    for name, value in (("rounds", rounds), ("steps", steps)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not 0 <= kappa < math.inf:
        raise ValueError(f"kappa must be a finite number >= 0, got {kappa}")
    if not 0 < step_share < math.inf:
        raise ValueError(f"step_share must be a finite number > 0, got {step_share}")


def _correct(logits, x, y, target) -> torch.Tensor:
    """Checks the labels; which images are classified y."""
    with torch.no_grad():
        f = logits(x.detach())
    check_labels(y, len(x), f.shape[1])
    if target is not None:
        check_labels(target, len(x), f.shape[1], "target")
        if (target == y).any():
            raise ValueError("target must be another class than y for every image")
    return f.argmax(1) == y
