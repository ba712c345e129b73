"""The leaves of an attack form: modules with parameters that the model's are not."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from fastinterp.fusion import stock_type
from fastinterp.models._layers import SameConv2d

CONVOLUTIONS = (nn.Conv2d, SameConv2d)


def copied(module: nn.Module, name: str, tensors: dict[str, torch.Tensor]) -> nn.Module:
    """The same module, buffers shared, in evaluation mode and with other parameters."""
    copied = object.__new__(type(module))
    copied.__dict__.update(
        module.__dict__,
        training=False,
        _parameters={
            key: None if p is None else tensors[f"{name}.{key}"]
            for key, p in module._parameters.items()
        },
        _modules={
            key: child and copied(child, f"{name}.{key}", tensors)
            for key, child in module._modules.items()
        },
    )
    return copied


def fold_norm(leaf: nn.Module, norm: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Has a convolution do what the batch norm ``norm`` behind it does."""
    scale = torch.rsqrt(norm.running_var + norm.eps)
    if norm.affine:
        scale = scale * tensors["weight"]
    shift = -norm.running_mean if leaf.bias is None else leaf.bias - norm.running_mean
    shift = shift * scale
    if norm.affine:
        shift = shift + tensors["bias"]
    leaf._parameters.update(weight=leaf.weight * scale[:, None, None, None], bias=shift)


def times_head(convolution: nn.Module, head: torch.Tensor) -> dict[str, torch.Tensor]:
    """With which parameters a convolution gives the head, (K, C), times what it gives now."""
    weight = convolution.weight
    last = weight.is_contiguous(memory_format=torch.channels_last)
    product = (head @ weight.flatten(1)).view(len(head), *weight.shape[1:])
    # Copied, as contiguous() leaves the strides of a one-channel weight ambiguous.
    layout = torch.channels_last if last else torch.contiguous_format
    tensors = {"weight": torch.empty_like(product, memory_format=layout).copy_(product)}
    if convolution.bias is not None:
        tensors["bias"] = head @ convolution.bias
    return tensors


def cast(parts: Iterable[nn.Module], dtype: torch.dtype) -> None:
    """Weights as autocast casts them, once instead of at every step."""
    for leaf in parts:
        if stock_type(leaf) in (*CONVOLUTIONS, nn.Linear):
            for key, tensor in leaf._parameters.items():
                if tensor is not None and tensor.dtype == torch.float32:
                    leaf._parameters[key] = tensor.to(dtype)
