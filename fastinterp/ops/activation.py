"""fastinterp::activation, an elementwise nonlinearity phi whose second order is one pass.

    y = phi(x)      gx = phi'(x) gy      ggy = phi'(x) v      gx2 = phi''(x) gy v

v is the cotangent of gx. relu and leaky_relu have phi'' = 0, so their gx2 is None and any order of
derivative exists; they keep y instead of x, which the layer after them keeps anyway. The others end
at the second order.
"""

from __future__ import annotations

import torch

from fastinterp import _native
from fastinterp.ops import _backend
from fastinterp.ops._activations import ACTIVATIONS, checked_alpha, curvature, slope, value
from fastinterp.ops._autograd import no_third_order, register_autograd, remember_edges, wanted
from fastinterp.ops._layout import dense_as, without_gaps

KINDS = {kind: code for kind, code in ACTIVATIONS.items() if kind != "identity"}
_PIECEWISE_LINEAR = ("relu", "leaky_relu")

torch.library.define(
    "fastinterp::activation",
    "(Tensor x, str kind, float alpha) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "fastinterp::activation_backward",
    "(Tensor grad, Tensor saved, str kind, float alpha) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "fastinterp::activation_backward_backward",
    "(Tensor v, Tensor grad, Tensor x, str kind, float alpha, bool need_ggy, bool need_gx2)"
    " -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
_backend.KERNELS["activation"] = ("cpu", "triton")


def activation(x: torch.Tensor, kind: str, alpha: float | None = None) -> torch.Tensor:
    """An activation function, element by element.

    Args:
        x: any shape, float32, float64, bfloat16 or float16; computed in float32 at least.
        kind: "relu", "leaky_relu", "softplus", "silu" or "gelu" (the exact form, with erf).
        alpha: slope of leaky_relu below zero (0.01 when None) or beta > 0 of softplus
            (1 when None); other kinds have none.

    Returns:
        Like x, in its dtype and memory format. Differentiable twice; relu and leaky_relu any number
        of times. The derivative at a kink is the one below it.

    Raises:
        ValueError: kind is not one of those, or alpha is out of range or given where there is none.
        TypeError: x is not floating point.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if x.dtype not in _backend.DTYPE_CODES:
        raise TypeError(f"x must be a floating point tensor, got {x.dtype}")
    alpha = checked_alpha(kind, alpha)
    if _plain_is_faster(x, kind):
        return value(x, kind, alpha)
    return torch.ops.fastinterp.activation(x, kind, alpha)


def _plain_is_faster(x: torch.Tensor, kind: str) -> bool:
    """Whether dispatching the op costs more than it saves: a small tensor on a CPU.

    Measured on 2 cores with AVX-512, three orders together: plain torch takes 0.45 of the op's time
    at 4,096 elements, 1.0 at 65,536 and 2 at 524,288. Not so for relu and leaky_relu, where plain
    torch sends zeros of second order down the whole network.
    """
    return kind not in _PIECEWISE_LINEAR and _backend.is_small(x, 1 << 15)


def reference(x, kind, alpha):
    return value(x.to(_backend.accumulation_dtype(x.dtype)), kind, alpha).to(x.dtype)


def reference_backward(grad, x, kind, alpha):
    acc = _backend.accumulation_dtype(x.dtype)
    return (slope(x.to(acc), kind, alpha) * grad).to(x.dtype)


def reference_backward_backward(v, grad, x, kind, alpha, need_ggy, need_gx2):
    acc = _backend.accumulation_dtype(x.dtype)
    z, none = x.to(acc), x.new_empty(0)
    return (
        (slope(z, kind, alpha) * v).to(x.dtype) if need_ggy else none,
        (curvature(z, kind, alpha) * grad.to(acc) * v).to(x.dtype) if need_gx2 else none,
    )


def _launch(name, x, kind, alpha, grad, v, out, second=None):
    if x.numel():
        getattr(_native.core, f"cpu_{name}")(
            _backend.DTYPE_CODES[x.dtype],
            KINDS[kind],
            alpha,
            x.numel(),
            x.data_ptr(),
            *_backend.addresses(grad, v, out, second),
            torch.get_num_threads(),
        )


@torch.library.impl("fastinterp::activation", "CompositeExplicitAutograd")
def _forward(x, kind, alpha):
    # ATen's own relu and leaky_relu are as fast as memory allows.
    if kind in _PIECEWISE_LINEAR:
        return value(x, kind, alpha)
    backend = _backend.choose("activation", x)
    if backend == "reference":
        return reference(x, kind, alpha)
    x = without_gaps(x)
    y = torch.empty_like(x)
    if backend == "triton":
        from fastinterp.triton.activation import activation_forward as launch

        launch(x, kind, alpha, y)
        return y
    _launch("activation", x, kind, alpha, None, None, y)
    return y


def _piecewise_linear_backward(grad, saved, kind, alpha):
    if kind == "relu":
        return torch.ops.aten.threshold_backward(grad, saved, 0)
    return torch.ops.aten.leaky_relu_backward(grad, saved, alpha, alpha >= 0)


@torch.library.impl("fastinterp::activation_backward", "CompositeExplicitAutograd")
def _backward_impl(grad, saved, kind, alpha):
    if kind in _PIECEWISE_LINEAR:
        return _piecewise_linear_backward(grad, saved, kind, alpha)
    backend = _backend.choose("activation", saved)
    if backend == "reference":
        return reference_backward(grad, saved, kind, alpha)
    x = without_gaps(saved)
    gx, grad = torch.empty_like(x), dense_as(grad, x)
    if backend == "triton":
        from fastinterp.triton.activation import activation_backward as launch

        launch(grad, x, kind, alpha, gx)
        return gx
    _launch("activation_backward", x, kind, alpha, grad, None, gx)
    return gx


@torch.library.impl("fastinterp::activation_backward_backward", "CompositeExplicitAutograd")
def _backward_backward_impl(v, grad, x, kind, alpha, need_ggy, need_gx2):
    backend = _backend.choose("activation", x)
    if backend == "reference":
        return reference_backward_backward(v, grad, x, kind, alpha, need_ggy, need_gx2)
    x = without_gaps(x)
    v, grad = dense_as(v, x), dense_as(grad, x)
    outputs = _fake_backward_backward(v, grad, x, kind, alpha, need_ggy, need_gx2)
    if backend == "triton":
        from fastinterp.triton.activation import activation_backward_backward as launch

        ggy, gx2 = outputs
        launch(v, grad, x, kind, alpha, ggy if need_ggy else None, gx2 if need_gx2 else None)
        return outputs
    _launch("activation_backward_backward", x, kind, alpha, grad, v, *outputs)
    return outputs


@torch.library.register_fake("fastinterp::activation")
def _fake(x, kind, alpha):
    return torch.empty_like(x)


@torch.library.register_fake("fastinterp::activation_backward")
def _fake_backward(grad, saved, kind, alpha):
    return torch.empty_like(saved)


@torch.library.register_fake("fastinterp::activation_backward_backward")
def _fake_backward_backward(v, grad, x, kind, alpha, need_ggy, need_gx2):
    return (
        torch.empty_like(x) if need_ggy else x.new_empty(0),
        torch.empty_like(x) if need_gx2 else x.new_empty(0),
    )


def _setup_context(ctx, inputs, output):
    remember_edges(ctx, inputs)
    x, ctx.kind, ctx.alpha = inputs
    keep_output = ctx.kind in _PIECEWISE_LINEAR and ctx.alpha >= 0
    ctx.save_for_backward(output if keep_output else x)


def _backward(ctx, grad):
    if grad is None:
        return None, None, None
    (saved,) = ctx.saved_tensors
    return torch.ops.fastinterp.activation_backward(grad, saved, ctx.kind, ctx.alpha), None, None


def _setup_backward(ctx, inputs, output):
    remember_edges(ctx, inputs)
    grad, saved, ctx.kind, ctx.alpha = inputs
    if ctx.kind in _PIECEWISE_LINEAR:
        ctx.save_for_backward(saved)
    else:
        ctx.save_for_backward(grad, saved)


def _second_order(ctx, v):
    if v is None:
        return (None,) * 4
    if ctx.kind in _PIECEWISE_LINEAR:
        (saved,) = ctx.saved_tensors
        ggy = torch.ops.fastinterp.activation_backward(v, saved, ctx.kind, ctx.alpha)
        return ggy, None, None, None
    need = wanted(ctx, 0), wanted(ctx, 1)
    if not any(need):
        return (None,) * 4
    ggy, gx2 = torch.ops.fastinterp.activation_backward_backward(
        v, *ctx.saved_tensors, ctx.kind, ctx.alpha, *need
    )
    return ggy if need[0] else None, gx2 if need[1] else None, None, None


def _many_gradients_of_one_x(op, size, batched, grad, saved, kind, alpha):
    """Broadcasts, which keeps one copy of saved, where its own derivative is None."""
    if not batched[0] or batched[1] or kind not in _PIECEWISE_LINEAR:
        return None
    return _piecewise_linear_backward(grad, saved.detach(), kind, alpha)


register_autograd("activation", _backward, setup_context=_setup_context)
register_autograd(
    "activation_backward",
    _second_order,
    setup_context=_setup_backward,
    vmap=_many_gradients_of_one_x,
)
register_autograd("activation_backward_backward", no_third_order("a smooth activation"))
