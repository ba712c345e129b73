"""fastinterp::norm_act in plain torch, as the formulas of csrc/cpu/norm_act.cpp read.

``kind`` is (groups, eps, activation, alpha). Values of a group, (N, G), meet x as columns.
"""

from __future__ import annotations

import torch

from fastinterp.ops._activations import SMOOTH, curvature, slope, value
from fastinterp.ops._backend import accumulation_dtype


def _channels(vector, x):
    return vector.view(1, -1, *[1] * (x.dim() - 2))


def _groups(values, x):
    n, groups = values.shape
    spread = values[:, :, None].expand(n, groups, x.shape[1] // max(groups, 1))
    return spread.reshape(*x.shape[:2], *[1] * (x.dim() - 2))


def _mean(t, groups):
    """Of every group, (N, G); zero where there are no elements."""
    count = t.shape[1] // groups * t.shape[2:].numel()
    return t.reshape(t.shape[0], groups, count).sum(2) / max(count, 1)


def _sum(t):
    return t.sum([0, *range(2, t.dim())])


def _pre_activation(xh, residual, weight, bias):
    z = xh if weight is None else xh * _channels(weight, xh)
    z = z if bias is None else z + _channels(bias, xh)
    return z if residual is None else z + residual


def forward(x, residual, weight, bias, kind):
    groups, eps, activation, alpha = kind
    x32 = x.to(accumulation_dtype(x.dtype))
    mean = _mean(x32, groups)
    centred = x32 - _groups(mean, x)
    rstd = 1 / torch.sqrt(_mean(centred.square(), groups) + eps)
    z = _pre_activation(centred * _groups(rstd, x), residual, weight, bias)
    return value(z, activation, alpha).to(x.dtype), mean, rstd


def _normalised(x, residual, weight, bias, mean, rstd, kind):
    """xh, the pre-activation and gamma, in the accumulation dtype."""
    xh = (x.to(mean.dtype) - _groups(mean, x)) * _groups(rstd, x)
    z = _pre_activation(xh, residual, weight, bias)
    return xh, z, 1.0 if weight is None else _channels(weight, x)


def backward(gy, x, residual, weight, bias, mean, rstd, addend, kind):
    groups, _, activation, alpha = kind
    xh, z, gamma = _normalised(x, residual, weight, bias, mean, rstd, kind)
    g = slope(z, activation, alpha) * gy
    h = gamma * g
    mean_h, mean_hx = _mean(h, groups), _mean(h * xh, groups)
    gx = _groups(rstd, x) * (h - _groups(mean_h, x) - xh * _groups(mean_hx, x))
    gx = gx if addend is None else gx + addend
    return gx.to(x.dtype), g.to(x.dtype), _sum(g * xh), _sum(g), mean_h, mean_hx


def backward_backward(
    v, u, a_weight, a_bias, gy, x, residual, weight, bias, mean, rstd, mean_h, mean_hx, kind
):
    groups, _, activation, alpha = kind
    xh, z, gamma = _normalised(x, residual, weight, bias, mean, rstd, kind)
    zero = torch.zeros((), dtype=mean.dtype, device=x.device)
    v, u = (zero.expand_as(x) if t is None else t.to(mean.dtype) for t in (v, u))
    a, b = (zero if t is None else _channels(t, x) for t in (a_weight, a_bias))
    if not mean_h.numel():  # v, which they stand with, is None then
        mean_h = mean_hx = torch.zeros_like(mean)
    first, gy, r = slope(z, activation, alpha), gy.to(mean.dtype), _groups(rstd, x)
    g = first * gy
    h = gamma * g
    mean_vx = _groups(_mean(v * xh, groups), x)
    v = v - _groups(_mean(v, groups), x)
    projected = v - xh * mean_vx
    q = gamma * r * projected + u + a * xh + b
    by_xh = a * g - r * (v * _groups(mean_hx, x) + (h - _groups(mean_h, x)) * mean_vx)
    gweight, gbias, k = r * g * projected, torch.zeros_like(g), None
    if activation in SMOOTH:
        k = curvature(z, activation, alpha) * gy * q
        by_xh, gweight, gbias = by_xh + gamma * k, gweight + k * xh, k
    along_xh = _mean(by_xh * xh, groups) + rstd * _mean(h * projected, groups)
    gx = r * (by_xh - _groups(_mean(by_xh, groups), x) - xh * _groups(along_xh, x))
    return (
        (first * q).to(x.dtype),
        gx.to(x.dtype),
        None if k is None else k.to(x.dtype),
        _sum(gweight),
        _sum(gbias),
    )
