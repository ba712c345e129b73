"""fastinterp::cam_discrepancy, the distance between the class activation maps of two images.

    M[n,k,p] = sum_c head[k,c] (features[n,c,p] - features_adv[n,c,p])      p: pixel
    d[n,k]   = ||M[n,k,:]||                                                 l1 or l2
    D[n]     = sum_k class_weights[n,k] d[n,k]

The kernels never hold the (N, K, h, w) maps. Derivatives: first order with respect to both
features, the head and the class weights. With e = dL/dd and S = e sign(M) (l1) or e M / d (l2):

    dL/dfeatures_adv[n,c,p] = -sum_k head[k,c] S[n,k,p] = -dL/dfeatures[n,c,p]
    dL/dhead[k,c]           =  sum_{n,p} S[n,k,p] (features - features_adv)[n,c,p]
"""

from __future__ import annotations

import torch

from fastinterp import _native
from fastinterp.ops import _backend
from fastinterp.ops._autograd import needs_grad, register_autograd

NORMS = {"l1": 0, "l2": 1}  # codes of csrc/kernels.h

torch.library.define(
    "fastinterp::cam_discrepancy",
    "(Tensor features, Tensor features_adv, Tensor? head, Tensor class_weights, str norm)"
    " -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "fastinterp::cam_discrepancy_backward",
    "(Tensor class_grad, Tensor features, Tensor features_adv, Tensor? head, Tensor distances,"
    " str norm, bool need_features, bool need_head) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
_backend.KERNELS["cam_discrepancy"] = ("cpu", "triton")


def cam_discrepancy(
    features: torch.Tensor,
    features_adv: torch.Tensor,
    head: torch.Tensor | None,
    class_weights: torch.Tensor,
    norm: str = "l1",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted distance between the class activation maps of two batches, maps never stored.

    Args:
        features: last feature maps of x, (N, C, h, w), float32, float64, bfloat16 or float16;
            NCHW or channels_last.
        features_adv: last feature maps of x', same shape and device.
        head: weight of the linear head, (K, C); None when the features are the class maps
            themselves (then K = C).
        class_weights: (N, K), weight of each class in D.
        norm: "l1" or "l2" over the pixels of a map.

    Returns:
        D, (N,), and the per-class distances d, (N, K), both float32 (float64 for float64 features).
        Both are differentiable once with respect to all four tensors.

    Raises:
        ValueError: shapes or norm are not as described.
        TypeError: a tensor is not floating point.

    Source: Boopathy et al., "Proper Network Interpretability Helps Adversarial Robustness in
    Classification" (ICML 2020), equations of the CAM discrepancy; see also Zhou et al. (2016).
    """
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
    if features.dim() != 4 or features_adv.shape != features.shape:
        raise ValueError(
            "features and features_adv must both be (N, C, h, w), got "
            f"{tuple(features.shape)} and {tuple(features_adv.shape)}"
        )
    channels = features.shape[1]
    if head is not None and (head.dim() != 2 or head.shape[1] != channels):
        raise ValueError(f"head must be (K, {channels}) or None, got {tuple(head.shape)}")
    expected = (len(features), channels if head is None else len(head))
    if tuple(class_weights.shape) != expected:
        raise ValueError(f"class_weights must be {expected}, got {tuple(class_weights.shape)}")
    dtype = features.dtype
    if features_adv.dtype != dtype:
        dtype = torch.promote_types(dtype, features_adv.dtype)
    if dtype not in _backend.DTYPE_CODES:
        raise TypeError(f"features must be floating point tensors, got {dtype}")
    acc = _backend.accumulation_dtype(dtype)
    if head is None and _plain_is_faster(features, norm):
        return reference(features, features_adv, None, class_weights.to(acc), norm)
    return torch.ops.fastinterp.cam_discrepancy(
        features.to(dtype),
        features_adv.to(dtype),
        None if head is None else head.to(acc),
        class_weights.to(acc),
        norm,
    )


def _plain_is_faster(maps: torch.Tensor, norm: str) -> bool:
    """Whether dispatching the op costs more than it saves: small maps, already made, on a CPU.

    Measured on 2 cores with AVX-512: plain torch takes 0.65 of the op's time at 25,000 values,
    0.74 at 113,000, and 2.0 at 820,000.
    """
    return norm == "l1" and _backend.is_small(maps, 1 << 18)


def _class_maps(features, features_adv, head, acc):
    difference = features.to(acc) - features_adv.to(acc)
    if head is None:
        return difference, difference
    return difference, torch.einsum("kc,nchw->nkhw", head, difference)


def reference(features, features_adv, head, class_weights, norm):
    _, maps = _class_maps(features, features_adv, head, class_weights.dtype)
    distances = maps.abs().sum((2, 3)) if norm == "l1" else maps.square().sum((2, 3)).sqrt()
    return (class_weights * distances).sum(1), distances


def reference_backward(
    class_grad, features, features_adv, head, distances, norm, need_features, need_head
):
    difference, maps = _class_maps(features, features_adv, head, class_grad.dtype)
    if norm == "l1":
        slope = class_grad[:, :, None, None] * maps.sign()
    else:
        slope = torch.where(distances > 0, class_grad / distances, 0)[:, :, None, None] * maps
    grad_features_adv, grad_head = _backward_outputs(
        class_grad, features_adv, head, need_features, need_head
    )
    if need_features:
        back = slope if head is None else torch.einsum("kc,nkhw->nchw", head, slope)
        grad_features_adv.copy_(-back)
    if need_head:
        grad_head.copy_(torch.einsum("nkhw,nchw->kc", slope, difference))
    return grad_features_adv, grad_head


def _backward_outputs(class_grad, features_adv, head, need_features, need_head):
    """Unfilled gradients of features_adv and head, empty where nobody asked."""
    grad_features_adv = torch.empty_like(features_adv) if need_features else class_grad.new_empty(0)
    grad_head = class_grad.new_empty(head.shape) if need_head else class_grad.new_empty(0)
    return grad_features_adv, grad_head


def _uniform_pixels(features: torch.Tensor) -> torch.Tensor:
    """``features`` with a constant stride over the pixels h * width + w, copied if need be."""
    _, _, height, width = features.shape
    _, _, row, column = features.stride()
    return features if height <= 1 or row == width * column else features.contiguous()


def _strides(t: torch.Tensor) -> tuple[int, int, int]:
    """Strides of example, channel and pixel."""
    example, channel, row, column = t.stride()
    return example, channel, column if t.shape[3] > 1 else row


def _cpu_common(features, features_adv, head, classes, norm):
    n, c, h, w = features.shape
    return (
        _backend.DTYPE_CODES[features.dtype],
        NORMS[norm],
        n,
        c,
        classes,
        h * w,
        features.data_ptr(),
        _strides(features),
        features_adv.data_ptr(),
        _strides(features_adv),
        *_backend.addresses(head),
        torch.get_num_threads(),
    )


@torch.library.impl("fastinterp::cam_discrepancy", "CompositeExplicitAutograd")
def _forward(features, features_adv, head, class_weights, norm):
    backend = _backend.choose("cam_discrepancy", features)
    if backend == "reference":
        with torch.autocast(features.device.type, enabled=False):
            return reference(features, features_adv, head, class_weights, norm)
    features, features_adv = _uniform_pixels(features), _uniform_pixels(features_adv)
    head = None if head is None else head.contiguous()
    class_weights = class_weights.contiguous()
    discrepancy = class_weights.new_empty(len(features))
    distances = torch.empty_like(class_weights)
    if backend == "triton":
        from fastinterp.triton.cam_discrepancy import cam_discrepancy_forward as launch

        launch(features, features_adv, head, class_weights, norm, discrepancy, distances)
    else:
        _native.core.cpu_cam_discrepancy_forward(
            *_cpu_common(features, features_adv, head, class_weights.shape[1], norm),
            class_weights.data_ptr(),
            discrepancy.data_ptr(),
            distances.data_ptr(),
        )
    return discrepancy, distances


@torch.library.impl("fastinterp::cam_discrepancy_backward", "CompositeExplicitAutograd")
def _backward_impl(
    class_grad, features, features_adv, head, distances, norm, need_features, need_head
):
    features, features_adv = _uniform_pixels(features), _uniform_pixels(features_adv)
    backend = _backend.choose("cam_discrepancy", features)
    if backend == "reference":
        with torch.autocast(features.device.type, enabled=False):
            return reference_backward(
                class_grad, features, features_adv, head, distances, norm, need_features, need_head
            )
    head = None if head is None else head.contiguous()
    class_grad, distances = class_grad.contiguous(), distances.contiguous()
    outputs = _backward_outputs(class_grad, features_adv, head, need_features, need_head)
    grad_features_adv, grad_head = outputs
    if backend == "triton":
        from fastinterp.triton.cam_discrepancy import cam_discrepancy_backward as launch

        launch(
            class_grad,
            features,
            features_adv,
            head,
            distances,
            norm,
            grad_features_adv if need_features else None,
            grad_head if need_head else None,
        )
    else:
        _native.core.cpu_cam_discrepancy_backward(
            *_cpu_common(features, features_adv, head, class_grad.shape[1], norm),
            class_grad.data_ptr(),
            distances.data_ptr(),
            grad_features_adv.data_ptr() if need_features else 0,
            _strides(grad_features_adv) if need_features else (0, 0, 0),
            grad_head.data_ptr() if need_head else 0,
        )
    return outputs


@torch.library.register_fake("fastinterp::cam_discrepancy")
def _fake(features, features_adv, head, class_weights, norm):
    return class_weights.new_empty(features.shape[0]), torch.empty_like(
        class_weights, memory_format=torch.contiguous_format
    )


@torch.library.register_fake("fastinterp::cam_discrepancy_backward")
def _fake_backward(
    class_grad, features, features_adv, head, distances, norm, need_features, need_head
):
    return _backward_outputs(
        class_grad,
        _uniform_pixels(features_adv),
        head,
        need_features,
        need_head,
    )


def _setup_context(ctx, inputs, output):
    features, features_adv, head, class_weights, ctx.norm = inputs
    ctx.save_for_backward(features, features_adv, head, class_weights, output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_discrepancy, grad_distances):
    if grad_discrepancy is None and grad_distances is None:
        return (None,) * 5
    features, features_adv, head, class_weights, distances = ctx.saved_tensors
    need = [needs_grad(ctx, i) for i in range(4)]
    class_grad, grad_weights = grad_distances, None
    if grad_discrepancy is not None:
        weighted = grad_discrepancy[:, None] * class_weights
        class_grad = weighted if class_grad is None else class_grad + weighted
        if need[3]:
            grad_weights = grad_discrepancy[:, None] * distances
    if not any(need[:3]):
        return None, None, None, grad_weights, None
    grad_adv, grad_head = torch.ops.fastinterp.cam_discrepancy_backward(
        class_grad, features, features_adv, head, distances, ctx.norm, need[0] or need[1], need[2]
    )
    return (
        -grad_adv if need[0] else None,
        grad_adv if need[1] else None,
        grad_head if need[2] else None,
        grad_weights,
        None,
    )


def _second_order(ctx, *grads):
    raise NotImplementedError(
        "second-order gradients of cam_discrepancy are not supported: write the distance with "
        "plain torch operations where you need them"
    )


register_autograd("cam_discrepancy", _backward, setup_context=_setup_context)
register_autograd("cam_discrepancy_backward", _second_order)
