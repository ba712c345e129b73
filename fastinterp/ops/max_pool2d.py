"""fastinterp::max_pool2d, with one-byte positions and derivatives of any order.

    y[o] = x[m(o)]            m(o): position of the first largest element of window o
    gx[m] = sum_o [m(o) = m] gy[o]                  the backward op, a scatter of gy
    ggy[o] = v[m(o)]                                its derivative for a cotangent v, a gather

Scatter and gather are each other's derivative with respect to their tensor, and there is no other:
the family is closed. All that is kept of the forward pass is the position of m(o) inside its
window, one byte per window.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastinterp import _native
from fastinterp.ops import _backend
from fastinterp.ops._autograd import register_autograd, remember_edges
from fastinterp.ops._layout import memory_format, prefers_channels_last, unfilled
from fastinterp.ops._window import check_map, check_window, pair, pooled_size

NO_OFFSET = 255  # of csrc/kernels.h: a window that lies in the padding altogether

_WINDOW = "int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation"
torch.library.define(
    "fastinterp::max_pool2d",
    f"(Tensor x, {_WINDOW}, bool ceil_mode) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "fastinterp::max_pool2d_backward",
    f"(Tensor grad, Tensor offsets, SymInt height, SymInt width, {_WINDOW}, bool channels_last)"
    " -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "fastinterp::max_pool2d_backward_backward",
    f"(Tensor v, Tensor offsets, {_WINDOW}, bool channels_last) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_backend.KERNELS["max_pool2d"] = ("cpu", "triton")


def max_pool2d(
    x: torch.Tensor,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    ceil_mode: bool = False,
) -> torch.Tensor:
    """Largest element of each window, as ``torch.nn.functional.max_pool2d``.

    Args:
        x: (N, C, H, W), float32, float64, bfloat16 or float16; NCHW or channels_last.
        kernel_size: rows and columns of a window, at most 255 elements together.
        stride: steps between windows, >= 1; None for kernel_size.
        padding: rows and columns of -inf on each side, at most half of kernel_size.
        dilation: steps between the elements of a window, >= 1.
        ceil_mode: also windows that begin inside and end outside.

    Returns:
        (N, C, h, w) in x's dtype and memory format, differentiable to any order. Of equal elements
        the first gets the gradient; a NaN in a window is its largest element.

    Raises:
        ValueError: x is not 4-d, an argument is out of its range, or the output would be empty.
        TypeError: x is not floating point.
    """
    check_map(x)
    kernel_size, stride, padding = check_window(kernel_size, stride, padding)
    dilation = pair("dilation", dilation, 1)
    if kernel_size[0] * kernel_size[1] > NO_OFFSET:
        raise ValueError(
            f"kernel_size must have at most {NO_OFFSET} elements, got {kernel_size}; use "
            "torch.nn.functional.max_pool2d for larger windows"
        )
    window = (kernel_size, stride, padding, dilation)
    if min(pooled_size(x.shape[2:], *window, ceil_mode)) < 1:
        raise ValueError(
            f"windows of {kernel_size}, dilation {dilation}, do not fit into a map of "
            f"{tuple(x.shape[2:])} with padding {padding}"
        )
    return torch.ops.fastinterp.max_pool2d(x, *window, ceil_mode)[0]


def _starts(size, axis, pooled, kernel_size, stride, padding, dilation, device):
    """First element of each window along an axis, and whether the window has any in the map."""
    starts = torch.arange(pooled, device=device) * stride[axis] - padding[axis]
    elements = starts[:, None] + torch.arange(kernel_size[axis], device=device) * dilation[axis]
    return starts, ((elements >= 0) & (elements < size)).any(1)


def reference(x, kernel_size, stride, padding, dilation, ceil_mode):
    y, index = F.max_pool2d(
        x, kernel_size, stride, padding, dilation, ceil_mode, return_indices=True
    )
    height, width = x.shape[2:]
    window = (kernel_size, stride, padding, dilation, x.device)
    top, some_row = _starts(height, 0, y.shape[2], *window)
    left, some_column = _starts(width, 1, y.shape[3], *window)
    row = (index // width - top[:, None]) // dilation[0]
    column = (index % width - left) // dilation[1]
    inside = some_row[:, None] & some_column
    return y, torch.where(inside, row * kernel_size[1] + column, NO_OFFSET).to(torch.uint8)


def _sources(offsets, width, kernel_size, stride, padding, dilation):
    """m(o) as an index into a flat map, 0 where there is none, and where there is one."""
    n, c, h, w = offsets.shape
    device = offsets.device
    top = (torch.arange(h, device=device) * stride[0] - padding[0])[:, None]
    left = torch.arange(w, device=device) * stride[1] - padding[1]
    k = offsets.long()
    row = top + k // kernel_size[1] * dilation[0]
    index = row * width + left + k % kernel_size[1] * dilation[1]
    there = offsets != NO_OFFSET
    return torch.where(there, index, 0).reshape(n, c, h * w), there


def reference_backward(grad, offsets, height, width, *window_and_layout):
    *window, _ = window_and_layout
    index, there = _sources(offsets, width, *window)
    acc = _backend.accumulation_dtype(grad.dtype)
    sums = grad.new_zeros((*grad.shape[:2], height * width), dtype=acc)
    sums.scatter_add_(2, index, torch.where(there, grad, 0).to(acc).reshape(index.shape))
    return sums.reshape(*grad.shape[:2], height, width).to(grad.dtype)


def reference_backward_backward(v, offsets, *window_and_layout):
    *window, _ = window_and_layout
    index, there = _sources(offsets, v.shape[3], *window)
    return torch.where(there, v.flatten(2).gather(2, index).reshape(there.shape), 0)


def _launch(name, map_, pooled, offsets, channels_last, window):
    if map_.numel() == 0 or pooled.numel() == 0:
        return
    getattr(_native.core, f"cpu_{name}")(
        _backend.DTYPE_CODES[map_.dtype],
        channels_last,
        tuple(map_.shape),
        tuple(pooled.shape[2:]),
        *(tuple(w) for w in window),
        map_.data_ptr(),
        pooled.data_ptr(),
        offsets.data_ptr(),
        torch.get_num_threads(),
    )


@torch.library.impl("fastinterp::max_pool2d", "CompositeExplicitAutograd")
def _forward(x, kernel_size, stride, padding, dilation, ceil_mode):
    window = (kernel_size, stride, padding, dilation)
    last = prefers_channels_last(x)
    y, offsets = _fake(x, *window, ceil_mode)
    backend = _backend.choose("max_pool2d", x)
    if backend == "reference":
        for out, value in zip((y, offsets), reference(x, *window, ceil_mode), strict=True):
            out.copy_(value)
        return y, offsets
    x = x.contiguous(memory_format=memory_format(last))
    if backend == "triton":
        from fastinterp.triton.max_pool2d import max_pool2d_forward as launch

        launch(x, y, offsets, last, window)
    else:
        _launch("max_pool2d", x, y, offsets, last, window)
    return y, offsets


@torch.library.impl("fastinterp::max_pool2d_backward", "CompositeExplicitAutograd")
def _backward_impl(grad, offsets, height, width, *window_and_layout):
    *window, last = window_and_layout
    out = _fake_backward(grad, offsets, height, width, *window_and_layout)
    backend = _backend.choose("max_pool2d", grad)
    if backend == "reference":
        return out.copy_(reference_backward(grad, offsets, height, width, *window_and_layout))
    grad = grad.contiguous(memory_format=memory_format(last))
    if backend == "triton":
        from fastinterp.triton.max_pool2d import max_pool2d_scatter as launch

        launch(grad, offsets, out, last, window)
    else:
        _launch("max_pool2d_backward", out, grad, offsets, last, window)
    return out


@torch.library.impl("fastinterp::max_pool2d_backward_backward", "CompositeExplicitAutograd")
def _backward_backward_impl(v, offsets, *window_and_layout):
    *window, last = window_and_layout
    out = _fake_backward_backward(v, offsets, *window_and_layout)
    backend = _backend.choose("max_pool2d", v)
    if backend == "reference":
        return out.copy_(reference_backward_backward(v, offsets, *window_and_layout))
    v = v.contiguous(memory_format=memory_format(last))
    if backend == "triton":
        from fastinterp.triton.max_pool2d import max_pool2d_gather as launch

        launch(v, offsets, out, last, window)
    else:
        _launch("max_pool2d_backward_backward", v, out, offsets, last, window)
    return out


@torch.library.register_fake("fastinterp::max_pool2d")
def _fake(x, kernel_size, stride, padding, dilation, ceil_mode):
    size = pooled_size(x.shape[2:], kernel_size, stride, padding, dilation, ceil_mode)
    shape, last = (*x.shape[:2], *size), prefers_channels_last(x)
    return unfilled(shape, x, last), unfilled(shape, x, last, torch.uint8)


@torch.library.register_fake("fastinterp::max_pool2d_backward")
def _fake_backward(grad, offsets, height, width, *window_and_layout):
    return unfilled((*grad.shape[:2], height, width), grad, window_and_layout[-1])


@torch.library.register_fake("fastinterp::max_pool2d_backward_backward")
def _fake_backward_backward(v, offsets, *window_and_layout):
    return unfilled(offsets.shape, v, window_and_layout[-1])


def _setup_context(ctx, inputs, output):
    remember_edges(ctx, inputs)
    x, *ctx.window, _ = inputs
    ctx.height, ctx.width = x.shape[2:]
    ctx.channels_last = prefers_channels_last(x)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def _backward(ctx, grad, _):
    if grad is None:
        return (None,) * 6
    (offsets,) = ctx.saved_tensors
    gx = torch.ops.fastinterp.max_pool2d_backward(
        grad, offsets, ctx.height, ctx.width, *ctx.window, ctx.channels_last
    )
    return gx, *(None,) * 5


def _setup_scatter(ctx, inputs, output):
    remember_edges(ctx, inputs)
    _, offsets, _, _, *ctx.window_and_layout = inputs
    ctx.save_for_backward(offsets)


def _scatter_backward(ctx, v):
    if v is None:
        return (None,) * 9
    (offsets,) = ctx.saved_tensors
    ggy = torch.ops.fastinterp.max_pool2d_backward_backward(v, offsets, *ctx.window_and_layout)
    return ggy, *(None,) * 8


def _setup_gather(ctx, inputs, output):
    remember_edges(ctx, inputs)
    v, offsets, *ctx.window_and_layout = inputs
    ctx.height, ctx.width = v.shape[2:]
    ctx.save_for_backward(offsets)


def _gather_backward(ctx, grad):
    if grad is None:
        return (None,) * 7
    (offsets,) = ctx.saved_tensors
    gv = torch.ops.fastinterp.max_pool2d_backward(
        grad, offsets, ctx.height, ctx.width, *ctx.window_and_layout
    )
    return gv, *(None,) * 6


for _name, _formula, _setup in (
    ("max_pool2d", _backward, _setup_context),
    ("max_pool2d_backward", _scatter_backward, _setup_scatter),
    ("max_pool2d_backward_backward", _gather_backward, _setup_gather),
):
    register_autograd(_name, _formula, setup_context=_setup)
