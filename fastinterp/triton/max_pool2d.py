"""max_pool2d, its scatter and its gather as Triton kernels.

    y[o] = x[m(o)]      gx[i] = sum_o [m(o) = i] gy[o]      ggy[o] = v[m(o)]

A thread has elements of the result, whichever it is, so the scatter is a sum over the few windows
that an element lies in: nothing is accumulated with atomics and results repeat bit for bit. NCHW is
channels_last with N C examples of one channel. Sizes are compile-time constants: a network has few
pooling layers, and each element's position is found by dividing by them.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

# Without a register limit ptxas may spill to fit one block more.
_OPTIONS = {"BLOCK": 1024, "num_warps": 4, "maxnreg": 255}
_UNROLLED = tl.constexpr(9)  # up to so many elements a window is unrolled: its loads overlap
_NO_OFFSET = tl.constexpr(255)  # of csrc/kernels.h: a window that lies in the padding altogether


class Geometry(NamedTuple):
    channels: int
    height: int
    width: int
    rows: int  # of windows
    columns: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    wide: bool  # indices need 64 bits


@triton.jit
def _indices(elements, G: tl.constexpr, BLOCK: tl.constexpr):
    """Elements of this program and which of them exist."""
    block = tl.program_id(0).to(tl.int64) if G.wide else tl.program_id(0)
    i = block * BLOCK + tl.arange(0, BLOCK)
    return i, i < elements


@triton.jit
def _position(i, height: tl.constexpr, width: tl.constexpr, channels: tl.constexpr):
    """Example, row, column and channel of element i."""
    pixel = i // channels
    line = pixel // width
    return line // height, line % height, pixel % width, i % channels


@triton.jit
def _address(at, row, column, height: tl.constexpr, width: tl.constexpr, channels: tl.constexpr):
    return ((at[0] * height + row) * width + column) * channels + at[3]


@triton.jit
def _element(at, k, G: tl.constexpr):
    """Index of element k of window ``at``, and whether it lies in the map."""
    row = at[1] * G.stride[0] - G.padding[0] + k // G.kernel[1] * G.dilation[0]
    column = at[2] * G.stride[1] - G.padding[1] + k % G.kernel[1] * G.dilation[1]
    inside = (row >= 0) & (row < G.height) & (column >= 0) & (column < G.width)
    return _address(at, row, column, G.height, G.width, G.channels), inside


@triton.jit
def _larger(x, at, there, k, best, offset, G: tl.constexpr):
    index, inside = _element(at, k, G)
    inside &= there
    v = tl.load(x + index, inside, 0.0).to(best.dtype)
    # The first of equal elements, but the last NaN, as in torch.
    takes = inside & ((v > best) | (v != v) | (offset == _NO_OFFSET))
    return tl.where(takes, v, best), tl.where(takes, k, offset)


@triton.jit
def _pool_kernel(x, y, offsets, elements, G: tl.constexpr, BLOCK: tl.constexpr):
    acc: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    i, there = _indices(elements, G, BLOCK)
    at = _position(i, G.rows, G.columns, G.channels)
    best = tl.full([BLOCK], float("-inf"), acc)
    offset = tl.full([BLOCK], _NO_OFFSET, tl.int32)
    if G.kernel[0] * G.kernel[1] <= _UNROLLED:
        for k in tl.static_range(G.kernel[0] * G.kernel[1]):
            best, offset = _larger(x, at, there, k, best, offset, G)
    else:
        for k in range(G.kernel[0] * G.kernel[1]):
            best, offset = _larger(x, at, there, k, best, offset, G)
    tl.store(y + i, best.to(y.dtype.element_ty), there)
    tl.store(offsets + i, offset.to(tl.uint8), there)


@triton.jit
def _from_window(gy, offsets, at, there, j, sums, G: tl.constexpr, ACROSS: tl.constexpr):
    """sums + what the j-th last of the windows that may hold element ``at`` gives it."""
    row = (at[1] + G.padding[0]) // G.stride[0] - j // ACROSS
    column = (at[2] + G.padding[1]) // G.stride[1] - j % ACROSS
    down = at[1] + G.padding[0] - row * G.stride[0]  # from the window's first row
    right = at[2] + G.padding[1] - column * G.stride[1]
    k = down // G.dilation[0] * G.kernel[1] + right // G.dilation[1]
    there &= (row >= 0) & (row < G.rows) & (column >= 0) & (column < G.columns)
    there &= (down % G.dilation[0] == 0) & (down // G.dilation[0] < G.kernel[0])
    there &= (right % G.dilation[1] == 0) & (right // G.dilation[1] < G.kernel[1])
    window = _address(at, row, column, G.rows, G.columns, G.channels)
    offset = tl.load(offsets + window, there, _NO_OFFSET).to(tl.int32)
    g = tl.load(gy + window, there, 0.0).to(sums.dtype)
    return sums + tl.where(there & (offset == k), g, 0.0)


@triton.jit
def _pool_scatter_kernel(
    gy,
    offsets,
    gx,
    elements,
    G: tl.constexpr,
    ALONG: tl.constexpr,  # windows that may hold an element, down and across
    ACROSS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    acc: tl.constexpr = tl.float64 if gy.dtype.element_ty == tl.float64 else tl.float32
    i, there = _indices(elements, G, BLOCK)
    at = _position(i, G.height, G.width, G.channels)
    sums = tl.zeros([BLOCK], acc)
    if ALONG * ACROSS <= _UNROLLED:
        for j in tl.static_range(ALONG * ACROSS):
            sums = _from_window(gy, offsets, at, there, j, sums, G, ACROSS)
    else:
        for j in range(ALONG * ACROSS):
            sums = _from_window(gy, offsets, at, there, j, sums, G, ACROSS)
    tl.store(gx + i, sums.to(gx.dtype.element_ty), there)


@triton.jit
def _pool_gather_kernel(v, offsets, ggy, elements, G: tl.constexpr, BLOCK: tl.constexpr):
    i, there = _indices(elements, G, BLOCK)
    at = _position(i, G.rows, G.columns, G.channels)
    k = tl.load(offsets + i, there, _NO_OFFSET).to(tl.int32)
    index, inside = _element(at, k, G)
    tl.store(ggy + i, tl.load(v + index, there & inside & (k != _NO_OFFSET), 0.0), there)


def _geometry(map_, pooled, channels_last, window):
    height, width = map_.shape[2:]
    channels = map_.shape[1] if channels_last else 1
    wide = max(map_.numel(), pooled.numel()) >= 2**31 - 1024
    window = (tuple(pair) for pair in window)
    return Geometry(channels, height, width, *pooled.shape[2:], *window, wide)


def _launch(kernel, tensors, out, **meta):
    if out.numel():
        grid = (triton.cdiv(out.numel(), _OPTIONS["BLOCK"]),)
        with torch.cuda.device_of(out):  # Triton launches on the current device
            kernel[grid](*tensors, out.numel(), **meta, **_OPTIONS)


def max_pool2d_forward(x, y, offsets, channels_last, window):
    """Fills y and the position of each largest element inside its window.

    Args:
        x: (N, C, H, W), contiguous or, if channels_last, in that order; as all tensors.
        y: (N, C, h, w), dtype of x.
        offsets: (N, C, h, w), uint8: row * columns of the window + column, 255 for none.
        window: pairs kernel_size, stride, padding, dilation.
    """
    _launch(_pool_kernel, (x, y, offsets), y, G=_geometry(x, y, channels_last, window))


def max_pool2d_scatter(gy, offsets, gx, channels_last, window):
    """Fills gx, (N, C, H, W), from gy, (N, C, h, w), of the same dtype."""
    g = _geometry(gx, gy, channels_last, window)
    along, across = (
        triton.cdiv((k - 1) * d + 1, s)
        for k, s, d in zip(g.kernel, g.stride, g.dilation, strict=True)
    )
    _launch(_pool_scatter_kernel, (gy, offsets, gx), gx, G=g, ALONG=along, ACROSS=across)


def max_pool2d_gather(v, offsets, ggy, channels_last, window):
    """Fills ggy, (N, C, h, w), from v, (N, C, H, W), of the same dtype."""
    g = _geometry(v, ggy, channels_last, window)
    _launch(_pool_gather_kernel, (v, offsets, ggy), ggy, G=g)
