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

    On a GPU nothing waits for the host and the count of steps is on the device, so that a step may
    be part of a CUDA graph; one whose ``lr`` is a tensor on the device follows its value. There, a
    step with ``found_inf``, a float tensor of shape () that gradient scalers and others may set,
    changes nothing where that is 1, as in torch's fused optimizers.

    Args:
        params: parameters to update.
        lr: learning rate; on a GPU also a tensor of shape ().
        eps: added to sqrt(v), not to its bias-corrected form.
    """

    def __init__(self, params, lr, betas=(0.9, 0.999), eps: float = 1e-8):
        super().__init__(params, lr=lr, betas=betas, eps=eps, fused=True)
        for group in self.param_groups:
            group["eps_hat"] = eps
            group["steps"] = 0

    @torch.no_grad()
    def step(self, closure=None):
        if any(p.device.type == "cuda" for group in self.param_groups for p in group["params"]):
            loss = None if closure is None else torch.enable_grad()(closure)()
            for group in self.param_groups:
                self._step_on_device(group)
            return loss
        for group in self.param_groups:
            group["steps"] += 1
            group["eps"] = group["eps_hat"] / (1 - group["betas"][1] ** group["steps"]) ** 0.5
        return super().step(closure)

    @torch.no_grad()
    def _step_on_device(self, group: dict) -> None:
        """The update with its scalars, steps and lr_t, in float64 on the device."""
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        device, (beta1, beta2) = params[0].device, group["betas"]
        if not isinstance(group["steps"], torch.Tensor) or group["steps"].device != device:
            group["steps"] = torch.as_tensor(group["steps"], dtype=torch.float64, device=device)
        for p in params:
            if not self.state[p]:
                self.state[p] = {
                    "step": torch.zeros((), device=device),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }
        states = [self.state[p] for p in params]
        m, v, counts = ([s[name] for s in states] for name in ("exp_avg", "exp_avg_sq", "step"))
        skipped = getattr(self, "found_inf", None)
        taken = 1 if skipped is None else 1 - skipped
        group["steps"] += taken
        torch._foreach_add_(counts, taken)
        t = group["steps"]
        lr = group["lr"] * torch.sqrt(1 - beta2**t) / (1 - beta1**t)
        torch._fused_adam_(
            *(params, [p.grad for p in params], m, v, []),
            # The corrections are in lr; of so many steps there are none.
            [torch.full((), 1e9, device=device)] * len(params),
            lr=lr.float(),
            beta1=beta1,
            beta2=beta2,
            weight_decay=0.0,
            eps=group["eps_hat"],
            amsgrad=False,
            maximize=False,
            found_inf=skipped,
        )


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
    params = list(params)
    if name == "adam":
        return EpsilonHatAdam(params, lr=lr)
    groups = [
        {"params": [p for p in params if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in params if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, fused=True)
    on_gpu = params[0].device.type == "cuda"
    optimizer = torch.optim.AdamW(groups, lr=lr, fused=True, capturable=on_gpu)
    optimizer._warned_capturable_if_run_uncaptured = True  # as steps before a capture are
    return optimizer


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate of the next step; on a GPU in a tensor there, which a CUDA graph reads."""
    for group in optimizer.param_groups:
        device = group["params"][0].device
        if device.type != "cuda":
            group["lr"] = lr
        elif isinstance(group["lr"], torch.Tensor) and group["lr"].device == device:
            group["lr"].fill_(lr)
        else:
            dtype = torch.float64 if isinstance(optimizer, EpsilonHatAdam) else torch.float32
            group["lr"] = torch.full((), lr, dtype=dtype, device=device)
