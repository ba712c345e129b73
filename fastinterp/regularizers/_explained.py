"""A batch and its clean maps, to be compared with the maps of perturbed batches.

Both kinds have ``classes`` (K), ``logits`` of x with graph, ``maps()`` of x, ``distance(x')`` -> (D
per example, logits of x', a function that gives the maps of x'), and ``attacked()``: inside, a
function z -> (a function that gives D per example, logits), without parameter gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch

from fastinterp import maps
from fastinterp._state import attack_parameters, depends_on_mode, eval_mode, substituted
from fastinterp.discrepancy import class_maps, class_weights, discrepancy, map_distance
from fastinterp.maps import CamNetwork
from fastinterp.maps._target import parse
from fastinterp.maps.grad_cam import explain_layer, mean_gradient, plus_plus
from fastinterp.maps.gradient import differentiate
from fastinterp.maps.integrated import along_path

MAPS = (
    *("cam", "grad_cam", "grad_cam_plus_plus"),
    *("input_gradient", "gradient_x_input", "integrated_gradients"),
)


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


def _surrogate(model, beta):
    return nullcontext() if beta is None else maps.softplus_surrogate(model, beta)


class ExplainedByCam:
    """By class activation maps, which are compared without being made."""

    def __init__(self, how, softplus_beta, model, x, y, network: CamNetwork | None):
        self._how, self._beta, self._x, self._y = how, softplus_beta, x, y
        self._network = CamNetwork(model, x) if network is None else network
        self.classes = self._network.head.out_features
        self._features, self.logits = self._network(x)

    def maps(self) -> torch.Tensor:
        return class_maps(self._features, self._network.head.weight)

    def distance(self, x_adv):
        features, logits = self._network(x_adv)
        head = self._network.head.weight
        value = discrepancy(self._features, features, head, logits, self._y, **self._how)
        return value, logits, lambda: class_maps(features, head)

    @contextmanager
    def attacked(self) -> Iterator:
        network, features = self._network, self._features
        with _surrogate(network.model, self._beta):
            with torch.no_grad():
                if self._beta is not None or depends_on_mode(network.model):
                    with eval_mode(network.model):
                        features, _ = network(self._x)
                clean = network.attacked_features(features)
            with network.attacked() as run:

                def at(z):
                    features, head, logits = run(z)
                    return partial(
                        discrepancy, clean, features, head, logits, self._y, **self._how
                    ), logits

                yield at


class ExplainedByMaps:
    """By any map that is a function (model, x, target) -> (maps, logits)."""

    def __init__(self, how, softplus_beta, explain, model, x, y, network: None):
        self._classes, self._norm = how["classes"], {k: how[k] for k in ("norm", "normalize")}
        self._explain, self._model, self._beta = explain, model, softplus_beta
        self._x, self._y = x, y
        self._maps, self.logits = explain(model, x, self._clean_target())
        self.classes = self.logits.shape[1]

    def maps(self) -> torch.Tensor:
        return self._maps

    def distance(self, x_adv):
        value, logits, maps_adv = self._compare(self._maps, x_adv)
        return value, logits, lambda: maps_adv

    @contextmanager
    def attacked(self) -> Iterator:
        model, clean = self._model, self._maps.detach()
        tensors = attack_parameters(model)
        with substituted(model, tensors), eval_mode(model), _surrogate(model, self._beta):
            if self._beta is not None or depends_on_mode(model):
                clean = self._explain(model, self._x, self._clean_target())[0].detach()

            def at(z):
                value, logits, _ = self._compare(clean, z)
                return lambda: value, logits

            yield at

    def _clean_target(self):
        # The predicted class of x', which "two" explains, is not known before x'.
        return self._y[:, None] if self._classes == "one" else None

    def _compare(self, clean, z):
        if self._classes == "two":
            with torch.no_grad():
                predicted = self._model(z).argmax(1)
            target = torch.stack([self._y, predicted], 1)
            maps_z, logits = self._explain(self._model, z, target)
            index = target.view(*target.shape, *[1] * (clean.dim() - 2))
            clean = clean.take_along_dim(index, 1)
            return map_distance(clean, maps_z, **self._norm).mean(1), logits, maps_z
        maps_z, logits = self._explain(self._model, z, self._clean_target())
        distance = map_distance(clean, maps_z, **self._norm)
        if self._classes == "one":
            return distance[:, 0], logits, maps_z
        return (class_weights(self._classes, logits, self._y) * distance).sum(1), logits, maps_z
