"""fuse and unfuse: a user's own model, computed by this package's ops.

layers.py       stock layers by class swap
norms.py        those that normalise
sites.py        what fused call sites decide at run time
tracing.py      a forward as a graph, or why not
patterns.py     patterns in the graph
containers.py   classes with a rewritten forward
"""

from __future__ import annotations

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from fastinterp.fusion.containers import fused_class, rewritten_forward
from fastinterp.fusion.layers import LAYERS, activation_kind, stock_type, why_not
from fastinterp.fusion.norms import NORMS
from fastinterp.fusion.report import Entry, FusionReport
from fastinterp.fusion.sites import FusedSequential, is_producer
from fastinterp.fusion.tracing import NotTraceable

__all__ = ["Entry", "FusionReport", "fuse", "stock_type", "unfuse"]

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)
_WITHOUT_OP = tuple(
    f"torch.nn.modules.{kind}"
    for kind in ("activation", "batchnorm", "conv", "instancenorm", "normalization", "pooling")
)


def fuse(model: nn.Module) -> nn.Module:
    """Makes a model's training with input gradients in the loss cheaper; changes it in place.

    Batch, layer and group norm, each with the addition and activation behind it, become one op with
    fused first and second derivatives, and convolutions, activations and poolings get ops with
    cheaper second derivatives. Linear layers stay: torch's double backward of them is as cheap.
    Layers are found by type; call sites in forwards that torch.fx traces, and in nn.Sequential.
    Every module keeps its identity, parameters, buffers, hooks, names and attributes; its class
    becomes a subclass of what it was. Results are those of before up to rounding.

    What a rewritten forward cannot see: changes, after fusing, of global variables or inside plain
    objects that the original read, and its prints. After a change of an attribute or of the list of
    children the original forward runs again, unfused; fuse once more to have it faster.

    Args:
        model: any nn.Module; not yet scripted, compiled or wrapped for parallel training.

    Returns:
        The same model, with ``model.fusion_report`` (a FusionReport): what was fused, what was left
        and why. Forward-mode derivatives and third-order gradients need ``unfuse``.

    Raises:
        TypeError: model is not an nn.Module, or a scripted one.
        ValueError: model is wrapped for parallel training, or compiled.
    """
    _check(model)
    unfuse(model)
    try:
        entries = _fused_everywhere(model)
    except BaseException:
        unfuse(model)
        raise
    model.fusion_report = FusionReport(tuple(entries))
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Gives every module of a fused model its own class back, in place; returns the model.

    Raises:
        TypeError: model is not an nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    for module in model.modules():
        module.__class__ = stock_type(module)
        if isinstance(module.__dict__.get("fusion_report"), FusionReport):
            del module.fusion_report
    return model


def _check(model) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model is scripted by torch.jit; fuse the nn.Module it was made from")
    if isinstance(model, _WRAPPERS):
        raise ValueError(f"fuse the model before wrapping it in {type(model).__name__}")
    if hasattr(model, "_orig_mod"):
        raise ValueError("fuse the model before torch.compile")


def _fused_everywhere(model: nn.Module) -> list[Entry]:
    entries, merged = [], set()
    modules = list(model.named_modules())
    for name, module in modules:
        found, children = _fused_call_sites(name, module)
        entries += found
        merged |= children
    for name, module in modules:
        kind = type(module)
        if kind in LAYERS:
            reason = why_not(module)
            if reason is None:
                fused, op = LAYERS[kind]
                module.__class__ = fused
                entry = Entry(name, kind.__name__, op)
            else:
                entry = Entry(name, kind.__name__, reason=reason)
            if module not in merged:
                entries.append(entry)
        elif kind.__module__ in _WITHOUT_OP:
            entries.append(Entry(name, kind.__name__, reason="there is no fused op for it"))
    every = model.named_modules(remove_duplicate=False)
    order = {name: i for i, (name, _) in enumerate(every)}
    return sorted(entries, key=lambda e: order[e.name])


def _fused_call_sites(name: str, module: nn.Module) -> tuple[list[Entry], set[nn.Module]]:
    """Gives a container a forward with fused call sites, where it has any."""
    kind = type(module)
    if isinstance(module, nn.Sequential) and kind.forward is nn.Sequential.forward:
        entries, merged = _sequential_sites(name, module)
        if not entries:
            return [], set()
        source = None
    else:
        if kind.__module__.split(".")[:2] == ["torch", "nn"] or kind in LAYERS:
            return [], set()
        try:
            _check_container(module)
            source, entries, merged = rewritten_forward(module, name)
        except NotTraceable as reason:
            return [Entry(name, kind.__name__, reason=str(reason))], set()
        if source is None:
            return [], set()
    try:
        module.__class__ = FusedSequential if kind is nn.Sequential else fused_class(kind, source)
    except Exception as error:
        reason = f"its class takes no subclass: {error}"
        return [Entry(name, kind.__name__, reason=reason)], set()
    return entries, merged


def _check_container(module: nn.Module) -> None:
    kind = type(module)
    if isinstance(module, (torch.jit.ScriptModule, fx.GraphModule, *_WRAPPERS)):
        raise NotTraceable(f"it is a {kind.__name__}")
    if "forward" in module.__dict__:
        raise NotTraceable("its forward was replaced on the instance")
    if kind.__call__ is not nn.Module.__call__:
        raise NotTraceable("its class has a __call__ of its own")
    if parametrize.is_parametrized(module):
        raise NotTraceable("it is parametrized")


def _sequential_sites(name: str, module: nn.Sequential) -> tuple[list[Entry], set[nn.Module]]:
    """What run_sequential merges, as long as no hooks are in the way."""
    entries, merged, producer = [], set(), False
    children = [(n, m) for n, m in module._modules.items() if type(m) is not nn.Identity]
    skip = False
    for i, (key, child) in enumerate(children):
        if skip:
            skip = False
            continue
        path = f"{name}.{key}" if name else key
        following = children[i + 1][1] if i + 1 < len(children) else None
        if stock_type(child) in NORMS and following is not None and activation_kind(following):
            what = f"{stock_type(child).__name__} + {stock_type(following).__name__}"
            entries.append(Entry(path, what, NORMS[stock_type(child)][1]))
            merged |= {child, following}
            skip, producer = True, False
            continue
        if producer and activation_kind(child) and getattr(child, "inplace", False):
            entries.append(Entry(path, stock_type(child).__name__, "activation"))
            merged.add(child)
        producer = is_producer(child)
    return entries, merged
