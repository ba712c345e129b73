"""What a step does with its batch: loss, gradients and the optimizer's update of the weights."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
from torch import nn

from fastinterp.graphs import GraphedStep
from fastinterp.training.config import TrainConfig


class Batch(NamedTuple):
    """What a step is taken with, and the random numbers' state before it."""

    step: int
    x: torch.Tensor
    y: torch.Tensor
    eps: float
    start: torch.Tensor | None
    order: torch.Tensor
    rng: dict

    @property
    def inputs(self) -> tuple:
        """Of an objective; on a GPU eps is a tensor, which a CUDA graph can follow."""
        eps = self.eps
        if self.x.device.type == "cuda" and eps > 0:
            eps = torch.full((), eps, dtype=torch.float64, device=self.x.device)
        return self.x, self.y, eps, self.start


class Update:
    """Gradients of a batch in the parameters, as the configuration has them.

    Args:
        config: accumulation, autocast and clipping.
        module: the objective, or a DistributedDataParallel around it.
        optimizer: of its parameters.
        device: where they are.
    """

    def __init__(self, config: TrainConfig, module: nn.Module, optimizer, device: torch.device):
        self.config, self.module, self.optimizer, self.device = config, module, optimizer, device

    def gradients(self, x, y, eps, start) -> dict[str, torch.Tensor]:
        """Replaces the gradients by those of the batch's mean loss, clipped.

        Returns:
            Detached scalars: the loss, its parts and the norm of the gradient before the clipping.
        """
        self.optimizer.zero_grad(set_to_none=True)
        return {**self.backward(x, y, eps, start), "grad_norm": self._clipped_norm()}

    def backward(self, x, y, eps, start) -> dict[str, torch.Tensor]:
        """Adds the gradients of the batch's mean loss to the parameters'; returns the loss."""
        parts, totals = self.config.accumulate, {}
        chunks = [None] * parts if start is None else start.chunk(parts)
        for i, (xi, yi, si) in enumerate(zip(x.chunk(parts), y.chunk(parts), chunks, strict=True)):
            with self._averaged_over_processes(last=i == parts - 1):
                with torch.autocast(
                    self.device.type, torch.bfloat16, enabled=self.config.amp == "bf16"
                ):
                    loss, logged = self.module(xi, yi, eps, si)
                if parts > 1:
                    loss, logged = loss / parts, {k: v / parts for k, v in logged.items()}
                loss.backward()
            for name, value in {"loss": loss.detach(), **logged}.items():
                totals[name] = totals[name] + value if name in totals else value
        return totals

    def _averaged_over_processes(self, last: bool):
        """Gradients of the parts before the last stay in their process."""
        if last or not hasattr(self.module, "no_sync"):
            return contextlib.nullcontext()
        return self.module.no_sync()

    def _clipped_norm(self) -> torch.Tensor:
        """Norm of the gradient, which is then scaled down to clip_grad_norm where it is larger."""
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
        if self.config.clip_grad_norm:
            nn.utils.clip_grads_with_norm_(parameters, self.config.clip_grad_norm, norm)
        return norm


class GraphedUpdate:
    """Updates replayed as a CUDA graph, at whose values the host looks from time to time only.

    The device looks at every one: from the first loss or gradient that is not finite on, no update
    changes the weights, and ``first_not_finite`` tells which it was. Where no graph can be made the
    same updates are launched one by one, with a warning that says why.

    Args:
        update: how gradients are made; its optimizer must heed ``found_inf``, as torch's fused ones
            and EpsilonHatAdam do.
    """

    def __init__(self, update: Update):
        self.update, device = update, update.device
        self._stopped = torch.zeros((), device=device)  # a float, as found_inf has to be
        self._taken = torch.zeros((), dtype=torch.int64, device=device)  # since the last look
        self._loss = torch.zeros((), device=device)  # of the step that stopped
        update.optimizer.found_inf = self._stopped
        self.graphed = GraphedStep(self._take)
        self._unseen: list[Batch] = []

    def __call__(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The update of a batch; what is returned is overwritten by the next."""
        self._unseen.append(batch)
        return self.graphed(*batch.inputs)

    def first_not_finite(self) -> tuple[Batch, float] | None:
        """Batch and loss of the update that stopped, if one did since the last call; waits."""
        unseen, self._unseen = self._unseen, []
        if not unseen or not self._stopped:
            self._taken.zero_()
            return None
        return unseen[int(self._taken)], float(self._loss)

    def _take(self, x, y, eps, start):
        values = self.update.gradients(x, y, eps, start)
        with torch.no_grad():
            going, loss = self._stopped == 0, values["loss"].float()
            self._loss.copy_(torch.where(going, loss, self._loss))
            going = going & torch.isfinite(loss + values["grad_norm"])
            self._stopped.copy_(~going)
            self._taken.add_(going)
        self.update.optimizer.step()
        return values
