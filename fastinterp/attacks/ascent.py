"""Projected gradient ascent: the loop under every inner maximisation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from fastinterp._timing import timed
from fastinterp.ops.attack_step import attack_step, columns, per_example


def random_start(
    x: torch.Tensor,
    eps: float | torch.Tensor,
    norm: str = "Linf",
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """A random perturbation like x, uniform in the eps box (Linf) or in the eps ball (L2).

    Args:
        x: (N, ...).
        eps: radius, a number or a tensor of shape () or (N,).
        norm: "Linf" or "L2".
        generator: where random numbers come from, on any device; by default torch's global one.
    """
    noise = torch.empty_like(x, device=generator.device if generator else x.device)
    per_image = isinstance(eps, torch.Tensor)
    radius = columns(eps.to(x), x) if per_image else eps
    if norm == "Linf":
        if per_image:
            return radius * noise.uniform_(-1, 1, generator=generator).to(x.device)
        return noise.uniform_(-eps, eps, generator=generator).to(x.device)
    direction = noise.normal_(generator=generator).flatten(1)
    direction = nn.functional.normalize(direction, dim=1)
    share = torch.empty_like(direction[:, :1]).uniform_(generator=generator)
    inside = share ** (1 / direction.shape[1]) * direction
    return radius * inside.view_as(x).to(x.device)


@timed("attack")
def maximise(
    objective: Callable,
    x: torch.Tensor,
    *,
    eps: float | torch.Tensor,
    step_size: float | torch.Tensor,
    steps: int,
    final_step_size: float | None = None,
    norm: str = "Linf",
    clip: tuple[float, float] | None = (0.0, 1.0),
    start: torch.Tensor | None = None,
    restarts: int = 1,
    best: bool = False,
    early_stop: bool = False,
    generator: torch.Generator | None = None,
    step: Callable[..., torch.Tensor] = attack_step,
) -> torch.Tensor:
    """Projected gradient ascent on ``objective`` around x, by default its last iterate.

    Of several points each example keeps its worst: one where it is beaten before one where it is
    not, then the one of the largest value.

    Args:
        objective: maps a perturbed batch to one value per example, (N,), or to a pair of these and
            booleans (N,), whether the example is beaten there. Examples must not influence one
            another. With ``early_stop`` it gives the pair and is called (z, rows), rows int64
            being the examples that are left in z. An attribute ``ascend`` of it, called as
            ascend(x, eps=, step_size=, steps=, clip=, start=), is a whole ascent by kernels that
            know the objective; it gives the last iterate, or None where they do not do it.
        x: (N, ...), the centre.
        eps, step_size: in units of x; numbers, or tensors of shape () or (N,).
        steps: number of gradient steps.
        final_step_size: the step size falls linearly to this value; None keeps it.
        norm: "Linf" or "L2", for the step and the projection.
        clip: bounds of valid inputs, or None.
        start: perturbation added before the first step (then clipped); None starts at x.
        restarts: ascents in all; from the second on they start at a random point of the ball.
        best: choose among all iterates rather than the last ones, for one more forward pass.
        early_stop: an example is done as soon as it is beaten and leaves the batch, which on a
            GPU waits for the device at every step.
        generator: of the restarts' random numbers; by default torch's global one. The draws do not
            depend on which examples are left.
        step: moves the iterate in place; called as ops.attack_step.

    Returns:
        (N, ...), detached.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError("an attack needs gradients: call it outside torch.inference_mode()")
    if restarts < 1:
        raise ValueError(f"restarts must be at least 1, got {restarts}")
    plain = norm == "Linf" and final_step_size is None and step is attack_step
    if plain and restarts == 1 and not (best or early_stop) and hasattr(objective, "ascend"):
        z = objective.ascend(x, eps=eps, step_size=step_size, steps=steps, clip=clip, start=start)
        if z is not None:
            return z
    centre = x.detach()
    radii = per_example("eps", eps, centre)
    sizes = [per_example("step_size", step_size, centre)] * steps
    if final_step_size is not None:
        first, last = sizes[0], per_example("final_step_size", final_step_size, centre)
        sizes = [torch.lerp(first, last, k / max(steps - 1, 1)) for k in range(steps)]
    worst = _Worst(centre, early_stop) if best or early_stop or restarts > 1 else None
    ascend = partial(_ascend, objective, centre, radii, sizes, norm, clip, worst, best, step)
    z = ascend(start)
    for _ in range(restarts - 1):
        again = random_start(centre, eps, norm, generator)
        if early_stop and worst.beaten.all():
            break
        ascend(again)
    return z if worst is None else worst.x


class _Worst:
    """The worst point seen of each example, and which examples an ascent still has in hand."""

    def __init__(self, x: torch.Tensor, early_stop: bool):
        self.x, self.early_stop = x.clone(), early_stop
        self._value = torch.full((len(x),), -torch.inf, dtype=torch.float64, device=x.device)
        self.beaten = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self._index = torch.arange(len(x), device=x.device)

    def left(self) -> torch.Tensor | slice:
        """Rows that an ascent starts with."""
        return self._index[~self.beaten] if self.early_stop else slice(None)

    def offer(self, rows, z, value, won):
        value = value.double()
        won = torch.zeros_like(value, dtype=torch.bool) if won is None else won
        had, before = self.beaten[rows], self._value[rows]
        worse = (won & ~had) | ((won == had) & (value > before))
        self._value[rows] = torch.where(worse, value, before)
        self.beaten[rows] = had | won
        self.x[rows] = torch.where(columns(worse, z), z, self.x[rows])


def _ascend(objective, x, eps, sizes, norm, clip, worst, best, step, start):
    rows = slice(None) if worst is None else worst.left()
    early_stop = worst is not None and worst.early_stop

    def of(tensor, which):
        return tensor[which] if tensor.dim() else tensor

    def evaluate(z):
        value = objective(z, rows) if early_stop else objective(z)
        if not isinstance(value, tuple):
            value = value, None
        if early_stop and value[1] is None:
            raise TypeError("early_stop needs an objective that also says who is beaten")
        return value

    centre, eps = x[rows], of(eps, rows)
    z = centre.clone() if start is None else centre + start[rows]
    if start is not None and clip is not None:
        z.clamp_(*clip)
    for step_size in sizes:
        z.requires_grad_(True)
        with torch.enable_grad():
            value, won = evaluate(z)
            (grad,) = torch.autograd.grad(value.sum(), z)
        z = z.detach()
        if best or early_stop:
            # Without ``best`` only points that beat an example are of interest before the last.
            worst.offer(
                rows, z, value.detach() if best else torch.full_like(value, -torch.inf), won
            )
        if early_stop:
            going = ~won
            z, grad, centre, rows = z[going], grad[going], centre[going], rows[going]
            eps = of(eps, going)
            if len(z) == 0:
                return z
        step(
            z,
            grad,
            centre,
            eps=eps,
            step_size=of(step_size, rows),
            norm=norm,
            clip=clip,
            inplace=True,
        )
    if worst is not None:
        with torch.enable_grad():
            value, won = evaluate(z)
        worst.offer(rows, z, value.detach(), won)
    return z
