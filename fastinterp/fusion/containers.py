"""Subclasses, made at run time, of containers whose forward was rewritten.

An instance is given such a class and gets its own back from ``unfuse``, or by itself as soon as an
attribute changes that the rewritten forward may have built on. Pickling stores the original class
and the source of the new forward.
"""

from __future__ import annotations

import contextlib
import copyreg
import functools
import hashlib
import linecache
import re

import torch
from torch import fx, nn
from torch.fx.graph_module import _format_import_block
from torch.package import sys_importer

from fastinterp.fusion.patterns import rewrite
from fastinterp.fusion.report import Entry
from fastinterp.fusion.sites import run_sequential
from fastinterp.fusion.tracing import NotTraceable, argument_names, trace


def fused_class(original: type, source: str | None) -> type:
    """The subclass of ``original`` with the forward of ``source``; None is nn.Sequential's."""
    return _fused_class(original, source)


@functools.cache
def _fused_class(original: type, source: str | None) -> type:
    names = {"forward": _sequential_forward, "READS": ()}
    if source is not None:
        names = _compiled(original, source)
    forward, reads = names["forward"], names["READS"]

    def __init__(self, *args, **kwargs):  # a new instance may be wired in another way
        self.__class__ = original
        self.__init__(*args, **kwargs)

    def __reduce_ex__(self, protocol):
        made = original.__reduce_ex__(self, max(protocol, 2))
        function, arguments, *rest = made
        if function is not copyreg.__newobj__:
            return made
        return (_rebuilt, (original, source, *arguments[1:]), *rest)

    def __setattr__(self, name, value):
        if name in reads and not _as_good(getattr(self, name, None), value):
            self.__class__ = original
        original.__setattr__(self, name, value)

    def __delattr__(self, name):
        if name in reads:
            self.__class__ = original
        original.__delattr__(self, name)

    body = {
        "forward": forward,
        "_stock_type": original,
        "__module__": original.__module__,
        "__doc__": original.__doc__,
        "__init__": __init__,
        "__reduce_ex__": __reduce_ex__,
        "__setattr__": __setattr__,
        "__delattr__": __delattr__,
    }
    return type(original)(f"Fused{original.__name__}", (original,), body)


def _rebuilt(original: type, source: str | None, *args):
    cls = fused_class(original, source)
    return cls.__new__(cls, *args)


def _sequential_forward(self, input):
    return run_sequential(self, input)


def _as_good(old, new) -> bool:
    """Whether a rewritten forward, which finds modules and tensors by name, may use the new one."""
    return any(isinstance(old, t) and isinstance(new, t) for t in (nn.Module, torch.Tensor))


def _may_read(module: nn.Module) -> list[str]:
    """Attributes whose values the trace of a forward may have built on."""
    own = module.__dict__.keys() - nn.Module().__dict__.keys()
    return sorted({*own, *module._parameters, *module._buffers, *module._modules})


# ---- source


def _compiled(original: type, source: str):
    digest = hashlib.sha256(source.encode()).hexdigest()[:12]
    file = f"<fastinterp {original.__module__}.{original.__qualname__} {digest}>"
    linecache.cache[file] = (len(source), None, source.splitlines(True), file)
    # Without a __name__, by which torch.compile would look for these names in a module.
    names = {"_original": original}
    exec(compile(source, file, "exec"), names)
    return names


def _function(graph: fx.Graph) -> tuple[str, dict]:
    """Source of a function ``forward`` that computes the graph, and the names it uses."""
    for node in graph.nodes:
        node.type = None  # annotations would need imports of their own
    code = graph.python_code("self")
    source = code.src.strip() + "\n"
    used = {k: v for k, v in code.globals.items() if re.search(rf"\b{re.escape(k)}\b", source)}
    return source, used


def _structure(module: nn.Module, graph: fx.Graph) -> list[str]:
    """Conditions under which the children are still those that the forward was traced with."""
    holders = {""}
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            parts = node.target.split(".")
            holders.update(".".join(parts[:i]) for i in range(1, len(parts)))
    conditions = []
    for holder in sorted(holders):
        parts = holder.split(".") if holder else []
        keys = tuple(module.get_submodule(holder)._modules)
        where = "self" + "".join(f"._modules[{part!r}]" for part in parts)
        conditions.append(f"tuple({where}._modules) == {keys!r}")
    return conditions


class _Source:
    """The functions that a rewritten forward chooses from, as they are found."""

    def __init__(self, module: nn.Module, path: str):
        self.module, self.path = module, path
        self.names = argument_names(module)
        self.functions: dict[str, str] = {}  # source -> name
        self.used, self.conditions, self.choices = {"Tensor": torch.Tensor}, set(), []
        self.entries, self.merged, self.asked = [], set(), False

    def add(self, argument_type: type) -> None:
        """The functions for arguments of a type, in training and in evaluation."""
        traced = [
            (*trace(self.module, argument_type, training, usual), training)
            for training in (True, False)
            for usual in (True, False)
        ]
        calls = []
        for graph, asked, training in traced:
            self.asked = self.asked or asked
            self.conditions.update(_structure(self.module, graph))
            entries, merged = rewrite(graph, self.module, self.path)
            source, used = _function(graph)
            self.used |= used
            calls.append(self.functions.setdefault(source, f"_forward_{len(self.functions)}"))
            if training and not self.entries:
                self.entries, self.merged = entries, merged
        training, training_else, evaluation, evaluation_else = calls
        if training != training_else or evaluation != evaluation_else:
            raise NotTraceable(
                "its forward depends on the training flag of a child, on autocast or on whether "
                "gradients are recorded"
            )
        if training != evaluation:
            training = f"({training} if self.training else {evaluation})"
        check = " and ".join(f"isinstance({n}, {argument_type.__name__})" for n in self.names)
        self.choices.append(f"        if {check}:")
        self.choices.append(f"            return {training}(self, {', '.join(self.names)})")

    def text(self) -> str:
        arguments = ", ".join(["self", *self.names])
        return "\n".join(
            [
                _format_import_block(self.used, sys_importer),
                f"READS = {tuple(_may_read(self.module))!r}\n",
                *(s.replace("def forward(", f"def {n}(", 1) for s, n in self.functions.items()),
                f"def forward({arguments}):",
                f"    if {' and '.join(sorted(self.conditions))}:",
                *self.choices,
                f"    return _original.forward({arguments})\n",
            ]
        )


def rewritten_forward(
    module: nn.Module, path: str
) -> tuple[str | None, list[Entry], set[nn.Module]]:
    """Source of a forward with fused call sites, or None where there is nothing to fuse.

    Returns:
        The source, what was fused, and the child modules merged into call sites.

    Raises:
        NotTraceable: why it cannot be rewritten.
    """
    source = _Source(module, path)
    source.add(torch.Tensor)
    if source.asked and len(source.names) == 1:
        with contextlib.suppress(NotTraceable):  # then a list goes the original way
            source.add(list)
    return (source.text() if source.entries else None), source.entries, source.merged
