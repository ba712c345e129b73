"""fastinterp::cross_entropy, softmax cross-entropy whose second order is one pass.

    p = softmax(z)      t = (1 - e) onehot(target) + e / K      e: label smoothing
    loss[n] = -sum_k t log p                            reduced to their sum or mean
    gz  = c (p - t)                                     c[n]: weight of the example in the result
    gc2 = sum_k v (p - t)      gz2 = c p (v - sum_k p v)        v: cotangent of gz

Kept of the forward pass: the logits, the targets, and two numbers per example that make p again.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastinterp import _native
from fastinterp.ops import _backend
from fastinterp.ops._autograd import no_third_order, register_autograd, remember_edges, wanted

REDUCTIONS = {"none": 0, "sum": 1, "mean": 2}  # codes of csrc/kernels.h

_HOW = "str reduction, float label_smoothing, int ignore_index"
_SAVED = "Tensor logits, Tensor target, Tensor shift, Tensor scale"
torch.library.define(
    "fastinterp::cross_entropy",
    f"(Tensor logits, Tensor target, {_HOW}) -> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "fastinterp::cross_entropy_backward",
    f"(Tensor grad, {_SAVED}, {_HOW}) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "fastinterp::cross_entropy_backward_backward",
    f"(Tensor v, Tensor grad, {_SAVED}, {_HOW}, bool need_grad, bool need_logits)"
    " -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
_backend.KERNELS["cross_entropy"] = ("cpu", "triton")


def cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
) -> torch.Tensor:
    """Cross-entropy of logits and class indices, as ``torch.nn.functional.cross_entropy``.

    Args:
        logits: (N, K), K >= 1, float32, float64, bfloat16 or float16.
        target: (N,), int64, each in [0, K) or equal to ignore_index.
        reduction: "mean" over the examples that count, "sum", or "none".
        label_smoothing: in [0, 1], share of the target spread evenly over all classes.
        ignore_index: target of examples that do not count: loss and gradient zero.

    Returns:
        () or, for "none", (N,); float32, or float64 for float64 logits, also outside autocast.
        Differentiable twice with respect to the logits. The mean over no example is NaN.

    Raises:
        ValueError: shapes, reduction or label_smoothing are not as described.
        TypeError: logits are not floating point, or target is not int64.
        IndexError: a target on the CPU is out of range. On a GPU the example's loss and gradient
            are NaN, or plain torch's kernel fails.
    """
    if logits.dim() != 2 or logits.shape[1] < 1:
        raise ValueError(f"logits must be (N, K) with K >= 1, got {tuple(logits.shape)}")
    if logits.dtype not in _backend.DTYPE_CODES:
        raise TypeError(f"logits must be a floating point tensor, got {logits.dtype}")
    if target.dtype != torch.int64:
        raise TypeError(f"target must be an int64 tensor of class indices, got {target.dtype}")
    if target.shape != logits.shape[:1]:
        raise ValueError(f"target must be ({logits.shape[0]},), got {tuple(target.shape)}")
    if target.device != logits.device:
        raise ValueError(f"target must be on {logits.device} like logits, got {target.device}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    if _plain_is_faster(logits):
        with torch.autocast(logits.device.type, enabled=False):
            return F.cross_entropy(
                logits.to(_backend.accumulation_dtype(logits.dtype)),
                target,
                reduction=reduction,
                label_smoothing=label_smoothing,
                ignore_index=ignore_index,
            )
    return torch.ops.fastinterp.cross_entropy(
        logits, target, reduction, float(label_smoothing), ignore_index
    )[0]


def _plain_is_faster(logits: torch.Tensor) -> bool:
    """Whether dispatching the op costs more than it saves: a small batch on a CPU.

    Measured on 2 cores with AVX-512, both orders together: plain torch takes 0.5 of the op's time
    at 1,280 logits, 0.9 at 51,200, 1.0 at 64,000, 1.8 at 256,000 and 8 at 1,024,000.
    """
    return _backend.is_small(logits, 1 << 16)


def _distribution(logits, target, label_smoothing, ignore_index):
    """t of the module's formulas, and which examples count, (N, 1)."""
    counts = (target != ignore_index)[:, None]
    classes = logits.shape[1]
    t = torch.full_like(logits, label_smoothing / classes)
    index = torch.where(counts, target[:, None], 0)
    return t.scatter_add_(1, index, torch.full_like(t[:, :1], 1 - label_smoothing)), counts


def reference(logits, target, reduction, label_smoothing, ignore_index):
    z = logits.to(_backend.accumulation_dtype(logits.dtype))
    counts = target != ignore_index
    if target.device.type == "cpu":
        bad = counts & ((target < 0) | (target >= z.shape[1]))
        _check_targets(target, z.shape[1], bad.nonzero()[0, 0].item() if bad.any() else -1)
    largest = z.amax(1, keepdim=True)
    log_total = (z - largest).exp().sum(1, keepdim=True).log()
    log_p = z - largest - log_total
    losses = -log_p.gather(1, torch.where(counts, target, 0)[:, None])[:, 0]
    if label_smoothing:  # which would make an infinite logit count
        losses = (1 - label_smoothing) * losses - label_smoothing * log_p.mean(1)
    losses = torch.where(counts, losses, 0)
    scale = 1 / counts.sum().to(z.dtype) if reduction == "mean" else z.new_ones(())
    shift = torch.cat([largest, log_total], 1)
    return (losses if reduction == "none" else losses.sum() * scale), shift, scale


def _check_targets(target, classes, bad):
    if bad >= 0:
        raise IndexError(
            f"target {target[bad].item()} of example {bad} is out of range: there are {classes} "
            "classes"
        )


def _terms(grad, logits, target, shift, scale, label_smoothing, ignore_index):
    """c, p, t and which examples count, in the accumulation dtype."""
    z = logits.to(shift.dtype)
    p = (z - shift[:, :1] - shift[:, 1:]).exp()
    t, counts = _distribution(z, target, label_smoothing, ignore_index)
    return (grad * scale).expand(len(z))[:, None], p, t, counts


def reference_backward(grad, *saved_and_how):
    logits, target, shift, scale, _, *smoothing = saved_and_how
    c, p, t, counts = _terms(grad, logits, target, shift, scale, *smoothing)
    return torch.where(counts, c * (p - t), 0).to(logits.dtype)


def reference_backward_backward(v, grad, *rest):
    logits, target, shift, scale, _, *smoothing, need_grad, need_logits = rest
    c, p, t, counts = _terms(grad, logits, target, shift, scale, *smoothing)
    v, none = v.to(p.dtype), p.new_empty(0)
    per_example = scale * torch.where(counts, v * (p - t), 0).sum(1)
    gz2 = torch.where(counts, c * p * (v - (p * v).sum(1, keepdim=True)), 0)
    return (
        per_example.sum_to_size(grad.shape) if need_grad else none,
        gz2.to(logits.dtype) if need_logits else none,
    )


def _common(logits, target, shift, scale, reduction, label_smoothing, ignore_index):
    return (
        _backend.DTYPE_CODES[logits.dtype],
        REDUCTIONS[reduction],
        *logits.shape,
        label_smoothing,
        ignore_index,
        logits.data_ptr(),
        target.data_ptr(),
        shift.data_ptr(),
        scale.data_ptr(),
        torch.get_num_threads(),
    )


@torch.library.impl("fastinterp::cross_entropy", "CompositeExplicitAutograd")
def _forward(logits, target, *how):
    backend = _backend.choose("cross_entropy", logits)
    if backend == "reference":
        return reference(logits, target, *how)
    logits, target = logits.contiguous(), target.contiguous()
    total, shift, scale = _fake(logits, target, *how)
    losses = total if how[0] == "none" else total.new_empty(len(logits))
    if backend == "triton":
        from fastinterp.triton.cross_entropy import cross_entropy_forward as launch

        launch(logits, target, shift, scale, losses, None if losses is total else total, how)
        return total, shift, scale
    bad = _native.core.cpu_cross_entropy(
        *_common(logits, target, shift, scale, *how),
        losses.data_ptr(),
        0 if how[0] == "none" else total.data_ptr(),
    )
    _check_targets(target, logits.shape[1], bad)
    return total, shift, scale


@torch.library.impl("fastinterp::cross_entropy_backward", "CompositeExplicitAutograd")
def _backward_impl(grad, logits, target, shift, scale, *how):
    backend = _backend.choose("cross_entropy", logits)
    if backend == "reference":
        return reference_backward(grad, logits, target, shift, scale, *how)
    logits, target = logits.contiguous(), target.contiguous()
    out = torch.empty_like(logits)
    if backend == "triton":
        from fastinterp.triton.cross_entropy import cross_entropy_backward as launch

        launch(grad, logits, target, shift, scale, out, how)
        return out
    _native.core.cpu_cross_entropy_backward(
        *_common(logits, target, shift, scale, *how),
        grad.data_ptr(),
        grad.stride(0) if grad.dim() else 0,
        0,
        0,
        out.data_ptr(),
    )
    return out


@torch.library.impl("fastinterp::cross_entropy_backward_backward", "CompositeExplicitAutograd")
def _backward_backward_impl(v, grad, logits, target, shift, scale, *how_and_need):
    backend = _backend.choose("cross_entropy", logits)
    if backend == "reference":
        return reference_backward_backward(v, grad, logits, target, shift, scale, *how_and_need)
    *how, need_grad, need_logits = how_and_need
    logits, target, v = logits.contiguous(), target.contiguous(), v.contiguous()
    per_example = shift.new_empty(len(logits) if need_grad else 0)
    gz2 = torch.empty_like(logits) if need_logits else logits.new_empty(0)
    if backend == "triton":
        from fastinterp.triton.cross_entropy import cross_entropy_backward_backward as launch

        results = per_example if need_grad else None, gz2 if need_logits else None
        launch(v, grad, logits, target, shift, scale, *results, how)
    else:
        _native.core.cpu_cross_entropy_backward_backward(
            *_common(logits, target, shift, scale, *how),
            grad.data_ptr(),
            grad.stride(0) if grad.dim() else 0,
            v.data_ptr(),
            per_example.data_ptr() if need_grad else 0,
            gz2.data_ptr() if need_logits else 0,
        )
    return per_example.sum() if need_grad and grad.dim() == 0 else per_example, gz2


@torch.library.register_fake("fastinterp::cross_entropy")
def _fake(logits, target, reduction, label_smoothing, ignore_index):
    acc = _backend.accumulation_dtype(logits.dtype)
    n = logits.shape[0]
    shape = (n,) if reduction == "none" else ()
    return tuple(logits.new_empty(s, dtype=acc) for s in (shape, (n, 2), ()))


@torch.library.register_fake("fastinterp::cross_entropy_backward")
def _fake_backward(grad, logits, *rest):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@torch.library.register_fake("fastinterp::cross_entropy_backward_backward")
def _fake_backward_backward(v, grad, logits, target, shift, scale, *how_and_need):
    need_grad, need_logits = how_and_need[-2:]
    return (
        torch.empty_like(grad, memory_format=torch.contiguous_format)
        if need_grad
        else shift.new_empty(0),
        torch.empty_like(logits, memory_format=torch.contiguous_format)
        if need_logits
        else logits.new_empty(0),
    )


def _setup_context(ctx, inputs, output):
    remember_edges(ctx, inputs)
    logits, target, *ctx.how = inputs
    _, shift, scale = output
    ctx.mark_non_differentiable(shift, scale)
    ctx.save_for_backward(logits, target, shift, scale)


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 5
    gz = torch.ops.fastinterp.cross_entropy_backward(grad, *ctx.saved_tensors, *ctx.how)
    return gz, *(None,) * 4


def _setup_backward(ctx, inputs, output):
    remember_edges(ctx, inputs)
    *tensors, ctx.reduction, ctx.label_smoothing, ctx.ignore_index = inputs
    ctx.save_for_backward(*tensors)


def _second_order(ctx, v):
    need = wanted(ctx, 0), wanted(ctx, 1)
    if v is None or not any(need):
        return (None,) * 8
    how = (ctx.reduction, ctx.label_smoothing, ctx.ignore_index)
    gc2, gz2 = torch.ops.fastinterp.cross_entropy_backward_backward(
        v, *ctx.saved_tensors, *how, *need
    )
    return gc2 if need[0] else None, gz2 if need[1] else None, *(None,) * 6


register_autograd("cross_entropy", _backward, setup_context=_setup_context)
register_autograd("cross_entropy_backward", _second_order, setup_context=_setup_backward)
register_autograd("cross_entropy_backward_backward", no_third_order("cross_entropy"))
