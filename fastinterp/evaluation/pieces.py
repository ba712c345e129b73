"""A protocol taken apart into pieces, each of one network under one attack at one radius."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from fastinterp.attacks import autoattack, pgd, unforeseen
from fastinterp.attacks.autoattack import autoattack_version
from fastinterp.data import Dataset
from fastinterp.evaluation import measure, measure_maps
from fastinterp.evaluation.accuracy import choose_examples
from fastinterp.evaluation.protocol import Protocol
from fastinterp.evaluation.results import Results, images_fingerprint, model_fingerprint
from fastinterp.maps import find_cam_network

UNBOUNDED = 1.0  # eps at which an image may become any other


@dataclass(frozen=True, eq=False)
class Network:
    """A network of a report: its name there, where its weights are from, and the model itself."""

    name: str
    source: str
    model: nn.Module


@dataclass(frozen=True)
class Piece:
    """What is computed, from what, and how; ``eps`` is None where there is no radius."""

    network: str
    kind: str
    eps: float | None
    settings: dict
    compute: Callable[[], dict]

    @property
    def key(self) -> tuple[str, str, float | None]:
        return self.network, self.kind, self.eps

    @property
    def name(self) -> str:
        return f"{self.network}/{self.kind}" + ("" if self.eps is None else f"-{self.eps:.6g}")


def evaluate(
    protocol: Protocol,
    networks: list[Network],
    data: Dataset,
    results: Results,
    *,
    batch_size: int = 500,
    progress: Callable[[str, int], None] = lambda name, pieces: None,
) -> dict[tuple[str, str, float | None], dict]:
    """Every result of a protocol, computed or found in ``results``.

    Args:
        protocol: what to run.
        networks: of one data set, with names of their own.
        data: the data set.
        results: where finished pieces are.
        batch_size: images attacked at a time.
        progress: called with the name of a piece that begins and the number of all pieces.

    Returns:
        By (network, kind, eps); see measure.py and measure_maps.py for what each kind gives.
    """
    pieces = list(plan(protocol, networks, data, batch_size))
    found = {}
    for piece in pieces:
        progress(piece.name, len(pieces))
        found[piece.key] = results.get(piece.name, piece.settings, piece.compute)
    return found


def plan(
    protocol: Protocol, networks: list[Network], data: Dataset, batch_size: int
) -> Iterator[Piece]:
    """The pieces of a protocol, the cheap ones of every network first."""
    split = data.test
    index = choose_examples(len(split), protocol.examples, protocol.seed)
    few = index[: protocol.sanity_examples or None]
    chosen = {
        "images": images_fingerprint(split, index),
        "examples": len(index),
    }
    context = dict(batch_size=batch_size)
    seeded = dict(seed=protocol.seed, **context)
    last, trained = protocol.steps[-1], protocol.trained_eps
    weights = {network.name: model_fingerprint(network.model) for network in networks}

    def piece(network, kind, eps, function, settings, where=index, extra=None):
        described = {"weights": weights[network.name], **chosen, **settings, **(extra or {})}
        # The batches cut the random numbers.
        described |= {"eps": eps, "seed": protocol.seed, "batch_size": batch_size}
        described["examples"] = len(where)
        return Piece(network.name, kind, eps, described, partial(function, network, where))

    def along(network, where, **settings):
        return measure.accuracy_along_steps(network.model, split, where, **settings, **seeded)

    def under(network, where, others=(), attack=pgd, **settings):
        attack = partial(attack, **settings)
        return measure.accuracy_under(attack, network.model, split, where, others=others, **seeded)

    every = torch.arange(len(split))
    all_images = images_fingerprint(split, every)
    for network in networks:
        yield Piece(
            network.name,
            "clean",
            None,
            {
                "weights": weights[network.name],
                "images": all_images,
                "examples": len(split),
            },
            partial(measure.clean, network.model, split, every, batch_size),
        )
    for network in networks:
        for eps in protocol.eps:
            settings = dict(eps=eps, step_size=protocol.step_size)
            for kind, steps in (("no-start", protocol.steps), ("random-start", (last,))):
                now = dict(settings, steps=steps, from_random_point=kind == "random-start")
                yield piece(network, kind, eps, partial(along, **now), now)
            for loss in protocol.losses:
                first = protocol.strong_step(eps)
                now = dict(
                    eps=eps,
                    step_size=first,
                    final_step_size=first / 5,
                    steps=last,
                    loss=loss,
                    random_start=True,
                    restarts=protocol.restarts,
                    early_stop=True,
                )
                yield piece(network, f"strong-{loss}", eps, partial(under, **now), now)
            if protocol.autoattack:
                now = dict(eps=eps, version=protocol.autoattack)
                compute = partial(under, attack=autoattack, **now)
                package = {"pyautoattack": autoattack_version()}
                yield piece(network, "autoattack", eps, compute, now, extra=package)
    for network in networks:
        x, _ = split.batch(index[:1])
        if find_cam_network(network.model, x.to(next(network.model.parameters()).device)) is None:
            continue
        for eps in protocol.aai_eps:
            now = dict(
                eps=eps,
                k=protocol.aai_k,
                steps=protocol.aai_steps,
                step_size=protocol.step_size,
            )

            def aai(network, where, now=now):
                return measure_maps.aai(network.model, split, where, **now, **seeded)

            yield piece(network, "aai", eps, aai, now)
        for classes in protocol.isa_classes:
            now = dict(
                classes=classes,
                ratios=protocol.isa_ratios,
                norm=protocol.isa_norm,
                rounds=protocol.isa_rounds,
                steps=protocol.isa_steps,
            )

            def isa(network, where, now=now):
                return measure_maps.isa(network.model, split, where, **now, **seeded)

            yield piece(network, f"isa-{classes}", None, isa, now)
        if protocol.bound_examples:
            now = dict(rounds=protocol.bound_rounds, steps=protocol.bound_steps)

            def bound(network, where, now=now):
                return measure_maps.bound(network.model, split, where, **now, **seeded)

            yield piece(network, "bound", None, bound, now, index[: protocol.bound_examples])
    for network in networks:
        for kind, eps in protocol.unforeseen:
            now = dict(kind=kind, eps=eps, steps=last)
            compute = partial(under, attack=unforeseen, **now)
            yield piece(network, f"unforeseen-{kind}", eps, compute, now, few)
    for network in networks:
        now = dict(eps=trained, step_size=protocol.step_size, steps=last, random_start=True)
        others = [other for other in networks if other is not network]
        names = {"others": [[other.name, weights[other.name]] for other in others]}
        compute = partial(under, others=tuple(other.model for other in others), **now)
        yield piece(network, "transfer", trained, compute, now, few, names)
        now = dict(
            eps=UNBOUNDED,
            step_size=max(protocol.step_size, 2 * UNBOUNDED / last),
            steps=last,
            random_start=True,
        )
        yield piece(network, "unbounded", UNBOUNDED, partial(under, **now), now, few)
        now = dict(eps=trained, step_size=protocol.step_size, steps=last)

        def landscape(network, where, now=now):
            return measure.landscape(network.model, split, where, **now, **seeded)

        yield piece(network, "landscape", trained, landscape, now, few)
