"""One piece of a report: a network's accuracy under one attack, as JSON values.

``correct`` is a string with a 1 for every image that is still classified right, in the order of
the images, so that attacks can be compared image by image.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from fastinterp._state import eval_mode
from fastinterp.attacks import pgd, random_start
from fastinterp.data import LabelledImages
from fastinterp.evaluation.accuracy import attacked_batches, batches, predictions

LANDSCAPE = tuple(k / 20 for k in range(21))  # points between x and x'


def bits(mask: torch.Tensor) -> str:
    return "".join("1" if value else "0" for value in mask.tolist())


def clean(model: nn.Module, split: LabelledImages, index: torch.Tensor, batch_size: int) -> dict:
    """Which images are classified right."""
    right = [predictions(model, x) == y for x, y in batches(model, split, index, batch_size)]
    return {"correct": bits(torch.cat(right))}


def accuracy_along_steps(
    model: nn.Module,
    split: LabelledImages,
    index: torch.Tensor,
    *,
    eps: float,
    steps: tuple[int, ...],
    step_size: float,
    from_random_point: bool,
    seed: int,
    batch_size: int,
) -> dict:
    """PGD's last iterate after each number of steps, of one ascent: each goes on from the former.

    Returns:
        {"correct": {str(steps): bits}, "seconds": float}
    """
    right = {count: [] for count in steps}
    began = time.perf_counter()

    def attack(model, x, y, generator):
        start = random_start(x, eps, generator=generator) if from_random_point else None
        done = 0
        for count in steps:
            z = pgd(
                model,
                x,
                y,
                eps=eps,
                step_size=step_size,
                steps=count - done,
                start=start,
            )
            right[count].append(predictions(model, z) == y)
            start, done = z - x, count
        return z

    for _ in attacked_batches(model, split, index, attack, batch_size=batch_size, seed=seed):
        pass
    return {
        "correct": {str(count): bits(torch.cat(parts)) for count, parts in right.items()},
        "seconds": time.perf_counter() - began,
    }


def accuracy_under(
    attack: Callable[..., torch.Tensor],
    model: nn.Module,
    split: LabelledImages,
    index: torch.Tensor,
    *,
    others: tuple[nn.Module, ...] = (),
    seed: int,
    batch_size: int,
) -> dict:
    """Which images an attack on ``model`` leaves right, in ``model`` and in ``others``.

    Args:
        attack: see attacked_batches.

    Returns:
        {"correct": bits, "others": [bits, ...], "seconds": float}
    """
    right = [[] for _ in range(1 + len(others))]
    began = time.perf_counter()
    for _, y, x_adv in attacked_batches(
        model, split, index, attack, batch_size=batch_size, seed=seed
    ):
        for parts, network in zip(right, (model, *others), strict=True):
            parts.append(predictions(network, x_adv) == y)
    seconds = time.perf_counter() - began
    own, *rest = (bits(torch.cat(parts)) for parts in right)
    return {"correct": own, "others": rest, "seconds": seconds}


def landscape(
    model: nn.Module,
    split: LabelledImages,
    index: torch.Tensor,
    *,
    eps: float,
    steps: int,
    step_size: float,
    seed: int,
    batch_size: int,
) -> dict:
    """Mean cross-entropy from x to three points of the eps box, at the shares LANDSCAPE of the way.

    Returns:
        {"no start": [...], "random start": [...], "random signs": [...]}; the first two are the
        results of PGD, the third is a random corner of the box.
    """
    total = {name: torch.zeros(len(LANDSCAPE)) for name in ("no start", "random start", "signs")}

    def attack(model, x, y, generator):
        settings = dict(eps=eps, steps=steps, step_size=step_size)
        start = random_start(x, eps, generator=generator)
        ends = {
            "no start": pgd(model, x, y, **settings),
            "random start": pgd(model, x, y, start=start, **settings),
            "signs": (x + eps * random_start(x, 1.0, generator=generator).sign()).clamp(0, 1),
        }
        with torch.no_grad(), eval_mode(model):
            for name, end in ends.items():
                for i, share in enumerate(LANDSCAPE):
                    loss = F.cross_entropy(model(torch.lerp(x, end, share)), y, reduction="sum")
                    total[name][i] += loss.item()
        return ends["no start"]

    for _ in attacked_batches(model, split, index, attack, batch_size=batch_size, seed=seed):
        pass
    return {name: (values / len(index)).tolist() for name, values in total.items()}
