"""Interpretation maps, fully differentiable or constant, never half.

A map leaves the model as it was: its flags, buffers (running statistics do not move), gradients and
hooks, and the random numbers that its next call will draw. With ``return_logits`` the pass that
made the map counts as ``model(x)``, as these logits take its place in a loss: running statistics
move once and random numbers are used up. A constant map (``detach``) never counts.

cam.py            class activation maps
grad_cam.py       Grad-CAM and Grad-CAM++ of any spatial layer
gradient.py       input gradient, gradient x input
integrated.py     integrated, expected and smoothed gradients: means over many points
surrogate.py      ReLU replaced by softplus for maps that are differentiated to x
_call.py          how somebody's model is borrowed
_target.py        classes and scores
_layers.py        which layer is explained
"""

from fastinterp.maps._layers import UnsupportedModelError, explained_layer
from fastinterp.maps.cam import CamNetwork, cam, find_cam_network
from fastinterp.maps.grad_cam import grad_cam, grad_cam_plus_plus
from fastinterp.maps.gradient import gradient_x_input, input_gradient
from fastinterp.maps.integrated import expected_gradients, integrated_gradients, smooth_grad
from fastinterp.maps.surrogate import softplus_surrogate

__all__ = [
    "CamNetwork",
    "UnsupportedModelError",
    "cam",
    "expected_gradients",
    "explained_layer",
    "find_cam_network",
    "grad_cam",
    "grad_cam_plus_plus",
    "gradient_x_input",
    "input_gradient",
    "integrated_gradients",
    "smooth_grad",
    "softplus_surrogate",
]
