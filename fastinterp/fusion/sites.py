"""What a rewritten forward calls in place of several modules, decided anew at every call.

Modules with hooks, or replaced since by others, are called one after the other as before.
"""

from __future__ import annotations

import torch
from torch import nn

from fastinterp import ops
from fastinterp.fusion.layers import (
    activate,
    activation_kind,
    idle,
    plain,
    stock_type,
)
from fastinterp.fusion.norms import NORMS, normalise
from fastinterp.models._layers import SameConv2d

# Modules whose output is a new tensor, which nobody else holds.
_PRODUCERS = (
    *(nn.Conv2d, nn.ConvTranspose2d, SameConv2d, nn.Linear),
    *(nn.MaxPool2d, nn.AvgPool2d, *NORMS),
)


def is_producer(module: nn.Module) -> bool:
    return stock_type(module) in _PRODUCERS


def merged_kind(act) -> tuple[str, float | None] | None:
    """Name and alpha of an activation, a module or already such a pair, that may be merged."""
    if isinstance(act, tuple):
        return act
    return activation_kind(act) if plain(act) else None


def is_merged_norm(module: nn.Module) -> bool:
    return stock_type(module) in NORMS and plain(module)


def iadd(a, b):
    """a += b; a function, as fx would record the statement as a = a + b."""
    a += b
    return a


def isub(a, b):
    a -= b
    return a


def imul(a, b):
    a *= b
    return a


def itruediv(a, b):
    a /= b
    return a


def _added(y, residual, added):
    first, second = (residual, y) if added.startswith("residual") else (y, residual)
    return iadd(first, second) if "+=" in added else first + second


def _chain(y, residual, added, act, before, after):
    for module in before:
        y = module(y)
    if added is not None:
        y = _added(y, residual, added)
    for module in after:
        y = module(y)
    if act is None:
        return y
    return activate(y, *act) if isinstance(act, tuple) else act(y)


def norm_act(norm, act, x, residual=None, added=None, before=(), after=()):
    """act(after(before(norm(x)) + residual)), in one pass where nothing stands against it.

    Args:
        norm: a batch, layer or group norm module.
        act: an activation module, or its name and alpha.
        residual: like x, with ``added`` "norm + residual", "residual + norm" or either of
            them with "+=".
        before, after: modules that were nn.Identity when the forward was rewritten.
    """
    kind = merged_kind(act)
    fits = residual is None or (
        isinstance(residual, torch.Tensor)
        and residual.shape == x.shape
        and residual.dtype == x.dtype
    )
    if kind and fits and is_merged_norm(norm) and all(idle(m) for m in (*before, *after)):
        return normalise(norm, x, residual, *kind)
    return _chain(norm(x), residual, added, act, before, after)


def _functional(op, act, after, *arguments, **options):
    kind = ("identity", None) if act is None else merged_kind(act)
    merged = kind is not None and all(idle(m) for m in after)
    name, alpha = kind if merged else ("identity", None)
    y = op(*arguments, **options, activation=name, alpha=alpha)
    return y if merged else _chain(y, None, None, act, (), after)


def batch_norm_act(
    act,
    x,
    running_mean,
    running_var,
    weight=None,
    bias=None,
    training=False,
    momentum=0.1,
    eps=1e-5,
    after=(),
):
    """act(after(F.batch_norm(...))); ``act`` may be None, here and below."""
    arguments = x, weight, bias, running_mean, running_var
    options = dict(training=training, momentum=momentum, eps=eps)
    return _functional(ops.batch_norm_act, act, after, *arguments, **options)


def layer_norm_act(act, x, normalized_shape, weight=None, bias=None, eps=1e-5, after=()):
    """act(after(F.layer_norm(...)))"""
    arguments = x, normalized_shape, weight, bias
    return _functional(ops.layer_norm_act, act, after, *arguments, eps=eps)


def group_norm_act(act, x, num_groups, weight=None, bias=None, eps=1e-5, after=()):
    """act(after(F.group_norm(...)))"""
    return _functional(ops.group_norm_act, act, after, x, num_groups, weight, bias, eps=eps)


def in_place_activation(act, x, producer=None):
    """act(x) for an in-place ``act`` and an x that nobody else holds: not in place, as an op is.

    ``producer`` is the module that made x; with a hook on it, or replaced by another, somebody may
    hold x after all.
    """
    kind = merged_kind(act)
    if kind is None or not (producer is None or (is_producer(producer) and plain(producer))):
        return act(x)
    return activate(x, *kind)


def run_sequential(modules, x):
    """nn.Sequential's forward, merging norms with the activations that follow."""
    modules = [m for m in modules if not idle(m)]
    i, producer = 0, None
    while i < len(modules):
        module, step = modules[i], 1
        following = modules[i + 1] if i + 1 < len(modules) else None
        if following is not None and is_merged_norm(module) and activation_kind(following):
            x, step = norm_act(module, following, x), 2
        elif producer is not None and activation_kind(module):
            x = in_place_activation(module, x, producer)
        else:
            x = module(x)
        producer = module if step == 1 and is_producer(module) else None
        i += step
    return x


class FusedSequential(nn.Sequential):
    _stock_type = nn.Sequential

    def forward(self, input):
        return run_sequential(self, input)
