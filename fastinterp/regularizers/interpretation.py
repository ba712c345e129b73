"""Drop-in losses for anybody's training loop."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from fastinterp._checks import check_attack, check_images, check_labels
from fastinterp._state import cloned_buffers, depends_on_mode, eval_mode, substituted
from fastinterp.attacks import maximise, random_start
from fastinterp.discrepancy import CLASSES, NORMALIZE, discrepancy
from fastinterp.maps import CamNetwork
from fastinterp.ops.cam_discrepancy import NORMS as MAP_NORMS

MAPS = ("cam",)


class Aux(NamedTuple):
    """What the regularizer computed on the way, so that nobody pays for it twice."""

    x_adv: torch.Tensor  # (N, C, H, W), detached
    logits: torch.Tensor  # (N, K) of x, with graph
    logits_adv: torch.Tensor  # (N, K) of x', with graph
    features: torch.Tensor  # (N, C, h, w) of x, with graph
    features_adv: torch.Tensor  # (N, C, h, w) of x', with graph


class InterpretationRegularizer(nn.Module):
    """Worst-case discrepancy between the class activation maps of x and x + delta.

        R = mean_n max_{||delta|| <= eps} D(x, x + delta)

    The maximisation starts at a random point (at x itself the gradient of D is exactly zero), uses
    the clean map computed once, and wants no weight gradients.

    Args:
        map: "cam".
        classes: "weighted" (the paper's training form), "all", "two" or "one"; see
            fastinterp.discrepancy.
        eps, step_size: radius and step in units of x, images in [0,1].
        steps: steps of the inner maximisation.
        norm: "Linf" or "L2" ball.
        map_norm: "l1" or "l2" distance between maps.
        normalize: "none" or "pixels".
        clip: bounds of valid images, or None.
        random_start: start at a random point of the ball.

    Source: Boopathy et al. (ICML 2020), the Int objective.

    Example:
        >>> reg = InterpretationRegularizer("cam", eps=8 / 255, steps=10, step_size=2 / 255)
        >>> loss = F.cross_entropy(model(x), y) + 0.01 * reg(model, x, y)
    """

    def __init__(
        self,
        map: str = "cam",
        *,
        classes: str = "weighted",
        eps: float,
        step_size: float,
        steps: int,
        norm: str = "Linf",
        map_norm: str = "l1",
        normalize: str = "none",
        clip: tuple[float, float] | None = (0.0, 1.0),
        random_start: bool = True,
    ):
        super().__init__()
        for name, value, allowed in (
            ("map", map, MAPS),
            ("classes", classes, CLASSES),
            ("norm", norm, ("Linf", "L2")),
            ("map_norm", map_norm, MAP_NORMS),
            ("normalize", normalize, NORMALIZE),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        check_attack(eps, step_size, steps)
        self.eps, self.step_size, self.steps, self.norm = eps, step_size, steps, norm
        self.clip, self.random_start = clip, random_start
        self._distance = dict(classes=classes, norm=map_norm, normalize=normalize)

    def forward(
        self,
        model: nn.Module,
        x: torch.Tensor,
        y: torch.Tensor,
        *,
        eps: float | None = None,
        start: torch.Tensor | None = None,
        return_aux: bool = False,
        validate: bool = True,
        network: CamNetwork | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Aux]:
        """The regularizer's value on a batch.

        Args:
            model: images -> logits, with global average pooling and a linear head. Its flags,
                buffers, gradients and hooks are left as they were.
            x: images (N, C, H, W) within ``clip``.
            y: true classes, int64 (N,).
            eps: radius for this call (a schedule), default the constructor's.
            start: perturbation to start from instead of a random one.
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
        eps = self.eps if eps is None else eps
        check_attack(eps, self.step_size, self.steps)
        if validate:
            check_images(x, bounds=self.clip)
        if network is None:
            network = CamNetwork(model, x)
        if validate:
            check_labels(y, len(x), network.head.out_features)
        if start is None and self.random_start:
            start = random_start(x, eps, self.norm)

        with substituted(model, cloned_buffers(model)):
            features, logits = network(x)
            x_adv = self._maximise(network, x, y, features, eps, start)
            features_adv, logits_adv = network(x_adv)
        value = discrepancy(
            features, features_adv, network.head.weight, logits_adv, y, **self._distance
        ).mean()
        if return_aux:
            return value, Aux(x_adv, logits, logits_adv, features, features_adv)
        return value

    def _maximise(self, network, x, y, features, eps, start):
        with torch.no_grad():
            if depends_on_mode(network.model):
                with eval_mode(network.model):
                    features, _ = network(x)
            clean = network.attacked_features(features)
        with network.attacked() as run:

            def objective(z):
                features_z, head, logits_z = run(z)
                return discrepancy(clean, features_z, head, logits_z, y, **self._distance).sum()

            return maximise(
                objective,
                x,
                eps=eps,
                step_size=self.step_size,
                steps=self.steps,
                norm=self.norm,
                clip=self.clip,
                start=start,
            )
