"""Softmax cross-entropy in three orders as Triton kernels; ops/cross_entropy.py has the formulas.

A program has a few examples and goes over their classes in blocks. What is wanted twice is read
twice, the second time from a cache. A target out of range, which only the host could report, makes
the loss and the gradients of its example NaN.
"""

from math import gcd

import torch
import triton
import triton.language as tl

_TILE = 1024  # logits in a tile; of 128 threads
_LARGEST = 4096  # classes in a tile of one example
_SIZES = ["examples", "units", "ignore", "stride"]

# In all kernels, classes = units DIVISOR, so that Triton sees by what it can be divided.


@triton.jit
def _examples(target, examples, classes, ignore, ROWS: tl.constexpr):
    """Examples of this program, which exist, count, and have a wrong target; and their targets."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = n < examples
    label = tl.load(target + n, there, 0)
    counts = there & (label != ignore)
    return n, there, counts, counts & ((label < 0) | (label >= classes)), label


@triton.jit
def _tile(x, n, there, k, classes, otherwise, acc: tl.constexpr):
    """x at examples n and classes k, and where that is."""
    at = n.to(tl.int64)[:, None] * classes + k[None, :]
    inside = there[:, None] & (k < classes)[None, :]
    return tl.load(x + at, inside, otherwise).to(acc), at, inside


@triton.jit
def _poisoned(values, wrong):
    return tl.where(wrong, float("nan"), values)


@triton.jit(do_not_specialize=_SIZES)
def _entropy_kernel(
    logits,
    target,
    shift,  # (N, 2): largest logit, and logarithm of the sum of exp(logit - largest)
    scale,
    losses,
    total,  # None if not in this program
    examples,
    units,
    ignore,
    smoothing: tl.float64,
    MEAN: tl.constexpr,
    DIVISOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    acc: tl.constexpr = shift.dtype.element_ty
    classes = units * DIVISOR
    smooth = tl.full([], smoothing, acc)
    n, there, counts, wrong, label = _examples(target, examples, classes, ignore, ROWS)
    highest = tl.full([ROWS, BLOCK], float("-inf"), acc)
    for first in range(0, classes, BLOCK):
        k = first + tl.arange(0, BLOCK)
        z, _at, _inside = _tile(logits, n, there, k, classes, float("-inf"), acc)
        highest = tl.maximum(highest, z)
    largest = tl.max(highest, 1)
    largest = tl.where(there, largest, 0.0)
    sums = tl.zeros([ROWS, BLOCK], acc)
    rest = tl.zeros([ROWS, BLOCK], acc)
    for first in range(0, classes, BLOCK):
        k = first + tl.arange(0, BLOCK)
        z, _at, inside = _tile(logits, n, there, k, classes, float("-inf"), acc)
        sums += tl.where(inside, tl.exp(z - largest[:, None]), 0.0)
        if smoothing > 0:  # else an infinite logit would count
            rest += tl.where(inside, z - largest[:, None], 0.0)
    log_total = tl.log(tl.where(there, tl.sum(sums, 1), 1.0))
    own = tl.load(logits + n.to(tl.int64) * classes + label, counts & (wrong == 0), 0.0).to(acc)
    loss = log_total - (own - largest)
    if smoothing > 0:
        loss = (1.0 - smooth) * loss + smooth * (log_total - tl.sum(rest, 1) / classes)
    loss = _poisoned(tl.where(counts, loss, 0.0), wrong)
    tl.store(losses + n, loss, there)
    tl.store(shift + 2 * n, largest, there)
    tl.store(shift + 2 * n + 1, log_total, there)
    if not MEAN:
        tl.store(scale, tl.full([], 1.0, acc))
    if total is not None:
        _finish(tl.sum(loss, 0), tl.sum(counts.to(tl.int32), 0), total, scale, MEAN)


@triton.jit
def _finish(loss, count, total, scale, MEAN: tl.constexpr):
    if MEAN:
        share = 1.0 / count.to(loss.dtype)
        tl.store(scale, share)
        loss = tl.where(count == 0, float("nan"), loss * share)
    tl.store(total, loss)


@triton.jit(do_not_specialize=_SIZES)
def _entropy_total_kernel(
    losses, target, total, scale, examples, ignore, MEAN: tl.constexpr, BLOCK: tl.constexpr
):
    sums = tl.zeros([BLOCK], losses.dtype.element_ty)
    counts = tl.zeros([BLOCK], tl.int32)
    for first in range(0, examples, BLOCK):
        n = first + tl.arange(0, BLOCK)
        sums += tl.load(losses + n, n < examples, 0.0)
        counts += ((tl.load(target + n, n < examples, 0) != ignore) & (n < examples)).to(tl.int32)
    _finish(tl.sum(sums, 0), tl.sum(counts, 0), total, scale, MEAN)


@triton.jit
def _terms(z, shift, n, there, label, k, classes, smooth):
    """p and p - t of a tile."""
    largest = tl.load(shift + 2 * n, there, 0.0)[:, None]
    log_total = tl.load(shift + 2 * n + 1, there, 0.0)[:, None]
    p = tl.exp(z - largest - log_total)
    own = label[:, None] == k[None, :]
    return p, p - tl.where(own, 1.0 - smooth, 0.0) - smooth / classes


@triton.jit(do_not_specialize=_SIZES)
def _entropy_backward_kernel(
    grad,  # one value, or N with the stride
    logits,
    target,
    shift,
    scale,
    gz,
    examples,
    units,
    ignore,
    stride,
    smoothing: tl.float64,
    DIVISOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    acc: tl.constexpr = shift.dtype.element_ty
    classes = units * DIVISOR
    smooth = tl.full([], smoothing, acc)
    n, there, counts, wrong, label = _examples(target, examples, classes, ignore, ROWS)
    c = tl.load(grad + n * stride, there, 0.0).to(acc) * tl.load(scale)
    c = _poisoned(c, wrong)[:, None]
    for first in range(0, classes, BLOCK):
        k = first + tl.arange(0, BLOCK)
        z, at, inside = _tile(logits, n, there, k, classes, float("-inf"), acc)
        _p, off = _terms(z, shift, n, there, label, k, classes, smooth)
        g = tl.where(counts[:, None], c * off, 0.0)
        tl.store(gz + at, g.to(gz.dtype.element_ty), inside)


@triton.jit(do_not_specialize=_SIZES)
def _entropy_second_kernel(
    v,
    grad,
    logits,
    target,
    shift,
    scale,
    per_example,  # scale sum_k v (p - t), or None
    gz2,  # c p (v - sum_k p v), or None
    examples,
    units,
    ignore,
    stride,
    smoothing: tl.float64,
    DIVISOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    acc: tl.constexpr = shift.dtype.element_ty
    classes = units * DIVISOR
    smooth = tl.full([], smoothing, acc)
    n, there, counts, wrong, label = _examples(target, examples, classes, ignore, ROWS)
    share = _poisoned(there.to(acc) * tl.load(scale), wrong)
    sums = tl.zeros([ROWS, BLOCK], acc)
    mean = tl.zeros([ROWS, BLOCK], acc)
    for first in range(0, classes, BLOCK):
        k = first + tl.arange(0, BLOCK)
        z, _at, _inside = _tile(logits, n, there, k, classes, float("-inf"), acc)
        vs, _at, _inside = _tile(v, n, there, k, classes, 0.0, acc)
        p, off = _terms(z, shift, n, there, label, k, classes, smooth)
        sums += vs * off
        mean += vs * p
    if per_example is not None:
        value = tl.where(counts, share * tl.sum(sums, 1), 0.0)
        tl.store(per_example + n, value, there)
    if gz2 is not None:
        pv = tl.sum(mean, 1)[:, None]
        c = (tl.load(grad + n * stride, there, 0.0).to(acc) * share)[:, None]
        for first in range(0, classes, BLOCK):
            k = first + tl.arange(0, BLOCK)
            z, at, inside = _tile(logits, n, there, k, classes, float("-inf"), acc)
            vs, at, inside = _tile(v, n, there, k, classes, 0.0, acc)
            p, _off = _terms(z, shift, n, there, label, k, classes, smooth)
            g = tl.where(counts[:, None], c * p * (vs - pv), 0.0)
            tl.store(gz2 + at, g.to(gz2.dtype.element_ty), inside)


def _plan(logits):
    """Grid, sizes and options for (N, K) logits."""
    examples, classes = logits.shape
    block = min(triton.next_power_of_2(classes), _LARGEST)
    rows = max(_TILE // block, 1)
    divisor = gcd(classes, 8)
    meta = {"DIVISOR": divisor, "ROWS": rows, "BLOCK": block, "num_warps": max(block // 512, 4)}
    meta["maxnreg"] = 255  # without a limit ptxas may spill to fit one block more
    return (triton.cdiv(examples, rows),), (examples, classes // divisor), meta


def cross_entropy_forward(logits, target, shift, scale, losses, total, how):
    """Fills the losses, their total, and what the other orders need.

    Args:
        logits: (N, K), contiguous, K >= 1.
        target: (N,), int64, contiguous.
        shift: (N, 2), float32 (float64 for float64 logits), as all below.
        scale: (), the weight of an example in the total.
        losses: (N,).
        total: (), or None when they are not reduced.
        how: reduction, label_smoothing, ignore_index.
    """
    reduction, smoothing, ignore = how
    grid, sizes, meta = _plan(logits)
    meta["MEAN"] = mean = reduction == "mean"
    if not len(logits):
        scale.fill_(torch.inf if mean else 1.0)
        if total is not None:
            total.fill_(torch.nan if mean else 0.0)
        return
    at_once = total if grid == (1,) else None
    with torch.cuda.device_of(logits):  # Triton launches on the current device
        _entropy_kernel[grid](
            *(logits, target, shift, scale, losses, at_once),
            *(*sizes, ignore, smoothing),
            **meta,
        )
        if total is not at_once:
            tensors = losses, target, total, scale
            _entropy_total_kernel[(1,)](*tensors, len(logits), ignore, MEAN=mean, BLOCK=1024)


def cross_entropy_backward(grad, logits, target, shift, scale, gz, how):
    """gz = c (p - t).

    Args:
        grad: () or (N,) of any stride.
        logits, target, shift, scale, how: as in the forward pass.
        gz: like logits.
    """
    _, smoothing, ignore = how
    grid, sizes, meta = _plan(logits)
    stride = grad.stride(0) if grad.dim() else 0
    if len(logits):
        with torch.cuda.device_of(logits):
            _entropy_backward_kernel[grid](
                *(grad, logits, target, shift, scale, gz),
                *(*sizes, ignore, stride, smoothing),
                **meta,
            )


def cross_entropy_backward_backward(v, grad, logits, target, shift, scale, per_example, gz2, how):
    """per_example = scale sum_k v (p - t), gz2 = c p (v - sum_k p v); either may be None.

    Args:
        v, gz2: like logits, contiguous.
        per_example: (N,), float32 (float64 for float64 logits).
        The others as in the backward pass.
    """
    _, smoothing, ignore = how
    grid, sizes, meta = _plan(logits)
    stride = grad.stride(0) if grad.dim() else 0
    if len(logits):
        with torch.cuda.device_of(logits):
            _entropy_second_kernel[grid](
                *(v, grad, logits, target, shift, scale, per_example, gz2),
                *(*sizes, ignore, stride, smoothing),
                **meta,
            )
