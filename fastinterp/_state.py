"""Ways to borrow somebody's model and give it back as it was, also after an exception.

One rule for everything that runs a model more than once: the pass whose logits the caller gets with
their graph counts as model(x), so running statistics (and random numbers) move as they do there;
every other pass is ``uncounted`` and leaves the model as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

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


@contextmanager
def uncounted(model: nn.Module) -> Iterator[Callable[[], AbstractContextManager]]:
    """Inside, the model runs on copies of its buffers, and running statistics do not move.

    Gives a function ``counted``: inside ``with counted():`` the buffers are the model's own, for
    the pass that is to move them; no pass before it has.
    """
    places = [
        (module._buffers, name)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]

    def swap(buffers):
        held = [table[name] for table, name in places]
        for (table, name), buffer in zip(places, buffers, strict=True):
            table[name] = buffer
        return held

    @contextmanager
    def counted():
        nonlocal own
        copies = swap(own)
        try:
            yield
        finally:
            own = swap(copies)  # a forward may have put others in their places

    shared = {id(table[name]): table[name].clone() for table, name in places}
    own = swap([shared[id(table[name])] for table, name in places])
    try:
        yield counted
    finally:
        swap(own)
