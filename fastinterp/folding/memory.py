"""What was found out about a model, kept for as long as the model stays as it is."""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Hashable, Iterator
from typing import TypeVar

from torch import nn

from fastinterp.folding.form import is_surrogate
from fastinterp.fusion.layers import plain

Found = TypeVar("Found")

KEPT = 8  # findings of one model, under the keys that were used last
_VALUES = (bool, int, float, complex, str, bytes, type(None))
_OF_MODULES = {*nn.Module().__dict__, "forward"}

_found: weakref.WeakKeyDictionary[nn.Module, dict] = weakref.WeakKeyDictionary()


def remembered(model: nn.Module, key: Hashable, find: Callable[[], Found]) -> Found:
    """``find()``, or what it gave for ``key`` when the model was as it is now.

    As it was means: the same modules in the same places, of the same classes with the same
    forwards, hooks and attributes; parameters and buffers of the same shapes, types and devices,
    shared in the same way. Their values and the flag ``training`` do not count. Of attributes that
    are objects their own attributes are compared too, but not those of these. What else a forward
    may depend on, as on a global variable, is not looked at.

    Args:
        model: not kept alive, and what ``find`` gives must not do so.
        key: what the finding depends on beside the model.
        find: an exception of it is not remembered.
    """
    description = list(_description(model))
    findings = _found.setdefault(model, {})
    known, value = findings.pop(key, (None, None))
    if known != description:
        value = find()
    findings[key] = description, value
    for oldest in list(findings)[:-KEPT]:
        del findings[oldest]
    return value


def _description(model: nn.Module) -> Iterator[tuple]:
    places: dict[int, int] = {}

    def place(shared) -> int:
        """The same for the same object, and for no other that is alive now."""
        return places.setdefault(id(shared), len(places))

    for name, module in model.named_modules(remove_duplicate=False):
        yield name, place(module), type(module), _Same(type(module).forward)
        yield (plain(module) or is_surrogate(module),)
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None:
                yield key, None
            else:
                yield key, place(tensor), tensor.shape, tensor.dtype, tensor.device
        for key, value in module.__dict__.items():
            if key not in _OF_MODULES:
                yield key, _identity(value)


def _identity(value, attributes: bool = True):
    if isinstance(value, _VALUES):
        return value
    if isinstance(value, (list, tuple, set, frozenset)):
        return type(value), *(_identity(each, attributes) for each in value)
    if isinstance(value, dict):
        return type(value), *(
            (_identity(k, attributes), _identity(v, attributes)) for k, v in value.items()
        )
    own = getattr(value, "__dict__", None)
    if not attributes or not isinstance(own, dict) or isinstance(value, (nn.Module, type)):
        return _Same(value)
    return _Same(value), *((k, _identity(v, False)) for k, v in own.items())


class _Same:
    """Equal to that of the very same object, and to none once the object is gone."""

    def __init__(self, value):
        # Of a bound method there is a new object whenever it is asked for.
        kind = weakref.WeakMethod if isinstance(value, types.MethodType) else weakref.ref
        try:
            self._get = kind(value)
        except TypeError:
            self._get = lambda: value

    def __eq__(self, other):
        if not isinstance(other, _Same):
            return NotImplemented
        mine, others = self._get(), other._get()
        if isinstance(mine, types.MethodType):
            return mine == others
        return mine is not None and mine is others

    __hash__ = None
