"""fastinterp::norm_act, what layer_norm_act and group_norm_act are made of, and its derivatives.

    y = phi(gamma xh + beta + residual)        xh = (x - mean) rstd

with the statistics of G groups of each example's channels, and an affine map per channel. Three
ops: forward, backward and backward of the backward; csrc/cpu/norm_act.cpp has the formulas,
_norm_act_reference.py the same in plain torch. Kept for the backward passes: x, two numbers per
group, and the residual unless phi is the identity; two more per group for the second order.

As in batch_norm_act, ``proxy`` is one value seen as a tensor like x and stands for x in the
backward op's graph, so that what the second order adds to the gradient of x joins the rest of it in
one pass (``addend``); and None stands for zeros: the second order gives no gradient of the residual
and of beta with a piecewise linear phi, and none of x where only the cotangents of the residual's
and of beta's gradients are there.
"""

from __future__ import annotations

import torch

from fastinterp import _native
from fastinterp.ops import _backend
from fastinterp.ops import _norm_act_reference as reference
from fastinterp.ops._activations import ACTIVATIONS, SMOOTH, checked_alpha
from fastinterp.ops._autograd import no_third_order, register_autograd, remember_edges, wanted
from fastinterp.ops._layout import (
    contiguous,
    dense,
    dense_as,
    filled,
    is_channels_last,
    prefers_channels_last,
)

_KIND = "SymInt groups, float eps, str activation, float alpha"
_INPUTS = "Tensor x, Tensor? residual, Tensor? weight, Tensor? bias"
torch.library.define(
    "fastinterp::norm_act",
    f"({_INPUTS}, {_KIND}) -> (Tensor y, Tensor mean, Tensor rstd, Tensor proxy)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "fastinterp::norm_act_backward",
    f"(Tensor gy, {_INPUTS}, Tensor mean, Tensor rstd, Tensor? proxy, Tensor? addend, {_KIND},"
    " bool need_x, bool need_residual, bool need_affine)"
    " -> (Tensor gx, Tensor gresidual, Tensor gweight, Tensor gbias, Tensor mean_h,"
    " Tensor mean_hx)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "fastinterp::norm_act_backward_backward",
    f"(Tensor? v, Tensor? u, Tensor? a_weight, Tensor? a_bias, Tensor gy, {_INPUTS}, Tensor mean,"
    f" Tensor rstd, Tensor mean_h, Tensor mean_hx, {_KIND},"
    " bool need_gy, bool need_x, bool need_residual, bool need_affine)"
    " -> (Tensor ggy, Tensor gx, Tensor gresidual, Tensor gweight, Tensor gbias)",
    tags=torch.Tag.pt2_compliant_tag,
)
_backend.KERNELS["norm_act"] = ("cpu", "triton")


def norm_act(x, residual, weight, bias, groups, eps, activation, alpha) -> torch.Tensor:
    """The op, of checked arguments."""
    acc = _backend.accumulation_dtype(x.dtype)
    weight, bias = (None if t is None else t.to(acc) for t in (weight, bias))
    kind = groups, float(eps), activation, alpha
    return torch.ops.fastinterp.norm_act(x, residual, weight, bias, *kind)[0]


def checked_options(x, residual, eps, activation, alpha) -> float:
    """alpha, or its default where it is None.

    Raises:
        ValueError: the residual's shape, the activation, alpha or eps is not allowed.
        TypeError: x is not floating point, or residual has another dtype.
    """
    if x.dtype not in _backend.DTYPE_CODES:
        raise TypeError(f"x must be a floating point tensor, got {x.dtype}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(
            f"residual must have the shape of x, {tuple(x.shape)}, got {tuple(residual.shape)}"
        )
    if residual is not None and residual.dtype != x.dtype:
        raise TypeError(f"residual must be {x.dtype} like x, got {residual.dtype}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if not eps >= 0:
        raise ValueError(f"eps must be >= 0, got {eps}")
    return checked_alpha(activation, alpha)


def plain_is_faster(x, weight, bias, activation) -> bool:
    """Whether dispatching the op costs more than it saves: a small tensor on a CPU.

    Measured on a core with AVX-512, three orders together, plain torch takes of the op's time, for
    the identity 0.5 at 3,200 elements, 0.6 to 0.9 at 16,384, 0.8 to 1.3 at 65,536, 1.3 to 1.5 at
    131,072; for gelu 0.8 at 3,200, 0.9 at 16,384, 1.1 to 1.2 at 32,768; for channels_last 1.0 to
    1.2 at 8,192.
    """
    dtypes = {t.dtype for t in (weight, bias) if t is not None}
    if not (dtypes <= {x.dtype} or dtypes == {torch.float32}):  # torch takes no other mixture
        return False
    if x.dim() == 4 and prefers_channels_last(x):
        return _backend.is_small(x, 1 << 13)
    return _backend.is_small(x, 1 << 16 if activation == "identity" else 1 << 15)


def autocast(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Float32 under autocast on CUDA, where torch normalises in float32; unchanged elsewhere."""
    device = tensors[0].device.type
    if device != "cuda" or not torch.is_autocast_enabled(device):
        return list(tensors)
    low = (torch.bfloat16, torch.float16)
    return [t.float() if t is not None and t.dtype in low else t for t in tensors]


# ---- the ops


def _header(x, kind):
    groups, eps, activation, alpha = kind
    return (
        _backend.DTYPE_CODES[x.dtype],
        ACTIVATIONS[activation],
        alpha,
        eps,
        *x.shape[:2],
        x.shape[2:].numel(),
        groups,
        is_channels_last(x),
        torch.get_num_threads(),
    )


def _results(x, acc, groups, tensors, vectors, statistics):
    """Unfilled results, empty where not wanted: like x, one value per channel, one per group."""
    n, c = x.shape[:2]
    return [
        *(torch.empty_like(x) if need else x.new_empty(0) for need in tensors),
        *(x.new_empty(c if need else 0, dtype=acc) for need in vectors),
        *(x.new_empty((n, groups) if need else 0, dtype=acc) for need in statistics),
    ]


def _forward_results(x, groups):
    acc = _backend.accumulation_dtype(x.dtype)
    return [*_results(x, acc, groups, (True,), (), (True, True)), x.new_zeros(()).expand_as(x)]


def _backward_results(x, acc, groups, need_x, need_residual, need_affine):
    return _results(x, acc, groups, (need_x, need_residual), (need_affine,) * 2, (need_x,) * 2)


def _second_results(x, acc, need_gy, need_x, need_residual, need_affine):
    return _results(x, acc, 0, (need_gy, need_x, need_residual), (need_affine,) * 2, ())


def _choose(x) -> str:
    return _backend.choose("norm_act", x) if x.numel() else "reference"


@torch.library.impl("fastinterp::norm_act", "CompositeExplicitAutograd")
def _forward(x, residual, weight, bias, *kind):
    x = dense(x)
    residual = dense_as(residual, x)
    results = _forward_results(x, kind[0])
    y, mean, rstd, _ = results
    backend = _choose(x)
    if backend == "reference":
        with torch.autocast(x.device.type, enabled=False):
            filled(results[:-1], reference.forward(x, residual, weight, bias, kind))
        return results
    weight, bias = contiguous(weight, bias)
    if backend == "triton":
        from fastinterp.triton.norm_act import norm_act_forward as launch

        launch((x, residual), (weight, bias), mean, rstd, y, kind, is_channels_last(x))
        return results
    _native.core.cpu_norm_act_forward(
        _header(x, kind), *_backend.addresses(x, residual, weight, bias, mean, rstd, y)
    )
    return results


@torch.library.impl("fastinterp::norm_act_backward", "CompositeExplicitAutograd")
def _backward_impl(gy, x, residual, weight, bias, mean, rstd, proxy, addend, *options):
    kind, need = options[:4], options[4:]
    x = dense(x)
    gy, residual, addend = (dense_as(t, x) for t in (gy, residual, addend))
    results = _backward_results(x, mean.dtype, kind[0], *need)
    backend = _choose(x)
    if backend == "reference":
        with torch.autocast(x.device.type, enabled=False):
            values = reference.backward(gy, x, residual, weight, bias, mean, rstd, addend, kind)
        return filled(results, values)
    weight, bias = contiguous(weight, bias)
    if backend == "triton":
        from fastinterp.triton.norm_act import norm_act_backward as launch

        given, wanted = ((x, residual), (weight, bias), (mean, rstd)), _backend.or_none(*results)
        launch(*given, gy, addend, wanted, kind, is_channels_last(x))
        return results
    _native.core.cpu_norm_act_backward(
        _header(x, kind),
        *_backend.addresses(x, residual, weight, bias, mean, rstd, gy, addend, *results),
    )
    return results


@torch.library.impl("fastinterp::norm_act_backward_backward", "CompositeExplicitAutograd")
def _backward_backward_impl(
    v, u, a_weight, a_bias, gy, x, residual, weight, bias, mean, rstd, mean_h, mean_hx, *options
):
    kind, need = options[:4], options[4:]
    x = dense(x)
    v, u, gy, residual = (dense_as(t, x) for t in (v, u, gy, residual))
    results = _second_results(x, mean.dtype, *need)
    backend = _choose(x)
    if backend == "reference":
        with torch.autocast(x.device.type, enabled=False):
            values = reference.backward_backward(
                *(v, u, a_weight, a_bias, gy, x, residual, weight, bias),
                *(mean, rstd, mean_h, mean_hx, kind),
            )
        return filled(results, values)
    a_weight, a_bias, weight, bias = contiguous(a_weight, a_bias, weight, bias)
    if backend == "triton":
        from fastinterp.triton.norm_act import norm_act_backward_backward as launch

        given = (x, residual), (weight, bias), (mean, rstd), _backend.or_none(mean_h, mean_hx)
        cotangents, wanted = (v, u, a_weight, a_bias), _backend.or_none(*results)
        launch(*given, gy, cotangents, wanted, kind, is_channels_last(x))
        return results
    _native.core.cpu_norm_act_backward_backward(
        _header(x, kind),
        *_backend.addresses(x, residual, weight, bias, mean, rstd, gy, v, u, a_weight, a_bias),
        *_backend.addresses(mean_h, mean_hx, *results),
    )
    return results


@torch.library.register_fake("fastinterp::norm_act")
def _fake(x, residual, weight, bias, *kind):
    return _forward_results(dense(x), kind[0])


@torch.library.register_fake("fastinterp::norm_act_backward")
def _fake_backward(gy, x, residual, weight, bias, mean, rstd, proxy, addend, *options):
    return _backward_results(dense(x), mean.dtype, options[0], *options[4:])


@torch.library.register_fake("fastinterp::norm_act_backward_backward")
def _fake_backward_backward(
    v, u, a_weight, a_bias, gy, x, residual, weight, bias, mean, rstd, mean_h, mean_hx, *options
):
    return _second_results(dense(x), mean.dtype, *options[4:])


# ---- derivatives


def _setup_context(ctx, inputs, output):
    x, residual, weight, bias, *ctx.kind = inputs
    _, mean, rstd, proxy = output
    remember_edges(ctx, inputs)
    ctx.mark_non_differentiable(mean, rstd)
    if ctx.kind[2] == "identity":
        residual = None
    ctx.save_for_backward(x, residual, weight, bias, mean, rstd, proxy)


def _backward(ctx, gy, _mean, _rstd, addend):
    if gy is None:
        return addend, *(None,) * 7
    x, residual, weight, bias, mean, rstd, proxy = ctx.saved_tensors
    need_x, need_residual, need_weight, need_bias = (wanted(ctx, i) for i in range(4))
    gx, gresidual, gweight, gbias, _, _ = torch.ops.fastinterp.norm_act_backward(
        *(gy, x, residual, weight, bias, mean, rstd, proxy, addend if need_x else None),
        *ctx.kind,
        *(need_x, need_residual, need_weight or need_bias),
    )
    return (
        gx if need_x else None,
        gresidual if need_residual else None,
        gweight if need_weight else None,
        gbias if need_bias else None,
        *(None,) * 4,
    )


def _setup_context_backward(ctx, inputs, output):
    gy, x, residual, weight, bias, mean, rstd, _, _, *options = inputs
    *_, mean_h, mean_hx = output
    remember_edges(ctx, inputs)
    ctx.mark_non_differentiable(mean_h, mean_hx)
    ctx.kind = options[:4]
    ctx.save_for_backward(gy, x, residual, weight, bias, mean, rstd, mean_h, mean_hx)


def _backward_backward(ctx, v, u, a_weight, a_bias, _mean_h, _mean_hx):
    cotangents = v, u, a_weight, a_bias
    ggy = gx = gresidual = gweight = gbias = None
    smooth = ctx.kind[2] in SMOOTH
    some = any(t is not None for t in cotangents)
    # Identically zero otherwise; see the top.
    need_gy = some and wanted(ctx, 0)
    need_x = some and (smooth or v is not None or a_weight is not None) and wanted(ctx, 7)
    need_residual = some and smooth and wanted(ctx, 2)
    need_weight = some and (smooth or v is not None) and wanted(ctx, 3)
    need_bias = some and smooth and wanted(ctx, 4)
    if need_gy or need_x or need_residual or need_weight or need_bias:
        ggy, gx, gresidual, gweight, gbias = torch.ops.fastinterp.norm_act_backward_backward(
            *cotangents,
            *ctx.saved_tensors,
            *ctx.kind,
            *(need_gy, need_x, need_residual, need_weight or need_bias),
        )
    return (
        ggy if need_gy else None,
        None,
        gresidual if need_residual else None,
        gweight if need_weight else None,
        gbias if need_bias else None,
        *(None, None),
        gx if need_x else None,
        v if wanted(ctx, 8) else None,
        *(None,) * 7,
    )


register_autograd("norm_act", _backward, setup_context=_setup_context)
register_autograd("norm_act_backward", _backward_backward, setup_context=_setup_context_backward)
register_autograd("norm_act_backward_backward", no_third_order("norm_act"))
