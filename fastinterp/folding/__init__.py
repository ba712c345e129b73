"""The form in which an inner maximisation runs a network: the same function, fewer operations.

An attack wants no gradients of parameters and runs the network in evaluation mode, so that what is
affine there can be multiplied out once per attack instead of once per step:

    batch norm behind a convolution   s (conv(a) + b - m) + t = (s conv)(a) + s (b - m) + t
    the head W into what is pooled    W (x + conv(a) + b) = W x + (W conv)(a) + W b

with s = gamma / sqrt(var + eps). With the head folded in, the last convolutions have K output
channels instead of C and their sum is the class maps themselves, whose mean is the logits. It goes
up through additions to convolutions, and to anything else as a 1x1 convolution. A max-pool or an
activation before the global pooling, as in the paper's Pool or in ResNets, is not linear: nothing
is folded there.

FASTINTERP_FOLD=off (default on) has attacks run the network as it is written.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import nn

from fastinterp.folding.form import AttackForm, enabled, is_surrogate
from fastinterp.fusion.layers import plain
from fastinterp.fusion.tracing import NotTraceable

__all__ = ["AttackForm", "find_attack_form"]


_forms: weakref.WeakKeyDictionary[nn.Module, dict] = weakref.WeakKeyDictionary()
_OF_MODULES = {*nn.Module().__dict__, "forward"}
_VALUES = (bool, int, float, complex, str, type(None))


def find_attack_form(
    model: nn.Module,
    x: torch.Tensor | None = None,
    cam: tuple[nn.Module, nn.Linear] | None = None,
    check: Callable[[], None] = lambda: None,
) -> AttackForm | None:
    """The model's AttackForm; None where torch.fx cannot trace it or FASTINTERP_FOLD is off.

    It is made once, and again when the model has changed: other modules, attributes of modules,
    shapes of parameters or hooks. What else a forward may depend on, as on a global variable, must
    stay as it was.

    Args:
        model, x, cam: of AttackForm.
        check: called before one is made with ``cam``; raises where the model is not such a network.
    """
    if not enabled():
        check()
        return None
    names, modules = zip(*model.named_modules(), strict=True)
    seen = cam and (*(modules.index(m) for m in cam), tuple(x.shape[1:]), x.dtype, x.device.type)
    description = seen, *map(_description, names, modules)
    forms = _forms.setdefault(model, {})  # one with ``cam`` and one without
    known, form = forms.get(cam is None, (None, None))
    if known != description:
        check()
        try:
            form = AttackForm(model, x, cam)
        except NotTraceable:
            form = None
        forms[cam is None] = description, form
    return form


def _description(name: str, module: nn.Module) -> tuple:
    """What a forward in evaluation mode may depend on, but the values of tensors."""
    tensors = (*module._parameters.items(), *module._buffers.items())
    return (
        name,
        type(module),
        plain(module) or is_surrogate(module),
        *((key, None if tensor is None else tensor.shape) for key, tensor in tensors),
        *((k, _identity(v)) for k, v in module.__dict__.items() if k not in _OF_MODULES),
    )


def _identity(value):
    if isinstance(value, _VALUES):
        return value
    if isinstance(value, (list, tuple, set, frozenset)):
        return type(value), *map(_identity, value)
    if isinstance(value, dict):
        return type(value), *((_identity(k), _identity(v)) for k, v in value.items())
    return id(value)
