"""Gradients of a class's score with respect to the image.

    input gradient    d s_c / dx            gradient x input    x d s_c / dx

Sources: Simonyan et al., "Deep Inside Convolutional Networks" (2014); Shrikumar et al., "Not Just a
Black Box" (2016).
"""

from __future__ import annotations

import torch
from torch import nn

from fastinterp._checks import check_images
from fastinterp.maps._call import borrowed, gradients, leaf, recording, run
from fastinterp.maps._target import Classes, at_least_float, check_of, parse, scores


def input_gradient(
    model: nn.Module,
    x: torch.Tensor,
    target: int | torch.Tensor | None = None,
    *,
    of: str = "logit",
    detach: bool = False,
    return_logits: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Gradient of each example's score with respect to its image, raw sign.

    Several classes share one forward and one batched backward pass. The model runs in its own mode;
    in training mode batch norm couples the examples: the map is the gradient of the batch's sum.

    Args:
        model: images -> logits (N, K).
        x: images (N, C, H, W) in [0,1].
        target: None for every class, a class, or int64 (N,) or (N, k).
        of: score s_c: "logit", "log_prob", or "loss", the cross-entropy with c as the true class.
        detach: True for a constant; False for a map that is differentiable with respect to every
            parameter, and to x where x requires gradients.
        return_logits: also the logits of x, with the same graph; see fastinterp.maps.

    Returns:
        (N, C, H, W) for a class or (N,), (N, k or K, C, H, W) for (N, k) or None; float32, or
        float64 for float64 x. With return_logits, (map, logits).

    Raises:
        TypeError, ValueError: x, target or of is out of range, or the output is not (N, K).
        RuntimeError: gradients are disabled and detach is False, or the output has none.
    """
    check_images(x)
    classes = parse(target, x)
    return differentiate("input_gradient", model, x, classes, of, detach, return_logits)


def gradient_x_input(
    model: nn.Module,
    x: torch.Tensor,
    target: int | torch.Tensor | None = None,
    *,
    of: str = "logit",
    detach: bool = False,
    return_logits: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Image times gradient, element by element; arguments, results and errors of input_gradient."""
    check_images(x)
    classes, name = parse(target, x), "gradient_x_input"
    return differentiate(name, model, x, classes, of, detach, return_logits, times_input=True)


def differentiate(
    name: str,
    model: nn.Module,
    x: torch.Tensor,
    classes: Classes,
    of: str = "logit",
    detach: bool = False,
    return_logits: bool = False,
    times_input: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """input_gradient or gradient_x_input of any x, whatever its range."""
    check_of(of)
    graph = not detach or not classes.single
    loan = borrowed(model, x, differentiable=graph, counts=return_logits and not detach)
    with recording(detach, name), loan as net:
        z = leaf(x, detach)
        logits = run(net, z)
        classes.check_below(logits.shape[1])
        with torch.autocast(x.device.type, enabled=False):
            value = at_least_float(gradients(scores(logits, classes, of), z, not detach))
            if times_input:
                value = (z.detach() if detach else x)[:, None] * value
        if detach:
            value, logits = value.detach(), logits.detach()
    if classes.single:
        value = value[:, 0]
    return (value, logits) if return_logits else value
