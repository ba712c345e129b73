"""Optimizers: Adam as the released code has it, and torch's fused ones."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

OPTIMIZERS = ("adam", "adamw", "sgd")


class EpsilonHatAdam(torch.optim.Adam):
    """Adam with TensorFlow 1's epsilon.

        lr_t = lr sqrt(1 - beta2^t) / (1 - beta1^t),   p -= lr_t m / (sqrt(v) + eps)

    which is torch's update with eps / sqrt(1 - beta2^t) in place of eps. Source: Kingma and Ba
    (2015), the remark after Algorithm 1.

    Args:
        params: parameters to update.
        lr: learning rate.
        eps: added to sqrt(v), not to its bias-corrected form.
    """

    def __init__(self, params, lr: float, betas=(0.9, 0.999), eps: float = 1e-8):
        super().__init__(params, lr=lr, betas=betas, eps=eps, fused=True)
        for group in self.param_groups:
            group["eps_hat"] = eps
            group["steps"] = 0

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["steps"] += 1
            group["eps"] = group["eps_hat"] / (1 - group["betas"][1] ** group["steps"]) ** 0.5
        return super().step(closure)


def create_optimizer(
    name: str, params: Iterable[nn.Parameter], *, lr: float, weight_decay: float, momentum: float
) -> torch.optim.Optimizer:
    """One of OPTIMIZERS.

    Args:
        name: "adam" (EpsilonHatAdam), "adamw" or "sgd".
        params: parameters to update.
        lr: of the first step.
        weight_decay: of adamw, decoupled, and of sgd; only of parameters with two or more
            dimensions, so not of biases and of norms.
        momentum: of sgd.
    """
    if name == "adam":
        return EpsilonHatAdam(params, lr=lr)
    params = list(params)
    groups = [
        {"params": [p for p in params if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in params if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, fused=True)
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, fused=True)
