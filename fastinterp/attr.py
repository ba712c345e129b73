"""fastinterp.maps behind captum's names: its arguments and defaults, but fully differentiable.

captum's attributions are constants to the parameters, or half so; these may stand in a loss. Not
offered are captum's further arguments, several inputs at once, and NoiseTunnel, for which there is
maps.smooth_grad.

Source of the interface: Kokhlikyan et al., "Captum" (2020).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fastinterp._checks import check_images
from fastinterp.maps._target import Classes, parse
from fastinterp.maps.grad_cam import explain_layer, mean_gradient
from fastinterp.maps.gradient import differentiate
from fastinterp.maps.integrated import METHODS, along_path

__all__ = ["InputXGradient", "IntegratedGradients", "LayerGradCam", "Saliency"]

Target = int | Sequence[int] | torch.Tensor | None

# captum's name -> ours
_METHODS = {f"riemann_{m}": m for m in METHODS if m != "gauss-legendre"}
_METHODS["gausslegendre"] = "gauss-legendre"


def _classes(inputs: torch.Tensor, target: Target) -> Classes:
    check_images(inputs, "inputs", bounds=None)
    if target is None:
        return Classes(None, single=True)
    if isinstance(target, Sequence):
        target = torch.tensor(target)
    if isinstance(target, torch.Tensor) and target.numel() == 1:
        target = target.reshape(())
    return parse(target, inputs)


class IntegratedGradients:
    """maps.integrated_gradients for captum's users.

    Args:
        model: images (N, C, H, W) of any range -> outputs (N, K).
    """

    def __init__(self, model: nn.Module):
        self.model = model

    def attribute(
        self,
        inputs: torch.Tensor,
        baselines: float | torch.Tensor | None = None,
        target: Target = None,
        n_steps: int = 50,
        method: str = "gausslegendre",
        internal_batch_size: int | None = None,
        return_convergence_delta: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Integrated gradients, like inputs, differentiable with respect to every parameter.

        The model runs in evaluation mode.

        Args:
            inputs: images; differentiated to as well where they require gradients.
            baselines: a number or tensor broadcastable to inputs; None for 0.
            target: a class, or one for each image; None where the model has one output.
            n_steps: points on the path.
            method: "gausslegendre", "riemann_left", "riemann_right", "riemann_middle" or
                "riemann_trapezoid"; the weights of the last sum to 1 here and to
                1 - 1 / n_steps in captum.
            internal_batch_size: most images in one forward pass.
            return_convergence_delta: also sum(attributions) - (f(inputs) - f(baselines)), (N,).

        Raises:
            TypeError, ValueError: an argument is out of range.
            RuntimeError: gradients are disabled, or the output has none.
        """
        if method not in _METHODS:
            raise ValueError(f"method must be one of {', '.join(_METHODS)}, got {method!r}")
        return along_path(
            "IntegratedGradients",
            self.model,
            inputs,
            _classes(inputs, target),
            baseline=0.0 if baselines is None else baselines,
            steps=n_steps,
            method=_METHODS[method],
            internal_batch_size=internal_batch_size,
            return_delta=return_convergence_delta,
        )


class Saliency:
    """maps.input_gradient for captum's users; arguments as IntegratedGradients."""

    def __init__(self, model: nn.Module):
        self.model = model

    def attribute(
        self, inputs: torch.Tensor, target: Target = None, abs: bool = True
    ) -> torch.Tensor:
        """The gradient of the target's output, or its magnitude, like inputs; raises the same."""
        classes = _classes(inputs, target)
        gradient = differentiate("Saliency", self.model, inputs, classes)
        return gradient.abs() if abs else gradient


class InputXGradient:
    """maps.gradient_x_input for captum's users; arguments as IntegratedGradients."""

    def __init__(self, model: nn.Module):
        self.model = model

    def attribute(self, inputs: torch.Tensor, target: Target = None) -> torch.Tensor:
        """Inputs times gradient of the target's output, like inputs; raises the same."""
        classes = _classes(inputs, target)
        return differentiate("InputXGradient", self.model, inputs, classes, times_input=True)


class LayerGradCam:
    """maps.grad_cam for captum's users.

    Args:
        model: images (N, C, H, W) of any range -> outputs (N, K).
        layer: a module of the model, or its dotted name, that answers with (N, C, h, w).
    """

    def __init__(self, model: nn.Module, layer: nn.Module | str):
        self.model, self.layer = model, layer

    def attribute(
        self, inputs: torch.Tensor, target: Target = None, relu_attributions: bool = False
    ) -> torch.Tensor:
        """Grad-CAM of the layer, (N, 1, h, w), weights and all differentiable.

        Args:
            inputs, target: as in IntegratedGradients.
            relu_attributions: set negative values to zero.

        Raises:
            As IntegratedGradients; UnsupportedModelError (a ValueError) for a layer without maps.
        """
        return explain_layer(
            "LayerGradCam",
            mean_gradient,
            self.model,
            inputs,
            _classes(inputs, target),
            layer=self.layer,
            relu=relu_attributions,
        )
