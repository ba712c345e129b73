"""Convolution units: what a step costs, counted in passes over every convolution of the network.

A unit is one pass of one kind, forward F, input gradient D or weight gradient W, over all L
convolutions and the N images of a batch. For a network whose activations are piecewise linear:

    plain step                              F + D + W                                     3 - 1/L
    penalty on an input gradient alone      F, D | F, W                                   4
    CE + the penalty                        F, D | F, W | D, W                            6 - 1/L
    CE on x + discrepancy of x and x'       6 for x, 4 for x'                            10 - 1/L
    CE on x + penalty on IG, m points       3 for x, 4 for each point

1/L is the input gradient of the first convolution, which a backward pass to weights never needs.
Batch statistics depend on x, so under train-mode batch norm the penalty alone is also
back-propagated to the first layer: D, W more (6 - 1/L) for x' and for each point. (Where a batch
norm lies behind every convolution, as in ResNets.)
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.objectives import IG_POINTS

_FORWARD = {"aten::convolution", "aten::convolution_overrideable", "aten::_convolution"}
_BACKWARD = {"aten::convolution_backward", "aten::convolution_backward_overrideable"}
_OURS = {
    "fastinterp::conv2d": "forward",
    "fastinterp::conv2d_input_grad": "input_grad",
    "fastinterp::conv2d_weight_grad": "weight_grad",
}


class UnitCounter(TorchDispatchMode):
    """Counts the convolution passes that run inside it.

        with UnitCounter(weight.shape for conv in convolutions) as counter:
            step()
        counter.calls               # {"forward": ..., "input_grad": ..., "weight_grad": ...}
        sum(counter.images.values())

    fastinterp's three convolution ops and a convolution of torch are one pass each,
    convolution_backward one for its input and one for its weight where asked for. torch's second
    derivative writes a weight gradient as a convolution whose kernel is as large as the map, which
    is still one: it is told by its kernel's shape, which is none of ``weight_shapes``.

    Args:
        weight_shapes: of the network's convolutions.

    Attributes:
        calls: passes of each kind.
        images: the same, each pass times the images that went through it.
    """

    def __init__(self, weight_shapes: Collection[torch.Size] = ()):
        super().__init__()
        self.weight_shapes = set(map(tuple, weight_shapes))
        self.calls = dict.fromkeys(("forward", "input_grad", "weight_grad"), 0)
        self.images = dict(self.calls)

    def _add(self, kind, images):
        self.calls[kind] += 1
        self.images[kind] += images

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name in _OURS:
            self._add(_OURS[name], args[0].shape[0])
        elif name in _FORWARD:
            x, weight = args[:2]
            if not self.weight_shapes or tuple(weight.shape) in self.weight_shapes:
                self._add("forward", x.shape[0])
            else:  # on transposed tensors, so the images are its channels
                self._add("weight_grad", x.shape[1])
        elif name in _BACKWARD:
            for kind, asked in zip(("input_grad", "weight_grad"), args[-1], strict=False):
                if asked:
                    self._add(kind, args[0].shape[0])
        return func(*args, **(kwargs or {}))


def count(step: Callable, net: nn.Module, batch: int) -> float:
    """Units of ``step()``: passes over images / (N images x convolutions of ``net``)."""
    shapes = [module.weight.shape for module in net.modules() if isinstance(module, nn.Conv2d)]
    with UnitCounter(shapes) as counter:
        step()
    return sum(counter.images.values()) / (batch * len(shapes))


def floor(objective: str, convolutions: int, batch_statistics: bool) -> float:
    """The fewest units that ``objective`` of benchmarks.objectives can take; table at the top.

    Args:
        convolutions: of the network.
        batch_statistics: whether it has train-mode batch norm.
    """
    first = 1 / convolutions
    stream = 6 - first if batch_statistics else 4
    return {
        "plain": 3 - first,
        "penalty": stream,
        "gradient": 6 - first,
        "discrepancy": 6 - first + stream,
        "ig": 3 - first + IG_POINTS * stream,
    }[objective]
