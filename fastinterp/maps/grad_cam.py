"""Grad-CAM and Grad-CAM++: a layer's feature maps A, weighted by the gradient of a logit.

    grad_cam            I_c = sum_k w_k A_k,  w_k = mean_hw g_k,  g = d f_c / dA
    grad_cam_plus_plus  w_k = sum_hw a_k relu(g_k),  a_k = 1 / (2 + g_k sum_hw A_k) where g_k > 0,
                        0 elsewhere, divided by its sum over hw

Behind global average pooling and a linear head W these are CAM / (h w), the second with relu(W).
Sources: Selvaraju et al., "Grad-CAM" (2017); Chattopadhay et al., "Grad-CAM++" (2018) for the
exponential of the logit, less that exponential as a common factor, and with a_k made to sum to 1 as
in its authors' code. pytorch-grad-cam does not do the latter.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from fastinterp._checks import check_images
from fastinterp.maps._call import NoGradientError, borrowed, constant, gradients, recording, run
from fastinterp.maps._layers import UnsupportedModelError, choose, recorded
from fastinterp.maps._target import Classes, at_least_float, parse, scores


def grad_cam(
    model: nn.Module,
    x: torch.Tensor,
    target: int | torch.Tensor | None = None,
    *,
    layer: str | nn.Module | None = None,
    relu: bool = False,
    detach: bool = False,
    return_logits: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Grad-CAM of a spatial layer; its weights, a gradient, are differentiated too.

    Args:
        model: images -> logits (N, K), run in its own mode.
        x: images (N, C, H, W) in [0,1].
        target: None for every class, a class, or int64 (N,) or (N, k); several share one forward
            and one batched backward pass.
        layer: a module of the model, its dotted name, or None for explained_layer(model, x), which
            costs a forward pass of one image. Of a layer called more than once the last call.
        relu: set negative values of the map to zero.
        detach: True for a constant; False for a map that is differentiable with respect to every
            parameter, and to x where x requires gradients.
        return_logits: also the logits of x, with the same graph; see fastinterp.maps.

    Returns:
        (N, 1, h, w) for a class or (N,), (N, k or K, h, w) for (N, k) or None; raw sign unless
        ``relu``; float32, or float64 for float64 activations. With return_logits, (map, logits).

    Raises:
        TypeError, ValueError: x, target or layer is out of range, or the output is not (N, K).
        UnsupportedModelError: the layer has no feature maps (N, C, h, w), or none was found.
        RuntimeError: gradients are disabled and detach is False, or the logits have no gradient to
            the layer.
    """
    check_images(x)
    classes, name = parse(target, x), "grad_cam"
    return explain_layer(name, mean_gradient, model, x, classes, layer, relu, detach, return_logits)


def grad_cam_plus_plus(
    model: nn.Module,
    x: torch.Tensor,
    target: int | torch.Tensor | None = None,
    *,
    layer: str | nn.Module | None = None,
    relu: bool = False,
    detach: bool = False,
    return_logits: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Grad-CAM++ of a spatial layer; arguments, results and errors of grad_cam."""
    check_images(x)
    classes, name = parse(target, x), "grad_cam_plus_plus"
    return explain_layer(name, plus_plus, model, x, classes, layer, relu, detach, return_logits)


def explain_layer(
    name: str,
    weights_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    model: nn.Module,
    x: torch.Tensor,
    classes: Classes,
    layer: str | nn.Module | None = None,
    relu: bool = False,
    detach: bool = False,
    return_logits: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """A layer's maps (N, C, h, w) summed with weights_of(gradient (N, k, C, h, w), maps)."""
    graph = not detach or not classes.single
    loan = borrowed(model, x, differentiable=graph, counts=return_logits and not detach)
    with recording(detach, name), loan as net:
        layer_name, module = choose(net, x, layer)
        with recorded(layer_name, module, detach) as activations:
            logits = run(net, constant(x) if detach else x)
        if not activations:
            raise UnsupportedModelError(
                f"layer {layer_name!r} is not called in the model's forward; name another"
            )
        classes.check_below(logits.shape[1])
        with torch.autocast(x.device.type, enabled=False):
            features = activations[-1]
            try:
                gradient = gradients(scores(logits, classes, "logit"), features, not detach)
            except NoGradientError as error:
                raise NoGradientError(f"layer {layer_name!r}: {error}") from error
            features = at_least_float(features)
            weights = weights_of(at_least_float(gradient), features)
            value = torch.einsum("nkc,nchw->nkhw", weights, features)
            if relu:
                value = value.clamp(min=0)
    if detach:
        value, logits = value.detach(), logits.detach()
    return (value, logits) if return_logits else value


def mean_gradient(gradient, features):
    return gradient.mean((3, 4))


def plus_plus(gradient, features):
    positive = gradient > 0
    denominator = 2 + gradient * features.sum((2, 3), keepdim=True)[:, None]
    usable = positive & (denominator != 0)
    alpha = torch.where(usable, 1 / torch.where(usable, denominator, 1), positive.to(gradient))
    total = alpha.sum((3, 4), keepdim=True)
    alpha = alpha / torch.where(total != 0, total, 1)
    return (alpha * gradient.clamp(min=0)).sum((3, 4))
