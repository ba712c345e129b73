"""Gradients averaged over many points: along a path, over baselines, over noise.

    integrated gradients   (x - a) sum_k w_k ds_c(a + t_k (x - a))/dz
    expected gradients     mean over draws of (x - b) ds_c(b + t (x - b))/dz for random b and t
    smooth grad            mean over draws of ds_c(x + n)/dx, n normal

All points are one batch. The model runs in evaluation mode: with a batch's own statistics, points
of one path would change each other's gradients.

Sources: Sundararajan et al., "Axiomatic Attribution for Deep Networks" (2017); Erion et al.,
"Improving Performance of Deep Learning Models with Axiomatic Attribution Priors and Expected
Gradients" (2021); Smilkov et al., "SmoothGrad" (2017).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn

from fastinterp._checks import check_images
from fastinterp.maps._call import borrowed, constant, gradients, leaf, recording, run
from fastinterp.maps._target import Classes, at_least_float, check_of, parse, scores

METHODS = ("left", "right", "middle", "trapezoid", "gauss-legendre")


def integrated_gradients(
    model: nn.Module,
    x: torch.Tensor,
    target: int | torch.Tensor | None = None,
    *,
    baseline: float | torch.Tensor = 0.0,
    steps: int = 50,
    method: str = "right",
    internal_batch_size: int | None = None,
    of: str = "logit",
    detach: bool = False,
    return_delta: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Integrated gradients of each example's score on the straight line from a baseline to x.

    The map sums to s_c(x) - s_c(baseline) as far as the quadrature is exact. The model runs in
    evaluation mode.

    Args:
        model: images -> logits (N, K).
        x: images (N, C, H, W) in [0,1].
        target: None for every class, a class, or int64 (N,) or (N, k).
        baseline: a number, or a tensor broadcastable to x.
        steps: points on the path, >= 1; >= 2 for "trapezoid", whose points include both ends.
        method: "left", "right", "middle", "trapezoid" or "gauss-legendre".
        internal_batch_size: most images in one forward pass; None for N * steps. Same values and
            gradients.
        of: score s_c: "logit", "log_prob", or "loss", the cross-entropy with c as the true class.
        detach: True for a constant; False for a map that is differentiable with respect to every
            parameter, and to x and the baseline where they require gradients.
        return_delta: also the error of completeness, sum(map) - (s_c(x) - s_c(baseline)).

    Returns:
        (N, C, H, W) for a class or (N,), (N, k or K, C, H, W) for (N, k) or None; float32, or
        float64 for float64 x. With return_delta, (map, delta), delta (N,) or (N, k or K).

    Raises:
        TypeError, ValueError: an argument is out of range, or the output is not (N, K).
        RuntimeError: gradients are disabled and detach is False, or the output has none.
    """
    check_images(x)
    return along_path(
        "integrated_gradients",
        model,
        x,
        parse(target, x),
        *(baseline, steps, method, internal_batch_size, of, detach, return_delta),
    )


def expected_gradients(
    model: nn.Module,
    x: torch.Tensor,
    target: int | torch.Tensor | None = None,
    *,
    baselines: torch.Tensor,
    samples: int = 1,
    generator: torch.Generator | None = None,
    internal_batch_size: int | None = None,
    of: str = "logit",
    detach: bool = False,
) -> torch.Tensor:
    """Integrated gradients averaged over random baselines and points of the path.

    Args:
        model, x, target, internal_batch_size, of, detach: as in integrated_gradients; the model
            runs in evaluation mode.
        baselines: images (M, C, H, W) to draw from, for each example and sample one.
        samples: draws for each example, >= 1.
        generator: where random numbers come from; by default torch's global one.

    Returns:
        A map as integrated_gradients gives it.

    Raises:
        As integrated_gradients.
    """
    check_images(x)
    classes = parse(target, x)
    if not isinstance(baselines, torch.Tensor) or baselines.shape[1:] != x.shape[1:]:
        seen = getattr(baselines, "shape", None)
        seen = type(baselines).__name__ if seen is None else tuple(seen)
        raise ValueError(
            f"baselines must be a tensor of images (M, {', '.join(map(str, x.shape[1:]))}), "
            f"got {seen}"
        )
    if len(baselines) == 0:
        raise ValueError("baselines must hold at least one image")
    _check_count("samples", samples)
    n, where = len(x), generator.device if generator else x.device
    drawn = torch.randint(len(baselines), (samples, n), generator=generator, device=where)
    t = torch.rand((samples, n, 1, 1, 1), generator=generator, device=where)
    baselines = baselines.to(x.device, x.dtype)[drawn.to(x.device)]
    t = t.to(x.device, x.dtype)
    with recording(detach, "expected_gradients"):
        z, b = (constant(v) if detach else v for v in (x, baselines))
        points = b + t * (z - b)
        gradient = _at_points(model, points, classes, of, detach, internal_batch_size)
        return _mean((z - b)[:, :, None] * gradient, classes, detach)


def smooth_grad(
    model: nn.Module,
    x: torch.Tensor,
    target: int | torch.Tensor | None = None,
    *,
    noise: float = 0.15,
    samples: int = 25,
    generator: torch.Generator | None = None,
    internal_batch_size: int | None = None,
    of: str = "logit",
    detach: bool = False,
) -> torch.Tensor:
    """Input gradient averaged over images with normal noise, which are not clipped to [0,1].

    Args:
        model, x, target, internal_batch_size, of, detach: as in integrated_gradients; the model
            runs in evaluation mode.
        noise: standard deviation in units of x, >= 0.
        samples: draws for each example, >= 1.
        generator: where random numbers come from; by default torch's global one.

    Returns:
        A map as integrated_gradients gives it.

    Raises:
        As integrated_gradients.
    """
    check_images(x)
    classes = parse(target, x)
    if not 0 <= noise < math.inf:
        raise ValueError(f"noise must be a finite number >= 0, got {noise}")
    _check_count("samples", samples)
    where = generator.device if generator else x.device
    draws = torch.randn((samples, *x.shape), generator=generator, device=where)
    draws = draws.to(x.device, x.dtype)
    with recording(detach, "smooth_grad"):
        points = (constant(x) if detach else x) + noise * draws
        gradient = _at_points(model, points, classes, of, detach, internal_batch_size)
        return _mean(gradient, classes, detach)


def along_path(
    name: str,
    model: nn.Module,
    x: torch.Tensor,
    classes: Classes,
    baseline: float | torch.Tensor = 0.0,
    steps: int = 50,
    method: str = "right",
    internal_batch_size: int | None = None,
    of: str = "logit",
    detach: bool = False,
    return_delta: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """integrated_gradients of any x, whatever its range."""
    check_of(of)
    t, weights = _quadrature(method, steps, x)
    baseline = _broadcast_baseline(baseline, x)
    with recording(detach, name):
        z, a = (constant(v) if detach else v for v in (x, baseline))
        points = a + t.view(-1, 1, 1, 1, 1) * (z - a)
        gradient = _at_points(model, points, classes, of, detach, internal_batch_size)
        with torch.autocast(x.device.type, enabled=False):
            mean = torch.tensordot(weights.to(gradient.dtype), gradient, 1)
            value = (z - a)[:, None] * mean
        if return_delta:
            with borrowed(model, x, differentiable=not detach, evaluation=True) as net:
                ends = scores(run(net, torch.cat([z, a])), classes.repeated(2), of)
            end, start = ends.chunk(2)
            delta = value.flatten(2).sum(2) - (end - start)
        if detach:
            value = value.detach()
        value = value[:, 0] if classes.single else value
        if not return_delta:
            return value
        delta = delta.detach() if detach else delta
        return value, delta[:, 0] if classes.single else delta


def _quadrature(method: str, steps: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Points t in [0,1] and weights, which sum to 1, as tensors like x."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    _check_count("steps", steps, 2 if method == "trapezoid" else 1)
    t, weights = (np.arange(steps) + 0.5) / steps, np.full(steps, 1 / steps)
    if method == "left":
        t = np.arange(steps) / steps
    elif method == "right":
        t = np.arange(1, steps + 1) / steps
    elif method == "trapezoid":
        t, weights = np.linspace(0, 1, steps), np.full(steps, 1 / (steps - 1))
        weights[[0, -1]] /= 2
    elif method == "gauss-legendre":
        t, weights = np.polynomial.legendre.leggauss(steps)
        t, weights = (t + 1) / 2, weights / 2
    return tuple(torch.as_tensor(v, dtype=x.dtype, device=x.device) for v in (t, weights))


def _broadcast_baseline(baseline, x: torch.Tensor) -> torch.Tensor:
    tensor = torch.as_tensor(baseline, dtype=x.dtype, device=x.device)
    try:
        return tensor.expand_as(x)
    except RuntimeError:
        raise ValueError(
            f"baseline must be a number or broadcastable to x {tuple(x.shape)}, got shape "
            f"{tuple(tensor.shape)}"
        ) from None


def _check_count(name: str, value: int, least: int = 1) -> None:
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")


def _at_points(model, points, classes, of, detach, internal_batch_size):
    """Score gradients (P, N, k, C, H, W) at points (P, N, C, H, W)."""
    check_of(of)
    if internal_batch_size is not None:
        _check_count("internal_batch_size", internal_batch_size)
    count, n = points.shape[:2]
    flat, classes = points.flatten(0, 1), classes.repeated(count)
    size = max(internal_batch_size or len(flat), 1)
    pieces = []
    graph = not detach or not classes.single
    with borrowed(model, points, differentiable=graph, evaluation=True) as net:
        for start in range(0, max(len(flat), 1), size):
            rows = slice(start, start + size)
            z = leaf(flat[rows], detach)
            logits = run(net, z)
            some = classes.rows(rows)
            some.check_below(logits.shape[1])
            with torch.autocast(points.device.type, enabled=False):
                pieces.append(gradients(scores(logits, some, of), z, not detach))
    return at_least_float(torch.cat(pieces)).unflatten(0, (count, n))


def _mean(values, classes, detach):
    value = values.mean(0)
    if classes.single:
        value = value[:, 0]
    return value.detach() if detach else value
