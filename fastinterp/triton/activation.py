"""The smooth activations and their first two derivatives as Triton kernels, one pass each.

y = phi(x)      gx = phi'(x) gy      ggy = phi'(x) v      gx2 = phi''(x) gy v
"""

import torch
import triton
import triton.language as tl

from fastinterp.triton import _activations as phi

# 16 bytes or more per thread and tensor; without a limit ptxas may spill to fit one block more
_OPTIONS = {"BLOCK": 1024, "num_warps": 4, "maxnreg": 255}


@triton.jit
def _load(x, BLOCK: tl.constexpr, elements):
    """Indices of this program, which of them exist, and x there."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < elements
    acc: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    return i, inside, tl.load(x + i, inside, 0.0).to(acc)


@triton.jit
def _activation_kernel(x, y, elements, alpha: tl.float64, KIND: tl.constexpr, BLOCK: tl.constexpr):
    i, inside, z = _load(x, BLOCK, elements)
    value = phi.value(z, tl.full([], alpha, z.dtype), KIND)
    tl.store(y + i, value.to(y.dtype.element_ty), inside)


@triton.jit
def _activation_backward_kernel(
    x, gy, gx, elements, alpha: tl.float64, KIND: tl.constexpr, BLOCK: tl.constexpr
):
    i, inside, z = _load(x, BLOCK, elements)
    slope, _ = phi.derivatives(z, tl.full([], alpha, z.dtype), KIND)
    g = slope * tl.load(gy + i, inside, 0.0)
    tl.store(gx + i, g.to(gx.dtype.element_ty), inside)


@triton.jit
def _activation_second_kernel(
    x, gy, v, ggy, gx2, elements, alpha: tl.float64, KIND: tl.constexpr, BLOCK: tl.constexpr
):
    i, inside, z = _load(x, BLOCK, elements)
    slope, curvature = phi.derivatives(z, tl.full([], alpha, z.dtype), KIND)
    vs = tl.load(v + i, inside, 0.0).to(z.dtype)
    if ggy is not None:
        tl.store(ggy + i, (slope * vs).to(ggy.dtype.element_ty), inside)
    if gx2 is not None:
        h = curvature * tl.load(gy + i, inside, 0.0) * vs
        tl.store(gx2 + i, h.to(gx2.dtype.element_ty), inside)


def _launch(kernel, tensors, kind, alpha):
    x = tensors[0]
    if x.numel():
        with torch.cuda.device_of(x):  # Triton launches on the current device
            grid = (triton.cdiv(x.numel(), _OPTIONS["BLOCK"]),)
            kernel[grid](*tensors, x.numel(), alpha, KIND=kind, **_OPTIONS)


def activation_forward(x, kind, alpha, y):
    """y = phi(x).

    Args:
        x, y: any shape, same dtype and same order without gaps, as all tensors below.
        kind: "softplus", "silu" or "gelu".
        alpha: beta of softplus.
    """
    _launch(_activation_kernel, (x, y), kind, alpha)


def activation_backward(gy, x, kind, alpha, gx):
    """gx = phi'(x) gy."""
    _launch(_activation_backward_kernel, (x, gy, gx), kind, alpha)


def activation_backward_backward(v, gy, x, kind, alpha, ggy, gx2):
    """ggy = phi'(x) v and gx2 = phi''(x) gy v, either of which may be None."""
    _launch(_activation_second_kernel, (x, gy, v, ggy, gx2), kind, alpha)
