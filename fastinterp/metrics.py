"""How sure an accuracy is, and how alike two interpretation maps are; batched, on any device.

Maps are (N, ...), one number per example: everything behind the first dimension is one map.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import NormalDist

import torch
from torch.nn import functional as F

from fastinterp import ops
from fastinterp._checks import check_attack, check_images
from fastinterp.attacks import maximise, random_start


def wilson_interval(correct: int, examples: int, confidence: float = 0.95) -> tuple[float, float]:
    """The interval of true accuracies that ``correct`` of ``examples`` are compatible with.

    Unlike the normal approximation it stays within [0, 1] and has a width at 0 and at ``examples``.

    Args:
        correct: 0 .. examples.
        examples: at least 1.
        confidence: in (0, 1).

    Returns:
        Its ends, in [0, 1].

    Raises:
        ValueError: an argument is out of its range.

    Source: Wilson, "Probable Inference, the Law of Succession, and Statistical Inference" (1927).
    """
    if examples < 1 or not 0 <= correct <= examples:
        raise ValueError(
            f"correct must lie between 0 and examples >= 1, got {correct} of {examples}"
        )
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = correct / examples
    shrink = 1 / (1 + z**2 / examples)
    middle = shrink * (share + z**2 / (2 * examples))
    half = shrink * z * (share * (1 - share) / examples + z**2 / (4 * examples**2)) ** 0.5
    # Rounding must not put the observed share outside.
    return max(0.0, min(middle - half, share)), min(1.0, max(middle + half, share))


def kendall_tau(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Kendall's tau-b between two maps of every example, ties counted as scipy does.

    Args:
        a, b: (N, ...), floating, same shape.

    Returns:
        (N,), float64, in [-1, 1]; NaN where a map is constant, as no order is in it.

    Raises:
        TypeError, ValueError: not floating, or shapes differ.
    """
    return ops.kendall_tau(*_rows(a, b))


def spearman(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Spearman's rank correlation between two maps of every example; ties get their mean rank.

    Args:
        a, b: (N, ...), floating, same shape.

    Returns:
        (N,), float64, in [-1, 1]; NaN where a map is constant or holds NaN.

    Raises:
        TypeError, ValueError: not floating, or shapes differ.
    """
    ranks = [_mean_ranks(rows) for rows in _rows(a, b)]
    ranks = [rank - rank.mean(1, keepdim=True) for rank in ranks]
    scale = torch.linalg.vector_norm(ranks[0], dim=1) * torch.linalg.vector_norm(ranks[1], dim=1)
    return ((ranks[0] * ranks[1]).sum(1) / scale).clamp(-1, 1)


def top_k_intersection(a: torch.Tensor, b: torch.Tensor, k: int) -> torch.Tensor:
    """Share of the k largest cells of one map that are among the k largest of the other.

    Args:
        a, b: (N, ...), floating, same shape.
        k: 1 .. number of cells; among equal cells the first are taken.

    Returns:
        (N,), float64, in [0, 1].

    Raises:
        TypeError, ValueError: not floating, shapes differ or k is out of range.

    Source: Ghorbani et al., "Interpretation of Neural Networks is Fragile" (2019).
    """
    rows = _rows(a, b)
    cells = rows[0].shape[1]
    if not 1 <= k <= cells:
        raise ValueError(f"k must lie between 1 and the {cells} cells of a map, got {k}")
    # A stable sort, or ties would be broken otherwise on another device.
    chosen = [
        torch.zeros_like(row, dtype=torch.bool).scatter_(
            1, row.sort(stable=True, dim=1, descending=True).indices[:, :k], True
        )
        for row in rows
    ]
    return (chosen[0] & chosen[1]).sum(1).double() / k


def cosine_similarity(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Cosine of the angle between two maps of every example, (N,), float64; 0 for a zero map."""
    a, b = _rows(a, b)
    return F.cosine_similarity(a.double(), b.double(), dim=1)


def normalised_discrepancy(
    maps: torch.Tensor,
    maps_adv: torch.Tensor,
    weights: torch.Tensor | None = None,
    norm: str = "l1",
) -> torch.Tensor:
    """Distance between maps of x and x' in units of the size of the maps of x.

    sum_c w_c ||I_c(x) - I_c(x')|| / sum_c w_c ||I_c(x)||: the scale of the maps, which differs by
    orders between networks, cancels.

    Args:
        maps, maps_adv: (N, k, ...), the maps of k classes.
        weights: (N, k), of the classes (see discrepancy.class_weights); None weighs them alike.
        norm: "l1" or "l2".

    Returns:
        (N,), float64, >= 0; infinite or NaN where the maps of x are zero.

    Raises:
        ValueError: shapes differ, or norm is unknown.
    """
    if norm not in ("l1", "l2"):
        raise ValueError(f"norm must be l1 or l2, got {norm!r}")
    if maps.dim() < 3 or maps.shape != maps_adv.shape:
        raise ValueError(
            "maps and maps_adv must both be (N, k, ...), got "
            f"{tuple(maps.shape)} and {tuple(maps_adv.shape)}"
        )
    order = 1 if norm == "l1" else 2
    clean, moved = (m.double().flatten(2) for m in (maps, maps_adv - maps))
    sizes = [torch.linalg.vector_norm(m, ord=order, dim=2) for m in (moved, clean)]
    if weights is not None:
        sizes = [weights.double() * size for size in sizes]
    return sizes[0].sum(1) / sizes[1].sum(1)


def slope(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Slope of the least-squares line through the points of every row that are not NaN.

    Args:
        x, y: (..., M), same shape; as in eps / eps_min and normalised discrepancy.

    Returns:
        (...), float64; NaN where fewer than two points differ in x.
    """
    x, y = x.double(), y.double()
    if x.shape != y.shape:
        raise ValueError(
            f"x and y must have the same shape, got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    known = x.isfinite() & y.isfinite()
    count = known.sum(-1, keepdim=True)
    dx, dy = (
        torch.where(known, v - torch.where(known, v, 0).sum(-1, keepdim=True) / count, 0)
        for v in (x, y)
    )
    spread = (dx * dx).sum(-1)
    return torch.where(spread > 0, (dx * dy).sum(-1) / spread, torch.nan)


def completeness_gap(
    maps: torch.Tensor, scores: torch.Tensor, reduction: str = "sum"
) -> torch.Tensor:
    """How far maps are from adding up to what they explain.

    Args:
        maps: (N, k, ...), the maps of k classes.
        scores: (N, k), what they explain: the logits for CAM, f(x) - f(baseline) for integrated
            gradients.
        reduction: "sum" over a map, or "mean", which is what a CAM's logit is.

    Returns:
        (N, k), float64, >= 0, in units of the scores.

    Raises:
        ValueError: shapes do not fit, or reduction is unknown.
    """
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction must be sum or mean, got {reduction!r}")
    if maps.dim() < 3 or maps.shape[:2] != scores.shape:
        raise ValueError(
            "maps must be (N, k, ...) and scores (N, k), got "
            f"{tuple(maps.shape)} and {tuple(scores.shape)}"
        )
    total = getattr(maps.double().flatten(2), reduction)(2)
    return (total - scores.double()).abs()


def local_lipschitz(
    explain: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    *,
    eps: float,
    steps: int = 10,
    step_size: float | None = None,
    restarts: int = 1,
    clip: tuple[float, float] | None = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """A lower bound of the map's Lipschitz constant around every image, found by ascent.

    max over x' in the eps box of ||I(x) - I(x')||_2 / ||x - x'||_2, by projected gradient ascent
    from random points; the largest ratio seen at a start or an end is kept.

    Args:
        explain: x (N, C, H, W) -> maps (N, ...), differentiable to x, examples apart.
        x: images within ``clip``.
        eps: radius of the box, in units of x.
        steps: of every ascent; 0 only samples.
        step_size: None for 2.5 eps / steps.
        restarts: ascents per image.
        clip: bounds of valid images, or None.
        generator: of the random points.

    Returns:
        (N,), float64, >= 0.

    Raises:
        TypeError, ValueError: an argument is out of its range.

    Source: Alvarez-Melis and Jaakkola, "On the Robustness of Interpretability Methods" (2018).
    """
    if restarts < 1:
        raise ValueError(f"restarts must be at least 1, got {restarts}")
    step_size = 2.5 * eps / max(steps, 1) if step_size is None else step_size
    check_attack(eps, step_size, max(steps, 1))
    check_images(x, bounds=clip)
    x = x.detach()
    with torch.no_grad():
        clean = explain(x).detach()

    def ratio(z):
        moved = torch.linalg.vector_norm((explain(z) - clean).flatten(1), dim=1)
        # Clipping may leave a start where it was; 0 / tiny is then 0, and its gradient finite.
        return moved / torch.linalg.vector_norm((z - x).flatten(1), dim=1).clamp_min(1e-12)

    largest = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for _ in range(restarts):
        start = random_start(x, eps, generator=generator)
        for count in {0, steps}:
            z = maximise(
                ratio, x, eps=eps, step_size=step_size, steps=count, clip=clip, start=start
            )
            with torch.no_grad():
                largest = torch.maximum(largest, ratio(z).double())
    return largest


def _rows(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    for name, maps in (("a", a), ("b", b)):
        if not isinstance(maps, torch.Tensor) or not maps.is_floating_point():
            seen = maps.dtype if isinstance(maps, torch.Tensor) else type(maps).__name__
            raise TypeError(f"{name} must be a floating point tensor of maps, got {seen}")
    if a.dim() < 2 or a.shape != b.shape:
        raise ValueError(
            f"a and b must both be maps (N, ...), got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    return a.detach().flatten(1), b.detach().flatten(1)


def _mean_ranks(rows: torch.Tensor) -> torch.Tensor:
    """Ranks 1 .. M of every row, float64; equal values share the mean of theirs."""
    order = rows.sort(1).values
    below = torch.searchsorted(order, rows.contiguous())
    up_to = torch.searchsorted(order, rows.contiguous(), right=True)
    ranks = (below + up_to + 1).double() / 2
    return torch.where(rows.isnan().any(1, keepdim=True), torch.nan, ranks)
