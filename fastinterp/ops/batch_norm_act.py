"""fastinterp::batch_norm_act, batch norm + residual + activation in one pass, and its derivatives.

    y = phi(gamma xh + beta + residual)        xh = (x - mean) rstd, per channel

Three ops: forward, backward and backward of the backward; csrc/cpu/batch_norm_act.cpp has the
formulas, ``reference_*`` below the same in plain torch. Kept for the backward passes:

    activation        without residual       with residual
    identity          x                      x
    relu, leaky_relu  x (mask recomputed)    x, one bit per element
    the smooth ones   x                      x, residual

None instead of zeros: the gradients of x with running statistics and a piecewise linear phi, of the
residual and of beta with a piecewise linear phi, all in the second order.
"""

from __future__ import annotations

import torch

from fastinterp import _native
from fastinterp.ops import _backend
from fastinterp.ops._autograd import no_third_order, remember_edges, wanted
from fastinterp.ops._layout import dense, dense_as, is_channels_last

# Codes of csrc/kernels.h, and what alpha is when it is not given.
ACTIVATIONS = {"identity": 0, "relu": 1, "leaky_relu": 2, "softplus": 3, "silu": 4, "gelu": 5}
DEFAULT_ALPHA = {"leaky_relu": 0.01, "softplus": 1.0}
SMOOTH = ("softplus", "silu", "gelu")

_KIND = "bool training, float eps, str activation, float alpha"
_INPUTS = "Tensor x, Tensor? residual, Tensor? mask, Tensor? weight, Tensor? bias"
torch.library.define(
    "fastinterp::batch_norm_act",
    "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? running_mean,"
    f" Tensor? running_var, {_KIND})"
    " -> (Tensor y, Tensor mean, Tensor var, Tensor rstd, Tensor mask)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "fastinterp::batch_norm_act_backward",
    f"(Tensor gy, {_INPUTS}, Tensor mean, Tensor rstd, {_KIND}, bool need_x, bool need_residual,"
    " bool need_affine) -> (Tensor gx, Tensor gresidual, Tensor gweight, Tensor gbias)",
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
_backend.KERNELS["batch_norm_act"] = ("cpu",)


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
        running_mean, running_var: (C,), or None. Used when not training; when training they are
            updated in place with the batch's mean and unbiased variance.
        residual: added before the activation, shape and dtype of x; or None.
        training: normalise with the batch's own statistics.
        momentum: share of the new statistics in the running ones, in [0, 1].
        eps: added to the variance, > 0.
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
    if alpha is None:
        alpha = DEFAULT_ALPHA.get(activation, 0.0)
    if activation == "leaky_relu" and alpha < 0:
        raise ValueError(f"alpha, the slope of leaky_relu, must be >= 0, got {alpha}")
    if activation == "softplus" and not alpha > 0:
        raise ValueError(f"alpha, the beta of softplus, must be > 0, got {alpha}")
    count = x.numel() // channels if channels else 0
    if training and count == 1:
        raise ValueError(f"training needs more than one value per channel, got x {tuple(x.shape)}")
    if not training and (running_mean is None or running_var is None):
        raise ValueError("running_mean and running_var are needed when not training")
    acc = _backend.accumulation_dtype(x.dtype)
    y, mean, var, _, _ = torch.ops.fastinterp.batch_norm_act(
        x,
        residual,
        _as(weight, acc),
        _as(bias, acc),
        None if training else running_mean.to(acc),
        None if training else running_var.to(acc),
        training,
        eps,
        activation,
        alpha,
    )
    if training and running_mean is not None and count > 0:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * (count / (count - 1))).to(running_var.dtype), momentum)
    return y


def _as(vector, dtype):
    return None if vector is None else vector.to(dtype)


# ---- plain torch


def _columns(vector, x):
    return vector.view(1, -1, *[1] * (x.dim() - 2))


def _sum(t):
    return t.sum([0, *range(2, t.dim())])


def _slope(z, activation, alpha):
    if activation == "relu":
        return (z > 0).to(z.dtype)
    if activation == "leaky_relu":
        return torch.where(z > 0, 1.0, alpha).to(z.dtype)
    if activation == "softplus":
        return torch.sigmoid(alpha * z)
    if activation == "silu":
        s = torch.sigmoid(z)
        return s * (1 + z * (1 - s))
    if activation == "gelu":
        return torch.special.ndtr(z) + z * _density(z)
    return torch.ones_like(z)


def _curvature(z, activation, alpha):
    if activation == "softplus":
        s = torch.sigmoid(alpha * z)
        return alpha * s * (1 - s)
    if activation == "silu":
        s = torch.sigmoid(z)
        return s * (1 - s) * (2 + z * (1 - 2 * s))
    return _density(z) * (2 - z * z)


def _density(z):
    return torch.exp(-0.5 * z * z) * 0.3989422804014327


def _value(z, activation, alpha):
    functional = torch.nn.functional
    if activation == "identity":
        return z
    if activation == "leaky_relu":
        return functional.leaky_relu(z, alpha)
    if activation == "softplus":
        return functional.softplus(z, alpha)
    return getattr(functional, activation)(z)


def reference_forward(x, residual, weight, bias, running_mean, running_var, kind):
    training, eps, activation, alpha = kind
    x32 = x.to(_backend.accumulation_dtype(x.dtype))
    if training:
        count = x.numel() // x.shape[1]
        mean = _sum(x32) / count
        var = _sum((x32 - _columns(mean, x)).square()) / count
    else:
        mean, var = running_mean.clone(), running_var.clone()
    rstd = 1 / torch.sqrt(var + eps)
    z = _pre_activation(x32, residual, weight, bias, mean, rstd)
    mask = None if residual is None else z > 0
    return _value(z, activation, alpha).to(x.dtype), mean, var, rstd, mask


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
        slope = torch.where(mask, 1.0, _slope(-torch.ones((), dtype=acc), activation, alpha))
        slope = slope.to(acc)
    else:
        z = _pre_activation(x32, residual, weight, bias, mean, rstd)
        slope = _slope(z, activation, alpha)
        if activation in SMOOTH:
            curvature = _curvature(z, activation, alpha)
    return xh, gy.to(acc), slope, curvature, scale


def reference_backward(gy, x, residual, mask, weight, bias, mean, rstd, kind):
    xh, gy, slope, _, scale = _normalised(gy, x, residual, mask, weight, bias, mean, rstd, kind)
    g = slope * gy
    sum_g, sum_gx = _sum(g), _sum(g * xh)
    gx = g
    if kind[0]:
        count = x.numel() // x.shape[1]
        gx = g - _columns(sum_g, x) / count - xh * _columns(sum_gx, x) / count
    return (scale * gx).to(x.dtype), g.to(x.dtype), sum_gx, sum_g


def reference_backward_backward(
    v, u, a_weight, a_bias, gy, x, residual, mask, weight, bias, mean, rstd, sum_gx, sum_g, kind
):
    xh, gy, slope, curvature, scale = _normalised(
        gy, x, residual, mask, weight, bias, mean, rstd, kind
    )
    zero = torch.zeros((), dtype=mean.dtype, device=x.device)
    v, u = (zero.expand_as(x) if t is None else t.to(mean.dtype) for t in (v, u))
    a_weight = zero if a_weight is None else _columns(a_weight, x)
    a_bias = zero if a_bias is None else _columns(a_bias, x)
    g, r = slope * gy, _columns(rstd, x)

    def centred(t, total, total_x):
        if not kind[0]:
            return t
        count = x.numel() // x.shape[1]
        return t - _columns(total, x) / count - xh * _columns(total_x, x) / count

    sum_v, sum_vx = _sum(v), _sum(v * xh)
    v_centred, g_centred = centred(v, sum_v, sum_vx), centred(g, sum_g, sum_gx)
    q = scale * v_centred + u + a_weight * xh + a_bias
    a = _sum(v_centred * g)
    gx = r * a_weight * g_centred
    if kind[0]:
        count = x.numel() // x.shape[1]
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


def _addresses(*tensors):
    return [0 if t is None else t.data_ptr() for t in tensors]


def _contiguous(*vectors):
    return [None if t is None else t.contiguous() for t in vectors]


def _results(x, acc, tensors, vectors):
    """Unfilled results, empty where not wanted: like x, then one value per channel."""
    return [
        *(torch.empty_like(x) if need else x.new_empty(0) for need in tensors),
        *(x.new_empty(x.shape[1] if need else 0, dtype=acc) for need in vectors),
    ]


def _forward_results(x, residual, activation):
    y, mean, var, rstd = _results(x, _backend.accumulation_dtype(x.dtype), (True,), (True,) * 3)
    rows, length = _mask_rows(x) if _keeps_mask(residual, activation) else (0, 0)
    return y, mean, var, rstd, x.new_empty(rows, -(-length // 8), dtype=torch.uint8)


@torch.library.impl("fastinterp::batch_norm_act", "CompositeExplicitAutograd")
def _forward(x, residual, weight, bias, running_mean, running_var, *kind):
    x = dense(x)
    residual = dense_as(residual, x)
    y, mean, var, rstd, mask = results = _forward_results(x, residual, kind[2])
    keeps_mask = _keeps_mask(residual, kind[2])
    if _backend.choose("batch_norm_act", x) == "reference":
        with torch.autocast(x.device.type, enabled=False):
            values = reference_forward(x, residual, weight, bias, running_mean, running_var, kind)
        for result, value in zip(results, values, strict=True):
            if result is not mask:
                result.copy_(value)
            elif keeps_mask:
                result.copy_(_pack(value, x))
        return results
    weight, bias, running_mean, running_var = _contiguous(weight, bias, running_mean, running_var)
    _native.core.cpu_batch_norm_act_forward(
        _header(x, kind),
        *_addresses(x, residual, weight, bias, mean, rstd, mask if keeps_mask else None),
        *_addresses(running_mean, running_var, y, var),
    )
    if not kind[0]:
        var.copy_(running_var)
    return results


@torch.library.impl("fastinterp::batch_norm_act_backward", "CompositeExplicitAutograd")
def _backward_impl(gy, x, residual, mask, weight, bias, mean, rstd, *options):
    kind, (need_x, need_residual, need_affine) = options[:4], options[4:]
    x = dense(x)
    gy, residual = dense_as(gy, x), dense_as(residual, x)
    gx, gresidual, gweight, gbias = results = _results(
        x, mean.dtype, (need_x, need_residual), (need_affine,) * 2
    )
    if _backend.choose("batch_norm_act", x) == "reference":
        with torch.autocast(x.device.type, enabled=False):
            mask = None if mask is None else _unpack(mask, x)
            values = reference_backward(gy, x, residual, mask, weight, bias, mean, rstd, kind)
        return _fill(results, values)
    weight, bias = _contiguous(weight, bias)
    _native.core.cpu_batch_norm_act_backward(
        _header(x, kind),
        *_addresses(x, residual, weight, bias, mean, rstd, mask, gy),
        *_addresses(*(t if t.numel() else None for t in (gx, gresidual, gweight, gbias))),
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
    if _backend.choose("batch_norm_act", x) == "reference":
        with torch.autocast(x.device.type, enabled=False):
            mask = None if mask is None else _unpack(mask, x)
            values = reference_backward_backward(
                *(v, u, a_weight, a_bias, gy, x, residual, mask, weight, bias, mean, rstd),
                *(sum_gx, sum_g, kind),
            )
        return _fill(results, values)
    vectors = _contiguous(a_weight, a_bias, sum_gx, sum_g, weight, bias)
    a_weight, a_bias, sum_gx, sum_g, weight, bias = vectors
    _native.core.cpu_batch_norm_act_backward_backward(
        _header(x, kind),
        *_addresses(x, residual, weight, bias, mean, rstd, mask, gy, v, u, a_weight, a_bias),
        *_addresses(*(t if t.numel() else None for t in (sum_gx, sum_g, *results))),
    )
    return results


def _fill(results, values):
    for result, value in zip(results, values, strict=True):
        if result.numel():
            result.copy_(value)
    return results


@torch.library.register_fake("fastinterp::batch_norm_act")
def _fake(x, residual, weight, bias, running_mean, running_var, *kind):
    return _forward_results(dense(x), residual, kind[2])


@torch.library.register_fake("fastinterp::batch_norm_act_backward")
def _fake_backward(gy, x, residual, mask, weight, bias, mean, rstd, *options):
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
    _, mean, var, rstd, mask = output
    remember_edges(ctx, inputs)
    ctx.mark_non_differentiable(mean, var, rstd, mask)
    ctx.keeps_mask = _keeps_mask(residual, ctx.kind[2])
    if ctx.kind[2] not in SMOOTH:
        residual = None
    ctx.save_for_backward(x, residual, weight, bias, mean, rstd, mask)


def _backward(ctx, gy, *_):
    if gy is None:
        return (None,) * 10
    x, residual, weight, bias, mean, rstd, mask = ctx.saved_tensors
    need_x, need_residual, need_weight, need_bias = (wanted(ctx, i) for i in range(4))
    gx, gresidual, gweight, gbias = torch.ops.fastinterp.batch_norm_act_backward(
        *(gy, x, residual, mask if ctx.keeps_mask else None, weight, bias, mean, rstd),
        *ctx.kind,
        *(need_x, need_residual, need_weight or need_bias or (ctx.kind[0] and need_x)),
    )
    return (
        gx if need_x else None,
        gresidual if need_residual else None,
        gweight if need_weight else None,
        gbias if need_bias else None,
        *(None,) * 6,
    )


def _setup_context_backward(ctx, inputs, output):
    gy, x, residual, mask, weight, bias, mean, rstd, *options = inputs
    remember_edges(ctx, inputs)
    ctx.kind = options[:4]
    ctx.save_for_backward(gy, x, residual, mask, weight, bias, mean, rstd, output[2], output[3])


def _backward_backward(ctx, v, u, a_weight, a_bias):
    nothing = (None,) * 15
    cotangents = v, u, a_weight, a_bias
    if all(t is None for t in cotangents):
        return nothing
    training, _, activation, _ = ctx.kind
    smooth = activation in SMOOTH
    # Identically zero otherwise; see the table at the top.
    depends_on_x = smooth or a_weight is not None or (training and v is not None)
    need_gy, need_x = wanted(ctx, 0), wanted(ctx, 1) and depends_on_x
    need_residual = smooth and ctx.needs_input_grad[2] and wanted(ctx, 2)
    need_weight = ctx.needs_input_grad[4] and (smooth or v is not None) and wanted(ctx, 4)
    need_bias = ctx.needs_input_grad[5] and smooth and wanted(ctx, 5)
    if not (need_gy or need_x or need_residual or need_weight or need_bias):
        return nothing
    ggy, gx, gresidual, gweight, gbias = torch.ops.fastinterp.batch_norm_act_backward_backward(
        *cotangents,
        *ctx.saved_tensors,
        *ctx.kind,
        *(need_gy, need_x, need_residual, need_weight or need_bias),
    )
    return (
        ggy if need_gy else None,
        gx if need_x else None,
        gresidual if need_residual else None,
        None,
        gweight if need_weight else None,
        gbias if need_bias else None,
        *(None,) * 9,
    )


torch.library.register_autograd(
    "fastinterp::batch_norm_act", _backward, setup_context=_setup_context
)
torch.library.register_autograd(
    "fastinterp::batch_norm_act_backward", _backward_backward, setup_context=_setup_context_backward
)
torch.library.register_autograd(
    "fastinterp::batch_norm_act_backward_backward", no_third_order("batch_norm_act")
)
