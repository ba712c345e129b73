"""fastinterp::avg_pool2d, a linear map A with derivatives of any order.

    y = A x      gx = A^T gy      ggy = A v

Each is the other's derivative and nothing is kept but sizes. The sums are ATen's kernels, on a CPU
and on a GPU; eager PyTorch keeps x for its shape alone and returns zeros for it in second order.
"""

from __future__ import annotations

import torch

from fastinterp.ops import _backend
from fastinterp.ops._autograd import fold_examples, register_autograd, remember_edges
from fastinterp.ops._layout import memory_format, prefers_channels_last, unfilled
from fastinterp.ops._window import check_map, check_window, pooled_size

_WINDOW = (
    "int[2] kernel_size, int[2] stride, int[2] padding, bool ceil_mode, bool count_include_pad, "
    "int? divisor_override"
)
torch.library.define(
    "fastinterp::avg_pool2d",
    f"(Tensor x, {_WINDOW}) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "fastinterp::avg_pool2d_backward",
    f"(Tensor grad, SymInt height, SymInt width, {_WINDOW}, bool channels_last) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


def avg_pool2d(
    x: torch.Tensor,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> torch.Tensor:
    """Mean of each window, as ``torch.nn.functional.avg_pool2d``.

    Args:
        x: (N, C, H, W), float32, float64, bfloat16 or float16; NCHW or channels_last. Sums are in
            float32 at least.
        kernel_size: rows and columns of a window.
        stride: steps between windows, >= 1; None for kernel_size.
        padding: rows and columns of zeros on each side, at most half of kernel_size.
        ceil_mode: also windows that begin inside and end outside.
        count_include_pad: whether the padding counts as elements of the mean.
        divisor_override: what to divide each sum by instead of the number of elements; not 0.

    Returns:
        (N, C, h, w) in x's dtype and memory format, differentiable to any order.

    Raises:
        ValueError: x is not 4-d, an argument is out of its range, or the output would be empty.
        TypeError: x is not floating point.
    """
    check_map(x)
    kernel_size, stride, padding = check_window(kernel_size, stride, padding)
    if divisor_override == 0:
        raise ValueError("divisor_override must not be 0")
    if min(pooled_size(x.shape[2:], kernel_size, stride, padding, (1, 1), ceil_mode)) < 1:
        raise ValueError(
            f"windows of {kernel_size} do not fit into a map of {tuple(x.shape[2:])} with padding "
            f"{padding}"
        )
    return torch.ops.fastinterp.avg_pool2d(
        x, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
    )


def adaptive_avg_pool2d(x: torch.Tensor, output_size: int | tuple[int, int]) -> torch.Tensor:
    """Mean over the whole map, ``torch.nn.functional.adaptive_avg_pool2d`` for output size 1.

    Args:
        x: (N, C, H, W) with H, W >= 1, dtypes and formats as ``avg_pool2d``.
        output_size: 1 or (1, 1).

    Returns:
        (N, C, 1, 1) in x's dtype, differentiable to any order; the gradient has x's memory format.

    Raises:
        ValueError: another output size, or x is not 4-d or has an empty map.
        TypeError: x is not floating point.
    """
    check_map(x)
    if output_size not in (1, (1, 1), [1, 1]):
        raise ValueError(
            f"output_size must be 1, got {output_size}; use "
            "torch.nn.functional.adaptive_avg_pool2d for others"
        )
    size = list(x.shape[2:])
    if min(size) < 1:
        raise ValueError(f"x has no pixels to average: {tuple(x.shape)}")
    return torch.ops.fastinterp.avg_pool2d(x, size, size, [0, 0], False, True, None)


def _is_mean(size, kernel_size, padding, divisor_override) -> bool:
    """Whether there is one window, the map: then a reduction and an expansion are faster."""
    return list(size) == list(kernel_size) and not any(padding) and divisor_override is None


@torch.library.impl("fastinterp::avg_pool2d", "CompositeExplicitAutograd")
def _forward(x, *window):
    out = _fake(x, *window)
    if x.numel() == 0:
        return out
    if _is_mean(x.shape[2:], window[0], window[2], window[5]):
        return torch.mean(x, (2, 3), keepdim=True, out=out)
    x = x.contiguous(memory_format=memory_format(prefers_channels_last(x)))
    return torch.ops.aten.avg_pool2d.out(x, *window, out=out)


@torch.library.impl("fastinterp::avg_pool2d_backward", "CompositeExplicitAutograd")
def _backward_impl(grad, height, width, *window_and_layout):
    *window, last = window_and_layout
    kernel_size, stride, padding = window[:3]
    out = _fake_backward(grad, height, width, *window_and_layout)
    if out.numel() == 0:
        return out
    if _is_mean((height, width), kernel_size, padding, window[5]):
        return out.copy_(grad / (height * width))
    # ATen adds up overlapping windows in the dtype of the gradient. It wants x for its shape only:
    # memory that nobody touches.
    overlap = any(s < k for s, k in zip(stride, kernel_size, strict=True))
    acc = _backend.accumulation_dtype(grad.dtype) if overlap else grad.dtype
    grad = grad.to(acc).contiguous(memory_format=memory_format(last))
    shape_of_x = torch.empty_like(out, dtype=acc)
    if acc == out.dtype:
        return torch.ops.aten.avg_pool2d_backward.grad_input(
            grad, shape_of_x, *window, grad_input=out
        )
    return out.copy_(torch.ops.aten.avg_pool2d_backward(grad, shape_of_x, *window))


@torch.library.register_fake("fastinterp::avg_pool2d")
def _fake(x, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override):
    size = pooled_size(x.shape[2:], kernel_size, stride, padding, (1, 1), ceil_mode)
    return unfilled((*x.shape[:2], *size), x, prefers_channels_last(x))


@torch.library.register_fake("fastinterp::avg_pool2d_backward")
def _fake_backward(grad, height, width, *window_and_layout):
    return unfilled((*grad.shape[:2], height, width), grad, window_and_layout[-1])


def _setup_context(ctx, inputs, output):
    remember_edges(ctx, inputs)
    x, *ctx.window = inputs
    ctx.height, ctx.width = x.shape[2:]
    ctx.channels_last = prefers_channels_last(x)


def _backward(ctx, grad):
    if grad is None:
        return (None,) * 7
    gx = torch.ops.fastinterp.avg_pool2d_backward(
        grad, ctx.height, ctx.width, *ctx.window, ctx.channels_last
    )
    return gx, *(None,) * 6


def _setup_backward(ctx, inputs, output):
    remember_edges(ctx, inputs)
    _, _, _, *ctx.window, _ = inputs


def _second_order(ctx, v):
    ggy = None if v is None else torch.ops.fastinterp.avg_pool2d(v, *ctx.window)
    return ggy, *(None,) * 9


register_autograd("avg_pool2d", _backward, setup_context=_setup_context, vmap=fold_examples)
register_autograd(
    "avg_pool2d_backward", _second_order, setup_context=_setup_backward, vmap=fold_examples
)
