"""Training objectives, by the paper's names.

    method   minimised            maximised over x'
    normal   CE(x)                -
    adv      CE(x')               CE(x')
    int      CE(x) + gamma D      D

Source: Boopathy et al. (ICML 2020); adv: Madry et al. (2018).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from fastinterp.attacks import pgd
from fastinterp.maps import CamNetwork, find_cam_network
from fastinterp.regularizers import InterpretationRegularizer


class Objective(nn.Module):
    """The loss of one batch; what a distributed wrapper would wrap.

    Args:
        model: images (N, C, H, W) in [0,1] -> logits (N, K).
        step_size, steps: of the inner maximisation, in units of x.
        gamma: weight of the discrepancy.
    """

    def __init__(self, model: nn.Module, *, step_size: float, steps: int, gamma: float = 0.01):
        super().__init__()
        self.model, self.step_size, self.steps, self.gamma = model, step_size, steps, gamma
        self._network: CamNetwork | None = None  # made once: a loop's model stays what it is

    def forward(
        self, x: torch.Tensor, y: torch.Tensor, eps: float, start: torch.Tensor | None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss and its parts for one batch.

        Args:
            x: images (N, C, H, W) in [0,1].
            y: int64 (N,).
            eps: radius at this step of the schedule; at 0 there is nothing to maximise.
            start: the random start, like x, or None when eps is 0.

        Returns:
            The scalar to minimise and detached scalars to log.
        """
        raise NotImplementedError


class Normal(Objective):
    def forward(self, x, y, eps, start):
        loss = F.cross_entropy(self.model(x), y)
        return loss, {}


class Adv(Objective):
    def forward(self, x, y, eps, start):
        if eps > 0:
            if self._network is None:
                self._network = find_cam_network(self.model, x)
            x = pgd(
                self.model,
                x,
                y,
                eps=eps,
                step_size=self.step_size,
                steps=self.steps,
                start=start,
                network=self._network,
            )
        return F.cross_entropy(self.model(x), y), {}


class Int(Objective):
    def __init__(self, model, *, step_size, steps, gamma=0.01):
        super().__init__(model, step_size=step_size, steps=steps, gamma=gamma)
        self.regularizer = InterpretationRegularizer(
            "cam", classes="weighted", eps=0.0, step_size=step_size, steps=steps
        )

    def forward(self, x, y, eps, start):
        if eps == 0:
            ce = F.cross_entropy(self.model(x), y)
            return ce, {"ce": ce.detach(), "discrepancy": torch.zeros_like(ce)}
        if self._network is None:
            self._network = CamNetwork(self.model, x)
        value, aux = self.regularizer(
            self.model,
            x,
            y,
            eps=eps,
            start=start,
            return_aux=True,
            validate=False,
            network=self._network,
        )
        ce = F.cross_entropy(aux.logits, y)
        return ce + self.gamma * value, {"ce": ce.detach(), "discrepancy": value.detach()}


METHODS: dict[str, type[Objective]] = {"normal": Normal, "adv": Adv, "int": Int}
