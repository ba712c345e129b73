"""The paper's regularizer: worst-case discrepancy between the interpretation maps of x and x'."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from fastinterp._checks import check_attack, check_images, check_labels
from fastinterp._state import cloned_buffers, substituted
from fastinterp.attacks import maximise, random_start
from fastinterp.discrepancy import CLASSES, NORMALIZE, NORMS
from fastinterp.maps import CamNetwork
from fastinterp.regularizers._explained import MAPS, ExplainedByCam, ExplainedByMaps, named_map
from fastinterp.regularizers._gradient import one_of

INNER = ("discrepancy", "ce", "ce+discrepancy")


class Aux(NamedTuple):
    """What the regularizer computed on the way, so that nobody pays for it twice."""

    x_adv: torch.Tensor  # (N, C, H, W), detached
    logits: torch.Tensor  # (N, K) of x, with graph
    logits_adv: torch.Tensor  # (N, K) of x', with graph
    maps: torch.Tensor  # of x, with graph: (N, K, h, w), or (N, k, C, H, W) for input gradients
    maps_adv: torch.Tensor  # of x'


class InterpretationRegularizer(nn.Module):
    """Worst-case discrepancy between the interpretation maps of x and x + delta.

        R = mean_n D(x_n, x_n + delta*),   delta* = argmax over ||delta|| <= eps of ``inner``

    The maximisation starts at a random point (at x itself the gradient of D is exactly zero), uses
    the clean map computed once, and wants no weight gradients.

    Args:
        map: "cam" (the paper's, and by far the cheapest), "grad_cam", "grad_cam_plus_plus",
            "input_gradient", "gradient_x_input", "integrated_gradients", or any function
            (model, x, target) -> (maps, logits) with a graph, ``target`` as in fastinterp.maps.
            For the gradient maps each attack step is a double backward pass, and all classes but
            "one" cost a backward pass per class. The input gradient of a logit of a ReLU network
            is constant almost everywhere: give ``softplus_beta``.
        classes: "weighted" (the paper's training form), "all", "two" or "one"; see
            fastinterp.discrepancy.
        eps, step_size: radius and step in units of x, images in [0,1].
        steps: steps of the inner maximisation.
        norm: "Linf" or "L2" ball.
        map_norm: "l1", "l2", "squared_l2", "cosine" or "pearson" distance between maps.
        normalize: "none" or "pixels".
        inner: what the maximisation raises: "discrepancy" D (Int), "ce" the cross-entropy (Int2),
            or "ce+discrepancy", CE + inner_weight D (Int-Adv).
        inner_weight: of D in "ce+discrepancy"; the paper's gamma.
        clip: bounds of valid images, or None.
        random_start: start at a random point of the ball.
        restarts: ascents in all; each example keeps the worst point found.
        softplus_beta: where given, ReLUs are softplus(beta) during the maximisation.
        map_options: further keyword arguments of the map, e.g. ``dict(steps=10)``.

    Source: Boopathy et al. (ICML 2020), the Int, Int-Adv and Int2 objectives.

    Example:
        >>> reg = InterpretationRegularizer("cam", eps=8 / 255, steps=10, step_size=2 / 255)
        >>> value, aux = reg(model, x, y, return_aux=True)
        >>> loss = F.cross_entropy(aux.logits, y) + 0.01 * value
    """

    def __init__(
        self,
        map: str | Callable = "cam",
        *,
        classes: str = "weighted",
        eps: float,
        step_size: float,
        steps: int,
        norm: str = "Linf",
        map_norm: str = "l1",
        normalize: str = "none",
        inner: str = "discrepancy",
        inner_weight: float = 0.01,
        clip: tuple[float, float] | None = (0.0, 1.0),
        random_start: bool = True,
        restarts: int = 1,
        softplus_beta: float | None = None,
        map_options: dict | None = None,
    ):
        super().__init__()
        for name, value, allowed in (
            ("classes", classes, CLASSES),
            ("norm", norm, ("Linf", "L2")),
            ("map_norm", map_norm, NORMS),
            ("normalize", normalize, NORMALIZE),
            ("inner", inner, INNER),
        ):
            one_of(name, value, allowed)
        if not callable(map):
            one_of("map", map, MAPS)
        check_attack(eps, step_size, steps)
        if restarts < 1:
            raise ValueError(f"restarts must be at least 1, got {restarts}")
        if not inner_weight >= 0:
            raise ValueError(f"inner_weight must be >= 0, got {inner_weight}")
        self.map, self.inner, self.inner_weight = map, inner, inner_weight
        self.eps, self.clip, self.random_start = eps, clip, random_start
        self._attack = dict(
            step_size=step_size, steps=steps, norm=norm, clip=clip, restarts=restarts
        )
        distance = dict(classes=classes, norm=map_norm, normalize=normalize)
        if map == "cam":
            if map_options:
                raise ValueError(f"map_options must be None for cam, got {map_options}")
            self._explained = partial(ExplainedByCam, distance, softplus_beta)
        else:
            options = map_options or {}
            explain = partial(map, **options) if callable(map) else named_map(map, options)
            self._explained = partial(ExplainedByMaps, distance, softplus_beta, explain)

    def forward(
        self,
        model: nn.Module,
        x: torch.Tensor,
        y: torch.Tensor,
        *,
        eps: float | None = None,
        start: torch.Tensor | None = None,
        attack_target: torch.Tensor | None = None,
        return_aux: bool = False,
        validate: bool = True,
        network: CamNetwork | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Aux]:
        """The regularizer's value on a batch.

        Args:
            model: images -> logits; for "cam" with global average pooling and a linear head. Its
                flags, buffers, gradients and hooks are left as they were.
            x: images (N, C, H, W) within ``clip``.
            y: true classes, int64 (N,).
            eps: radius for this call (a schedule), default the constructor's.
            start: perturbation to start from instead of a random one.
            attack_target: int64 (N,): the cross-entropy in ``inner`` is then that of these classes
                and is lowered instead of raised.
            return_aux: also return an Aux.
            validate: check x and y, which on a GPU waits for the device.
            network: CamNetwork of ``model``, for a loop that knows the model does not change; by
                default it is made anew, which costs a forward pass of one image.

        Returns:
            A scalar, differentiable once to the parameters; with return_aux, (scalar, Aux).

        Raises:
            RuntimeError: gradients are disabled.
            TypeError, ValueError: x or y is out of range, or the model has no GAP + linear head.
        """
        if not torch.is_grad_enabled():
            raise RuntimeError(
                "InterpretationRegularizer needs gradients for its inner maximisation: call it "
                "outside torch.no_grad() and torch.inference_mode()"
            )
        if attack_target is not None and self.inner == "discrepancy":
            raise ValueError('attack_target needs inner="ce" or "ce+discrepancy"')
        eps = self.eps if eps is None else eps
        check_attack(eps, self._attack["step_size"], self._attack["steps"])
        if validate:
            check_images(x, bounds=self.clip)
        if start is None and self.random_start:
            start = random_start(x, eps, self._attack["norm"])

        with substituted(model, cloned_buffers(model)):
            explained = self._explained(model, x, y, network)
            if validate:
                for name, labels in (("y", y), ("attack_target", attack_target)):
                    if labels is not None:
                        check_labels(labels, len(x), explained.classes, name)
            with explained.attacked() as at:
                x_adv = maximise(
                    lambda z: self._raised(*at(z), y, attack_target),
                    x,
                    eps=eps,
                    start=start,
                    **self._attack,
                )
            value, logits_adv, maps_adv = explained.distance(x_adv)
        value = value.mean()
        if return_aux:
            return value, Aux(x_adv, explained.logits, logits_adv, explained.maps(), maps_adv())
        return value

    def _raised(self, discrepancy, logits, y, attack_target):
        """What the maximisation raises, per example; ``discrepancy`` is a function without one."""
        if self.inner == "discrepancy":
            return discrepancy()
        if attack_target is None:
            ce = F.cross_entropy(logits, y, reduction="none")
        else:
            ce = -F.cross_entropy(logits, attack_target, reduction="none")
        return ce if self.inner == "ce" else ce + self.inner_weight * discrepancy()
