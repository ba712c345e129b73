"""A model's forward as one graph with what is affine in it multiplied out."""

from __future__ import annotations

import operator
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.utils import parametrize

from fastinterp._state import attack_parameters
from fastinterp.folding.chain import Chain, find_chain, mean_logits
from fastinterp.folding.parts import CONVOLUTIONS, cast, copied, fold_norm, times_head
from fastinterp.fusion import stock_type
from fastinterp.fusion.layers import FusedConv2d, plain
from fastinterp.fusion.sites import iadd
from fastinterp.fusion.tracing import NotTraceable, trace
from fastinterp.models._layers import SameConv2d

_BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
_IDLE = (nn.Identity, nn.Dropout, nn.Dropout2d)  # in evaluation mode
_NOT_OURS = (torch.jit.ScriptModule, fx.GraphModule)
_NOT_OURS += (nn.DataParallel, nn.parallel.DistributedDataParallel)
_ADDITIONS = {operator.add: False, torch.add: False, "add": False, iadd: True, "add_": True}


def enabled() -> bool:
    """What FASTINTERP_FOLD says.

    Raises:
        ValueError: it is neither on nor off.
    """
    value = os.environ.get("FASTINTERP_FOLD") or "on"
    if value not in ("on", "off"):
        raise ValueError(f"FASTINTERP_FOLD must be on or off, got {value!r}")
    return value == "on"


class AttackForm:
    """A model's forward as one graph, from which what an attack runs is made anew for each attack.

    The model itself, its flags and its parameters are not touched, nor is it kept alive.

    Args:
        model: images (N, C, H, W) -> logits (N, K).
        x: one image, of which the shapes inside the network are learnt.
        cam: its global average pooling and its head, known to be logits = head(flatten(pool(A))).

    Attributes:
        batch_norms: how many are folded into convolutions.
        tails: names of the convolutions that the head is folded into.
        last: the convolution whose output the head alone reads, so that it may be part of it in
            training; None where there is no such.

    Raises:
        NotTraceable: the reason why there is no such graph.
    """

    def __init__(
        self,
        model: nn.Module,
        x: torch.Tensor | None = None,
        cam: tuple[nn.Module, nn.Linear] | None = None,
    ):
        for module in model.modules():
            _check(module, surrogate=module is model)
        self._model = weakref.ref(model)
        with _stock_classes(model):
            self._graph, _ = trace(model, torch.Tensor, False, usual=True, is_leaf=_is_leaf)
        self._modules: dict[fx.Node, str] = {}  # where each leaf of the graph is in the model
        self._tensors: dict[fx.Node, str] = {}
        for node in self._graph.nodes:
            if node.op == "call_module":
                self._modules[node] = node.target
                node.target = f"leaf_{node.name}"
            elif node.op == "get_attr":
                self._tensors[node] = node.target
                node.target = f"tensor_{node.name}"
        self._norms: dict[fx.Node, str] = {}  # the batch norm behind a convolution
        self._folded: set[fx.Node] = set()  # convolutions that the head is folded into
        self._skips: set[fx.Node] = set()  # 1x1 convolutions that are the head
        self._head = ""
        self._drop_idle()
        self._fold_batch_norms()
        features = self._fold_head(x, *cam) if cam else None
        (output,) = (node for node in self._graph.nodes if node.op == "output")
        logits = output.args[0]
        output.args = ((features, logits),)
        folded = features in self._folded and logits.target is mean_logits
        self._chain = find_chain(features, self._module) if folded else []
        self._kind: fx.GraphModule | None = None  # without its parts; code is generated once

    @property
    def batch_norms(self) -> int:
        return len(self._norms)

    @property
    def tails(self) -> tuple[str, ...]:
        return tuple(self._modules[node] for node in self._graph.nodes if node in self._folded)

    @property
    def last(self) -> str | None:
        if len(self._folded) != 1 or self._skips or self._norms.keys() & self._folded:
            return None
        (name,) = self.tails
        return name if list(self._modules.values()).count(name) == 1 else None

    def fits(self) -> bool:
        """Whether it may stand for the model now: it is enabled, and the model has no hooks."""
        model = self._model()
        return enabled() and all(
            plain(module) or (module is model and is_surrogate(module))
            for module in model.modules()
        )

    @contextmanager
    def made(self) -> Iterator[nn.Module]:
        """Inside, a module z -> (features, logits) with the parameters that the model has now.

        features are the input of the global pooling, or the class maps where there are ``tails``,
        or None without ``cam``. A softplus_surrogate of the model holds for the module too.
        """
        parts = self._parts()
        module = _assembled(self._kind or self._module_of(parts), parts)
        if self._kind is None:
            self._kind = _assembled(module, {})
            self._graph.owning_module = None  # which would keep the parts
        forward = self._model().__dict__.get("forward")
        if forward is not None:
            module.__dict__["forward"] = forward.surrogate(module.forward)
        elif self._chain:
            bias = parts.get("tensor_head_bias")
            convolutions = [parts[link.convolution.target] for link in self._chain]
            for each in convolutions:  # which a graph of its passes may outlive
                if each.bias is not None:
                    each._parameters["bias"] = each.bias.clone()
            relus = [link.relu for link in self._chain]
            module = Chain(module, convolutions, relus, bias)
        yield module

    # ---- the graph

    def _module(self, node) -> nn.Module | None:
        """The module that a node calls with one argument and nothing else."""
        name = self._modules.get(node)
        if name is None or node.kwargs or len(node.args) != 1:
            return None
        return self._model().get_submodule(name)

    def _is_convolution(self, node) -> bool:
        module = self._module(node)
        return module is not None and stock_type(module) in CONVOLUTIONS

    def _remove(self, node: fx.Node, instead: fx.Node) -> None:
        node.replace_all_uses_with(instead)
        self._erase(node)

    def _erase(self, node: fx.Node) -> None:
        self._graph.erase_node(node)
        for places in (self._modules, self._tensors):
            places.pop(node, None)

    def _drop_idle(self) -> None:
        for node in list(self._graph.nodes):
            module = self._module(node)
            if module is not None and stock_type(module) in _IDLE:
                self._remove(node, node.args[0])

    def _fold_batch_norms(self) -> None:
        for node in list(self._graph.nodes):
            module = self._module(node)
            if (
                module is not None
                and stock_type(module) in _BATCH_NORMS
                and module.running_mean is not None
                and self._is_convolution(node.args[0])
                and len(node.args[0].users) == 1
            ):
                self._norms[node.args[0]] = self._modules[node]
                self._remove(node, node.args[0])

    def _fold_head(self, x, pool, head) -> fx.Node | None:
        """Gives the graph logits without ``head`` where that pays; returns the features."""
        pools, heads = ([n for n in self._modules if self._module(n) is m] for m in (pool, head))
        if len(pools) != 1 or len(heads) != 1:
            raise NotTraceable("its pooling or its head is called more than once")
        features, last = pools[0].args[0], heads[0]
        if self._pays(features, head) and not self._takes_head(features):
            with torch.no_grad():  # additions must not broadcast
                ShapeProp(self._module_of(self._parts())).propagate(x)
        if not self._pays(features, head):
            return features
        self._head = self._modules[last]
        maps = self._times_head(features)
        with self._graph.inserting_after(last):
            bias = None
            if head.bias is not None:
                bias = self._graph.create_node("get_attr", "tensor_head_bias")
                self._tensors[bias] = f"{self._head}.bias"
        with self._graph.inserting_after(bias or last):
            logits = self._graph.call_function(mean_logits, (maps, bias))
        last.replace_all_uses_with(logits)
        dead = [pools[0]]
        for node in dead:  # all that comes of the pooling led to the logits, and to nothing else
            dead += [user for user in node.users if user not in dead]
        order = {node: i for i, node in enumerate(self._graph.nodes)}
        for node in sorted(dead, key=order.__getitem__, reverse=True):
            self._erase(node)
        return maps

    def _pays(self, node: fx.Node, head: nn.Linear) -> bool:
        """Whether there is a convolution to fold into, with more channels than classes."""
        if self._takes_head(node):
            return self._module(node).out_channels > head.out_features
        return self._is_addition(node) and any(self._pays(a, head) for a in node.args)

    def _takes_head(self, node) -> bool:
        return (
            self._is_convolution(node) and self._module(node).groups == 1 and len(node.users) == 1
        )

    def _is_addition(self, node) -> bool:
        """Whether a node is a sum of two maps of its own shape that nothing else changes."""
        if node.op not in ("call_function", "call_method") or node.target not in _ADDITIONS:
            return False
        in_place = _ADDITIONS[node.target]
        return (
            not node.kwargs
            and len(node.args) == 2
            and len(node.users) == 1
            and all(isinstance(a, fx.Node) and _shape(a) == _shape(node) for a in node.args)
            and not (in_place and len(node.args[0].users) > 1)
        )

    def _times_head(self, node: fx.Node) -> fx.Node:
        """The node whose value is the head times that of ``node``."""
        if self._takes_head(node):
            self._folded.add(node)
            return node
        if self._is_addition(node):
            with self._graph.inserting_before(node):
                parts = tuple(self._times_head(a) for a in node.args)
                total = self._graph.call_function(operator.add, parts)
            self._remove(node, total)
            return total
        skip = self._graph.create_node("call_module", f"skip_{node.name}", (node,))
        self._skips.add(skip)
        return skip

    # ---- what runs

    @torch.no_grad()
    def _parts(self) -> dict[str, nn.Module | torch.Tensor]:
        """What the graph's nodes name, with the parameters of now."""
        model = self._model()
        tensors = attack_parameters(model)
        device = next(iter(tensors.values())).device.type if tensors else "cpu"
        parts: dict[str, nn.Module | torch.Tensor] = {}
        head = model.get_submodule(self._head).weight.detach() if self._head else None
        with torch.autocast(device, enabled=False):
            for node, name in self._modules.items():
                leaf = copied(model.get_submodule(name), name, tensors)
                if (norm := self._norms.get(node)) is not None:
                    own = {key: tensors.get(f"{norm}.{key}") for key in ("weight", "bias")}
                    fold_norm(leaf, model.get_submodule(norm), own)
                if node in self._folded:
                    leaf._parameters.update(times_head(leaf, head))
                    # Another kind of convolution would have other second derivatives.
                    kind = nn.Conv2d if type(leaf) is stock_type(leaf) else FusedConv2d
                parts[node.target] = leaf
            for node in self._skips:
                skip = kind(1, 1, 1, bias=False, device="meta").eval()
                skip._parameters["weight"] = head[:, :, None, None]
                parts[node.target] = skip
        if torch.is_autocast_enabled(device):
            cast(parts.values(), torch.get_autocast_dtype(device))
        buffers = dict(model.named_buffers(remove_duplicate=False))
        for node, name in self._tensors.items():
            parts[node.target] = tensors[name] if name in tensors else buffers[name]
        return parts

    def _module_of(self, parts) -> fx.GraphModule:
        return fx.GraphModule(parts, self._graph, type(self._model()).__name__)


def _assembled(kind: fx.GraphModule, parts: dict[str, nn.Module | torch.Tensor]) -> fx.GraphModule:
    """The graph module with other parts; attacks within one another each have their own."""
    module = object.__new__(type(kind))
    modules = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
    buffers = {name: part for name, part in parts.items() if name not in modules}
    module.__dict__.update(kind.__dict__, _modules=modules, _buffers=buffers)
    return module


def _check(module: nn.Module, surrogate: bool) -> None:
    """Raises NotTraceable where a module is more than its class's forward."""
    kind = type(module)
    if not (plain(module) or (surrogate and is_surrogate(module))):
        raise NotTraceable(f"a {kind.__name__} has hooks or a forward of its own")
    if isinstance(module, _NOT_OURS) or "_orig_mod" in module._modules:
        raise NotTraceable(f"it holds a {kind.__name__}")
    if kind.__call__ is not nn.Module.__call__ or module._compiled_call_impl is not None:
        raise NotTraceable(f"a {kind.__name__} is called in a way of its own")
    if parametrize.is_parametrized(module):
        raise NotTraceable(f"a {kind.__name__} is parametrized")


def is_surrogate(module: nn.Module) -> bool:
    """Whether nothing but softplus_surrogate stands between a call and the class's forward."""
    forward = module.__dict__.get("forward")
    original = getattr(forward, "without_surrogate", None)
    if getattr(original, "__func__", None) is not type(module).forward:
        return False
    del module.__dict__["forward"]
    try:
        return plain(module)
    finally:
        module.__dict__["forward"] = forward


def _is_leaf(module: nn.Module) -> bool:
    if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return False
    return type(module) is SameConv2d or type(module).__module__.startswith("torch.nn.")


@contextmanager
def _stock_classes(model: nn.Module) -> Iterator[None]:
    """A fused model as it was before, so that its forwards are seen as they are written."""
    fused = [(m, type(m)) for m in model.modules() if type(m) is not stock_type(m)]
    for module, _ in fused:
        module.__class__ = stock_type(module)
    try:
        yield
    finally:
        for module, kind in fused:
            module.__class__ = kind


def _shape(node: fx.Node):
    return getattr(node.meta.get("tensor_meta"), "shape", None)
