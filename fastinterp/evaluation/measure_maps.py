"""One piece of a report: a network's maps under one attack, as JSON values."""

from __future__ import annotations

import time

import torch
from torch import nn
from torch.nn import functional as F

from fastinterp import metrics
from fastinterp._state import eval_mode
from fastinterp.attacks import attack_interpretation, attack_sneaking, least_eps, released_draws
from fastinterp.data import LabelledImages
from fastinterp.discrepancy import class_weights, map_distance
from fastinterp.evaluation.accuracy import attacked_batches, batches
from fastinterp.evaluation.measure import bits
from fastinterp.maps import cam


def aai(
    model: nn.Module,
    split: LabelledImages,
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
    image = split.image_shape
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


def _classes(model: nn.Module, split: LabelledImages) -> int:
    x, _ = next(batches(model, split, torch.arange(1), 1))
    with torch.no_grad(), eval_mode(model):
        return model(x).shape[1]


def isa(
    model: nn.Module,
    split: LabelledImages,
    index: torch.Tensor,
    *,
    classes: str,
    ratios: tuple[float, ...],
    norm: str,
    rounds: int,
    steps: int,
    seed: int,
    batch_size: int,
) -> dict:
    """How near to the maps of x the maps of an image of a random other class can be brought.

    Boxes are ``ratios``, increasing, times the least eps that reaches the class; the points found
    in one are candidates in the next. Targets are those of the released evaluation.

    Returns:
        {"eps": the least eps, "discrepancy": {str(ratio): normalised discrepancy}, "seconds":
        float}, a number per image, or None where x is wrong already or nothing reached the class.

    Source: Boopathy et al. (ICML 2020), interpretability sneaking attack.
    """
    found = {"eps": [], **{ratio: [] for ratio in ratios}}
    count, began = _classes(model, split), time.perf_counter()
    draws = released_draws(len(split), len(index), split.image_shape, count, seed)
    targets = draws.target(split.labels[index], count).split(batch_size)
    settings = dict(rounds=rounds, steps=steps, step_share=2 / steps)
    for (x, y), target in zip(batches(model, split, index, batch_size), targets, strict=True):
        target = target.to(y.device)
        search = least_eps(model, x, y, target=target, **settings)
        known, counted = search.x_adv, search.correct & search.eps.isfinite()
        found["eps"].append(torch.where(counted, search.eps, torch.nan))
        weights = class_weights(classes, F.one_hot(target, count).to(x.dtype), y)
        maps = _maps(model, x)
        for ratio in ratios:
            attack = attack_sneaking(
                model,
                x,
                y,
                target,
                eps=(ratio * search.eps).clamp(max=1),
                classes=classes,
                norm=norm,
                known=known,
                **settings,
            )
            known = attack.x_adv
            moved = metrics.normalised_discrepancy(maps, _maps(model, known), weights, norm)
            found[ratio].append(torch.where(counted & attack.flipped, moved, torch.nan))
    eps, *each = (_numbers(torch.cat(parts)) for parts in found.values())
    by_ratio = dict(zip(map(str, ratios), each, strict=True))
    return {"eps": eps, "discrepancy": by_ratio, "seconds": time.perf_counter() - began}


@torch.no_grad()
def _maps(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """CAMs of every class, (N, K, h, w)."""
    with eval_mode(model):
        return cam(model, x)


def bound(
    model: nn.Module,
    split: LabelledImages,
    index: torch.Tensor,
    *,
    rounds: int,
    steps: int,
    seed: int,
    batch_size: int,
) -> dict:
    """Proposition 1 at the least eps at which sign steps on the margin succeed, see least_eps.

    With maps that add up to their logits (CAM / (h w)) and x' classified t',
    (d_t + d_t') / 2 >= (f_t(x) - f_t'(x)) / 2. Images that are wrong from the start, and those that
    no eps up to 1 changes, are left out.

    Returns:
        {"margin": right side, "discrepancy": left side, "eps": radius}, a number per image.

    Source: Boopathy et al. (ICML 2020), Proposition 1.
    """
    found = {"margin": [], "discrepancy": [], "eps": []}

    def attack(model, x, y, generator):
        search = least_eps(model, x, y, rounds=rounds, steps=steps, step_share=2.5 / steps)
        found["eps"].append(search.eps)
        return search.x_adv

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
