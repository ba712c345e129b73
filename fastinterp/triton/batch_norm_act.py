"""batch_norm_act as Triton kernels: forward and backward; the second order is beside it.

The formulas are in csrc/batch_norm.h. An order is three kernels: partial sums over chunks
of the tensor, their totals made into a few values per channel in float64, and one pass that applies
these. Nothing is accumulated with atomics, so results repeat bit for bit. With d = x - mean:

    z = scale d + bias + residual      g = phi'(z) gy      gx = scale g + const + by_d d + addend
"""

import torch
import triton
import triton.language as tl

from fastinterp.triton import _activations as phi
from fastinterp.triton import _channel_tiles as cut

SIZES = ["items", "units", "channels", "steps", "parts"]  # not worth a compilation each
_CHANNELS = 8  # of a program between the passes: 32 bytes of float32, a sector

# In all kernels, given is (x, residual, mask) and affine (weight, bias, mean, rstd), any of which
# may be None where it stands for nothing; items, units, channels and steps are sizes of a cut.Plan.


@triton.jit
def lane_values(affine, sizes, acc: tl.constexpr, CUT: tl.constexpr):
    """Of this program's lanes: mean, rstd, scale = gamma rstd, and bias."""
    _lane, there, channel = cut.lanes_of(sizes, CUT)
    weight = cut.vector(affine[0], channel, there, 1.0, acc)
    bias = cut.vector(affine[1], channel, there, 0.0, acc)
    mean = cut.vector(affine[2], channel, there, 0.0, acc)
    rstd = cut.vector(affine[3], channel, there, 0.0, acc)
    return mean, rstd, weight * rstd, bias


@triton.jit
def slopes(d, given, at, scale, bias, alpha, KIND: tl.constexpr):
    """phi'(z), as z > 0 where phi is piecewise linear, and phi''(z) of a smooth phi."""
    if given[2] is not None:
        slope = cut.load_bits(given[2], at)
        curvature = slope
    else:
        z = cut.plus(d * scale + bias, given[1], at)
        if KIND == "softplus" or KIND == "silu" or KIND == "gelu":
            slope, curvature = phi.derivatives(z, alpha, KIND)
        else:
            slope = z > 0
            curvature = slope
    return slope, curvature


@triton.jit(do_not_specialize=SIZES)
def _norm_sums_kernel(
    x,
    partial,  # (3, chunks, lanes): count of elements, their mean, squared deviations from it
    items,
    units,
    channels,
    steps,
    CUT: tl.constexpr,
):
    acc: tl.constexpr = partial.dtype.element_ty
    sizes = (items, units, channels, steps)
    begin, end = cut.chunk_of(sizes, CUT)
    # Sums are taken relative to the mean of the first tile, or squares would cancel.
    first = cut.elements(begin, tl.minimum(begin + 1, end), sizes, CUT).to(acc)
    pivot = cut.over_tile(cut.load(x, cut.tile(begin, sizes, CUT), acc), CUT)
    pivot = pivot / tl.maximum(first, 1.0)
    sums = tl.full([CUT.a, CUT.b, 8], 0.0, acc)
    squares = tl.full([CUT.a, CUT.b, 8], 0.0, acc)
    for t in range(begin, end):
        at = cut.tile(t, sizes, CUT)
        d = tl.where(at[1], cut.load(x, at, acc) - pivot, 0.0)
        sums += d
        squares += d * d
    count = cut.elements(begin, end, sizes, CUT).to(acc)
    share = 1.0 / tl.maximum(count, 1.0)
    shift = cut.over_tile(sums, CUT)
    squares = cut.over_tile(squares, CUT) - shift * shift * share
    cut.store_part(partial, 0, sizes, count, CUT)
    cut.store_part(partial, 1, sizes, pivot + shift * share, CUT)
    cut.store_part(partial, 2, sizes, tl.maximum(squares, 0.0), CUT)


@triton.jit(do_not_specialize=SIZES)
def _norm_totals_kernel(
    partial,
    mean,
    rstd,
    unbiased_var,
    parts,
    channels,
    eps: tl.float64,
    C: tl.constexpr,
    T: tl.constexpr,
):
    acc: tl.constexpr = mean.dtype.element_ty
    c = tl.program_id(0) * C + tl.arange(0, C)
    there = c < channels
    plane = parts.to(tl.int64) * channels
    pivot = tl.load(partial + plane + c, there, 0.0).to(tl.float64)
    count = tl.zeros([T, C], tl.float64)
    sums = tl.zeros([T, C], tl.float64)
    squares = tl.zeros([T, C], tl.float64)
    for first in range(0, parts, T):
        t = (first + tl.arange(0, T))[:, None]
        inside = (t < parts) & there[None, :]
        at = partial + t.to(tl.int64) * channels + c[None, :]
        n = tl.load(at, inside, 0.0).to(tl.float64)
        d = tl.load(at + plane, inside, 0.0).to(tl.float64) - pivot[None, :]
        count += n
        sums += n * d
        squares += n * d * d + tl.load(at + 2 * plane, inside, 0.0).to(tl.float64)
    n = tl.sum(count, 0)
    shift = tl.sum(sums, 0) / tl.maximum(n, 1.0)
    squares = tl.maximum(tl.sum(squares, 0) - n * shift * shift, 0.0)
    var = squares / tl.maximum(n, 1.0)
    tl.store(mean + c, (pivot + shift).to(acc), there)
    tl.store(rstd + c, (1.0 / tl.sqrt(var + eps)).to(acc), there)
    tl.store(unbiased_var + c, (squares / tl.maximum(n - 1.0, 1.0)).to(acc), there)


@triton.jit(do_not_specialize=SIZES)
def _norm_kernel(
    given,
    affine,
    running_mean,  # with running statistics: mean and rstd are written
    running_var,
    y,
    items,
    units,
    channels,
    steps,
    eps: tl.float64,
    alpha: tl.float64,
    KIND: tl.constexpr,
    CUT: tl.constexpr,
):
    acc: tl.constexpr = affine[2].dtype.element_ty
    sizes = (items, units, channels, steps)
    alpha = tl.full([], alpha, acc)
    _lane, there, channel = cut.lanes_of(sizes, CUT)
    if running_var is None:
        mean, _rstd, scale, bias = lane_values(affine, sizes, acc, CUT)
    else:
        mean = cut.vector(running_mean, channel, there, 0.0, acc)
        rstd = cut.vector(running_var, channel, there, 0.0, tl.float64)
        rstd = (1.0 / tl.sqrt(rstd + eps)).to(acc)
        scale = cut.vector(affine[0], channel, there, 1.0, acc) * rstd
        bias = cut.vector(affine[1], channel, there, 0.0, acc)
        if tl.program_id(1) == 0:
            tl.store(affine[2] + channel, mean, there)
            tl.store(affine[3] + channel, rstd, there)
    begin, end = cut.chunk_of(sizes, CUT)
    for t in range(begin, end):
        at = cut.tile(t, sizes, CUT)
        z = cut.plus((cut.load(given[0], at, acc) - mean) * scale + bias, given[1], at)
        cut.store(y, at, phi.value(z, alpha, KIND))
        if given[2] is not None:
            cut.store_bits(given[2], at, z > 0)


@triton.jit(do_not_specialize=SIZES)
def _norm_backward_sums_kernel(
    given,
    affine,
    gy,
    partial,  # (2, chunks, lanes): g, g xh
    items,
    units,
    channels,
    steps,
    alpha: tl.float64,
    KIND: tl.constexpr,
    CUT: tl.constexpr,
):
    acc: tl.constexpr = partial.dtype.element_ty
    sizes = (items, units, channels, steps)
    alpha = tl.full([], alpha, acc)
    mean, rstd, scale, bias = lane_values(affine, sizes, acc, CUT)
    sums = tl.full([CUT.a, CUT.b, 8], 0.0, acc)
    sums_x = tl.full([CUT.a, CUT.b, 8], 0.0, acc)
    begin, end = cut.chunk_of(sizes, CUT)
    for t in range(begin, end):
        at = cut.tile(t, sizes, CUT)
        d = cut.load(given[0], at, acc) - mean
        slope, _ = slopes(d, given, at, scale, bias, alpha, KIND)
        g = phi.times(slope, cut.load(gy, at, acc), alpha, KIND)
        sums += g
        sums_x += g * (d * rstd)
    cut.store_part(partial, 0, sizes, cut.over_tile(sums, CUT), CUT)
    cut.store_part(partial, 1, sizes, cut.over_tile(sums_x, CUT), CUT)


@triton.jit(do_not_specialize=SIZES)
def _norm_backward_totals_kernel(
    partial,
    affine,
    gweight,
    gbias,
    values,  # (2, channels): const, by_d
    parts,
    channels,
    share: tl.float64,  # 1 / elements of a channel
    C: tl.constexpr,
    T: tl.constexpr,
):
    c = tl.program_id(0) * C + tl.arange(0, C)
    there = c < channels
    sums = cut.totals(partial, parts, channels, c, 2, 2, T)
    sum_g = cut.pick(sums, 0)
    sum_gx = cut.pick(sums, 1)
    if gweight is not None:
        tl.store(gweight + c, sum_gx.to(gweight.dtype.element_ty), there)
        tl.store(gbias + c, sum_g.to(gbias.dtype.element_ty), there)
    if values is not None:
        acc: tl.constexpr = values.dtype.element_ty
        rstd = cut.vector(affine[3], c, there, 0.0, tl.float64)
        scale = -share * rstd * cut.vector(affine[0], c, there, 1.0, tl.float64)
        tl.store(values + c, (scale * sum_g).to(acc), there)
        tl.store(values + cut.plane(1, channels) + c, (scale * sum_gx * rstd).to(acc), there)


@triton.jit(do_not_specialize=SIZES)
def _norm_backward_kernel(
    given,
    affine,
    gy,
    addend,
    values,  # None with running statistics
    gx,
    gresidual,
    items,
    units,
    channels,
    steps,
    alpha: tl.float64,
    KIND: tl.constexpr,
    CUT: tl.constexpr,
):
    acc: tl.constexpr = affine[2].dtype.element_ty
    sizes = (items, units, channels, steps)
    alpha = tl.full([], alpha, acc)
    mean, _rstd, scale, bias = lane_values(affine, sizes, acc, CUT)
    _lane, there, channel = cut.lanes_of(sizes, CUT)
    if values is not None:
        const = cut.vector(values, channel, there, 0.0, acc)
        by_d = cut.vector(values + cut.plane(1, channels), channel, there, 0.0, acc)
    begin, end = cut.chunk_of(sizes, CUT)
    for t in range(begin, end):
        at = cut.tile(t, sizes, CUT)
        d = cut.load(given[0], at, acc) - mean
        slope, _ = slopes(d, given, at, scale, bias, alpha, KIND)
        g = phi.times(slope, cut.load(gy, at, acc), alpha, KIND)
        cut.store(gresidual, at, g)
        if gx is not None:
            gradient = scale * g
            if values is not None:
                gradient += const + by_d * d
            cut.store(gx, at, cut.plus(gradient, addend, at))


def plan(x, rows, sums):
    """How to cut x for kernels that keep ``sums`` sums of each element, and their options.

    A thread has one octet, or half of one in float64; there are fewer threads where they need many
    registers. Without a limit to these ptxas spills a few bytes to fit one block more.

    Args:
        x: (N, C, ...), dense.
        rows: rows of the bit mask of such a tensor, their length, whether x is channels last.
    """
    wide = x.dtype == torch.float64
    octets = 128 if sums > 3 or wide else 256
    p = cut.plan(*rows[:2], x.shape[1], rows[2], octets)
    return p, {"CUT": p.cut, "num_warps": 8 if wide else octets // 32, "maxnreg": 255}


def between(channels, sums):
    """Grid and options of a kernel that makes totals of ``sums`` partial sums."""
    meta = {
        "C": _CHANNELS,
        "T": 1024 // triton.next_power_of_2(sums),
        "num_warps": 4,
        "maxnreg": 255,
    }
    return (triton.cdiv(channels, _CHANNELS),), meta


def batch_norm_act_forward(given, affine, running_mean, running_var, y, unbiased_var, kind, rows):
    """Fills y, mean and rstd, the mask where it is not None, and unbiased_var when training.

    Args:
        given: x, residual or None, mask or None: (N, C, ...), same dtype and order; the mask bits
            as ops/batch_norm_act.py has them.
        affine: weight or None, bias or None, mean, rstd: (C,), float32 (float64 for float64 x), as
            all vectors.
        running_mean, running_var: (C,), or None when training.
        y: like x.
        unbiased_var: (C,), or empty when not training.
        kind: training, eps, activation, alpha.
        rows: see ``plan``.
    """
    training, eps, activation, alpha = kind
    x, mean, rstd = given[0], *affine[2:]
    channels = x.shape[1]
    if channels == 0:
        return
    p, options = plan(x, rows, 2)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        if training:
            partial = mean.new_empty(3 * p.parts, channels)
            _norm_sums_kernel[p.grid](x, partial, *p.sizes, **options)
            grid, meta = between(channels, 3)
            statistics = mean, rstd, unbiased_var
            _norm_totals_kernel[grid](partial, *statistics, p.parts, channels, eps, **meta)
        running = running_mean, running_var
        options["KIND"] = activation
        _norm_kernel[p.grid](given, affine, *running, y, *p.sizes, eps, alpha, **options)


def batch_norm_act_backward(given, affine, gy, addend, gx, gresidual, gweight, gbias, kind, rows):
    """Fills those of the four gradients that are not None.

    Args:
        given, affine, kind, rows: as in the forward pass; the residual where phi is smooth, or else
            the mask that the forward pass filled.
        gy, addend: like x; addend, which is added to gx, may be None.
        gx, gresidual: like x.
        gweight, gbias: (C,), both or neither.
    """
    training, _, activation, alpha = kind
    x, mean = given[0], affine[2]
    channels = x.shape[1]
    if channels == 0:
        return
    p, options = plan(x, rows, 2)
    options["KIND"] = activation
    values = mean.new_empty(2, cut.padded(channels)) if training and gx is not None else None
    with torch.cuda.device_of(x):  # Triton launches on the current device
        if values is not None or gweight is not None:
            partial = mean.new_empty(2 * p.parts, channels)
            _norm_backward_sums_kernel[p.grid](
                given, affine, gy, partial, *p.sizes, alpha, **options
            )
            share = channels / max(x.numel(), 1)
            grid, meta = between(channels, 2)
            results = gweight, gbias, values
            _norm_backward_totals_kernel[grid](
                partial, affine, *results, p.parts, channels, share, **meta
            )
        if gx is not None or gresidual is not None:
            results = gx, gresidual
            _norm_backward_kernel[p.grid](
                given, affine, gy, addend, values, *results, *p.sizes, alpha, **options
            )
