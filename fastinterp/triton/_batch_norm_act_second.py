"""The backward of the backward of batch_norm_act as Triton kernels; see batch_norm_act.py.

With d = x - mean, g = phi'(z) gy and the cotangents v of gx and u of gresidual:

    q = scale v + u + q_const + q_d d      ggy = phi'(z) q      h = phi''(z) gy q
    gx2 = const + by_d d + by_v v + by_g g + scale h      gresidual2 = h
"""

import torch
import triton
import triton.language as tl

from fastinterp.triton import _activations as phi
from fastinterp.triton import _channel_tiles as cut
from fastinterp.triton.batch_norm_act import SIZES, between, lane_values, plan, slopes

_SMOOTH = ("softplus", "silu", "gelu")


@triton.jit(do_not_specialize=SIZES)
def _norm_second_sums_kernel(
    given,
    affine,
    gy,
    v,
    u,
    partial,  # (3 or 10, chunks, lanes)
    items,
    units,
    channels,
    steps,
    alpha: tl.float64,
    KIND: tl.constexpr,
    SMOOTH: tl.constexpr,
    CUT: tl.constexpr,
):
    acc: tl.constexpr = partial.dtype.element_ty
    sizes = (items, units, channels, steps)
    alpha = tl.full([], alpha, acc)
    mean, rstd, scale, bias = lane_values(affine, sizes, acc, CUT)
    zeros = tl.full([CUT.a, CUT.b, 8], 0.0, acc)
    # sums of v, v xh, v g; with w = phi'' gy: of w, w xh, w xh xh, v w, v w xh, u w, u w xh
    sv, svx, svg = zeros, zeros, zeros
    sw, swx, swxx, svw, svwx, suw, suwx = zeros, zeros, zeros, zeros, zeros, zeros, zeros
    begin, end = cut.chunk_of(sizes, CUT)
    for t in range(begin, end):
        at = cut.tile(t, sizes, CUT)
        d = cut.load(given[0], at, acc) - mean
        gyt = cut.load(gy, at, acc)
        slope, curvature = slopes(d, given, at, scale, bias, alpha, KIND)
        xh = d * rstd
        if v is not None:
            vt = cut.load(v, at, acc)
            sv += vt
            svx += vt * xh
            svg += vt * phi.times(slope, gyt, alpha, KIND)
        if SMOOTH:
            w = curvature * gyt
            sw += w
            swx += w * xh
            swxx += w * xh * xh
            if v is not None:
                svw += vt * w
                svwx += vt * w * xh
            if u is not None:
                uw = cut.load(u, at, acc) * w
                suw += uw
                suwx += uw * xh
    cut.store_part(partial, 0, sizes, cut.over_tile(sv, CUT), CUT)
    cut.store_part(partial, 1, sizes, cut.over_tile(svx, CUT), CUT)
    cut.store_part(partial, 2, sizes, cut.over_tile(svg, CUT), CUT)
    if SMOOTH:
        cut.store_part(partial, 3, sizes, cut.over_tile(sw, CUT), CUT)
        cut.store_part(partial, 4, sizes, cut.over_tile(swx, CUT), CUT)
        cut.store_part(partial, 5, sizes, cut.over_tile(swxx, CUT), CUT)
        cut.store_part(partial, 6, sizes, cut.over_tile(svw, CUT), CUT)
        cut.store_part(partial, 7, sizes, cut.over_tile(svwx, CUT), CUT)
        cut.store_part(partial, 8, sizes, cut.over_tile(suw, CUT), CUT)
        cut.store_part(partial, 9, sizes, cut.over_tile(suwx, CUT), CUT)


@triton.jit(do_not_specialize=SIZES)
def _norm_second_totals_kernel(
    partial,
    affine,
    cotangents,  # a_weight, a_bias
    first,  # sum_gx, sum_g of the backward pass
    gweight,
    gbias,
    values,  # (6, channels): q_const, q_d, const, by_d, by_v, by_g
    parts,
    channels,
    share: tl.float64,  # 1 / elements of a channel; 0 with running statistics
    SUMS: tl.constexpr,
    S: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
):
    acc: tl.constexpr = values.dtype.element_ty
    c = tl.program_id(0) * C + tl.arange(0, C)
    there = c < channels
    rstd = cut.vector(affine[3], c, there, 0.0, tl.float64)
    scale = rstd * cut.vector(affine[0], c, there, 1.0, tl.float64)
    a_weight = cut.vector(cotangents[0], c, there, 0.0, tl.float64)
    a_bias = cut.vector(cotangents[1], c, there, 0.0, tl.float64)
    mean_gx = share * cut.vector(first[0], c, there, 0.0, tl.float64)
    mean_g = share * cut.vector(first[1], c, there, 0.0, tl.float64)
    sums = cut.totals(partial, parts, channels, c, SUMS, S, T)
    sv = cut.pick(sums, 0)
    svx = cut.pick(sums, 1)
    mean_v = share * sv
    mean_vx = share * svx
    a = cut.pick(sums, 2) - sv * mean_g - svx * mean_gx
    q_const = a_bias - scale * mean_v
    q_xh = a_weight - scale * mean_vx
    h = tl.zeros([C], tl.float64)  # sums of h and h xh
    hx = h
    if SUMS > 3:
        swx = cut.pick(sums, 4)
        h = scale * cut.pick(sums, 6) + cut.pick(sums, 8)
        h += q_xh * swx + q_const * cut.pick(sums, 3)
        hx = scale * cut.pick(sums, 7) + cut.pick(sums, 9)
        hx += q_xh * cut.pick(sums, 5) + q_const * swx
    if gweight is not None:
        tl.store(gweight + c, (rstd * a + hx).to(acc), there)
        tl.store(gbias + c, h.to(acc), there)
    by_v = -scale * rstd * mean_gx
    by_g = rstd * q_xh
    const = -by_v * mean_v - by_g * mean_g - scale * h * share
    by_xh = -scale * (rstd * a + hx) * share - by_v * mean_vx - by_g * mean_gx
    tl.store(values + c, q_const.to(acc), there)
    tl.store(values + cut.plane(1, channels) + c, (q_xh * rstd).to(acc), there)
    tl.store(values + cut.plane(2, channels) + c, const.to(acc), there)
    tl.store(values + cut.plane(3, channels) + c, (by_xh * rstd).to(acc), there)
    tl.store(values + cut.plane(4, channels) + c, by_v.to(acc), there)
    tl.store(values + cut.plane(5, channels) + c, by_g.to(acc), there)


@triton.jit(do_not_specialize=SIZES)
def _norm_second_kernel(
    given,
    affine,
    gy,
    v,
    u,
    values,
    ggy,
    gx,
    gresidual,
    items,
    units,
    channels,
    steps,
    alpha: tl.float64,
    KIND: tl.constexpr,
    SMOOTH: tl.constexpr,
    CUT: tl.constexpr,
):
    acc: tl.constexpr = values.dtype.element_ty
    sizes = (items, units, channels, steps)
    alpha = tl.full([], alpha, acc)
    mean, _rstd, scale, bias = lane_values(affine, sizes, acc, CUT)
    _lane, there, channel = cut.lanes_of(sizes, CUT)
    q_const = cut.vector(values, channel, there, 0.0, acc)
    q_d = cut.vector(values + cut.plane(1, channels), channel, there, 0.0, acc)
    const = cut.vector(values + cut.plane(2, channels), channel, there, 0.0, acc)
    by_d = cut.vector(values + cut.plane(3, channels), channel, there, 0.0, acc)
    by_v = cut.vector(values + cut.plane(4, channels), channel, there, 0.0, acc)
    by_g = cut.vector(values + cut.plane(5, channels), channel, there, 0.0, acc)
    begin, end = cut.chunk_of(sizes, CUT)
    for t in range(begin, end):
        at = cut.tile(t, sizes, CUT)
        d = cut.load(given[0], at, acc) - mean
        gyt = cut.load(gy, at, acc)
        vt = cut.load(v, at, acc)
        slope, curvature = slopes(d, given, at, scale, bias, alpha, KIND)
        q = cut.plus(scale * vt + q_const + q_d * d, u, at)
        second = const + by_d * d + by_v * vt + by_g * phi.times(slope, gyt, alpha, KIND)
        if SMOOTH:
            h = curvature * gyt * q
            cut.store(gresidual, at, h)
            second += scale * h
        cut.store(ggy, at, phi.times(slope, q, alpha, KIND))
        cut.store(gx, at, second)


def batch_norm_act_backward_backward(
    given, affine, gy, cotangents, first, ggy, gx, gresidual, gweight, gbias, kind, rows
):
    """Fills those of the five gradients that are not None.

    Args:
        given, affine, gy, kind, rows: as in the backward pass.
        cotangents: v, u, like x, and a_weight, a_bias, (C,); each may be None.
        first: gweight and gbias of the backward pass, or None, None.
        ggy, gx, gresidual: like x; gresidual of a smooth phi only.
        gweight, gbias: (C,), both or neither.
    """
    training, _, activation, alpha = kind
    x, mean, (v, u, *by_channel) = given[0], affine[2], cotangents
    channels = x.shape[1]
    if channels == 0:
        return
    smooth = activation in _SMOOTH
    sums = 10 if smooth else 3
    p, options = plan(x, rows, sums)
    options |= {"KIND": activation, "SMOOTH": smooth}
    need_sums = training or gweight is not None
    parts = p.parts if need_sums else 0
    partial, values = (
        mean.new_empty(sums * parts, channels),
        mean.new_empty(6, cut.padded(channels)),
    )
    share = channels / max(x.numel(), 1) if training else 0.0
    with torch.cuda.device_of(x):  # Triton launches on the current device
        if need_sums:
            _norm_second_sums_kernel[p.grid](
                given, affine, gy, v, u if smooth else None, partial, *p.sizes, alpha, **options
            )
        grid, meta = between(channels, sums)
        meta |= {"SUMS": sums, "S": triton.next_power_of_2(sums)}
        _norm_second_totals_kernel[grid](
            partial,
            affine,
            tuple(by_channel),
            first,
            gweight,
            gbias,
            values,
            parts,
            channels,
            share,
            **meta,
        )
        if not (ggy is None and gx is None and gresidual is None):
            tensors = gy, v, u, values, ggy, gx, gresidual
            _norm_second_kernel[p.grid](given, affine, *tensors, *p.sizes, alpha, **options)
