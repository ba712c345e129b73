"""fastinterp::conv2d, a family of three ops closed under differentiation.

    y  = conv2d(x, w)                   F
    gx = conv2d_input_grad(gy, w)       D, the adjoint of F in x
    gw = conv2d_weight_grad(gy, x)      W, the adjoint of F in w

Each is bilinear, and its derivatives are the other two, so any order of derivative is one of three
vendor kernels:

    of        with respect to gy / x        with respect to w / x
    F         D(cotangent, w)               W(cotangent, x)
    D         F(cotangent, w)               W(gy, cotangent)
    W         F(x, cotangent)               D(gy, cotangent)

torch's own second derivative instead makes the weight gradient a convolution with a kernel as
large as the feature map, and computes weight gradients that nobody asked for. The arithmetic is
left to the convolution and convolution_backward of torch: on a GPU it is the vendor's in all three,
and there are no kernels of our own.
"""

from __future__ import annotations

import os

import torch

from fastinterp import _native
from fastinterp.ops import _backend
from fastinterp.ops._autocast import lowered
from fastinterp.ops._autograd import (
    fold_examples,
    needs_grad,
    register_autograd,
    remember_edges,
    wanted,
)
from fastinterp.ops._layout import memory_format, prefers_channels_last, unfilled

_OPTIONS = "SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups"
torch.library.define(
    "fastinterp::conv2d",
    f"(Tensor x, Tensor weight, Tensor? bias, {_OPTIONS}) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "fastinterp::conv2d_input_grad",
    f"(Tensor gy, Tensor weight, SymInt[] input_size, {_OPTIONS}) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "fastinterp::conv2d_weight_grad",
    f"(Tensor gy, Tensor x, SymInt[] weight_size, {_OPTIONS}) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


def conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> torch.Tensor:
    """torch.nn.functional.conv2d with a second derivative at the price of the arithmetic.

    Args:
        x: (N, C, H, W) or (C, H, W), any floating dtype; NCHW or channels_last, which is kept.
        weight: (O, C / groups, kh, kw), dtype of x.
        bias: (O,) or None.
        stride, padding, dilation: a number or (vertical, horizontal); padding also "valid" or,
            with stride 1, "same".
        groups: of channels.

    Returns:
        (N, O, H', W') or (O, H', W'). Differentiable to any order with respect to x, weight and
        bias. Under autocast x, weight and bias are cast to the autocast dtype, as torch does.

    Raises:
        ValueError: padding is a word other than "valid" and "same", or "same" with a stride.
        RuntimeError: from torch, where shapes or dtypes do not fit each other.

    Source: the adjoint of a convolution; Chellapilla, Puri & Simard (2006) for its three products.
    """
    x, weight, bias = lowered(x, weight, bias)
    stride, dilation = _pair(stride), _pair(dilation)
    if isinstance(padding, str):
        x, padding = _named_padding(x, weight, padding, stride, dilation)
    batched = x if x.dim() == 4 else x[None]
    y = torch.ops.fastinterp.conv2d(batched, weight, bias, stride, _pair(padding), dilation, groups)
    return y if x.dim() == 4 else y[0]


def _pair(value):
    return (value, value) if isinstance(value, int) else tuple(value)


def _named_padding(x, weight, padding, stride, dilation):
    if padding == "valid":
        return x, 0
    if padding != "same":
        raise ValueError(f'padding must be numbers, "valid" or "same", got {padding!r}')
    if stride != (1, 1):
        raise ValueError(f'padding="same" needs stride 1, got {stride}')
    total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    if any(t % 2 for t in total):  # one more on the right and at the bottom
        x = torch.nn.functional.pad(x, (0, total[1] % 2, 0, total[0] % 2))
    return x, tuple(t // 2 for t in total)


def _forward(x, weight, bias, stride, padding, dilation, groups):
    return _convolution(x, weight, bias, stride, padding, dilation, False, (0, 0), groups)


def _input_grad(gy, weight, input_size, stride, padding, dilation, groups):
    # In the layout in which torch's convolution would have answered.
    last = prefers_channels_last(gy) or prefers_channels_last(weight)
    # Memory never touched: convolution_backward reads shape and layout off this argument.
    x = unfilled(input_size, gy, last)
    options = stride, padding, dilation, False, (0, 0), groups
    return _convolution_backward(gy, x, weight, None, *options, (True, False, False))[0]


def _weight_grad(gy, x, weight_size, stride, padding, dilation, groups):
    if _tiles_are_faster(gy, x, weight_size, groups):
        return _weight_grad_tiles(gy, x, weight_size, stride, padding, dilation)
    return _weight_grad_by_torch(gy, x, weight_size, stride, padding, dilation, groups)


def _weight_grad_by_torch(gy, x, weight_size, stride, padding, dilation, groups):
    if _product_is_faster(gy, weight_size, groups):
        return _weight_grad_product(gy, x, weight_size, stride, padding, dilation)
    weight = unfilled(weight_size, x, prefers_channels_last(x))
    options = stride, padding, dilation, False, (0, 0), groups
    return _convolution_backward(gy, x, weight, None, *options, (False, True, False))[1]


def _pixels(gy) -> int:
    return gy.shape[0] * gy.shape[2] * gy.shape[3]


def _product_is_faster(gy, weight_size, groups) -> bool:
    """Whether one matrix product is the best weight gradient: fewer pixels than channels.

    With M output pixels in the batch, measured on 2 cores with AVX-512 and AMX, oneDNN's time over
    the product's: bfloat16 3x3 4.5 to 6.5 at M <= O; float32 1.2 to 2.2 up to M = O, 0.9 to 1.1 at
    M = 2 O.
    """
    if gy.device.type != "cpu" or groups != 1:
        return False
    return gy.dtype in (torch.bfloat16, torch.float32) and _pixels(gy) <= weight_size[0]


def _tiles_are_faster(gy, x, weight_size, groups) -> bool:
    """Whether csrc/cpu/conv2d_amx.cpp beats oneDNN: bfloat16, unless packing outweighs the rest.

    Measured on 2 cores, oneDNN's time over the kernel's: 3x3 with 64 channels or more 1.1 to 3.1,
    with fewer 0.7 to 0.9 at 25,000 pixels and 1.1 to 2.5 at 8,000 or fewer; 1x1 0.7 with 64
    channels at 8,000 pixels, 1.4 to 5.2 with more channels or fewer pixels; NCHW, copies included,
    0.6 to 0.9 at 8,000 pixels or more, 1.1 to 2.7 below.
    """
    if gy.dtype != torch.bfloat16 or groups != 1 or not _tiles_are_there(gy):
        return False
    out_channels, channels, height, width = weight_size
    pixels = _pixels(gy)
    if not x.numel() or pixels <= out_channels:
        return False
    if not prefers_channels_last(x):
        return pixels <= 4096
    if height * width == 1:
        return pixels <= 4096 or channels >= 128
    return pixels <= 8192 or min(channels, out_channels) >= 64


def _tiles_are_there(gy) -> bool:
    wanted = os.environ.get("FASTINTERP_BACKEND", "auto") in ("auto", "cpu")
    return wanted and gy.device.type == "cpu" and getattr(_native.core, "amx_bf16", False)


def _weight_grad_tiles(gy, x, weight_size, stride, padding, dilation):
    last = prefers_channels_last(x)
    gy, x = (t.contiguous(memory_format=torch.channels_last) for t in (gy, x))
    gweight = unfilled(weight_size, x, True)
    _native.core.cpu_conv2d_weight_grad(
        *x.shape[:2],
        gy.shape[1],
        *(tuple(t.shape[2:]) for t in (x, gy)),
        *(tuple(pair) for pair in (weight_size[2:], stride, padding, dilation)),
        *_backend.addresses(gy, x, gweight),
        torch.get_num_threads(),
    )
    return gweight if last else unfilled(weight_size, x, False).copy_(gweight)


def _weight_grad_product(gy, x, weight_size, stride, padding, dilation):
    """gw[o, (i, j, c)] = sum_m gy[m, o] window[m, (i, j, c)], m over the pixels of the batch."""
    out_channels, channels, kh, kw = weight_size
    n, _, height, width = gy.shape
    layout = memory_format(prefers_channels_last(x))
    x = x.permute(0, 2, 3, 1)
    if any(padding):
        x = torch.nn.functional.pad(x, (0, 0, padding[1], padding[1], padding[0], padding[0]))
    example, row, column, channel = x.stride()
    windows = x.as_strided(
        (n, height, width, kh, kw, channels),
        (
            *(example, stride[0] * row, stride[1] * column),
            *(dilation[0] * row, dilation[1] * column, channel),
        ),
        x.storage_offset(),
    ).reshape(n * height * width, kh * kw * channels)
    gy = gy.permute(0, 2, 3, 1).reshape(n * height * width, out_channels)
    gweight = (gy.t() @ windows).view(out_channels, kh, kw, channels)
    return gweight.permute(0, 3, 1, 2).contiguous(memory_format=layout)


_convolution = torch.ops.aten.convolution.default
_convolution_backward = torch.ops.aten.convolution_backward.default

for _name, _kernel, _traced in (
    ("conv2d", _forward, _forward),
    ("conv2d_input_grad", _input_grad, _input_grad),
    ("conv2d_weight_grad", _weight_grad, _weight_grad_by_torch),
):
    # Tracers run torch's code, so that its own convolution tells them the layouts.
    torch.library.impl(f"fastinterp::{_name}", "CompositeExplicitAutograd", _kernel)
    torch.library.register_fake(f"fastinterp::{_name}", _traced)


def _setup_context(ctx, inputs, output):
    x, weight, _, *ctx.options = inputs
    remember_edges(ctx, inputs)
    # What the other's gradient needs; frozen weights keep no activations.
    need_x, need_weight = needs_grad(ctx, 0), needs_grad(ctx, 1)
    ctx.sizes = x.shape, weight.shape
    ctx.save_for_backward(x if need_weight else None, weight if need_x else None)


def _backward(ctx, gy):
    x, weight = ctx.saved_tensors
    ops, (x_size, weight_size) = torch.ops.fastinterp, ctx.sizes
    gx = gweight = gbias = None
    if gy is not None:
        if wanted(ctx, 0):
            gx = ops.conv2d_input_grad(gy, weight, x_size, *ctx.options)
        if wanted(ctx, 1):
            gweight = ops.conv2d_weight_grad(gy, x, weight_size, *ctx.options)
        if wanted(ctx, 2):
            gbias = gy.sum((0, 2, 3))
    return gx, gweight, gbias, *(None,) * 4


def _setup_context_input_grad(ctx, inputs, output):
    gy, weight, ctx.input_size, *ctx.options = inputs
    remember_edges(ctx, inputs)
    need_gy, need_weight = needs_grad(ctx, 0), needs_grad(ctx, 1)
    ctx.weight_size = weight.shape
    ctx.save_for_backward(gy if need_weight else None, weight if need_gy else None)


def _backward_input_grad(ctx, v):
    gy, weight = ctx.saved_tensors
    ggy = gweight = None
    if v is not None:
        if wanted(ctx, 0):
            ggy = torch.ops.fastinterp.conv2d(v, weight, None, *ctx.options)
        if wanted(ctx, 1):
            gweight = torch.ops.fastinterp.conv2d_weight_grad(gy, v, ctx.weight_size, *ctx.options)
    return ggy, gweight, *(None,) * 5


def _setup_context_weight_grad(ctx, inputs, output):
    gy, x, _, *ctx.options = inputs
    remember_edges(ctx, inputs)
    need_gy, need_x = needs_grad(ctx, 0), needs_grad(ctx, 1)
    ctx.input_size = x.shape
    ctx.save_for_backward(gy if need_x else None, x if need_gy else None)


def _backward_weight_grad(ctx, u):
    gy, x = ctx.saved_tensors
    ggy = gx = None
    if u is not None:
        if wanted(ctx, 0):
            ggy = torch.ops.fastinterp.conv2d(x, u, None, *ctx.options)
        if wanted(ctx, 1):
            gx = torch.ops.fastinterp.conv2d_input_grad(gy, u, ctx.input_size, *ctx.options)
    return ggy, gx, *(None,) * 5


def _fold_input_grad(op, size, batched, gy, weight, input_size, *options):
    examples, *image = input_size
    return fold_examples(op, size, batched, gy, weight, [size * examples, *image], *options)


register_autograd("conv2d", _backward, setup_context=_setup_context, vmap=fold_examples)
register_autograd(
    "conv2d_input_grad",
    _backward_input_grad,
    setup_context=_setup_context_input_grad,
    vmap=_fold_input_grad,
)
register_autograd(
    "conv2d_weight_grad",
    _backward_weight_grad,
    setup_context=_setup_context_weight_grad,
)
