"""A module's own forward as a torch.fx graph, its children leaves, or the reason why there is none.

fx records what one run with placeholders does. Whatever else a forward may do is looked for here:
questions about the type of an argument, in-place operators, gradient or autocast modes, custom
autograd functions, random numbers, attributes that it stores, tensors of its own.
"""

from __future__ import annotations

import copy
import inspect
import random
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import fx, nn

from fastinterp.fusion import sites

# Who may ask for a placeholder's type without the forward depending on the answer.
_FX = ("torch.fx", "torch.utils._pytree", "torch.nn.parameter", "torch.nn.modules.module", __name__)


class NotTraceable(Exception):
    """Why a forward cannot be rewritten."""


class _Proxy(fx.Proxy):
    """Answers isinstance with the argument's assumed type, and records in-place operators."""

    @property
    def __class__(self):
        asker = sys._getframe(1).f_globals.get("__name__", "")
        return _Proxy if asker.startswith(_FX) else self.tracer.asked_type(self)


def _in_place(name):
    function = getattr(sites, name, None)

    def operator(self, other):
        if function is None:
            raise NotTraceable(f"its forward uses the in-place operator {name}")
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return operator


for _name in (
    *("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow"),
    *("iand", "ior", "ixor", "imatmul", "ilshift", "irshift"),
):
    setattr(_Proxy, f"__{_name}__", _in_place(_name))


def _modes():
    """What an operation's meaning depends on beside its arguments."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
        torch._C._autograd._top_saved_tensors_default_hooks(False),
        torch._C._len_torch_function_stack(),
    )


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, argument_type: type, is_leaf: Callable[[nn.Module], bool]):
        super().__init__()
        self.argument_type, self.type_was_asked, self.modes = argument_type, False, _modes()
        self.is_leaf = is_leaf

    def is_leaf_module(self, m, module_qualified_name):
        return self.is_leaf(m)

    def proxy(self, node):
        return _Proxy(node, self)

    def asked_type(self, proxy):
        if proxy.node.op != "placeholder":
            raise NotTraceable("its forward asks for the type of an intermediate value")
        self.type_was_asked = True
        return self.argument_type

    def create_node(self, *args, **kwargs):
        if _modes() != self.modes:
            raise NotTraceable(
                "its forward switches gradients, autocast or checkpointing inside itself"
            )
        return super().create_node(*args, **kwargs)


def _refuse_autograd_function(cls, *args, **kwargs):
    raise NotTraceable("its forward calls a custom autograd.Function")


@contextmanager
def _no_autograd_functions() -> Iterator[None]:
    """fx would record the operations of their forward and lose their backward."""
    stock = torch.autograd.Function.__dict__["apply"]
    torch.autograd.Function.apply = classmethod(_refuse_autograd_function)
    try:
        yield
    finally:
        torch.autograd.Function.apply = stock


def _same(a, b) -> bool:
    return a is b or (isinstance(a, (bool, int, float, str, type(None))) and a == b)


def _items(container) -> list:
    if isinstance(container, dict):
        return [part for item in container.items() for part in item]
    return sorted(container, key=id) if isinstance(container, set) else list(container)


class _Snapshot:
    """A module's attributes: whether they are still the same ones, and a way back."""

    _CONTAINERS = (list, dict, OrderedDict, set)

    def __init__(self, module: nn.Module):
        self.module, self.attributes = module, dict(module.__dict__)
        self.contents = {
            name: copy.copy(value)
            for name, value in self.attributes.items()
            if type(value) in self._CONTAINERS
        }
        self.tensors = {
            name: (value._version, value.detach().clone())
            for name, value in self.attributes.items()
            if isinstance(value, torch.Tensor) and not value.is_inference()
        }

    def changed(self) -> bool:
        now = self.module.__dict__
        return (
            now.keys() != self.attributes.keys()
            or not all(_same(value, now[name]) for name, value in self.attributes.items())
            or any(self.attributes[n]._version != v for n, (v, _) in self.tensors.items())
            or not all(
                len(now[name]) == len(content)
                and all(map(_same, _items(now[name]), _items(content)))
                for name, content in self.contents.items()
            )
        )

    def restore(self) -> None:
        self.module.__dict__.clear()
        self.module.__dict__.update(self.attributes)
        for name, content in self.contents.items():
            value = self.attributes[name]
            value.clear()
            (value.extend if isinstance(value, list) else value.update)(content)
        for name, (_, tensor) in self.tensors.items():
            with torch.no_grad():
                self.attributes[name].copy_(tensor)


def _random_states():
    return torch.get_rng_state(), random.getstate(), np.random.get_state()


@contextmanager
def _without_side_effects(module: nn.Module) -> Iterator[None]:
    """Raises NotTraceable, after undoing it, where the body changes attributes or draws numbers."""
    snapshots = [_Snapshot(m) for m in module.modules()]
    state, python, numpy = _random_states()
    try:
        yield
    finally:
        changed = [s for s in snapshots if s.changed()]
        for snapshot in changed:
            snapshot.restore()
        now, python_now, numpy_now = _random_states()
        drew = (
            state.numpy().tobytes() != now.numpy().tobytes()
            or python != python_now
            or numpy[2] != numpy_now[2]
            or not np.array_equal(numpy[1], numpy_now[1])
        )
        if drew:
            torch.set_rng_state(state)
            random.setstate(python)
            np.random.set_state(numpy)
    if changed:
        raise NotTraceable("its forward changes attributes of the module")
    if drew:
        raise NotTraceable("its forward draws random numbers")


@contextmanager
def _ambient(gradients: bool) -> Iterator[None]:
    """Gradients without autocast, or the reverse; a forward that switches either will show."""
    devices = ("cpu", "cuda")
    before = [torch.is_autocast_enabled(device) for device in devices]
    for device in devices:
        torch.set_autocast_enabled(device, not gradients)
    try:
        with torch.set_grad_enabled(gradients):
            yield
    finally:
        for device, enabled in zip(devices, before, strict=True):
            torch.set_autocast_enabled(device, enabled)


@contextmanager
def _training_flags(module: nn.Module, own: bool, children: bool) -> Iterator[None]:
    flags = [(m, m.training) for m in module.modules()]
    for m, _ in flags:
        m.__dict__["training"] = children
    module.__dict__["training"] = own
    try:
        yield
    finally:
        for m, flag in flags:
            m.__dict__["training"] = flag


def argument_names(module: nn.Module) -> list[str]:
    """The arguments of a module's forward.

    Raises:
        NotTraceable: some are optional or without a name.
    """
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    for p in parameters:
        if p.kind is not p.POSITIONAL_OR_KEYWORD or p.default is not p.empty:
            raise NotTraceable(f"its forward has an optional argument, {p}")
    if not parameters:
        raise NotTraceable("its forward takes no argument")
    return [p.name for p in parameters]


def trace(
    module: nn.Module,
    argument_type: type,
    training: bool,
    usual: bool,
    is_leaf: Callable[[nn.Module], bool] = lambda child: True,
) -> tuple[fx.Graph, bool]:
    """The graph of a forward for arguments of a type, and whether it asked for that type.

    ``usual``: the children's training flags are the module's own, and gradients are recorded
    without autocast; else the reverse of each. A forward may be rewritten when both agree. Modules
    that are no leaves become part of the graph.

    Nothing of the module or of the random states is changed afterwards.

    Raises:
        NotTraceable: with the reason.
    """
    tracer = None
    try:
        with (
            _ambient(gradients=usual),
            _training_flags(module, training, training is usual),
            _without_side_effects(module),
            _no_autograd_functions(),
        ):
            tracer = _Tracer(argument_type, is_leaf)
            graph = tracer.trace(module)
            own_tensors = [
                n.target
                for n in graph.nodes
                if n.op == "get_attr" and n.target.startswith("_tensor_constant")
            ]
            for name in own_tensors:
                module.__dict__.pop(name, None)
    except NotTraceable:
        raise
    except Exception as error:
        cause = str(error).strip().splitlines() or [type(error).__name__]
        raise NotTraceable(f"torch.fx does not trace its forward: {cause[0]}") from error
    if own_tensors:
        raise NotTraceable("its forward makes tensors of its own or reads plain tensor attributes")
    return graph, tracer.type_was_asked
