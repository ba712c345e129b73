"""Patterns in the graph of a forward, and the calls of sites.py that take their place.

    act(norm(x))   act(norm(x) + r)   act(r + norm(x))   in-place act   functional convolution, ...

An intermediate value must have no other user; modules that are nn.Identity are looked through.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

import torch
from torch import fx, nn
from torch.nn import functional as F

from fastinterp.fusion import layers, sites
from fastinterp.fusion.layers import activation_kind, stock_type
from fastinterp.fusion.norms import NORMS
from fastinterp.fusion.report import Entry

_RELU = ("relu", ("input", "inplace"))
_ACTIVATIONS = {  # call target -> name and arguments
    F.relu: _RELU,
    torch.relu: _RELU,
    "relu": _RELU,
    torch.relu_: _RELU,
    "relu_": _RELU,
    F.silu: ("silu", ("input", "inplace")),
    F.gelu: ("gelu", ("input", "approximate")),
    F.softplus: ("softplus", ("input", "beta", "threshold")),
    F.leaky_relu: ("leaky_relu", ("input", "negative_slope", "inplace")),
}
_IN_PLACE = (torch.relu_, "relu_")
_ALPHA = {"softplus": ("beta", 1.0), "leaky_relu": ("negative_slope", 0.01)}

_FUNCTIONS = {
    torch.conv2d: layers.conv2d,
    F.max_pool2d: layers.max_pool2d,
    torch.max_pool2d: layers.max_pool2d,
    F.avg_pool2d: layers.avg_pool2d,
    F.adaptive_avg_pool2d: layers.adaptive_avg_pool2d,
}
_ADDITIONS = {  # call target -> whether it is in place
    operator.add: False,
    torch.add: False,
    "add": False,
    sites.iadd: True,
    "add_": True,
}
_AFFINE = ("weight", "bias")
_NORM_FUNCTIONS = {  # -> the site, the arguments always given, the others
    F.batch_norm: (
        sites.batch_norm_act,
        ("input", "running_mean", "running_var"),
        (*_AFFINE, "training", "momentum", "eps"),
    ),
    F.layer_norm: (sites.layer_norm_act, ("input", "normalized_shape"), (*_AFFINE, "eps")),
    F.group_norm: (sites.group_norm_act, ("input", "num_groups"), (*_AFFINE, "eps")),
}
# Functions whose result is a new tensor.
_NEW = (operator.add, operator.sub, operator.mul, torch.add, torch.cat)
_NEW += (*_FUNCTIONS, *_NORM_FUNCTIONS)


@dataclass
class _Activation:
    node: fx.Node
    source: fx.Node
    kind: tuple[str, float | None]
    in_place: bool
    label: str


@dataclass
class _Match:
    """The norm, the identities behind it, the addition and the identities behind that."""

    norm: fx.Node
    before: list[fx.Node]
    addition: fx.Node | None = None
    residual: fx.Node | None = None
    added: str | None = None
    after: list[fx.Node] = field(default_factory=list)


class _Rewriter:
    def __init__(self, graph: fx.Graph, module: nn.Module, path: str):
        self.graph, self.module, self.path = graph, module, path
        self.entries: list[Entry] = []
        self.merged: set[nn.Module] = set()

    # ---- reading

    def child(self, node) -> nn.Module | None:
        """The module that a node calls with one argument and nothing else."""
        if not isinstance(node, fx.Node) or node.op != "call_module" or node.kwargs:
            return None
        if len(node.args) != 1 or not isinstance(node.args[0], fx.Node):
            return None
        return self.module.get_submodule(node.target)

    def activation(self, node) -> _Activation | None:
        if (child := self.child(node)) is not None:
            kind = activation_kind(child)
            in_place = getattr(child, "inplace", False)
            label = stock_type(child).__name__
            return kind and _Activation(node, node.args[0], kind, in_place, label)
        if node.op not in ("call_function", "call_method") or node.target not in _ACTIVATIONS:
            return None
        name, parameters = _ACTIVATIONS[node.target]
        given = dict(zip(parameters, node.args, strict=False)) | node.kwargs
        source = given.pop("input", None)
        if not isinstance(source, fx.Node) or any(isinstance(v, fx.Node) for v in given.values()):
            return None
        alpha = None
        if name in _ALPHA:
            argument, default = _ALPHA[name]
            alpha = float(given.get(argument, default))
            if alpha < 0 or (
                name == "softplus" and (alpha == 0 or given.get("threshold", 20) != 20)
            ):
                return None
        if given.get("approximate", "none") != "none":
            return None
        in_place = bool(given.get("inplace", False)) or node.target in _IN_PLACE
        return _Activation(node, source, (name, alpha), in_place, name)

    def behind_identities(self, node) -> tuple[fx.Node | None, list[fx.Node]]:
        """The value that identities, from ``node`` upwards, pass on; None if it has other users."""
        passed = []
        while isinstance(node, fx.Node) and len(node.users) == 1:
            if type(self.child(node)) is not nn.Identity:
                return node, passed[::-1]
            passed.append(node)
            node = node.args[0]
        return None, []

    def is_norm(self, node) -> bool:
        if (child := self.child(node)) is not None:
            return stock_type(child) in NORMS
        return node.op == "call_function" and node.target in _NORM_FUNCTIONS

    def match(self, activation: _Activation) -> _Match | None:
        node, after = self.behind_identities(activation.source)
        if node is None:
            return None
        if self.is_norm(node):
            return _Match(node, [], after=after)
        if node.op not in ("call_function", "call_method") or node.target not in _ADDITIONS:
            return None
        if len(node.args) != 2 or any(v != 1 for v in node.kwargs.values()):
            return None
        found = []
        for i in (0, 1):
            norm, before = self.behind_identities(node.args[i])
            residual, in_place = node.args[1 - i], _ADDITIONS[node.target]
            # A module, as the fused call comes later and keeps what it is given until then.
            if (
                norm is not None
                and norm.op == "call_module"
                and self.is_norm(norm)
                and isinstance(residual, fx.Node)
                and residual is not node.args[i]
                and (i == 0 or not in_place or self.is_fresh(residual))
                and self.may_wait(norm, node, activation.node)
            ):
                sign = "+=" if in_place else "+"
                words = ("norm", "residual") if i == 0 else ("residual", "norm")
                added = f"{words[0]} {sign} {words[1]}"
                found.append((norm, _Match(norm, before, node, residual, added, after)))
        order = {n: i for i, n in enumerate(self.graph.nodes)}
        return max(found, key=lambda pair: order[pair[0]])[1] if found else None

    def may_wait(self, norm: fx.Node, addition: fx.Node, until: fx.Node) -> bool:
        """Whether a norm may run later: its input and its statistics are left alone."""
        node = norm.next
        while node is not until:
            used = node is not addition and norm.args[0] in node.all_input_nodes
            if used or self.child(node) is self.child(norm):
                return False
            node = node.next
        return True

    def is_fresh(self, node: fx.Node) -> bool:
        """Whether a value is a new tensor that only its one user will ever see."""
        node, _ = self.behind_identities(node)
        if node is None:
            return False
        if (child := self.child(node)) is not None:
            return sites.is_producer(child)
        if node.target in (sites.iadd, "add_"):
            return self.is_fresh(node.args[0])
        return node.op == "call_function" and (node.target in _NEW or node.target in _SITES)

    # ---- writing

    def attribute(self, node: fx.Node) -> fx.Node:
        return self.graph.get_attr(node.target)

    def act_argument(self, activation: _Activation):
        if activation.node.op == "call_module":
            self.merged.add(self.child(activation.node))
            return self.attribute(activation.node)
        return activation.kind

    def replace(self, node: fx.Node, function, args, kwargs=None, dead=()) -> fx.Node:
        new = self.graph.call_function(function, tuple(args), kwargs or {})
        node.replace_all_uses_with(new)
        for old in (node, *dead):
            self.graph.erase_node(old)
        return new

    def note(self, what: str, fused_as: str, name: str = "") -> None:
        path = ".".join(part for part in (self.path, name) if part)
        self.entries.append(Entry(path, what, fused_as))

    def write_match(self, activation: _Activation, match: _Match) -> None:
        norm, parts = match.norm, [match.addition and "add", activation.label]
        with self.graph.inserting_before(activation.node):
            act = self.act_argument(activation)
            after = [self.attribute(n) for n in match.after]
            dead = [*match.after[::-1], match.addition, *match.before[::-1], norm]
            dead = [n for n in dead if n is not None]
            if norm.op == "call_module":
                child = self.child(norm)
                self.merged.add(child)
                kind, name = stock_type(child), norm.target
                label, op = kind.__name__, NORMS[kind][1]
                args = [self.attribute(norm), act, norm.args[0], match.residual, match.added]
                args += [tuple(self.attribute(n) for n in match.before), tuple(after)]
                self.replace(activation.node, sites.norm_act, args, dead=dead)
            else:
                label, name = norm.target.__name__, ""
                site, args, kwargs = self.norm_arguments(norm, act, after)
                self.replace(activation.node, site, args, kwargs, dead)
                op = site.__name__
        self.note(" + ".join([label, *filter(None, parts)]), op, name)

    def norm_arguments(self, norm: fx.Node, act, after):
        site, first, others = _NORM_FUNCTIONS[norm.target]
        given = dict(zip((*first, *others), norm.args, strict=False)) | norm.kwargs
        rest = {name: given[name] for name in others if name in given}
        return site, [act, *(given[n] for n in first)], {**rest, "after": tuple(after)}

    def write_activation(self, activation: _Activation) -> None:
        node, source = activation.node, activation.source
        is_module = node.op == "call_module"
        if activation.in_place:
            if not self.is_fresh(source):
                return
        elif is_module:
            return  # its class is changed
        with self.graph.inserting_before(node):
            if is_module:
                made_by, _ = self.behind_identities(source)
                producer = self.attribute(made_by) if self.child(made_by) is not None else None
                args = [self.act_argument(activation), source, producer]
                self.replace(node, sites.in_place_activation, args)
                self.note(activation.label, "activation", node.target)
            else:
                self.replace(node, layers.activate, [source, *activation.kind])
                self.note(f"{activation.label} function", "activation")

    def run(self) -> None:
        for node in list(self.graph.nodes):
            activation = self.activation(node)
            match = activation and self.match(activation)
            if match:
                self.write_match(activation, match)
        for node in list(self.graph.nodes):
            if activation := self.activation(node):
                self.write_activation(activation)
            elif node.op == "call_function" and node.target in _FUNCTIONS:
                node.target = _FUNCTIONS[node.target]
                self.note(f"{node.target.__name__} function", node.target.__name__)
            elif node.op == "call_function" and node.target in _NORM_FUNCTIONS:
                with self.graph.inserting_before(node):
                    site, args, kwargs = self.norm_arguments(node, None, ())
                    self.replace(node, site, args, kwargs)
                self.note(f"{node.target.__name__} function", site.__name__)


_SITES = (sites.norm_act, layers.activate, *_FUNCTIONS.values())
_SITES += tuple(site for site, *_ in _NORM_FUNCTIONS.values())


def rewrite(graph: fx.Graph, module: nn.Module, path: str) -> tuple[list[Entry], set[nn.Module]]:
    """Rewrites the graph of ``module``'s forward in place.

    Returns:
        What was fused, with names that begin with ``path``, and the child modules merged into it.
    """
    rewriter = _Rewriter(graph, module, path)
    rewriter.run()
    return rewriter.entries, rewriter.merged
