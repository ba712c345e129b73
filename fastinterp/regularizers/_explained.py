"""How a batch is explained, and how its explanation is compared with that of another.

Both kinds have ``clean(x)`` and ``moved(x')``, one pass of the model each, ``maps`` of such a pass,
``distance(clean, moved)`` per example, and ``attacked(clean)``: inside, a function z -> (a function
that gives the distance, logits) in evaluation mode and without parameter gradients. There ``clean``
is None where the model computes something else in its own mode. The function may have an attribute
``ascend``: Chain.ascend, but for x and the weights of what is raised.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import NamedTuple

import torch

from fastinterp import maps
from fastinterp._state import attack_parameters, eval_mode, substituted, uncounted
from fastinterp.attacks import attacked
from fastinterp.discrepancy import class_maps, class_weights, discrepancy, map_distance
from fastinterp.maps import CamNetwork
from fastinterp.maps._target import parse
from fastinterp.maps.grad_cam import explain_layer, mean_gradient, plus_plus
from fastinterp.maps.gradient import differentiate
from fastinterp.maps.integrated import along_path

_OF_LOGITS = ("input_gradient", "gradient_x_input", "integrated_gradients")
MAPS = ("cam", "grad_cam", "grad_cam_plus_plus", *_OF_LOGITS)


def named_map(name: str, options: dict):
    """The function (model, x, target) -> (maps, logits) of a name of MAPS but "cam", for any x."""

    def explain(model, x, target):
        classes = parse(target, x)
        if name in ("grad_cam", "grad_cam_plus_plus"):
            weights = mean_gradient if name == "grad_cam" else plus_plus
            return explain_layer(name, weights, model, x, classes, return_logits=True, **options)
        if name == "integrated_gradients":  # the logits of x are none of its points'
            return along_path(name, model, x, classes, **options), model(x)
        times_input = name == "gradient_x_input"
        return differentiate(
            name, model, x, classes, return_logits=True, times_input=times_input, **options
        )

    return explain


# The discrepancy of the released code.
RELEASED = dict(classes="weighted", norm="l1", normalize="none")


class Explained(NamedTuple):
    """What one pass of the model says about a batch, with its graph."""

    compared: torch.Tensor  # feature maps (N, C, h, w) for CAM, else maps (N, k, ...)
    logits: torch.Tensor  # (N, K)
    target: torch.Tensor | None = None  # classes (N, k) of the maps, where only they are compared


def surrogate(model, beta):
    return nullcontext() if beta is None else maps.softplus_surrogate(model, beta)


class ExplainedByCam:
    """By class activation maps, which are compared without being made, or made without features."""

    def __init__(self, how, softplus_beta, model, x, y):
        self._how, self._beta, self._x, self._y = how, softplus_beta, x, y
        self._network = CamNetwork(model, x)
        self._folded = self._network.folds()
        self._head = None if self._folded else self._network.head.weight

    def clean(self, x) -> Explained:
        with self._network.folded() if self._folded else nullcontext():
            return Explained(*self._network(x))

    moved = clean

    def maps(self, explained: Explained) -> torch.Tensor:
        return class_maps(explained.compared, self._head)

    def distance(self, clean: Explained, moved: Explained) -> torch.Tensor:
        return self._compare(clean.compared, moved.compared, self._head, moved.logits)

    def _compare(self, clean, features, head, logits):
        return discrepancy(clean, features, head, logits, self._y, **self._how)

    @contextmanager
    def attacked(self, clean: Explained | None) -> Iterator:
        network = self._network
        with surrogate(network.model, self._beta), network.attacked() as run:
            with torch.no_grad():
                if clean is None or self._beta is not None:
                    clean_features = run(self._x)[0]
                else:
                    clean_features = network.attacked_features(clean.compared, self._folded)

            def at(z):
                features, head, logits = run(z)
                return partial(self._compare, clean_features, features, head, logits), logits

            if self._how == RELEASED:
                at.ascend = partial(run.ascend, y=self._y, clean=clean_features)
            yield at


class ExplainedByMaps:
    """By any map: a name but "cam", or a function (model, x, target) -> (maps, logits)."""

    def __init__(self, how, softplus_beta, map, options, model, x, y):
        self._classes, self._norm = how["classes"], {k: how[k] for k in ("norm", "normalize")}
        self._explain = partial(map, **options) if callable(map) else named_map(map, options)
        self._model, self._beta = model, softplus_beta
        self._of_logits = map in _OF_LOGITS
        self._x, self._y = x, y

    def clean(self, x, model=None) -> Explained:
        # The predicted class of x', which "two" explains, is not known before x'.
        target = self._y[:, None] if self._classes == "one" else None
        return Explained(*self._explain(model or self._model, x, target))

    def moved(self, x, model=None) -> Explained:
        model = model or self._model
        if self._classes != "two":
            return self.clean(x, model)
        with torch.no_grad(), uncounted(model):
            predicted = model(x).argmax(1)
        target = torch.stack([self._y, predicted], 1)
        return Explained(*self._explain(model, x, target), target)

    def maps(self, explained: Explained) -> torch.Tensor:
        return explained.compared

    def distance(self, clean: Explained, moved: Explained) -> torch.Tensor:
        a, b, target = clean.compared, moved.compared, moved.target
        if target is not None:
            a = a.take_along_dim(target.view(*target.shape, *[1] * (a.dim() - 2)), 1)
        distance = map_distance(a, b, **self._norm)
        if self._classes == "two":
            return distance.mean(1)
        if self._classes == "one":
            return distance[:, 0]
        return (class_weights(self._classes, moved.logits, self._y) * distance).sum(1)

    @contextmanager
    def attacked(self, clean: Explained | None) -> Iterator:
        with surrogate(self._model, self._beta), self._attacked_model() as model:
            if clean is None or self._beta is not None:
                clean = self.clean(self._x, model)
            clean = Explained(*(t.detach() for t in clean[:2]))

            def at(z):
                moved = self.moved(z, model)
                return partial(self.distance, clean, moved), moved.logits

            yield at

    @contextmanager
    def _attacked_model(self) -> Iterator:
        if self._of_logits:
            with attacked(self._model, self._x) as model:
                yield model
        else:  # which may look for layers by name
            model = self._model
            with substituted(model, attack_parameters(model)), eval_mode(model):
                yield model
