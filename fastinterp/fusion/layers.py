"""Stock layers computed by this package's ops: same parameters, buffers, attributes and results.

An instance becomes one by a change of class, so that whatever refers to it keeps doing so. Each of
these classes names in ``_stock_type`` the class it stands in for.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

from fastinterp import ops
from fastinterp.fusion.norms import NORMS
from fastinterp.models._layers import SameConv2d

_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_MAX_TAPS = 255  # of a max-pooling window; more have no op
_SOFTPLUS_THRESHOLD = 20  # torch's default, which the ops share


def stock_type(module: nn.Module) -> type:
    """The class of ``module`` before it was fused; its class where it is not fused."""
    return type(module).__dict__.get("_stock_type", type(module))


def plain(module: nn.Module) -> bool:
    """Whether calling ``module`` is no more than its class's forward, so that it can be merged."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or _has_any_global_hook()
    )


def idle(module: nn.Module) -> bool:
    """Whether calling ``module`` does nothing at all."""
    return type(module) is nn.Identity and plain(module)


# ---- functions with torch's signatures


def activate(x: torch.Tensor, kind: str, alpha: float | None = None) -> torch.Tensor:
    """An activation by name; torch's own for what the op does not take."""
    if x.dtype in _FLOATING:
        return ops.activation(x, kind, alpha)
    return getattr(F, kind)(x) if alpha is None else getattr(F, kind)(x, alpha)


def conv2d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    return ops.conv2d(input, weight, bias, stride, padding, dilation, groups)


def _image_batch(input) -> bool:
    return input.dim() == 4 and input.dtype in _FLOATING


def max_pool2d(
    input,
    kernel_size,
    stride=None,
    padding=0,
    dilation=1,
    ceil_mode=False,
    return_indices=False,
):
    taps = kernel_size**2 if isinstance(kernel_size, int) else math.prod(kernel_size)
    if return_indices or taps > _MAX_TAPS or not _image_batch(input):
        return F.max_pool2d(
            input, kernel_size, stride, padding, dilation, ceil_mode, return_indices
        )
    return ops.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode)


def avg_pool2d(
    input,
    kernel_size,
    stride=None,
    padding=0,
    ceil_mode=False,
    count_include_pad=True,
    divisor_override=None,
):
    options = kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
    pool = ops.avg_pool2d if _image_batch(input) else F.avg_pool2d
    return pool(input, *options)


def adaptive_avg_pool2d(input, output_size):
    if _image_batch(input) and output_size in (1, (1, 1), [1, 1]):
        return ops.adaptive_avg_pool2d(input, 1)
    return F.adaptive_avg_pool2d(input, output_size)


def activation_kind(module: nn.Module) -> tuple[str, float | None] | None:
    """Name and alpha of a stock activation module as the ops take them; None for any other."""
    kind = stock_type(module)
    if kind is nn.ReLU:
        return "relu", None
    if kind is nn.SiLU:
        return "silu", None
    if kind is nn.GELU and module.approximate == "none":
        return "gelu", None
    if kind is nn.LeakyReLU and module.negative_slope >= 0:
        return "leaky_relu", float(module.negative_slope)
    if kind is nn.Softplus and module.threshold == _SOFTPLUS_THRESHOLD and module.beta > 0:
        return "softplus", float(module.beta)
    return None


# ---- layers


class FusedConv2d(nn.Conv2d):
    _stock_type = nn.Conv2d

    def _conv_forward(self, input, weight, bias):
        padding = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return ops.conv2d(input, weight, bias, self.stride, padding, self.dilation, self.groups)


class FusedSameConv2d(SameConv2d):
    _stock_type = SameConv2d

    def _convolution(self, x, stride, padding):
        return ops.conv2d(x, self.weight, self.bias, stride, padding)


class _FusedActivation:
    def forward(self, input):
        kind = activation_kind(self)
        if kind is None or getattr(self, "inplace", False):
            return super().forward(input)
        return activate(input, *kind)


class FusedReLU(_FusedActivation, nn.ReLU):
    _stock_type = nn.ReLU


class FusedLeakyReLU(_FusedActivation, nn.LeakyReLU):
    _stock_type = nn.LeakyReLU


class FusedSoftplus(_FusedActivation, nn.Softplus):
    _stock_type = nn.Softplus


class FusedSiLU(_FusedActivation, nn.SiLU):
    _stock_type = nn.SiLU


class FusedGELU(_FusedActivation, nn.GELU):
    _stock_type = nn.GELU


class FusedMaxPool2d(nn.MaxPool2d):
    _stock_type = nn.MaxPool2d

    def forward(self, input):
        return max_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.ceil_mode,
            self.return_indices,
        )


class FusedAvgPool2d(nn.AvgPool2d):
    _stock_type = nn.AvgPool2d

    def forward(self, input):
        return avg_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )


class FusedAdaptiveAvgPool2d(nn.AdaptiveAvgPool2d):
    _stock_type = nn.AdaptiveAvgPool2d

    def forward(self, input):
        return adaptive_avg_pool2d(input, self.output_size)


# stock class -> fused class and the op behind it
LAYERS = {
    **NORMS,
    nn.Conv2d: (FusedConv2d, "conv2d"),
    SameConv2d: (FusedSameConv2d, "conv2d"),
    nn.ReLU: (FusedReLU, "activation"),
    nn.LeakyReLU: (FusedLeakyReLU, "activation"),
    nn.Softplus: (FusedSoftplus, "activation"),
    nn.SiLU: (FusedSiLU, "activation"),
    nn.GELU: (FusedGELU, "activation"),
    nn.MaxPool2d: (FusedMaxPool2d, "max_pool2d"),
    nn.AvgPool2d: (FusedAvgPool2d, "avg_pool2d"),
    nn.AdaptiveAvgPool2d: (FusedAdaptiveAvgPool2d, "adaptive_avg_pool2d"),
}


def why_not(module: nn.Module) -> str | None:
    """Why a module of one of the stock classes in LAYERS is not swapped; None when it is."""
    kind = type(module)
    if kind is nn.MaxPool2d and module.return_indices:
        return "it returns indices"
    if kind is nn.AdaptiveAvgPool2d and module.output_size not in (1, (1, 1), [1, 1]):
        return "only output size 1 has a fused op"
    if LAYERS[kind][1] == "activation":
        if activation_kind(module) is None:
            return "its options have no fused op"
        if getattr(module, "inplace", False):
            return "it works in place on a tensor that others may hold"
    return None
