"""norm_act as Triton kernels, three orders; the formulas are in csrc/cpu/norm_act.cpp.

A program has some groups and goes over their elements once for each set of sums and once to apply
them; what it reads a second time comes from a cache, and where a tile holds whole groups from
registers. Sums per channel are partial sums, a row for every chunk of examples, made into totals in
float64. Nothing is accumulated with atomics, so results repeat bit for bit.
"""

from math import gcd
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastinterp.triton import _activations as phi
from fastinterp.triton._channel_tiles import load, pick, plus, store, totals, vector

SIZES = ["examples", "groups", "length", "other", "steps"]  # not worth a compilation each
_PROGRAMS = 1024  # enough for the device; fixed, so that results do not depend on it
_ROOM = 2048  # elements of a tile, 8 of every thread; two in float64
_LEAST_ROWS = 32  # pixels of a channel a program, where it writes sums per channel
_CHANNELS = 8  # of a program between the passes: 32 bytes of float32, a sector
_SMOOTH = ("softplus", "silu", "gelu")


class Cut(NamedTuple):
    """What a kernel must know when it is compiled.

    A tile is [rows, depth, pixels]: groups, some of their channels, some of their pixels.
    """

    divisor: int  # of the length, so that Triton sees which accesses are aligned
    last: bool  # channels follow each other in memory, else pixels
    across: bool  # rows are groups of one example, else examples of one group
    whole: bool  # the depth is all channels of a group: a program may have several examples
    one: bool  # and the pixels are all of them: no loops over a group
    rows: int
    depth: int
    pixels: int


class Plan(NamedTuple):
    """How a tensor is cut."""

    sizes: tuple[int, int, int, int, int]  # SIZES; length, of what follows in memory, / divisor
    grid: tuple[int, int]  # blocks of groups, chunks of examples
    share: float  # 1 / elements of a group
    options: dict


def plan(x, groups, last):
    """The plan for a dense (N, C, ...) tensor that has elements."""
    (examples, channels), pixels = x.shape[:2], x.shape[2:].numel()
    depth = channels // groups
    room = _ROOM // 4 if x.dtype == torch.float64 else _ROOM
    all_pixels, all_depth = map(triton.next_power_of_2, (pixels, depth))
    if last:
        d = min(all_depth, room)
        p = min(all_pixels, room // d)
    else:
        p = min(all_pixels, room)
        d = min(all_depth, room // p)
    across = last and groups > 1
    rows = room // (d * p)
    if across:  # enough for whole sectors, more only where there is room
        wide = max(64 // d, 1)
        rows = min(triton.next_power_of_2(groups), max(wide, rows))
        p = max(min(p, room // (d * rows)), 1)
    else:
        rows = min(triton.next_power_of_2(examples), rows)
    one, whole = d >= depth and p >= pixels, d >= depth
    blocks = triton.cdiv(groups, rows) if across else groups
    tiles = examples if across else triton.cdiv(examples, rows)
    steps = 1
    if whole:
        least = triton.cdiv(_LEAST_ROWS, (1 if across else rows) * pixels)
        steps = max(triton.cdiv(tiles, max(_PROGRAMS // blocks, 1)), least)
    length, other = (depth, pixels) if last else (pixels, depth)
    divisor = gcd(length, 8)
    cut = Cut(divisor, last, across, whole, one, rows, d, p)
    # Without a limit ptxas spills a few bytes to fit one block more.
    options = {"CUT": cut, "num_warps": 8, "maxnreg": 255}
    sizes = examples, groups, length // divisor, other, steps
    return Plan(sizes, (blocks, triton.cdiv(tiles, steps)), 1 / (depth * pixels), options)


# Below, sizes is Plan.sizes; given is (x, residual) and affine (weight, bias), where any but x may
# be None and stands for zeros, the weight for ones.


@triton.jit
def _extent(sizes, CUT: tl.constexpr):
    """Channels of a group, and pixels."""
    length = sizes[2] * CUT.divisor
    if CUT.last:
        depth = length
        pixels = sizes[3]
    else:
        depth = sizes[3]
        pixels = length
    return depth, pixels


@triton.jit
def _ends(sizes, CUT: tl.constexpr):
    """Where loops over the channels and the pixels of a group end."""
    depth, pixels = _extent(sizes, CUT)
    if CUT.whole:
        depth = CUT.depth
    if CUT.one:
        pixels = CUT.pixels
    return depth, pixels


@triton.jit
def _blocks(sizes, CUT: tl.constexpr):
    """First block of examples of this program and the one after its last."""
    begin = tl.program_id(1) * sizes[4]
    blocks = sizes[0] if CUT.across else tl.cdiv(sizes[0], CUT.rows)
    return begin, tl.minimum(begin + sizes[4], blocks)


@triton.jit
def _rows(block, sizes, CUT: tl.constexpr):
    """(index of the group among all, whether it exists, example, group in it): [rows, 1, 1]."""
    r = tl.arange(0, CUT.rows)[:, None, None]
    if CUT.across:
        example = tl.full([CUT.rows, 1, 1], 0, tl.int64) + block
        group = tl.program_id(0) * CUT.rows + r
        here = group < sizes[1]
    else:
        example = (block * CUT.rows + r).to(tl.int64)
        group = tl.full([1, 1, 1], 0, tl.int32) + tl.program_id(0)
        here = example < sizes[0]
    return example * sizes[1] + group, here, example, group


@triton.jit
def _channels(rows, c0, sizes, CUT: tl.constexpr):
    """Channels of a tile and whether they exist, [rows or 1, depth, 1]."""
    depth, _ = _extent(sizes, CUT)
    c = c0 + tl.arange(0, CUT.depth)[None, :, None]
    return rows[3] * depth + c, (c < depth) & (rows[3] < sizes[1])


@triton.jit
def _tile(rows, c0, p0, sizes, CUT: tl.constexpr):
    """(offset, inside) of the elements of a tile."""
    depth, pixels = _extent(sizes, CUT)
    c = c0 + tl.arange(0, CUT.depth)[None, :, None]
    p = p0 + tl.arange(0, CUT.pixels)[None, None, :]
    inside = rows[1] & (c < depth) & (p < pixels)
    if CUT.last:
        at = ((rows[2] * pixels + p) * sizes[1] + rows[3]) * depth + c
    else:
        at = (rows[0] * depth + c) * pixels + p
    return at, inside


@triton.jit
def _over_group(values):
    """Sums over the elements of each group, [rows, 1, 1]."""
    return tl.sum(tl.sum(values, 2, keep_dims=True), 1, keep_dims=True)


@triton.jit
def _of_groups(table, rows, acc: tl.constexpr):
    """A value of every group, [rows, 1, 1]."""
    if table is None:
        values = tl.zeros(rows[0].shape, acc)
    else:
        values = tl.load(table + rows[0], rows[1], 0.0)
    return values


@triton.jit
def _store_channels(partial, s, rows, c0, sizes, values, CUT: tl.constexpr):
    """Sum s over the program's elements of each channel to ``partial``, (sums, chunks, C)."""
    depth, _ = _extent(sizes, CUT)
    channel, there = _channels(rows, c0, sizes, CUT)
    values = tl.sum(values, 2, keep_dims=True)
    if not CUT.across:
        values = tl.sum(values, 0, keep_dims=True)
    row = (s * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    tl.store(partial + row * (sizes[1] * depth) + channel, values, there)


@triton.jit
def _gradient(given, gy, at, group, channel, alpha, KIND: tl.constexpr):
    """xh, z, gy and g = phi'(z) gy of a tile; group is (mean, rstd), channel (gamma, beta)."""
    xh = (load(given[0], at, group[0].dtype) - group[0]) * group[1]
    z = plus(xh * channel[0] + channel[1], given[1], at)
    upstream = load(gy, at, z.dtype)
    if KIND == "softplus" or KIND == "silu" or KIND == "gelu":
        slope, curvature = phi.derivatives(z, alpha, KIND)
    else:
        slope = z > 0
        curvature = slope
    return xh, slope, curvature, upstream, phi.times(slope, upstream, alpha, KIND)


@triton.jit(do_not_specialize=SIZES)
def _group_norm_kernel(
    given,
    affine,
    mean,
    rstd,
    y,
    examples,
    groups,
    length,
    other,
    steps,
    share: tl.float64,
    eps: tl.float64,
    alpha: tl.float64,
    KIND: tl.constexpr,
    CUT: tl.constexpr,
):
    acc: tl.constexpr = mean.dtype.element_ty
    sizes = (examples, groups, length, other, steps)
    share = tl.full([], share, acc)
    alpha = tl.full([], alpha, acc)
    c_end, p_end = _ends(sizes, CUT)
    begin, end = _blocks(sizes, CUT)
    for block in range(begin, end):
        rows = _rows(block, sizes, CUT)
        depth, pixels = _extent(sizes, CUT)
        if CUT.last:
            first = (rows[2] * pixels * groups + rows[3]) * depth
        else:
            first = rows[0] * depth * pixels
        pivot = tl.load(given[0] + first, rows[1], 0.0).to(acc)  # near the mean: small sums
        # full and not zeros, which Triton 3.6 does not give the numbers of a constexpr tuple.
        sums = tl.full([CUT.rows, CUT.depth, CUT.pixels], 0.0, acc)
        for c0 in range(0, c_end, CUT.depth):
            for p0 in range(0, p_end, CUT.pixels):
                at = _tile(rows, c0, p0, sizes, CUT)
                sums += tl.where(at[1], load(given[0], at, acc) - pivot, 0.0)
        average = pivot + _over_group(sums) * share
        squares = tl.full([CUT.rows, CUT.depth, CUT.pixels], 0.0, acc)
        for c0 in range(0, c_end, CUT.depth):
            for p0 in range(0, p_end, CUT.pixels):
                at = _tile(rows, c0, p0, sizes, CUT)
                d = tl.where(at[1], load(given[0], at, acc) - average, 0.0)
                squares += d * d
        variance = (_over_group(squares) * share).to(tl.float64)
        scale = (1.0 / tl.sqrt(variance + eps)).to(acc)
        tl.store(mean + rows[0], average, rows[1])
        tl.store(rstd + rows[0], scale, rows[1])
        for c0 in range(0, c_end, CUT.depth):
            channel, there = _channels(rows, c0, sizes, CUT)
            gamma = vector(affine[0], channel, there, 1.0, acc)
            beta = vector(affine[1], channel, there, 0.0, acc)
            for p0 in range(0, p_end, CUT.pixels):
                at = _tile(rows, c0, p0, sizes, CUT)
                xh = (load(given[0], at, acc) - average) * scale
                store(y, at, phi.value(plus(xh * gamma + beta, given[1], at), alpha, KIND))


@triton.jit(do_not_specialize=SIZES)
def _group_norm_backward_kernel(
    given,
    affine,
    mean,
    rstd,
    gy,
    addend,
    gx,
    gresidual,
    mean_h,  # with gx, as mean_hx
    mean_hx,
    partial,  # (2, chunks, C): g xh, g
    examples,
    groups,
    length,
    other,
    steps,
    share: tl.float64,
    alpha: tl.float64,
    KIND: tl.constexpr,
    CUT: tl.constexpr,
):
    acc: tl.constexpr = mean.dtype.element_ty
    sizes = (examples, groups, length, other, steps)
    share = tl.full([], share, acc)
    alpha = tl.full([], alpha, acc)
    c_end, p_end = _ends(sizes, CUT)
    begin, end = _blocks(sizes, CUT)
    zeros = tl.full([CUT.rows, CUT.depth, CUT.pixels], 0.0, acc)
    gweight, gbias = zeros, zeros
    for block in range(begin, end):
        rows = _rows(block, sizes, CUT)
        statistics = (_of_groups(mean, rows, acc), _of_groups(rstd, rows, acc))
        sums, sums_x = zeros, zeros
        for c0 in range(0, c_end, CUT.depth):
            channel, there = _channels(rows, c0, sizes, CUT)
            gamma = vector(affine[0], channel, there, 1.0, acc)
            beta = vector(affine[1], channel, there, 0.0, acc)
            if not CUT.whole:
                gweight, gbias = zeros, zeros
            for p0 in range(0, p_end, CUT.pixels):
                at = _tile(rows, c0, p0, sizes, CUT)
                xh, _slope, _curvature, _gy, g = _gradient(
                    given, gy, at, statistics, (gamma, beta), alpha, KIND
                )
                store(gresidual, at, g)
                if gx is not None:
                    sums += gamma * g
                    sums_x += gamma * g * xh
                if partial is not None:
                    gweight += g * xh
                    gbias += g
            if partial is not None and not CUT.whole:
                _store_channels(partial, 0, rows, c0, sizes, gweight, CUT)
                _store_channels(partial, 1, rows, c0, sizes, gbias, CUT)
        if gx is not None:
            h = _over_group(sums) * share
            hx = _over_group(sums_x) * share
            tl.store(mean_h + rows[0], h, rows[1])
            tl.store(mean_hx + rows[0], hx, rows[1])
            for c0 in range(0, c_end, CUT.depth):
                channel, there = _channels(rows, c0, sizes, CUT)
                gamma = vector(affine[0], channel, there, 1.0, acc)
                beta = vector(affine[1], channel, there, 0.0, acc)
                for p0 in range(0, p_end, CUT.pixels):
                    at = _tile(rows, c0, p0, sizes, CUT)
                    xh, _slope, _curvature, _gy, g = _gradient(
                        given, gy, at, statistics, (gamma, beta), alpha, KIND
                    )
                    own = statistics[1] * (gamma * g - h - xh * hx)
                    store(gx, at, plus(own, addend, at))
    if partial is not None and CUT.whole:
        rows = _rows(begin, sizes, CUT)
        _store_channels(partial, 0, rows, 0, sizes, gweight, CUT)
        _store_channels(partial, 1, rows, 0, sizes, gbias, CUT)


@triton.jit
def _by_xh(values, t, gamma, a, group, alpha, KIND: tl.constexpr, SMOOTH: tl.constexpr):
    """pv, q, k and X of the formulas for a tile; values is what ``_gradient`` gives.

    group is (rstd, mean h, mean h xh, mean v, mean v xh), t (v, u), a (a, b).
    """
    xh, _slope, curvature, upstream, g = values
    h = gamma * g - group[1]
    v = t[0] - group[3]
    projected = v - xh * group[4]
    q = gamma * group[0] * projected + t[1] + a[0] * xh + a[1]
    by_xh = a[0] * g - group[0] * (v * group[2] + h * group[4])
    k = tl.zeros(xh.shape, xh.dtype)
    if SMOOTH:
        k = curvature * upstream * q
        by_xh += gamma * k
    return projected, q, k, by_xh


@triton.jit(do_not_specialize=SIZES)
def _group_norm_second_kernel(
    given,
    affine,
    mean,
    rstd,
    mean_h,  # None where v is, as mean_hx
    mean_hx,
    gy,
    v,
    u,
    cotangents,  # a_weight, a_bias
    ggy,
    gx,
    gresidual,
    partial,  # (2, chunks, C): of gamma and of beta
    examples,
    groups,
    length,
    other,
    steps,
    share: tl.float64,
    alpha: tl.float64,
    KIND: tl.constexpr,
    SMOOTH: tl.constexpr,
    CUT: tl.constexpr,
):
    acc: tl.constexpr = mean.dtype.element_ty
    sizes = (examples, groups, length, other, steps)
    share = tl.full([], share, acc)
    alpha = tl.full([], alpha, acc)
    c_end, p_end = _ends(sizes, CUT)
    begin, end = _blocks(sizes, CUT)
    zeros = tl.full([CUT.rows, CUT.depth, CUT.pixels], 0.0, acc)
    gweight, gbias = zeros, zeros
    for block in range(begin, end):
        rows = _rows(block, sizes, CUT)
        statistics = (_of_groups(mean, rows, acc), _of_groups(rstd, rows, acc))
        sums, sums_x = zeros, zeros
        if v is not None:
            for c0 in range(0, c_end, CUT.depth):
                for p0 in range(0, p_end, CUT.pixels):
                    at = _tile(rows, c0, p0, sizes, CUT)
                    vt = load(v, at, acc)
                    sums += vt
                    sums_x += vt * ((load(given[0], at, acc) - statistics[0]) * statistics[1])
        group = (
            statistics[1],
            _of_groups(mean_h, rows, acc),
            _of_groups(mean_hx, rows, acc),
            _over_group(sums) * share,
            _over_group(sums_x) * share,
        )
        sums, sums_x = zeros, zeros
        for c0 in range(0, c_end, CUT.depth):
            channel, there = _channels(rows, c0, sizes, CUT)
            gamma = vector(affine[0], channel, there, 1.0, acc)
            beta = vector(affine[1], channel, there, 0.0, acc)
            a = (
                vector(cotangents[0], channel, there, 0.0, acc),
                vector(cotangents[1], channel, there, 0.0, acc),
            )
            if not CUT.whole:
                gweight, gbias = zeros, zeros
            for p0 in range(0, p_end, CUT.pixels):
                at = _tile(rows, c0, p0, sizes, CUT)
                values = _gradient(given, gy, at, statistics, (gamma, beta), alpha, KIND)
                t = (load(v, at, acc), load(u, at, acc))
                projected, q, k, by_xh = _by_xh(values, t, gamma, a, group, alpha, KIND, SMOOTH)
                store(ggy, at, phi.times(values[1], q, alpha, KIND))
                if SMOOTH:
                    store(gresidual, at, k)
                if gx is not None:
                    by_xh = tl.where(at[1], by_xh, 0.0)
                    sums += by_xh
                    sums_x += by_xh * values[0] + group[0] * (gamma * values[4] * projected)
                if partial is not None:
                    gweight += group[0] * values[4] * projected + k * values[0]
                    gbias += k
            if partial is not None and not CUT.whole:
                _store_channels(partial, 0, rows, c0, sizes, gweight, CUT)
                _store_channels(partial, 1, rows, c0, sizes, gbias, CUT)
        if gx is not None:
            const = _over_group(sums) * share
            along_xh = _over_group(sums_x) * share
            for c0 in range(0, c_end, CUT.depth):
                channel, there = _channels(rows, c0, sizes, CUT)
                gamma = vector(affine[0], channel, there, 1.0, acc)
                beta = vector(affine[1], channel, there, 0.0, acc)
                a = (
                    vector(cotangents[0], channel, there, 0.0, acc),
                    vector(cotangents[1], channel, there, 0.0, acc),
                )
                for p0 in range(0, p_end, CUT.pixels):
                    at = _tile(rows, c0, p0, sizes, CUT)
                    values = _gradient(given, gy, at, statistics, (gamma, beta), alpha, KIND)
                    t = (load(v, at, acc), load(u, at, acc))
                    _pv, _q, _k, by_xh = _by_xh(values, t, gamma, a, group, alpha, KIND, SMOOTH)
                    store(gx, at, group[0] * (by_xh - const - values[0] * along_xh))
    if partial is not None and CUT.whole:
        rows = _rows(begin, sizes, CUT)
        _store_channels(partial, 0, rows, 0, sizes, gweight, CUT)
        _store_channels(partial, 1, rows, 0, sizes, gbias, CUT)


@triton.jit(do_not_specialize=["parts", "channels"])
def _group_norm_totals_kernel(
    partial, gweight, gbias, parts, channels, C: tl.constexpr, T: tl.constexpr
):
    c = tl.program_id(0) * C + tl.arange(0, C)
    there = c < channels
    sums = totals(partial, parts, channels, c, 2, 2, T)
    tl.store(gweight + c, pick(sums, 0).to(gweight.dtype.element_ty), there)
    tl.store(gbias + c, pick(sums, 1).to(gbias.dtype.element_ty), there)


def _partial(p, like, channels):
    return like.new_empty(2, p.grid[1], channels)


def _totals(partial, gweight, gbias):
    _, parts, channels = partial.shape
    grid = (triton.cdiv(channels, _CHANNELS),)
    meta = {"C": _CHANNELS, "T": 512, "num_warps": 4, "maxnreg": 255}
    _group_norm_totals_kernel[grid](partial, gweight, gbias, parts, channels, **meta)


def norm_act_forward(given, affine, mean, rstd, y, kind, last):
    """Fills y, mean and rstd.

    Args:
        given: x, residual or None: (N, C, ...) with elements, same dtype and order.
        affine: weight or None, bias or None: (C,), float32 (float64 for float64 x), as the below.
        mean, rstd: (N, G).
        y: like x.
        kind: groups, eps, activation, alpha.
        last: whether x is channels last.
    """
    groups, eps, activation, alpha = kind
    p = plan(given[0], groups, last)
    with torch.cuda.device_of(y):  # Triton launches on the current device
        _group_norm_kernel[p.grid](
            given,
            affine,
            mean,
            rstd,
            y,
            *p.sizes,
            p.share,
            eps,
            alpha,
            KIND=activation,
            **p.options,
        )


def norm_act_backward(given, affine, statistics, gy, addend, results, kind, last):
    """Fills those of the results that are not None.

    Args:
        given, affine, kind, last: as in the forward pass.
        statistics: mean, rstd: (N, G).
        gy, addend: like x; addend, which is added to gx, may be None.
        results: gx, gresidual, like x; gweight, gbias, (C,), both or neither; the means of h and
            h xh, (N, G), with gx.
    """
    groups, _, activation, alpha = kind
    gx, gresidual, gweight, gbias, *means = results
    p = plan(gy, groups, last)
    channels = gy.shape[1]
    partial = None if gweight is None else _partial(p, statistics[0], channels)
    with torch.cuda.device_of(gy):  # Triton launches on the current device
        if gx is not None or gresidual is not None or partial is not None:
            _group_norm_backward_kernel[p.grid](
                *(given, affine, *statistics, gy, addend, gx, gresidual, *means, partial),
                *(*p.sizes, p.share, alpha),
                KIND=activation,
                **p.options,
            )
        if partial is not None:
            _totals(partial, gweight, gbias)


def norm_act_backward_backward(
    given, affine, statistics, means, gy, cotangents, results, kind, last
):
    """Fills those of the results that are not None.

    Args:
        given, affine, statistics, gy, kind, last: as in the backward pass.
        means: of h and h xh, as the backward pass filled them, or None, None where v is None.
        cotangents: v, u, like x, and a_weight, a_bias, (C,); each may be None.
        results: ggy, gx, gresidual, like x, gresidual of a smooth phi only; gweight, gbias, (C,),
            both or neither.
    """
    groups, _, activation, alpha = kind
    v, u, *by_channel = cotangents
    *like_x, gweight, gbias = results
    p = plan(gy, groups, last)
    partial = None if gweight is None else _partial(p, statistics[0], gy.shape[1])
    with torch.cuda.device_of(gy):  # Triton launches on the current device
        _group_norm_second_kernel[p.grid](
            *(given, affine, *statistics, *means, gy, v, u, tuple(by_channel), *like_x, partial),
            *(*p.sizes, p.share, alpha),
            KIND=activation,
            SMOOTH=activation in _SMOOTH,
            **p.options,
        )
        if partial is not None:
            _totals(partial, gweight, gbias)
