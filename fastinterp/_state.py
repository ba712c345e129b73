"""Ways to borrow somebody's model and give it back as it was, also after an exception."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from fastinterp.fusion import stock_type
from fastinterp.models.networks import Pool, SameConv2d, Small, WResnet

# Modules that compute the same in training and in evaluation. Any other may hold a functional
# dropout, stochastic depth or running statistics.
_MODE_FREE = {
    *(nn.Sequential, nn.Identity, nn.Flatten, nn.Conv2d, nn.Linear, nn.ReLU, nn.GELU, nn.SiLU),
    *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.LayerNorm, nn.GroupNorm, nn.Softplus),
    *(SameConv2d, Small, Pool, WResnet),
}


def depends_on_mode(model: nn.Module) -> bool:
    """Whether the model, as its flags are now, may compute something else in evaluation mode."""
    return any(m.training and stock_type(m) not in _MODE_FREE for m in model.modules())


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; every module's own flag afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def substituted(model: nn.Module, tensors: dict[str, torch.Tensor]) -> Iterator[None]:
    """The named parameters and buffers are replaced inside and are the very same again afterwards.

    Shapes may differ, which is what lets a folded head stand in for a convolution.
    """
    saved = []
    try:
        for name, tensor in tensors.items():
            path, _, leaf = name.rpartition(".")
            module = model.get_submodule(path)
            for table in (module._parameters, module._buffers):
                if leaf in table:
                    saved.append((table, leaf, table[leaf]))
                    table[leaf] = tensor
                    break
            else:
                raise KeyError(f"{name} is neither a parameter nor a buffer")
        yield
    finally:
        for table, leaf, tensor in reversed(saved):
            table[leaf] = tensor


def attack_parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters without gradient, for an attack that wants none of theirs.

    On a CPU convolution weights become channels_last, which the activations then follow: the input
    gradient of MNIST Small's strided convolutions is 3 to 5 times faster that way.
    """
    parameters = {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False)}
    for name, p in parameters.items():
        if p.dim() == 4 and p.device.type == "cpu":
            # Copied, as contiguous() leaves the strides of a one-channel weight ambiguous and the
            # convolution then falls back to NCHW.
            parameters[name] = torch.empty_like(p, memory_format=torch.channels_last).copy_(p)
    return parameters


def cloned_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the buffers, for a forward pass that must not move running statistics."""
    return {name: b.clone() for name, b in model.named_buffers(remove_duplicate=False)}
