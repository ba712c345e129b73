"""fastinterp::attack_step, one step of projected gradient ascent in one pass.

    y = x + step_size * direction(grad)        direction: sign (Linf), g / ||g||_2 (L2)
    y = origin + project(y - origin, eps)      clamp to +-eps (Linf), scale to length eps (L2)
    out = clip(y, clip_min, clip_max)

Derivatives: first order with respect to x, grad and origin, made of plain torch operations. The
sign has derivative zero, so the gradient with respect to ``grad`` is None for Linf.
"""

from __future__ import annotations

import math

import torch

from fastinterp import _native
from fastinterp.ops import _backend
from fastinterp.ops._autograd import register_autograd
from fastinterp.ops._layout import dense, dense_as

NORMS = {"Linf": 0, "L2": 1}  # codes of csrc/kernels.h

_ARGS = (
    "Tensor grad, Tensor origin, Tensor eps, Tensor step_size, str norm, "
    "float clip_min, float clip_max"
)
torch.library.define(
    "fastinterp::attack_step", f"(Tensor x, {_ARGS}) -> Tensor", tags=torch.Tag.pt2_compliant_tag
)
torch.library.define(
    "fastinterp::attack_step_", f"(Tensor(a!) x, {_ARGS}) -> ()", tags=torch.Tag.pt2_compliant_tag
)
_backend.KERNELS["attack_step"] = ("cpu", "cuda", "triton")


def attack_step(
    x: torch.Tensor,
    grad: torch.Tensor,
    origin: torch.Tensor,
    *,
    eps: float | torch.Tensor,
    step_size: float | torch.Tensor,
    norm: str = "Linf",
    clip: tuple[float, float] | None = (0.0, 1.0),
    inplace: bool = False,
) -> torch.Tensor:
    """Moves x along grad, projects onto the eps ball around origin and clips, in one pass.

    Args:
        x: current iterate, (N, ...), float32, float64, bfloat16 or float16.
        grad: ascent direction, same shape, dtype and device as x.
        origin: centre of the ball, same shape, dtype and device as x.
        eps: radius >= 0 in units of x; a number, or a tensor of shape () or (N,).
        step_size: step length in units of x; a number, or a tensor of shape () or (N,).
        norm: "Linf" (sign step) or "L2" (unit step over each example).
        clip: (low, high) bounds of valid inputs, or None.
        inplace: write the result into x and return x; not differentiable.

    Returns:
        (N, ...) like x. Differentiable once with respect to x, grad and origin, not to eps or
        step_size.

    Raises:
        ValueError: shapes, norm, eps or clip are not as described.
        TypeError: dtypes differ or are not floating.

    Source: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks" (2018).
    """
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
    if x.dim() < 1:
        raise ValueError("x must have a batch dimension, got a 0-d tensor")
    for name, other in (("grad", grad), ("origin", origin)):
        if other.shape != x.shape:
            raise ValueError(
                f"{name} must have the shape of x, {tuple(x.shape)}, got {tuple(other.shape)}"
            )
        if other.dtype != x.dtype or other.device != x.device:
            raise TypeError(
                f"{name} must be {x.dtype} on {x.device} like x, got {other.dtype} on "
                f"{other.device}"
            )
    if x.dtype not in _backend.DTYPE_CODES:
        raise TypeError(f"x must be a floating point tensor, got {x.dtype}")
    low, high = (-math.inf, math.inf) if clip is None else map(float, clip)
    if not low <= high:
        raise ValueError(f"clip must be (low, high) with low <= high, got {clip}")
    args = (
        grad,
        origin,
        per_example("eps", eps, x),
        per_example("step_size", step_size, x),
        norm,
        low,
        high,
    )
    if inplace:
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "x requires grad and inplace=True has no derivative; detach x or use inplace=False"
            )
        torch.ops.fastinterp.attack_step_(x, *args)
        return x
    return torch.ops.fastinterp.attack_step(x, *args)


def per_example(name: str, value: float | torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """``value``, checked, as the tensor the op takes: what a loop does once, not every step."""
    dtype = _backend.accumulation_dtype(x.dtype)
    if not isinstance(value, torch.Tensor):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be a finite number >= 0, got {value}")
        return torch.full((), float(value), dtype=dtype, device=x.device)
    if value.shape not in ((), (len(x),)):
        raise ValueError(
            f"{name} must be a number or a tensor of shape () or ({len(x)},), "
            f"got {tuple(value.shape)}"
        )
    if value.device.type == "cpu" and (value.item() < 0 if value.dim() == 0 else (value < 0).any()):
        raise ValueError(f"{name} must be >= 0, got {value.min().item()}")
    if value.requires_grad:
        raise ValueError(f"attack_step has no derivative with respect to {name}; detach it")
    return value.to(device=x.device, dtype=dtype)


def columns(value: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """One value, or one per example, in a shape that broadcasts against x."""
    return value.reshape(value.numel(), *[1] * (x.dim() - 1))


def _length(v: torch.Tensor) -> torch.Tensor:
    return columns(torch.linalg.vector_norm(v.flatten(1), dim=1), v)


def _direction(grad: torch.Tensor, norm: str) -> torch.Tensor:
    if norm == "Linf":
        return grad.sign()
    # Dividing by the largest entry first keeps the squares of tiny gradients from underflowing.
    largest = grad.flatten(1).abs().amax(1) if grad.numel() else grad.new_zeros(len(grad))
    tiny = torch.finfo(grad.dtype).tiny
    scaled = grad / columns(torch.where(largest < tiny, math.inf, largest), grad)
    length = _length(scaled)
    return scaled / torch.where(length == 0, 1, length)


def _moved(x, grad, origin, eps, step_size, norm):
    """The iterate after the step, grad, origin and the radius, in the accumulation dtype."""
    dtype = eps.dtype
    x, grad, origin = x.to(dtype), grad.to(dtype), origin.to(dtype)
    y = x + columns(step_size, x) * _direction(grad, norm)
    return y, grad, origin, columns(eps, x)


def reference(x, grad, origin, eps, step_size, norm, clip_min, clip_max):
    y, _, o, radius = _moved(x, grad, origin, eps, step_size, norm)
    if norm == "Linf":
        y = torch.clamp(y, o - radius, o + radius)
    else:
        offset = y - o
        length = _length(offset)
        y = o + offset * torch.where(length > radius, radius / length, 1)
    return y.clamp(clip_min, clip_max).to(x.dtype)


def _run(x, grad, origin, eps, step_size, norm, clip_min, clip_max, inplace):
    backend = _backend.choose("attack_step", x)
    if backend == "reference":
        result = reference(x, grad, origin, eps, step_size, norm, clip_min, clip_max)
        return x.copy_(result) if inplace else result
    if (copy := dense(x)) is not x:  # a sliced or expanded view
        result = _run(copy, grad, origin, eps, step_size, norm, clip_min, clip_max, inplace=False)
        return (x if inplace else torch.empty_like(x)).copy_(result)
    out = x if inplace else torch.empty_like(x)
    if x.numel() == 0:
        return out
    grad, origin = dense_as(grad, x), dense_as(origin, x)
    if backend == "triton":
        from fastinterp.triton.attack_step import attack_step as launch

        launch(x, grad, origin, eps, step_size, norm, clip_min, clip_max, out)
        return out
    args = (
        _backend.DTYPE_CODES[x.dtype],
        NORMS[norm],
        len(x),
        x.numel() // len(x),
        x.data_ptr(),
        grad.data_ptr(),
        origin.data_ptr(),
        out.data_ptr(),
        eps.data_ptr(),
        eps.stride(0) if eps.dim() else 0,
        step_size.data_ptr(),
        step_size.stride(0) if step_size.dim() else 0,
        clip_min,
        clip_max,
    )
    if backend == "cuda":
        _backend.run_cuda("cuda_attack_step", x.device, *args)
    else:
        _native.core.cpu_attack_step(*args, torch.get_num_threads())
    return out


@torch.library.impl("fastinterp::attack_step", "CompositeExplicitAutograd")
def _functional(x, grad, origin, eps, step_size, norm, clip_min, clip_max):
    return _run(x, grad, origin, eps, step_size, norm, clip_min, clip_max, inplace=False)


@torch.library.impl("fastinterp::attack_step_", "CompositeExplicitAutograd")
def _inplace(x, grad, origin, eps, step_size, norm, clip_min, clip_max):
    version = x._version
    _run(x, grad, origin, eps, step_size, norm, clip_min, clip_max, inplace=True)
    if x._version == version:  # a kernel wrote behind autograd's back
        torch.autograd.graph.increment_version(x)


@torch.library.register_fake("fastinterp::attack_step")
def _fake(x, grad, origin, eps, step_size, norm, clip_min, clip_max):
    return torch.empty_like(x)


@torch.library.register_fake("fastinterp::attack_step_")
def _fake_inplace(x, grad, origin, eps, step_size, norm, clip_min, clip_max):
    return None


def _setup_context(ctx, inputs, output):
    *tensors, ctx.norm, ctx.clip_min, ctx.clip_max = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out):
    if grad_out is None:
        return (None,) * 8
    x, grad, origin, eps, step_size = ctx.saved_tensors
    y, grad32, o, radius = _moved(x, grad, origin, eps, step_size, ctx.norm)
    upstream = grad_out.to(y.dtype)
    if ctx.norm == "Linf":
        projected = torch.clamp(y, o - radius, o + radius)
        upstream = upstream * ((projected >= ctx.clip_min) & (projected <= ctx.clip_max))
        inside = (y >= o - radius) & (y <= o + radius)
        grad_x, grad_grad = upstream * inside, None
        grad_origin = upstream - grad_x
    else:
        # z = o + s(d) d with d = y - o; dz/dd = (eps / |d|) (1 - d d^T / |d|^2) outside the ball.
        d = y - o
        length = _length(d)
        shrink = torch.where(length > radius, radius / length, 1)
        projected = o + shrink * d
        upstream = upstream * ((projected >= ctx.clip_min) & (projected <= ctx.clip_max))
        unit = d / torch.where(length > 0, length, 1)
        grad_x = shrink * (
            upstream - torch.where(length > radius, 1, 0) * unit * _dot(unit, upstream)
        )
        grad_origin = upstream - grad_x
        direction = _direction(grad32, "L2")
        size = _length(grad32)
        scale = torch.where(size > 0, columns(step_size, x) / size, 0)
        grad_grad = scale * (grad_x - direction * _dot(direction, grad_x))
        grad_grad = grad_grad.to(grad.dtype)
    return grad_x.to(x.dtype), grad_grad, grad_origin.to(origin.dtype), *(None,) * 5


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return columns((a * b).flatten(1).sum(1), a)


register_autograd("attack_step", _backward, setup_context=_setup_context)
