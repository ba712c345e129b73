"""fastinterp::batch_norm_act, batch norm + residual + activation in one pass, and its derivatives.

    y = phi(gamma xh + beta + residual)        xh = (x - mean) rstd, per channel

Three ops: forward, backward and backward of the backward; csrc/batch_norm.h has the
formulas, _batch_norm_act_reference.py the same in plain torch. Kept for the backward passes:

    activation        without residual       with residual
    identity          x                      x
    relu, leaky_relu  x (mask recomputed)    x, one bit per element
    the smooth ones   x                      x, residual

The forward op also gives ``proxy``, one value seen as a tensor like x, which stands for x in the
backward op's graph. What the second order adds to the gradient of x arrives at the forward op's
formula as the gradient of ``proxy`` and is added by the same pass that makes the gradient of x
(``addend``); through x itself, autograd would add the two in a pass of its own.

None instead of zeros: the gradients of x with running statistics and a piecewise linear phi, of the
residual and of beta with a piecewise linear phi, all in the second order.
"""

from __future__ import annotations

from functools import partial

import torch

from fastinterp import _native
from fastinterp.ops import _backend
from fastinterp.ops import _batch_norm_act_reference as reference
from fastinterp.ops._activations import ACTIVATIONS, SMOOTH, checked_alpha
from fastinterp.ops._autograd import (
    needs_grad,
    no_third_order,
    register_autograd,
    remember_edges,
    wanted,
)
from fastinterp.ops._layout import contiguous, dense, dense_as, filled, is_channels_last
from fastinterp.ops._recompute import can_be_made_again, recomputing

_KIND = "bool training, float eps, str activation, float alpha"
_INPUTS = "Tensor x, Tensor? residual, Tensor? mask, Tensor? weight, Tensor? bias"
torch.library.define(
    "fastinterp::batch_norm_act",
    "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? running_mean,"
    f" Tensor? running_var, {_KIND})"
    " -> (Tensor y, Tensor mean, Tensor rstd, Tensor unbiased_var, Tensor mask, Tensor proxy)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "fastinterp::batch_norm_act_backward",
    f"(Tensor gy, {_INPUTS}, Tensor mean, Tensor rstd, Tensor? proxy, Tensor? addend, {_KIND},"
    " bool need_x, bool need_residual, bool need_affine)"
    " -> (Tensor gx, Tensor gresidual, Tensor gweight, Tensor gbias)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "fastinterp::batch_norm_act_backward_backward",
    "(Tensor? v, Tensor? u, Tensor? a_weight, Tensor? a_bias,"
    f" Tensor gy, {_INPUTS}, Tensor mean, Tensor rstd, Tensor sum_gx, Tensor sum_g, {_KIND},"
    " bool need_gy, bool need_x, bool need_residual, bool need_affine)"
    " -> (Tensor ggy, Tensor gx, Tensor gresidual, Tensor gweight, Tensor gbias)",
    tags=torch.Tag.pt2_compliant_tag,
)
_backend.KERNELS["batch_norm_act"] = ("cpu", "cuda", "triton")


def batch_norm_act(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    running_mean: torch.Tensor | None = None,
    running_var: torch.Tensor | None = None,
    *,
    residual: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "identity",
    alpha: float | None = None,
) -> torch.Tensor:
    """activation(batch_norm(x) + residual) in one pass, with fused first and second derivatives.

    Args:
        x: (N, C) or (N, C, ...), float32, float64, bfloat16 or float16; NCHW or channels_last.
        weight, bias: (C,), or None for ones and zeros.
        running_mean, running_var: (C,), or None. Used when not training; when training each that
            is given is updated in place with the batch's mean or unbiased variance.
        residual: added before the activation, shape and dtype of x; or None.
        training: normalise with the batch's own statistics.
        momentum: share of the new statistics in the running ones.
        eps: added to the variance, >= 0; > 0 when training.
        activation: "identity", "relu", "leaky_relu", "softplus", "silu" or "gelu" (exact).
        alpha: slope of leaky_relu (0.01) or beta of softplus (1).

    Returns:
        y like x. Statistics and sums are in float32 (float64 for float64 x). Differentiable twice
        with respect to x, residual, weight and bias; a third derivative raises.

    Raises:
        ValueError: shapes or options are not as described, or there is one value per channel only
            when training.
        TypeError: x is not floating point, or residual has another dtype.

    Source: Ioffe & Szegedy, "Batch Normalization" (2015); the second order is derived from it.
    """
    if x.dtype not in _backend.DTYPE_CODES:
        raise TypeError(f"x must be a floating point tensor, got {x.dtype}")
    if x.dim() < 2:
        raise ValueError(f"x must be (N, C) or (N, C, ...), got {tuple(x.shape)}")
    channels = x.shape[1]
    for name, vector in (
        ("weight", weight),
        ("bias", bias),
        ("running_mean", running_mean),
        ("running_var", running_var),
    ):
        if vector is not None and vector.shape != (channels,):
            raise ValueError(f"{name} must be ({channels},) or None, got {tuple(vector.shape)}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(
            f"residual must have the shape of x, {tuple(x.shape)}, got {tuple(residual.shape)}"
        )
    if residual is not None and residual.dtype != x.dtype:
        raise TypeError(f"residual must be {x.dtype} like x, got {residual.dtype}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    alpha = checked_alpha(activation, alpha)
    if activation == "leaky_relu" and alpha < 0:  # the mask is the sign of phi
        raise ValueError(f"alpha, the slope of leaky_relu, must be >= 0, got {alpha}")
    if not eps >= 0 or (training and eps == 0):
        raise ValueError(f"eps must be > 0 when training and >= 0 otherwise, got {eps}")
    count = x.numel() // channels if channels else 0
    if training and count == 1:
        raise ValueError(f"training needs more than one value per channel, got x {tuple(x.shape)}")
    if not training and (running_mean is None or running_var is None):
        raise ValueError("running_mean and running_var are needed when not training")
    acc = _backend.accumulation_dtype(x.dtype)
    weight, bias = _as(weight, acc), _as(bias, acc)
    y, mean, rstd, unbiased_var, _, _ = torch.ops.fastinterp.batch_norm_act(
        x,
        residual,
        weight,
        bias,
        None if training else running_mean.to(acc),
        None if training else running_var.to(acc),
        training,
        eps,
        activation,
        alpha,
    )
    if training and count > 0:
        with torch.no_grad():
            for running, batch in ((running_mean, mean), (running_var, unbiased_var)):
                if running is not None:
                    running.lerp_(batch.to(running.dtype), momentum)
    if residual is None and recomputing():
        given = (t if t is None else t.detach() for t in (x, weight, bias, mean, rstd))
        can_be_made_again(y, partial(_again, *given, activation, alpha))
    return y


@torch.no_grad()
def _again(x, weight, bias, mean, rstd, activation, alpha):
    kind = False, 0.0, activation, alpha
    return torch.ops.fastinterp.batch_norm_act(x, None, weight, bias, mean, rstd**-2, *kind)[0]


def _as(vector, dtype):
    return None if vector is None else vector.to(dtype)


# ---- the ops


def _keeps_mask(residual, activation) -> bool:
    return residual is not None and activation in ("relu", "leaky_relu")


def _mask_rows(x: torch.Tensor) -> tuple[int, int]:
    """Rows of the bit mask and elements in each; every row is padded to whole bytes.

    A row is a plane (NCHW) or the channels of a pixel, of several pixels where 64 / C is whole.
    """
    n, c = x.shape[:2]
    pixels = x.shape[2:].numel()
    if not is_channels_last(x):
        return n * c, pixels
    fold = 64 // c if 0 < c < 64 and 64 % c == 0 and n * pixels % (64 // c) == 0 else 1
    return n * pixels // fold, c * fold


def _in_memory_order(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return t.movedim(1, -1) if is_channels_last(x) else t


def _pack(positive: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    rows, length = _mask_rows(x)
    bits = _in_memory_order(positive, x).reshape(rows, length).to(torch.uint8)
    bits = torch.nn.functional.pad(bits, (0, -length % 8)).view(rows, -1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=x.device)).sum(2, dtype=torch.uint8)


def _unpack(mask: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    rows, length = _mask_rows(x)
    bits = mask[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=x.device) & 1
    bits = bits.view(rows, mask.shape[1] * 8)[:, :length]
    ordered = _in_memory_order(x, x)
    bits = bits.reshape(ordered.shape)
    return (bits.movedim(-1, 1) if is_channels_last(x) else bits).bool()


def _rows(x: torch.Tensor) -> tuple[int, int, bool]:
    return *_mask_rows(x), is_channels_last(x)


def _header(x, kind):
    training, eps, activation, alpha = kind
    return (
        _backend.DTYPE_CODES[x.dtype],
        ACTIVATIONS[activation],
        alpha,
        training,
        eps,
        *x.shape[:2],
        x.shape[2:].numel(),
        is_channels_last(x),
        torch.get_num_threads(),
    )


def _launch(backend, name, x, kind, *addresses):
    """Calls the compiled kernel ``name`` for CPU or CUDA tensors."""
    header, core = _header(x, kind), _native.core
    if backend == "cpu":
        getattr(core, f"cpu_{name}")(header, *addresses)
        return
    size = core.cuda_batch_norm_act_scratch_bytes(header)
    scratch = torch.empty(size, dtype=torch.uint8, device=x.device)
    _backend.run_cuda(f"cuda_{name}", x.device, header, *addresses, scratch.data_ptr())


def _results(x, acc, tensors, vectors):
    """Unfilled results, empty where not wanted: like x, then one value per channel."""
    return [
        *(torch.empty_like(x) if need else x.new_empty(0) for need in tensors),
        *(x.new_empty(x.shape[1] if need else 0, dtype=acc) for need in vectors),
    ]


def _forward_results(x, residual, training, activation):
    acc = _backend.accumulation_dtype(x.dtype)
    y, mean, rstd, unbiased_var = _results(x, acc, (True,), (True, True, training))
    rows, length = _mask_rows(x) if _keeps_mask(residual, activation) else (0, 0)
    mask = x.new_empty(rows, -(-length // 8), dtype=torch.uint8)
    return y, mean, rstd, unbiased_var, mask, x.new_zeros(()).expand_as(x)


@torch.library.impl("fastinterp::batch_norm_act", "CompositeExplicitAutograd")
def _forward(x, residual, weight, bias, running_mean, running_var, *kind):
    training, _, activation, _ = kind
    x = dense(x)
    residual = dense_as(residual, x)
    results = _forward_results(x, residual, training, activation)
    y, mean, rstd, unbiased_var, mask, _ = results
    backend = _backend.choose("batch_norm_act", x)
    if backend == "reference":
        with torch.autocast(x.device.type, enabled=False):
            *values, positive = reference.forward(
                x, residual, weight, bias, running_mean, running_var, kind
            )
        filled(results[:-1], (*values, _pack(positive, x) if mask.numel() else None))
        return results
    weight, bias, running_mean, running_var = contiguous(weight, bias, running_mean, running_var)
    if backend == "triton":
        from fastinterp.triton.batch_norm_act import batch_norm_act_forward as launch

        given, affine = (x, residual, *_backend.or_none(mask)), (weight, bias, mean, rstd)
        launch(given, affine, running_mean, running_var, y, unbiased_var, kind, _rows(x))
        return results
    _launch(
        *(backend, "batch_norm_act_forward", x, kind),
        *_backend.addresses(x, residual, weight, bias, mean, rstd, mask),
        *_backend.addresses(running_mean, running_var, y, unbiased_var),
    )
    return results


@torch.library.impl("fastinterp::batch_norm_act_backward", "CompositeExplicitAutograd")
def _backward_impl(gy, x, residual, mask, weight, bias, mean, rstd, proxy, addend, *options):
    kind, (need_x, need_residual, need_affine) = options[:4], options[4:]
    x = dense(x)
    gy, residual, addend = (dense_as(t, x) for t in (gy, residual, addend))
    results = _results(x, mean.dtype, (need_x, need_residual), (need_affine,) * 2)
    backend = _backend.choose("batch_norm_act", x)
    if backend == "reference":
        with torch.autocast(x.device.type, enabled=False):
            mask = None if mask is None else _unpack(mask, x)
            values = reference.backward(
                gy, x, residual, mask, weight, bias, mean, rstd, addend, kind
            )
        return filled(results, values)
    weight, bias = contiguous(weight, bias)
    if backend == "triton":
        from fastinterp.triton.batch_norm_act import batch_norm_act_backward as launch

        given, affine = (x, residual, mask), (weight, bias, mean, rstd)
        launch(given, affine, gy, addend, *_backend.or_none(*results), kind, _rows(x))
        return results
    _launch(
        *(backend, "batch_norm_act_backward", x, kind),
        *_backend.addresses(x, residual, weight, bias, mean, rstd, mask, gy, addend),
        *_backend.addresses(*results),
    )
    return results


@torch.library.impl("fastinterp::batch_norm_act_backward_backward", "CompositeExplicitAutograd")
def _backward_backward_impl(
    v, u, a_weight, a_bias, gy, x, residual, mask, weight, bias, mean, rstd, sum_gx, sum_g, *options
):
    kind, need = options[:4], options[4:]
    x = dense(x)
    v, u, gy, residual = (dense_as(t, x) for t in (v, u, gy, residual))
    results = _results(x, mean.dtype, need[:3], need[3:] * 2)
    backend = _backend.choose("batch_norm_act", x)
    if backend == "reference":
        with torch.autocast(x.device.type, enabled=False):
            mask = None if mask is None else _unpack(mask, x)
            values = reference.backward_backward(
                *(v, u, a_weight, a_bias, gy, x, residual, mask, weight, bias, mean, rstd),
                *(sum_gx, sum_g, kind),
            )
        return filled(results, values)
    vectors = contiguous(a_weight, a_bias, sum_gx, sum_g, weight, bias)
    a_weight, a_bias, sum_gx, sum_g, weight, bias = vectors
    if backend == "triton":
        from fastinterp.triton._batch_norm_act_second import batch_norm_act_backward_backward

        given, affine = (x, residual, mask), (weight, bias, mean, rstd)
        cotangents, first = (v, u, a_weight, a_bias), _backend.or_none(sum_gx, sum_g)
        batch_norm_act_backward_backward(
            given, affine, gy, cotangents, first, *_backend.or_none(*results), kind, _rows(x)
        )
        return results
    _launch(
        *(backend, "batch_norm_act_backward_backward", x, kind),
        *_backend.addresses(
            x, residual, weight, bias, mean, rstd, mask, gy, v, u, a_weight, a_bias
        ),
        *_backend.addresses(sum_gx, sum_g, *results),
    )
    return results


@torch.library.register_fake("fastinterp::batch_norm_act")
def _fake(x, residual, weight, bias, running_mean, running_var, *kind):
    return _forward_results(dense(x), residual, kind[0], kind[2])


@torch.library.register_fake("fastinterp::batch_norm_act_backward")
def _fake_backward(gy, x, residual, mask, weight, bias, mean, rstd, proxy, addend, *options):
    need_x, need_residual, need_affine = options[4:]
    return _results(dense(x), mean.dtype, (need_x, need_residual), (need_affine,) * 2)


@torch.library.register_fake("fastinterp::batch_norm_act_backward_backward")
def _fake_backward_backward(
    v, u, a_weight, a_bias, gy, x, residual, mask, weight, bias, mean, rstd, sum_gx, sum_g, *options
):
    need = options[4:]
    return _results(dense(x), mean.dtype, need[:3], need[3:] * 2)


# ---- derivatives


def _setup_context(ctx, inputs, output):
    x, residual, weight, bias, _, _, *ctx.kind = inputs
    _, mean, rstd, unbiased_var, mask, proxy = output
    remember_edges(ctx, inputs)
    ctx.mark_non_differentiable(mean, rstd, unbiased_var, mask)
    ctx.keeps_mask = _keeps_mask(residual, ctx.kind[2])
    if ctx.kind[2] not in SMOOTH:
        residual = None
    ctx.save_for_backward(x, residual, weight, bias, mean, rstd, mask, proxy)


def _backward(ctx, gy, _mean, _rstd, _unbiased_var, _mask, addend):
    if gy is None:
        return addend, *(None,) * 9
    x, residual, weight, bias, mean, rstd, mask, proxy = ctx.saved_tensors
    need_x, need_residual = wanted(ctx, 0), wanted(ctx, 1)
    sums_are_there = ctx.kind[0] and need_x
    need_weight, need_bias = (
        needs_grad(ctx, i) and (sums_are_there or wanted(ctx, i)) for i in (2, 3)
    )
    gx, gresidual, gweight, gbias = torch.ops.fastinterp.batch_norm_act_backward(
        *(gy, x, residual, mask if ctx.keeps_mask else None, weight, bias, mean, rstd),
        *(proxy, addend if need_x else None),
        *ctx.kind,
        *(need_x, need_residual, need_weight or need_bias or sums_are_there),
    )
    return (
        gx if need_x else None,
        gresidual if need_residual else None,
        gweight if need_weight else None,
        gbias if need_bias else None,
        *(None,) * 6,
    )


def _setup_context_backward(ctx, inputs, output):
    gy, x, residual, mask, weight, bias, mean, rstd, _, _, *options = inputs
    remember_edges(ctx, inputs)
    ctx.kind = options[:4]
    ctx.save_for_backward(gy, x, residual, mask, weight, bias, mean, rstd, output[2], output[3])


def _backward_backward(ctx, v, u, a_weight, a_bias):
    cotangents = v, u, a_weight, a_bias
    ggy = gx = gresidual = gweight = gbias = None
    training, _, activation, _ = ctx.kind
    smooth = activation in SMOOTH
    # Identically zero otherwise; see the top.
    depends_on_x = smooth or a_weight is not None or (training and v is not None)
    some = any(t is not None for t in cotangents)
    need_gy = some and wanted(ctx, 0)
    need_x = some and depends_on_x and wanted(ctx, 8)
    need_residual = some and smooth and wanted(ctx, 2)
    need_weight = some and (smooth or v is not None) and needs_grad(ctx, 4)
    need_bias = some and smooth and needs_grad(ctx, 5)
    if need_gy or need_x or need_residual or need_weight or need_bias:
        ggy, gx, gresidual, gweight, gbias = torch.ops.fastinterp.batch_norm_act_backward_backward(
            *cotangents,
            *ctx.saved_tensors,
            *ctx.kind,
            *(need_gy, need_x, need_residual, need_weight or need_bias),
        )
    return (
        ggy if need_gy else None,
        None,
        gresidual if need_residual else None,
        None,
        gweight if need_weight else None,
        gbias if need_bias else None,
        *(None, None),
        gx if need_x else None,
        v if needs_grad(ctx, 9) else None,
        *(None,) * 7,
    )


register_autograd("batch_norm_act", _backward, setup_context=_setup_context)
register_autograd(
    "batch_norm_act_backward", _backward_backward, setup_context=_setup_context_backward
)
register_autograd("batch_norm_act_backward_backward", no_third_order("batch_norm_act"))
