"""The attack step as Triton kernels; the formulas are those of csrc/math.h.

``out`` may be ``x``: every element is read, by the thread that writes it, before it is written.
"""

import torch
import triton
import triton.language as tl

# Clip bounds are declared fp64 and rounded in the kernel to the accumulation type, so that a
# float64 call keeps them exact and every other call pins them to fp32.


@triton.jit
def _clamp(v, low, high):
    # Comparisons let a NaN in v through, as in torch.clamp.
    v = tl.where(v < low, low, v)
    return tl.where(v > high, high, v)


@triton.jit
def _linf_kernel(
    x,  # (N, inner), as grad, origin and out
    grad,
    origin,
    eps,  # one value, or N values when eps_stride is 1; accumulation type, as step_size
    step_size,
    out,
    inner,
    eps_stride,
    step_stride,
    clip_min: tl.float64,
    clip_max: tl.float64,
    BLOCK: tl.constexpr,
):
    acc = eps.dtype.element_ty
    chunks = tl.cdiv(inner, BLOCK)
    pid = tl.program_id(0)
    example = (pid // chunks).to(tl.int64)
    radius = tl.load(eps + example * eps_stride)
    step = tl.load(step_size + example * step_stride)
    i = (pid % chunks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < inner
    i += example * inner
    xs = tl.load(x + i, inside).to(acc)
    g = tl.load(grad + i, inside).to(acc)
    o = tl.load(origin + i, inside).to(acc)
    # clip(clamp(x + s sign(g), o - eps, o + eps))
    moved = xs + tl.where(g > 0, step, tl.where(g < 0, -step, 0.0))
    moved = _clamp(moved, o - radius, o + radius)
    moved = _clamp(moved, tl.full([], clip_min, acc), tl.full([], clip_max, acc))
    tl.store(out + i, moved.to(out.dtype.element_ty), inside)


@triton.jit
def _l2_kernel(
    x,  # (N, inner), as grad, origin and out
    grad,
    origin,
    eps,  # one value, or N values when eps_stride is 1; accumulation type, as step_size
    step_size,
    out,
    inner,
    eps_stride,
    step_stride,
    clip_min: tl.float64,
    clip_max: tl.float64,
    SMALLEST_NORMAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    acc = eps.dtype.element_ty
    example = tl.program_id(0).to(tl.int64)
    x += example * inner
    grad += example * inner
    origin += example * inner
    out += example * inner

    # Gradients of a mean loss are often near 1e-20: their squares underflow, so divide by the
    # largest first. Subnormal gradients have no usable direction and count as zero.
    largest = tl.zeros([BLOCK], acc)
    for start in range(0, inner, BLOCK):
        i = start + tl.arange(0, BLOCK)
        g = tl.load(grad + i, i < inner, 0.0).to(acc)
        largest = tl.maximum(largest, tl.abs(g))
    peak = tl.max(largest, 0)
    usable = peak >= SMALLEST_NORMAL
    down = tl.where(usable, 1.0 / tl.where(usable, peak, 1.0), 0.0)
    squares = tl.zeros([BLOCK], acc)
    for start in range(0, inner, BLOCK):
        i = start + tl.arange(0, BLOCK)
        g = tl.load(grad + i, i < inner, 0.0).to(acc) * down
        squares += g * g
    length = tl.sqrt(tl.sum(squares, 0))
    step = tl.load(step_size + example * step_stride)
    scale = tl.where(length == 0, 0.0, step / tl.where(length == 0, 1.0, length))

    # y = x + s g/|g|,  out = clip(o + (y - o) min(1, eps/|y - o|)); lengths are over one example.
    squares = tl.zeros([BLOCK], acc)
    for start in range(0, inner, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < inner
        g = tl.load(grad + i, inside, 0.0).to(acc) * down
        d = tl.load(x + i, inside, 0.0).to(acc) + scale * g
        d -= tl.load(origin + i, inside, 0.0).to(acc)
        squares += d * d
    length = tl.sqrt(tl.sum(squares, 0))
    radius = tl.load(eps + example * eps_stride)
    shrink = tl.where(length > radius, radius / tl.where(length > 0, length, 1.0), 1.0)
    low = tl.full([], clip_min, acc)
    high = tl.full([], clip_max, acc)
    for start in range(0, inner, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < inner
        g = tl.load(grad + i, inside, 0.0).to(acc) * down
        o = tl.load(origin + i, inside, 0.0).to(acc)
        d = tl.load(x + i, inside, 0.0).to(acc) + scale * g - o
        moved = _clamp(o + shrink * d, low, high)
        tl.store(out + i, moved.to(out.dtype.element_ty), inside)


def attack_step(x, grad, origin, eps, step_size, norm, clip_min, clip_max, out):
    """out = clip(project(x + step_size * direction(grad), origin, eps), clip_min, clip_max).

    Args:
        x, grad, origin, out: (N, ...), same dtype and same dense order with the batch outermost,
            not empty. out may be x.
        eps, step_size: () or (N,), float32 (float64 for float64 tensors).
        norm: "Linf" or "L2".
        clip_min, clip_max: numbers; -inf and inf when there is no clip.
    """
    examples, inner = len(x), x.numel() // len(x)
    eps_stride = eps.stride(0) if eps.dim() else 0
    step_stride = step_size.stride(0) if step_size.dim() else 0
    if norm == "Linf":
        if eps_stride == step_stride == 0:
            examples, inner = 1, x.numel()
        kernel, grid = _linf_kernel, (examples * triton.cdiv(inner, 1024),)
        meta = {"BLOCK": 1024, "num_warps": 4}  # 16 bytes or more per thread and tensor
    else:
        block = min(max(triton.next_power_of_2(inner), 1024), 4096)
        kernel, grid = _l2_kernel, (examples,)
        smallest_normal = torch.finfo(eps.dtype).tiny
        meta = {
            "SMALLEST_NORMAL": smallest_normal,
            "BLOCK": block,
            "num_warps": block // 256,
            "maxnreg": 128,
        }
    with torch.cuda.device_of(x):  # Triton launches on the current device
        kernel[grid](
            x,
            grad,
            origin,
            eps,
            step_size,
            out,
            inner,
            eps_stride,
            step_stride,
            clip_min,
            clip_max,
            **meta,
        )
