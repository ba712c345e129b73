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

import torch
from torch import nn

from fastinterp.folding.chain import Chain
from fastinterp.folding.form import AttackForm, enabled
from fastinterp.folding.memory import remembered
from fastinterp.folding.parts import times_head
from fastinterp.fusion.tracing import NotTraceable

__all__ = [
    "AttackForm",
    "Chain",
    "enabled",
    "find_attack_form",
    "make_attack_form",
    "remembered",
    "times_head",
]


def find_attack_form(model: nn.Module) -> AttackForm | None:
    """The model's AttackForm without a head folded in, made once; None as of make_attack_form."""
    return remembered(model, ("attack form", enabled()), lambda: make_attack_form(model))


def make_attack_form(
    model: nn.Module,
    x: torch.Tensor | None = None,
    cam: tuple[nn.Module, nn.Linear] | None = None,
) -> AttackForm | None:
    """AttackForm(...); None where torch.fx cannot trace the model or FASTINTERP_FOLD is off."""
    if not enabled():
        return None
    try:
        return AttackForm(model, x, cam)
    except NotTraceable:
        return None
