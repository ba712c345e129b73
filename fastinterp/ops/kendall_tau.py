"""fastinterp::kendall_tau, the rank correlation of each row of a with the same row of b.

    tau = S / (sqrt(A) sqrt(B)),    S = sum_{i<j} sign(a_i - a_j) sign(b_i - b_j)
    A = number of pairs i < j with a_i != a_j,    B the same of b

This is tau-b, which is tau without ties. The three counts are integers, so every backend gives the
same tau to the last bit. A function of ranks has no useful derivative; asking for one raises.
"""

from __future__ import annotations

import torch

from fastinterp import _native
from fastinterp.ops import _backend
from fastinterp.ops._autograd import register_autograd

torch.library.define(
    "fastinterp::kendall_tau",
    "(Tensor a, Tensor b) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_backend.KERNELS["kendall_tau"] = ("cpu", "cuda", "triton")


def kendall_tau(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Kendall's tau-b between the rows of two matrices, exact with ties.

    Args:
        a: (N, M), float32, float64, bfloat16 or float16. Only the order within a row counts.
        b: (N, M), likewise, on the device of a.

    Returns:
        (N,) float64 in [-1, 1]; NaN for a row that is constant in a or in b, has fewer than two
        columns, or holds a NaN. What scipy.stats.kendalltau(variant="b") gives for each row.
        Not differentiable.

    Raises:
        ValueError: a and b are not matrices of one shape, or not on one device.
        TypeError: a or b is not floating point.

    Source: Kendall, "The treatment of ties in ranking problems" (1945).
    """
    if a.dim() != 2 or a.shape != b.shape:
        raise ValueError(
            f"a and b must both be (N, M), got {tuple(a.shape)} and {tuple(b.shape)}; flatten maps "
            "to one row per example"
        )
    if a.device != b.device:
        raise ValueError(f"b must be on {a.device} like a, got {b.device}")
    for name, t in (("a", a), ("b", b)):
        if t.dtype not in _backend.DTYPE_CODES:
            raise TypeError(f"{name} must be a floating point tensor, got {t.dtype}")
    # Wider numbers compare as the narrower ones did.
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return torch.ops.fastinterp.kendall_tau(a.to(dtype), b.to(dtype))


def reference(a, b):
    counts = torch.zeros(3, len(a), dtype=torch.int64, device=a.device)
    for shift in range(1, a.shape[1]):
        sign_a, sign_b = (_order(t[:, shift:], t[:, :-shift]) for t in (a, b))
        counts[0] += (sign_a * sign_b).sum(1)
        counts[1] += sign_a.abs().sum(1)
        counts[2] += sign_b.abs().sum(1)
    agreement, pairs_a, pairs_b = counts.double()
    tau = (agreement / pairs_a.sqrt() / pairs_b.sqrt()).clamp(-1, 1)  # 0 / 0 is NaN
    return torch.where(a.isnan().any(1) | b.isnan().any(1), torch.nan, tau)


def _order(p, q):
    """sign(p - q), also of infinities."""
    return (p > q).to(torch.int8) - (p < q).to(torch.int8)


@torch.library.impl("fastinterp::kendall_tau", "CompositeExplicitAutograd")
def _forward(a, b):
    backend = _backend.choose("kendall_tau", a)
    if backend == "reference":
        return reference(a, b)
    a, b = a.contiguous(), b.contiguous()
    tau = a.new_empty(len(a), dtype=torch.float64)
    if not len(a):
        return tau
    if backend == "triton":
        from fastinterp.triton.kendall_tau import kendall_tau as launch

        launch(a, b, tau)
        return tau
    core = _native.core
    shape = _backend.DTYPE_CODES[a.dtype], *a.shape
    tensors = a.data_ptr(), b.data_ptr(), tau.data_ptr()
    if backend == "cuda":
        size = core.cuda_kendall_tau_scratch_bytes(*a.shape)
        scratch = torch.empty(size, dtype=torch.uint8, device=a.device)
        _backend.run_cuda("cuda_kendall_tau", a.device, *shape, *tensors, scratch.data_ptr())
    else:
        core.cpu_kendall_tau(*shape, *tensors, torch.get_num_threads())
    return tau


@torch.library.register_fake("fastinterp::kendall_tau")
def _fake(a, b):
    return a.new_empty(a.shape[0], dtype=torch.float64)


def _refuse(ctx, grad):
    raise NotImplementedError(
        "kendall_tau has no derivative: it changes only where ranks do. Detach its arguments, or "
        "take a smooth measure, such as fastinterp.discrepancy, as the loss"
    )


def _fold(op, size, batched, *args):
    a, b = (t if has else t.expand(size, *t.shape) for t, has in zip(args, batched, strict=True))
    return op(a.flatten(0, 1), b.flatten(0, 1)).unflatten(0, (size, a.shape[1]))


register_autograd("kendall_tau", _refuse, vmap=_fold)
