"""fastinterp::batch_norm_act in plain torch, as the formulas of csrc/batch_norm.h read.

``kind`` is (training, eps, activation, alpha); ``mask`` is boolean, of the shape of x.
"""

from __future__ import annotations

import torch

from fastinterp.ops._activations import SMOOTH, value
from fastinterp.ops._activations import curvature as curvature_of
from fastinterp.ops._activations import slope as slope_of
from fastinterp.ops._backend import accumulation_dtype


def _columns(vector, x):
    return vector.view(1, -1, *[1] * (x.dim() - 2))


def _sum(t):
    return t.sum([0, *range(2, t.dim())])


def _count(x):
    """M, elements of a channel; 1 where there are none, so that sums of nothing stay zero."""
    return max(x.numel() // max(x.shape[1], 1), 1)


def forward(x, residual, weight, bias, running_mean, running_var, kind):
    training, eps, activation, alpha = kind
    x32 = x.to(accumulation_dtype(x.dtype))
    if training:
        count = _count(x)
        mean = _sum(x32) / count
        squares = _sum((x32 - _columns(mean, x)).square())
        var, unbiased_var = squares / count, squares / max(count - 1, 1)
    else:
        mean, var, unbiased_var = running_mean, running_var, None
    rstd = 1 / torch.sqrt(var + eps)
    z = _pre_activation(x32, residual, weight, bias, mean, rstd)
    mask = None if residual is None else z > 0
    return value(z, activation, alpha).to(x.dtype), mean, rstd, unbiased_var, mask


def _pre_activation(x32, residual, weight, bias, mean, rstd):
    scale = rstd if weight is None else weight * rstd
    z = (x32 - _columns(mean, x32)) * _columns(scale, x32)
    if bias is not None:
        z = z + _columns(bias, x32)
    return z if residual is None else z + residual


def _normalised(gy, x, residual, mask, weight, bias, mean, rstd, kind):
    """xh, gy, the slope, the curvature or None, and gamma rstd; in the accumulation dtype."""
    _, _, activation, alpha = kind
    acc = mean.dtype
    x32 = x.to(acc)
    xh = (x32 - _columns(mean, x)) * _columns(rstd, x)
    scale = _columns(rstd if weight is None else weight * rstd, x)
    curvature = None
    if mask is not None:
        slope = slope_of(torch.where(mask, torch.ones_like(x32), -1), activation, alpha)
    else:
        z = _pre_activation(x32, residual, weight, bias, mean, rstd)
        slope = slope_of(z, activation, alpha)
        if activation in SMOOTH:
            curvature = curvature_of(z, activation, alpha)
    return xh, gy.to(acc), slope, curvature, scale


def backward(gy, x, residual, mask, weight, bias, mean, rstd, addend, kind):
    xh, gy, slope, _, scale = _normalised(gy, x, residual, mask, weight, bias, mean, rstd, kind)
    g = slope * gy
    sum_g, sum_gx = _sum(g), _sum(g * xh)
    gx = g
    if kind[0]:
        count = _count(x)
        gx = g - _columns(sum_g, x) / count - xh * _columns(sum_gx, x) / count
    gx = scale * gx if addend is None else scale * gx + addend
    return gx.to(x.dtype), g.to(x.dtype), sum_gx, sum_g


def backward_backward(
    v, u, a_weight, a_bias, gy, x, residual, mask, weight, bias, mean, rstd, sum_gx, sum_g, kind
):
    xh, gy, slope, curvature, scale = _normalised(
        gy, x, residual, mask, weight, bias, mean, rstd, kind
    )
    zero = torch.zeros((), dtype=mean.dtype, device=x.device)
    v, u = (zero.expand_as(x) if t is None else t.to(mean.dtype) for t in (v, u))
    a_weight = zero if a_weight is None else _columns(a_weight, x)
    a_bias = zero if a_bias is None else _columns(a_bias, x)
    if not sum_g.numel():  # v and a_weight, which they stand with, are None then
        sum_gx = sum_g = torch.zeros_like(mean)
    g, r = slope * gy, _columns(rstd, x)

    def centred(t, total, total_x):
        if not kind[0]:
            return t
        count = _count(x)
        return t - _columns(total, x) / count - xh * _columns(total_x, x) / count

    sum_v, sum_vx = _sum(v), _sum(v * xh)
    v_centred, g_centred = centred(v, sum_v, sum_vx), centred(g, sum_g, sum_gx)
    q = scale * v_centred + u + a_weight * xh + a_bias
    a = _sum(v_centred * g)
    gx = r * a_weight * g_centred
    if kind[0]:
        count = _count(x)
        gx = gx - scale * r / count * (
            _columns(a, x) * xh + _columns(sum_gx, x) * v_centred + _columns(sum_vx, x) * g_centred
        )
    gweight, gbias, h = rstd * a, torch.zeros_like(mean), None
    if curvature is not None:
        h = curvature * gy * q
        gbias, h_x = _sum(h), _sum(h * xh)
        gweight = gweight + h_x
        gx = gx + scale * centred(h, gbias, h_x)
    dtype = x.dtype
    return (
        (slope * q).to(dtype),
        gx.to(dtype),
        None if h is None else h.to(dtype),
        gweight,
        gbias,
    )
