"""Unforeseen attacks (UAR): x' far from x in no Lp norm, but seen as the same by people.

    kind        variables z of an image               eps is or scales      in units of
    jpeg_linf   quantised DCT coefficients            max |z|               half a step
    jpeg_l2                                           ||z||_2, |z| <= 2
    jpeg_l1                                           ||z||_1, |z| <= 2
    elastic     flow, then smoothed                   max |z|               pixels
    fog         diamond-square's numbers, in [0,1]    thickness of the fog  grey levels
    snow        brightness of flakes, within budgets  brightness of all     white
    gabor       weights at sparse points, in [-1,1]   height of the noise   grey levels

Source: Kang, Sun, Hendrycks, Brown and Steinhardt, "Testing Robustness Against Unforeseen
Adversaries" (2019), https://github.com/ddkang/advex-uar.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from fastinterp._checks import check_attack, check_images, check_labels
from fastinterp.attacks.ascent import maximise
from fastinterp.attacks.distortions import DISTORTIONS
from fastinterp.attacks.losses import LOSSES, beaten, loss_function
from fastinterp.attacks.pgd import attacked


class Calibration(NamedTuple):
    """Six sizes of a distortion, alike in what they leave of networks trained against it."""

    eps: tuple[float, ...]
    accuracies: tuple[float, ...]  # ATA, the best accuracy of adversarial training, by eps


# The repository's analysis/calibrations: ResNet-56 on CIFAR-10, ResNet-50 on ImageNet-100, 200
# steps. Fog, snow and gabor are calibrated for ImageNet-100 alone.
CALIBRATED = {
    "jpeg_linf": {
        "cifar10": Calibration(
            (0.03125, 0.0625, 0.125, 0.25, 0.5, 1), (0.897, 0.870, 0.831, 0.786, 0.697, 0.354)
        ),
        "imagenet100": Calibration(
            (0.0625, 0.125, 0.25, 0.5, 1, 2), (0.850, 0.832, 0.793, 0.728, 0.348, 0.011)
        ),
    },
    "jpeg_l2": {
        "cifar10": Calibration((0.25, 0.5, 1, 2, 4, 8), (0.922, 0.910, 0.884, 0.858, 0.812, 0.720)),
        "imagenet100": Calibration(
            (8, 16, 32, 64, 128, 256), (0.848, 0.825, 0.789, 0.723, 0.475, 0.034)
        ),
    },
    "jpeg_l1": {
        "cifar10": Calibration(
            (2, 8, 64, 256, 512, 1024), (0.914, 0.881, 0.802, 0.689, 0.563, 0.377)
        ),
        "imagenet100": Calibration(
            (256, 1024, 4096, 16384, 65536, 131072), (0.848, 0.818, 0.762, 0.671, 0.464, 0.418)
        ),
    },
    "elastic": {
        "cifar10": Calibration(
            (0.125, 0.25, 0.5, 1, 2, 8), (0.874, 0.813, 0.721, 0.582, 0.454, 0.278)
        ),
        "imagenet100": Calibration(
            (0.25, 0.5, 2, 4, 8, 16), (0.859, 0.832, 0.781, 0.756, 0.570, 0.225)
        ),
    },
    "fog": {
        "imagenet100": Calibration(
            (128, 256, 512, 2048, 4096, 8192), (0.858, 0.838, 0.790, 0.684, 0.679, 0.647)
        ),
    },
    "snow": {
        "imagenet100": Calibration(
            (0.0625, 0.125, 0.25, 2, 4, 8), (0.840, 0.811, 0.777, 0.656, 0.595, 0.412)
        ),
    },
    "gabor": {
        "imagenet100": Calibration(
            (6.25, 12.5, 25, 400, 800, 1600), (0.840, 0.798, 0.798, 0.662, 0.447, 0.146)
        ),
    },
}


def unforeseen(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    kind: str,
    *,
    eps: float,
    steps: int = 200,
    step_size: float | None = None,
    loss: str = "ce",
    target: torch.Tensor | str | None = "random",
    best: bool = True,
    early_stop: bool = False,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Searches a distortion for what the model gets wrong, from a random point of it.

    The model is attacked in evaluation mode and is left as it was. With eps 0 elastic and gabor
    give x, jpeg x after its round trip; fog has stretched the contrast of x and snow paled it.

    Args:
        model: images (N, C, H, W) -> logits (N, K).
        x: images in [0,1], grey or RGB, of any size.
        y: true classes, int64 (N,).
        kind: a key of CALIBRATED.
        eps: size of the distortion, in the units above; CALIBRATED has the published ones.
        steps: at least 1.
        step_size: in units of the variables; None is eps / sqrt(steps) for jpeg and elastic, and
            1 / sqrt(1000 steps) for the others, whose variables have a range of 1. jpeg_l1 knows
            no step size: its steps are those of Frank and Wolfe.
        loss: "ce", "margin" or "dlr", see fastinterp.attacks.losses.
        target: the class to reach, int64 (N,); "random" draws a wrong one for each image, as the
            source does; None leaves y instead.
        best: of all iterates each image keeps one that is not classified as y before one that is,
            then the one of the largest loss; False keeps the last, as the source does.
        early_stop: an image leaves the batch as soon as it is not classified as y.
        generator: where random numbers come from; by default torch's global one.

    Returns:
        x', (N, C, H, W), in [0,1], detached.

    Raises:
        TypeError, ValueError: an argument is out of its range, or the kind is not for such images.
    """
    check_attack(eps, 1.0 if step_size is None else step_size, steps)
    check_images(x)
    for name, value, allowed in (("kind", kind, DISTORTIONS), ("loss", loss, LOSSES)):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    x = x.detach()
    if len(x) == 0:
        return x.clone()
    with attacked(model, x) as logits:
        with torch.no_grad():
            classes = logits(x[:1]).shape[1]
        check_labels(y, len(x), classes)
        if isinstance(target, str):
            if target != "random":
                raise ValueError(f'target must be a tensor, "random" or None, got {target!r}')
            target = other_classes(y, classes, generator)
        goal = y if target is None else target
        check_labels(goal, len(x), classes, "target")
        raised = loss_function(loss, classes, targeted=target is not None)
        distortion = DISTORTIONS[kind](x, eps, generator)

        def objective(z, rows=slice(None)):
            f = logits(distortion.render(z, rows))
            value = raised(f, y[rows], goal[rows])
            return (value, beaten(f, y[rows])) if best or early_stop else value

        z = maximise(
            objective,
            torch.full_like(distortion.start, distortion.centre),
            eps=distortion.radius,
            step_size=distortion.reach / steps**0.5 if step_size is None else step_size,
            steps=steps,
            norm=distortion.norm,
            clip=distortion.clip,
            start=distortion.start - distortion.centre,
            best=best,
            early_stop=early_stop,
            step=distortion.step,
        )
        with torch.no_grad():
            return distortion.render(z, slice(None))


def uar(accuracies: Sequence[float], trained: Sequence[float]) -> float:
    """Accuracies at the calibrated sizes in units of what adversarial training reaches.

    Args:
        accuracies: under a kind of attack, one for each eps of its Calibration.
        trained: the Calibration's accuracies.

    Returns:
        sum(accuracies) / sum(trained); 1 is as good as training against that very attack.

    Raises:
        ValueError: they are not as many as each other, or there are none.
    """
    if not len(accuracies) == len(trained) > 0:
        raise ValueError(
            f"uar needs an accuracy for each calibrated eps, got {len(accuracies)} for "
            f"{len(trained)}"
        )
    return sum(accuracies) / sum(trained)


def other_classes(y: torch.Tensor, classes: int, generator: torch.Generator | None) -> torch.Tensor:
    """A class for each of y (N,), uniform among the others."""
    if classes < 2:
        raise ValueError("a random target needs a model of at least 2 classes")
    device = generator.device if generator else y.device
    shift = torch.randint(classes - 1, y.shape, device=device, generator=generator)
    return (y + 1 + shift.to(y.device)) % classes
