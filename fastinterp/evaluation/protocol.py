"""Which attacks a report runs, and with what settings.

paper   what the paper did, on 200 images, with one random start beside every PGD number; unforeseen
        attacks on CIFAR-10
strong  what a sceptic does: random restarts, three losses, a falling step size, AutoAttack,
        unforeseen attacks, every test image

Both end in the checks that a defence which masks its gradients fails.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from fastinterp.attacks import CALIBRATED
from fastinterp.attacks.autoattack import VERSIONS
from fastinterp.attacks.losses import LOSSES
from fastinterp.attacks.sneaking import CLASSES as ISA_CLASSES

PROTOCOLS = ("paper", "strong")
_GREY = 1 / 255
# eps of the accuracies, that which the networks are trained for, and eps of the interpretability
# attack.
_RADII = {
    "mnist": ((0.05, 0.1, 0.2, 0.3, 0.35, 0.4), 0.3, (0.05, 0.1, 0.2, 0.3)),
    "cifar10": (
        tuple(k * _GREY for k in (2, 4, 6, 8, 9, 10)),
        8 * _GREY,
        tuple(k * _GREY for k in (2, 4, 6, 8)),
    ),
    "restricted-imagenet": ((0.001, 0.002, 0.003, 0.004), 0.003, (0.001, 0.002, 0.003)),
}
_RADII["digits"] = _RADII["mnist"]
_RADII["folder"] = _RADII["restricted-imagenet"]
# Sizes of the unforeseen attacks: the paper's for CIFAR-10, which did without elastic, and middling
# calibrated ones for ImageNet. None are published for grey digits, which get those of CIFAR-10.
_CIFAR10 = dict(jpeg_linf=0.25, jpeg_l2=8.0, jpeg_l1=256.0, elastic=1.0)
_CIFAR10 |= dict(fog=2048.0, snow=2.0, gabor=400.0)
_IMAGENET = {kind: float(sizes["imagenet100"].eps[3]) for kind, sizes in CALIBRATED.items()}
_UNFORESEEN = {"restricted-imagenet": _IMAGENET, "folder": _IMAGENET}


@dataclass(frozen=True)
class Protocol:
    """Settings of a report; eps and step sizes in units of images in [0,1].

    Attributes:
        name, dataset: one of PROTOCOLS, one of data.DATASETS.
        examples, seed: how many test images, the first of a seeded permutation; 0 for all.
        eps: radii of the accuracies; radius of the sanity checks is ``trained_eps``.
        steps: PGD is looked at after each of these numbers of steps; the last is the headline.
        step_size: of PGD.
        losses, restarts: the strong attack tries every one of ``losses`` from ``restarts`` random
            points, its step falling from ``strong_step(eps)`` to a fifth; no losses, no strong
            attack.
        autoattack: which version of AutoAttack is run, one of attacks.autoattack.VERSIONS; empty
            for none.
        aai_eps, aai_k, aai_steps: the attack against interpretability; no eps, no attack.
        isa_classes, isa_norm: the interpretability sneaking attack keeps the maps of each of these
            choices of classes, "one", "two", "all"; none, no attack.
        isa_ratios: its eps, in units of the least eps that flips an image, >= 1.
        isa_rounds, isa_steps: rounds of its binary searches, first for eps, then for gamma, and
            steps of the attack in each, which together go 2 eps far.
        bound_examples, bound_rounds, bound_steps: images of Proposition 1, rounds of the binary
            search for the least successful eps, steps of the attack in each; 0 images for none.
        unforeseen: kinds of unforeseen attacks with their eps, as many steps as PGD's last.
        sanity_examples: images of transfer, unbounded eps, the loss landscape and ``unforeseen``.
    """

    name: str
    dataset: str
    examples: int
    eps: tuple[float, ...]
    trained_eps: float
    seed: int = 99
    steps: tuple[int, ...] = (1, 10, 100, 200)
    step_size: float = 0.01
    losses: tuple[str, ...] = ()
    restarts: int = 5
    autoattack: str = ""
    aai_eps: tuple[float, ...] = ()
    aai_k: int = 8
    aai_steps: int = 200
    isa_classes: tuple[str, ...] = ()
    isa_norm: str = "l1"
    isa_ratios: tuple[float, ...] = (1.0, 1.25, 1.5, 1.75, 2.0)
    isa_rounds: int = 10
    isa_steps: int = 40
    bound_examples: int = 0
    bound_rounds: int = 10
    bound_steps: int = 40
    unforeseen: tuple[tuple[str, float], ...] = ()
    sanity_examples: int = 200

    def __post_init__(self):
        for name in ("eps", "aai_eps"):
            for eps in getattr(self, name):
                if not 0 < eps < math.inf:
                    raise ValueError(f"{name} must be finite numbers > 0, got {eps}")
        if list(self.steps) != sorted(set(self.steps)) or not self.steps or self.steps[0] < 1:
            raise ValueError(f"steps must be increasing numbers >= 1, got {list(self.steps)}")
        counts = ("restarts", "aai_k", "aai_steps", "isa_rounds", "isa_steps")
        for name in (*counts, "bound_rounds", "bound_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.autoattack not in ("", *VERSIONS):
            raise ValueError(
                f"autoattack must be one of {', '.join(VERSIONS)} or empty, got {self.autoattack!r}"
            )
        if list(self.isa_ratios) != sorted(set(self.isa_ratios)) or self.isa_ratios[0] < 1:
            raise ValueError(
                f"isa_ratios must be increasing numbers >= 1, got {list(self.isa_ratios)}"
            )
        for name in ("examples", "bound_examples", "sanity_examples"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")

    def strong_step(self, eps: float) -> float:
        """First step size of the strong attack: as the paper's, but never above eps / 4."""
        return min(self.step_size, eps / 4)


def protocol(name: str, dataset: str) -> Protocol:
    """The settings of one of PROTOCOLS for a data set.

    Raises:
        ValueError: there is no such protocol.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}, got {name!r}")
    eps, trained, aai = _RADII[dataset]
    paper = Protocol(
        name,
        dataset,
        examples=200,
        eps=eps,
        trained_eps=trained,
        aai_eps=aai,
        isa_classes=ISA_CLASSES,
        bound_examples=100,
        unforeseen=tuple(_CIFAR10.items()) if dataset == "cifar10" else (),
    )
    if name == "strong":
        return replace(
            paper,
            examples=0,
            losses=tuple(LOSSES),
            autoattack="standard",
            unforeseen=tuple(_UNFORESEEN.get(dataset, _CIFAR10).items()),
            aai_eps=(),
            isa_classes=(),
            bound_examples=0,
        )
    return paper
