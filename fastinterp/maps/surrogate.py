"""ReLU replaced by softplus while maps are computed that are to be differentiated to the image.

The input Hessian of a ReLU network is zero almost everywhere, so the gradient of its input gradient
says nothing. softplus_beta(z) = log(1 + exp(beta z)) / beta is smooth and tends to relu(z) with
beta. Source: Dombrowski et al., "Explanations can be manipulated and geometry is to blame" (2019).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fastinterp import ops  # noqa: F401  which registers what _FUSED names
from fastinterp.maps._call import unwrapped

_RELU = {F.relu, torch.relu, torch.Tensor.relu}
_RELU_IN_PLACE = {F.relu_, torch.relu_, torch.Tensor.relu_}


def _with_activation(*names: str) -> dict:
    """op -> which of its arguments names the activation; alpha is the next."""
    found = {}
    for name in names:
        packet = getattr(torch.ops.fastinterp, name)
        arguments = [a.name for a in packet.default._schema.arguments]
        found[packet] = found[packet.default] = arguments.index("alpha") - 1
    return found


_FUSED = _with_activation("activation", "batch_norm_act", "norm_act")


class _Softplus(TorchFunctionMode):
    def __init__(self, beta: float):
        self.beta = beta

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if (i := _FUSED.get(function)) is not None and len(args) > i and args[i] == "relu":
            args = (*args[:i], "softplus", self.beta, *args[i + 2 :])
        elif function in _RELU or function in _RELU_IN_PLACE:
            return self._relu(function, *args, **kwargs)
        return function(*args, **kwargs)

    def _relu(self, function, input, inplace=False):
        if inplace or function in _RELU_IN_PLACE:
            return input.copy_(F.softplus(input.clone(), self.beta))
        return F.softplus(input, self.beta)


@contextmanager
def softplus_surrogate(model: nn.Module, beta: float = 10.0) -> Iterator[None]:
    """Inside, calls of the model compute softplus_beta wherever they computed relu.

    That is nn.ReLU modules, torch.nn.functional.relu, torch.relu, Tensor.relu, their in-place forms
    and the ReLUs of a fused model. Not clamp, ReLU6, nor what torch.jit compiled. Graphs recorded
    inside may be differentiated outside.

    Args:
        model: any nn.Module; calls of a part of it from elsewhere are not affected.
        beta: sharpness, > 0; the largest deviation from relu is log(2) / beta.

    Raises:
        ValueError: beta is not a finite number > 0.

    Example:
        >>> with maps.softplus_surrogate(model, beta=10):
        ...     saliency = maps.input_gradient(model, x, y)
        >>> (direction,) = torch.autograd.grad(saliency.abs().sum(), x)
    """
    if not 0 < beta < math.inf:
        raise ValueError(f"beta must be a finite number > 0, got {beta}")
    model = unwrapped(model)
    attributes = model.__dict__
    # Of nested contexts the inner one counts.
    original = getattr(model.forward, "without_surrogate", model.forward)

    def surrogate(function):
        def forward(*args, **kwargs):
            with _Softplus(float(beta)):
                return function(*args, **kwargs)

        return forward

    forward = surrogate(original)
    # For who runs the same function in another form, as fastinterp.folding does.
    forward.without_surrogate, forward.surrogate = original, surrogate
    own = attributes.get("forward")
    attributes["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del attributes["forward"]
        else:
            attributes["forward"] = own
