"""What an attack on a classifier raises, per example, and whether it has won.

With f the logits, t the true class, c the target and s the logits sorted downwards:

    loss    away from t                            towards c
    ce      -log softmax_t(f)                      log softmax_c(f)
    margin  max_{i != t} f_i - f_t                 f_c - max_{i != c} f_i
    dlr     (max_{i != t} f_i - f_t) / (s_1 - s_3)  (f_c - f_t) / (s_1 - (s_3 + s_4) / 2)

Sources: margin, Carlini and Wagner, "Towards Evaluating the Robustness of Neural Networks" (2017);
dlr, Croce and Hein, "Reliable evaluation of adversarial robustness ..." (2020).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

LOSSES = ("ce", "margin", "dlr")


def cross_entropy(logits, y, goal, targeted):
    loss = F.cross_entropy(logits, goal, reduction="none")
    return -loss if targeted else loss


def margin(
    logits: torch.Tensor, y: torch.Tensor, goal: torch.Tensor | None = None, targeted: bool = False
) -> torch.Tensor:
    """How far ahead of ``goal`` (default y) the best other class is, (N,); with ``targeted`` the
    negative of that. Above 0 the attack has won."""
    goal = y if goal is None else goal
    own = logits.gather(1, goal[:, None])[:, 0]
    others = logits.scatter(1, goal[:, None], -torch.inf).amax(1)
    return own - others if targeted else others - own


def dlr(logits, y, goal, targeted):
    ordered = logits.sort(1, descending=True).values
    if targeted:
        classes = torch.stack([y, goal], 1)
        true, wanted = logits.gather(1, classes).unbind(1)
        return (wanted - true) / (ordered[:, 0] - ordered[:, 2:4].mean(1) + 1e-12)
    return margin(logits, y) / (ordered[:, 0] - ordered[:, 2] + 1e-12)


_FUNCTIONS = {"ce": cross_entropy, "margin": margin, "dlr": dlr}
_CLASSES = {"ce": (1, 1), "margin": (2, 2), "dlr": (3, 4)}  # at least, for either form


def loss_function(name: str, classes: int, targeted: bool = False) -> Callable:
    """The function (logits (N, K), y (N,), goal (N,)) -> (N,) that an attack raises.

    ``goal`` is the class to leave (y) or, with ``targeted``, the one to reach.

    Raises:
        ValueError: unknown name, or fewer classes than it needs.
    """
    if name not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {name!r}")
    needed = _CLASSES[name][targeted]
    if classes < needed:
        raise ValueError(
            f"loss {name!r} needs a model of at least {needed} classes, this one has {classes}; "
            "use 'ce' or 'margin'"
        )
    function = _FUNCTIONS[name]
    return lambda logits, y, goal: function(logits, y, goal, targeted)


def beaten(logits: torch.Tensor, goal: torch.Tensor, targeted: bool = False) -> torch.Tensor:
    """Whether the predicted class is another than ``goal`` or, with ``targeted``, is it, (N,)."""
    predicted = logits.argmax(1)
    return predicted == goal if targeted else predicted != goal
