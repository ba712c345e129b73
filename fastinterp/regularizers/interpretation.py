"""The paper's regularizer: worst-case discrepancy between the interpretation maps of x and x'."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from fastinterp._checks import check_attack, check_images, check_labels, values_unread
from fastinterp._state import depends_on_mode, uncounted
from fastinterp.attacks import attacked, maximise, random_start
from fastinterp.attacks.pgd import as_cross_entropy
from fastinterp.discrepancy import CLASSES, NORMALIZE, NORMS
from fastinterp.maps._call import borrowed
from fastinterp.regularizers._explained import (
    MAPS,
    ExplainedByCam,
    ExplainedByMaps,
    surrogate,
)
from fastinterp.regularizers._gradient import one_of

INNER = ("discrepancy", "ce", "ce+discrepancy")
COUNTED = ("x", "x_adv")


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
    the clean map computed once, and wants no weight gradients. It runs the model in evaluation
    mode, with running statistics as they were before the batch; x and x' then pass in the model's
    own mode, each as a batch of its own.

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
        self._beta = softplus_beta
        self._attack = dict(
            step_size=step_size, steps=steps, norm=norm, clip=clip, restarts=restarts
        )
        distance = dict(classes=classes, norm=map_norm, normalize=normalize)
        if map == "cam":
            if map_options:
                raise ValueError(f"map_options must be None for cam, got {map_options}")
            self._explained = partial(ExplainedByCam, distance, softplus_beta)
        else:
            self._explained = partial(
                ExplainedByMaps, distance, softplus_beta, map, map_options or {}
            )

    def forward(
        self,
        model: nn.Module,
        x: torch.Tensor,
        y: torch.Tensor,
        *,
        eps: float | torch.Tensor | None = None,
        start: torch.Tensor | None = None,
        attack_target: torch.Tensor | None = None,
        return_aux: bool = False,
        counts: str = "x",
        validate: bool = True,
    ) -> torch.Tensor | tuple[torch.Tensor, Aux]:
        """The regularizer's value on a batch.

        Args:
            model: images -> logits; for "cam" with global average pooling and a linear head. Its
                flags, buffers, gradients and hooks are left as they were, but see ``return_aux``.
            x: images (N, C, H, W) within ``clip``.
            y: true classes, int64 (N,).
            eps: radius for this call (a schedule), default the constructor's; a number or a tensor
                of shape () or (N,).
            start: perturbation to start from instead of a random one.
            attack_target: int64 (N,): the cross-entropy in ``inner`` is then that of these classes
                and is lowered instead of raised.
            return_aux: also return an Aux. Its logits take the place of ``model(x)``, so that pass
                counts as one: running statistics move once.
            counts: "x", or "x_adv" where it is the cross-entropy of ``logits_adv`` that is
                minimised: the pass over x' counts instead.
            validate: check the values of x and y, which on a GPU waits for the device.

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
        one_of("counts", counts, COUNTED)
        if attack_target is not None and self.inner == "discrepancy":
            raise ValueError('attack_target needs inner="ce" or "ce+discrepancy"')
        eps = self.eps if eps is None else eps
        check_attack(eps, self._attack["step_size"], self._attack["steps"])
        if validate:
            check_images(x, bounds=self.clip)
        if start is None and self.random_start:
            start = random_start(x, eps, self._attack["norm"])

        loan = borrowed(model, x, differentiable=True, counts=True)
        read = nullcontext() if validate else values_unread()
        with read, loan as model, uncounted(model) as counted:
            own = counted if return_aux else nullcontext
            explained = self._explained(model, x, y)

            def clean_pass():
                with own() if counts == "x" else nullcontext():
                    return explained.clean(x)

            # Of a model that depends on its mode the maximisation uses another clean pass, and this
            # one comes after, as it moves running statistics.
            clean = None if depends_on_mode(model) else clean_pass()
            with self._attacked(explained, clean, model, x, y) as at:
                unchecked = {"y": y, "attack_target": attack_target} if validate else {}

                def raised(z):
                    distance, logits = at(z)
                    while unchecked:
                        name, labels = unchecked.popitem()
                        if labels is not None:
                            check_labels(labels, len(x), logits.shape[1], name)
                    return self._raised(distance, logits, y, attack_target)

                if hasattr(at, "ascend") and attack_target is None:
                    raised.ascend = partial(at.ascend, **self._weights())
                x_adv = maximise(raised, x, eps=eps, start=start, **self._attack)
            clean = clean or clean_pass()
            with own() if counts == "x_adv" else nullcontext():
                moved = explained.moved(x_adv)
            value = explained.distance(clean, moved).mean()
            if not return_aux:
                return value
            maps = (explained.maps(each) for each in (clean, moved))
            return value, Aux(x_adv, clean.logits, moved.logits, *maps)

    def _weights(self) -> dict[str, float]:
        """Of what the maximisation raises."""
        return {
            "discrepancy": dict(ce_weight=0.0, discrepancy_weight=1.0),
            "ce": dict(ce_weight=1.0),
            "ce+discrepancy": dict(ce_weight=1.0, discrepancy_weight=self.inner_weight),
        }[self.inner]

    @contextmanager
    def _attacked(self, explained, clean, model, x, y) -> Iterator:
        """As ``explained.attacked``, but without explanations where nothing needs them."""
        if self.inner != "ce":
            with explained.attacked(clean) as at:
                yield at
        else:
            with surrogate(model, self._beta), attacked(model, x) as logits:
                yield as_cross_entropy(lambda z: (None, logits(z)), logits, y)

    def _raised(self, distance, logits, y, attack_target):
        """What the maximisation raises, per example; ``distance`` is a function that gives D."""
        if self.inner == "discrepancy":
            return distance()
        if attack_target is None:
            ce = F.cross_entropy(logits, y, reduction="none")
        else:
            ce = -F.cross_entropy(logits, attack_target, reduction="none")
        return ce if self.inner == "ce" else ce + self.inner_weight * distance()
