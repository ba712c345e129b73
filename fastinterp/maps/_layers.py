"""Which layer a CAM-like map explains, and its activation during a forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from fastinterp._checks import check_images
from fastinterp.fusion import stock_type
from fastinterp.maps._call import borrowed, unwrapped

_NOT_EXPLAINED = (
    *(nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.AvgPool2d, nn.Identity),
    *(nn.Dropout, nn.Dropout2d),
)


_INPUT = "input of "


class UnsupportedModelError(ValueError):
    """The model is not one whose maps this package knows how to find."""


def explained_layer(model: nn.Module, x: torch.Tensor) -> str:
    """Dotted name of the layer that grad_cam explains when it is not told which.

    It is the last module to answer with feature maps (N, C, h, w) of more than one pixel that is
    not an average pooling, a dropout or an nn.Identity; or "input of NAME" for a global average
    pooling NAME before which a function, which is no module, changes those maps. Found by running
    one image.

    Args:
        model: any classifier of images.
        x: images (N, C, H, W) in [0,1], of which one is used.

    Raises:
        UnsupportedModelError: there is no such layer, or its output is not what the classifier
            goes on with: tokens, or channels in the last dimension. The message names the way out.
    """
    check_images(x)
    with borrowed(model, x, differentiable=False, evaluation=True) as net:
        return _find(net, x[:1])


def is_global_pool(module: nn.Module) -> bool:
    return isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1), [1, 1])


@torch.no_grad()
def _find(net: nn.Module, x: torch.Tensor) -> str:
    shapes: dict[str, torch.Size] = {}
    last = None

    def record(name, tensor):
        nonlocal last
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
            shapes.pop(name, None)  # a module called twice counts where it was called last
            shapes[name], last = tensor.shape, tensor

    def hooked(name, module):
        def before(_, args):
            if args[0] is not last and args[0] is not x:
                record(_INPUT + name, args[0])

        if is_global_pool(module):
            return module.register_forward_pre_hook(before)
        return module.register_forward_hook(lambda _, args, output: record(name, output))

    hooks = [
        hooked(name, module)
        for name, module in net.named_modules()
        if module is not net
        and (is_global_pool(module) or stock_type(module) not in _NOT_EXPLAINED)
    ]
    try:
        net(x)
    finally:
        for hook in hooks:
            hook.remove()
    kind = type(net).__name__
    maps = [n for n, shape in shapes.items() if len(shape) == 4 and shape[2] * shape[3] > 1]
    if not maps:
        raise UnsupportedModelError(
            f"no spatial layer found: no module of {kind} answers with (N, C, h, w) of "
            "more than one pixel; use input_gradient or integrated_gradients, which need none"
        )
    name, shape = maps[-1], tuple(shapes[maps[-1]])
    after = list(shapes)[list(shapes).index(name) + 1 :]
    tokens = [n for n in after if len(shapes[n]) == 3 and 1 not in shapes[n][1:]]
    if tokens:
        raise UnsupportedModelError(
            f"after {name!r} {kind} goes on with tokens {tuple(shapes[tokens[0]])} at "
            f"{tokens[0]!r}, which have no height and width; use input_gradient or "
            "integrated_gradients, or name a layer that answers with (N, C, h, w)"
        )
    if shape[1] == shape[2] != shape[3] > shape[1]:
        raise UnsupportedModelError(
            f"the output {shape} of {name!r} looks like (N, h, w, C); name a layer that answers "
            "with (N, C, h, w), or use input_gradient or integrated_gradients"
        )
    return name


def choose(net: nn.Module, x: torch.Tensor, layer) -> tuple[str, nn.Module]:
    """Name and module of the layer to explain; ``layer`` is a name, a module or None.

    Raises:
        TypeError, ValueError: the model has no such layer.
    """
    if layer is None:
        layer = explained_layer(net, x)
    elif isinstance(layer, nn.Module):
        layer = unwrapped(layer)
        for name, module in net.named_modules():
            if module is layer:
                return name, module
        raise ValueError(f"layer, a {type(layer).__name__}, is not a module of the model")
    elif not isinstance(layer, str):
        raise TypeError(
            f"layer must be a module, its dotted name or None, got {type(layer).__name__}"
        )
    modules = dict(net.named_modules())
    if layer.removeprefix(_INPUT) not in modules:
        some = ", ".join(list(modules)[-8:])
        raise ValueError(f"the model has no layer {layer!r}; its last ones are {some}")
    return layer, modules[layer.removeprefix(_INPUT)]


@contextmanager
def recorded(name: str, module: nn.Module, detach: bool) -> Iterator[list[torch.Tensor]]:
    """Inside, the list holds the layer's activation after each of its calls.

    It is always part of a graph: where nothing before it has parameters with gradients, or for a
    constant map, a graph begins there.
    """
    seen: list[torch.Tensor] = []

    def activation(output):
        if not isinstance(output, torch.Tensor):
            raise UnsupportedModelError(
                f"layer {name!r} answers with a {type(output).__name__}; name one whose output is "
                "one tensor (N, C, h, w)"
            )
        if output.dim() != 4:
            raise UnsupportedModelError(
                f"layer {name!r} answers with {tuple(output.shape)}, not feature maps (N, C, h, w)"
                "; name a layer before it, or use input_gradient or integrated_gradients, which "
                "need no layer"
            )
        if detach or not output.requires_grad:
            output = output.detach().requires_grad_()
        seen.append(output)
        # Another tensor, as an activation behind the layer may work in place.
        return output.clone()

    if name.startswith(_INPUT):
        handle = module.register_forward_pre_hook(lambda _, args: (activation(args[0]), *args[1:]))
    else:
        handle = module.register_forward_hook(lambda _, args, output: activation(output))
    try:
        yield seen
    finally:
        handle.remove()
