"""One piece of a report: one network under one attack, as JSON values.

``correct`` is a string with a 1 for every image that is still classified right, in the order of
the images, so that attacks can be compared image by image.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from fastinterp import metrics
from fastinterp._state import eval_mode
from fastinterp.attacks import (
    attack_interpretation,
    attacked,
    margin,
    maximise,
    pgd,
    random_start,
    released_draws,
)
from fastinterp.data import Split
from fastinterp.discrepancy import class_weights, map_distance
from fastinterp.evaluation.accuracy import attacked_batches, batches, predictions
from fastinterp.maps import cam

FIRST_EPS = 0.05  # of the search for the least successful one
LANDSCAPE = tuple(k / 20 for k in range(21))  # points between x and x'


def bits(mask: torch.Tensor) -> str:
    return "".join("1" if value else "0" for value in mask.tolist())


def clean(model: nn.Module, split: Split, index: torch.Tensor, batch_size: int) -> dict:
    """Which images are classified right."""
    right = [predictions(model, x) == y for x, y in batches(model, split, index, batch_size)]
    return {"correct": bits(torch.cat(right))}


def accuracy_along_steps(
    model: nn.Module,
    split: Split,
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

    def attack(model, x, y, network, generator):
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
                network=network,
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
    split: Split,
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


def aai(
    model: nn.Module,
    split: Split,
    index: torch.Tensor,
    *,
    eps: float,
    k: int,
    steps: int,
    step_size: float,
    seed: int,
    batch_size: int,
) -> dict:
    """How alike the true class's CAM is before and after an attack on that map alone.

    The attack lowers the sum of the map over the k cells that were largest, from the random points
    of the released evaluation.

    Returns:
        {"same": bits, whether the predicted class stayed, "tau", "spearman", "top_k", "cosine": a
        number per image or None where a map is constant, "seconds": float}

    Source: Boopathy et al. (ICML 2020), after Ghorbani et al. (2019).
    """
    found = {"same": [], "tau": [], "spearman": [], "top_k": [], "cosine": []}
    began = time.perf_counter()
    image = split.images.shape[1:]
    starts = released_draws(len(split), len(index), image, _classes(model, split), seed).start(eps)
    for (x, y), start in zip(
        batches(model, split, index, batch_size), starts.split(batch_size), strict=True
    ):
        attack = attack_interpretation(
            model, x, y, eps=eps, k=k, steps=steps, step_size=step_size, start=start.to(x)
        )
        maps = attack.maps, attack.maps_adv
        found["same"].append(attack.unchanged)
        found["tau"].append(metrics.kendall_tau(*maps))
        found["spearman"].append(metrics.spearman(*maps))
        found["top_k"].append(metrics.top_k_intersection(*maps, k))
        found["cosine"].append(metrics.cosine_similarity(*maps))
    same = bits(torch.cat(found.pop("same")))
    numbers = {name: _numbers(torch.cat(parts)) for name, parts in found.items()}
    return {"same": same, **numbers, "seconds": time.perf_counter() - began}


def _classes(model: nn.Module, split: Split) -> int:
    x, _ = next(batches(model, split, torch.arange(1), 1))
    with torch.no_grad(), eval_mode(model):
        return model(x).shape[1]


def bound(
    model: nn.Module,
    split: Split,
    index: torch.Tensor,
    *,
    rounds: int,
    steps: int,
    seed: int,
    batch_size: int,
) -> dict:
    """Proposition 1 at the least eps, found by bisection, at which PGD on the margin succeeds.

    With maps that add up to their logits (CAM / (h w)) and x' classified t',
    (d_t + d_t') / 2 >= (f_t(x) - f_t'(x)) / 2. Images that are wrong from the start, and those that
    no eps up to 1 changes, are left out.

    Returns:
        {"margin": right side, "discrepancy": left side, "eps": radius}, a number per image.

    Source: Boopathy et al. (ICML 2020), Proposition 1.
    """
    found = {"margin": [], "discrepancy": [], "eps": []}

    def attack(model, x, y, network, generator):
        eps = torch.full((len(x),), FIRST_EPS, device=x.device)
        low, high = torch.zeros_like(eps), torch.full_like(eps, torch.inf)
        least = x.clone()
        with attacked(model, network) as logits:
            for _ in range(rounds):
                z = maximise(
                    lambda z: margin(logits(z), y),
                    x,
                    eps=eps,
                    step_size=2.5 * eps / steps,
                    steps=steps,
                )
                with torch.no_grad():
                    won = logits(z).argmax(1) != y
                least = torch.where(won[:, None, None, None], z, least)
                low, high = torch.where(won, low, eps), torch.where(won, eps, high)
                eps = torch.where(high.isfinite(), (low + high) / 2, 2 * eps).clamp(max=1)
        found["eps"].append(high)
        return least

    for x, y, x_adv in attacked_batches(
        model, split, index, attack, batch_size=batch_size, seed=seed
    ):
        with eval_mode(model), torch.no_grad():
            maps, logits = cam(model, x, return_logits=True)
            maps_adv, logits_adv = cam(model, x_adv, return_logits=True)
        distance = map_distance(maps, maps_adv, normalize="pixels")
        weights = class_weights("two", logits_adv, y)
        reached = logits_adv.argmax(1, keepdim=True)
        margins = (logits.gather(1, y[:, None]) - logits.gather(1, reached))[:, 0] / 2
        counted = (logits.argmax(1) == y) & (reached[:, 0] != y)
        found["margin"].append(margins[counted])
        found["discrepancy"].append((weights * distance).sum(1)[counted])
        found["eps"][-1] = found["eps"][-1][counted]
    return {name: torch.cat(parts).tolist() for name, parts in found.items()}


def _numbers(values: torch.Tensor) -> list[float | None]:
    """As JSON has them, which knows no NaN."""
    return [value if value == value else None for value in values.tolist()]


def landscape(
    model: nn.Module,
    split: Split,
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

    def attack(model, x, y, network, generator):
        settings = dict(eps=eps, steps=steps, step_size=step_size, network=network)
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
