"""Results as numbers with names: what the tables, the figures and the sentences of a report use."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fastinterp.evaluation.pieces import UNBOUNDED
from fastinterp.evaluation.protocol import Protocol
from fastinterp.metrics import slope, wilson_interval

SIMILARITIES = {
    "tau": "Kendall's tau-b",
    "spearman": "Spearman",
    "top_k": "top-k intersection",
    "cosine": "cosine",
}
Found = dict[tuple[str, str, float | None], dict]


@dataclass(frozen=True)
class Accuracy:
    """How many of how many images were classified right."""

    correct: int
    examples: int

    @classmethod
    def of(cls, bits: str) -> Accuracy:
        return cls(bits.count("1"), len(bits))

    @property
    def value(self) -> float:
        return self.correct / self.examples

    @property
    def interval(self) -> tuple[float, float]:
        return wilson_interval(self.correct, self.examples)

    def clearly_below(self, other: Accuracy) -> bool:
        """Whether the 95 % intervals do not touch."""
        return self.interval[1] < other.interval[0]


@dataclass(frozen=True)
class Sneaking:
    """Mean normalised discrepancy under ISA by eps / eps_min, over the images flipped at each."""

    ratios: tuple[float, ...]
    means: tuple[float, ...]
    images: int
    eps: float  # median of eps_min, over the same images

    @property
    def slope(self) -> float:
        """Of the least-squares line; NaN where nothing was flipped."""
        return slope(torch.tensor(self.ratios), torch.tensor(self.means)).item()


@dataclass(frozen=True)
class Row:
    """One line of the CSV."""

    network: str
    attack: str
    eps: float
    steps: int | None
    metric: str
    value: float
    low: float | None
    high: float | None
    examples: int


class Summary:
    """Accuracies and maps' similarities by network, attack and eps.

    Args:
        protocol: that was run.
        networks: their names, in the order of the report.
        found: what pieces.evaluate gave.
        index: of the evaluated test images, (N,).
    """

    def __init__(self, protocol: Protocol, networks: list[str], found: Found, index: torch.Tensor):
        self.protocol, self.networks, self.found, self.index = protocol, networks, found, index
        self.last = protocol.steps[-1]

    @property
    def attacks(self) -> dict[str, str]:
        """What every attack on the accuracy that was run is called in the report, weakest first."""
        strong = self.protocol.losses
        names = {
            "no-start": f"PGD-{self.last}, no random start",
            "random-start": f"PGD-{self.last}, one random start",
            **{f"strong-{loss}": f"{self.protocol.restarts} restarts, {loss}" for loss in strong},
        }
        if self.protocol.autoattack:
            names["autoattack"] = f"AutoAttack, {self.protocol.autoattack}"
        return names | {"worst": "worst of these"} if len(names) > 2 else names

    def clean(self, network: str) -> Accuracy:
        """Of all test images."""
        return Accuracy.of(self.found[network, "clean", None]["correct"])

    def accuracy(self, network: str, attack: str, eps: float, steps: int | None = None) -> Accuracy:
        """Of the chosen images under an attack of ``attacks``; eps 0 is the clean accuracy."""
        return Accuracy.of(self._bits(network, attack, eps, steps))

    def _bits(self, network: str, attack: str, eps: float, steps: int | None = None) -> str:
        if eps == 0:
            every = self.found[network, "clean", None]["correct"]
            return "".join(every[i] for i in self.index.tolist())
        if attack == "worst":
            each = [self._bits(network, name, eps) for name in self.attacks if name != "worst"]
            return "".join("1" if set(image) == {"1"} else "0" for image in zip(*each, strict=True))
        correct = self.found[network, attack, eps]["correct"]
        return correct[str(steps or self.last)] if isinstance(correct, dict) else correct

    def similarity(self, network: str, eps: float, metric: str = "tau") -> tuple[float, int] | None:
        """Mean of a map metric of measure_maps.aai over images whose predicted class stayed, and
        how many there are; None where the network has no CAM."""
        piece = self.found.get((network, "aai", eps))
        if piece is None:
            return None
        kept = [
            value
            for value, same in zip(piece[metric], piece["same"], strict=True)
            if same == "1" and value is not None
        ]
        return (sum(kept) / len(kept) if kept else math.nan), len(kept)

    @property
    def mapped(self) -> list[str]:
        """Networks whose maps were attacked."""
        return [
            name
            for name in self.networks
            if any((name, "aai", e) in self.found for e in self.protocol.aai_eps)
        ]

    def sneaking(self, network: str, classes: str) -> Sneaking | None:
        """How near ISA brings the maps of ``classes``; None where it was not run."""
        piece = self.found.get((network, f"isa-{classes}", None))
        if piece is None:
            return None
        ratios = self.protocol.isa_ratios
        each = zip(piece["eps"], *(piece["discrepancy"][str(r)] for r in ratios), strict=True)
        counted = torch.tensor([row for row in each if None not in row], dtype=torch.float64)
        counted = counted.reshape(-1, 1 + len(ratios))
        means = tuple(counted[:, 1:].mean(0).tolist())
        eps = counted[:, 0].median().item() if len(counted) else math.nan
        return Sneaking(ratios, means, len(counted), eps)

    @property
    def sneaked(self) -> list[str]:
        """Networks that ISA was run on."""
        some = self.protocol.isa_classes[:1]
        return [n for n in self.networks if any(self.sneaking(n, c) for c in some)]

    def bound(self, network: str) -> dict[str, list[float]] | None:
        """Proposition 1's two sides, see measure_maps.bound; None where it was not looked at."""
        return self.found.get((network, "bound", None))

    def transfer(self, source: str, target: str) -> Accuracy:
        """Of ``target`` on images that were crafted on ``source``."""
        piece = self.found[source, "transfer", self.protocol.trained_eps]
        others = [name for name in self.networks if name != source]
        return Accuracy.of(
            piece["correct"] if source == target else piece["others"][others.index(target)]
        )

    def unforeseen(self, network: str) -> dict[str, Accuracy]:
        """Of the images of the sanity checks, clean and under each kind."""
        protocol = self.protocol
        if not protocol.unforeseen:
            return {}
        left = {
            kind: self.found[network, f"unforeseen-{kind}", eps]["correct"]
            for kind, eps in protocol.unforeseen
        }
        clean = self._bits(network, "no-start", 0)[: protocol.sanity_examples or None]
        return {kind: Accuracy.of(bits) for kind, bits in {"clean": clean, **left}.items()}

    def unbounded(self, network: str) -> Accuracy:
        return Accuracy.of(self.found[network, "unbounded", UNBOUNDED]["correct"])

    def landscape(self, network: str) -> dict[str, list[float]]:
        return self.found[network, "landscape", self.protocol.trained_eps]

    def seconds(self, network: str, attack: str) -> float:
        """Of an attack at all radii together."""
        return sum(self.found[network, attack, eps]["seconds"] for eps in self.protocol.eps)

    def rows(self) -> list[Row]:
        """Everything, for the CSV."""
        rows = []

        def add(network, attack, eps, steps, accuracy, metric="accuracy"):
            rows.append(
                Row(
                    *(network, attack, eps, steps, metric),
                    *(accuracy.value, *accuracy.interval, accuracy.examples),
                )
            )

        for network in self.networks:
            add(network, "clean, all test images", 0.0, None, self.clean(network))
            add(network, "clean", 0.0, None, self.accuracy(network, "no-start", 0))
            for eps in self.protocol.eps:
                for steps in self.protocol.steps:
                    entry = self.accuracy(network, "no-start", eps, steps)
                    add(network, "PGD, no random start", eps, steps, entry)
                for attack, label in self.attacks.items():
                    if attack != "no-start":
                        entry = self.accuracy(network, attack, eps)
                        add(network, label, eps, self.last, entry)
            if network in self.mapped:
                for eps in self.protocol.aai_eps:
                    for metric in SIMILARITIES:
                        value, images = self.similarity(network, eps, metric)
                        steps = self.protocol.aai_steps
                        rows.append(
                            Row(network, "AAI", eps, steps, metric, value, None, None, images)
                        )
            for (kind, eps), entry in zip(
                self.protocol.unforeseen, [*self.unforeseen(network).values()][1:], strict=True
            ):
                add(network, kind, eps, self.last, entry)
            for classes in self.protocol.isa_classes if network in self.sneaked else ():
                entry = self.sneaking(network, classes)
                for ratio, mean in zip(entry.ratios, entry.means, strict=True):
                    label = f"ISA, {classes}-class, eps in units of the least"
                    steps, images = self.protocol.isa_steps, entry.images
                    metric = "normalised_discrepancy"
                    rows.append(Row(network, label, ratio, steps, metric, mean, None, None, images))
            for source in self.networks:
                label = f"crafted on {source}"
                entry = self.transfer(source, network)
                add(network, label, self.protocol.trained_eps, self.last, entry)
            add(network, "unbounded", UNBOUNDED, self.last, self.unbounded(network))
        return rows


def show_eps(eps: float, dataset: str) -> str:
    """A radius as its field writes it: 8/255 for CIFAR-10, 0.3 for MNIST."""
    grey = eps * 255
    if dataset == "cifar10" and math.isclose(grey, round(grey), abs_tol=1e-6):
        return f"{round(grey)}/255"
    return f"{eps:g}"
