"""What a report says in words, from its own figures: which numbers not to believe, and why."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import pairwise

from fastinterp.evaluation.pieces import UNBOUNDED
from fastinterp.evaluation.summary import Summary, show_eps

BOUND_TOLERANCE = 1e-4  # rounding
MORE_STEPS_TOLERANCE = 0.01  # a last iterate comes and goes on single images


@dataclass(frozen=True)
class Finding:
    """A sentence; a warning where it casts doubt on a number."""

    text: str
    warning: bool


def findings(summary: Summary) -> list[Finding]:
    """Where a stronger attack breaks what the weak one did not, and the signs of masking."""
    checks = (
        weak_attack,
        trained_eps,
        transfer,
        more_steps,
        unbounded,
        landscape,
        sneaking,
        proposition_1,
    )
    return [finding for check in checks for finding in check(summary)]


def weak_attack(summary: Summary) -> list[Finding]:
    """Radii at which a stronger attack leaves clearly fewer images than PGD from x itself.

    Clearly: the 95 % Wilson intervals of the two do not touch.
    """
    shown = partial(show_eps, dataset=summary.protocol.dataset)
    names = summary.attacks
    broken, spared = [], []
    for network in summary.networks:
        before = len(broken)
        for eps in summary.protocol.eps:
            weak = summary.accuracy(network, "no-start", eps)
            stronger = {
                attack: summary.accuracy(network, attack, eps)
                for attack in names
                if attack not in ("no-start", "worst")
            }
            clear = {a: found for a, found in stronger.items() if found.clearly_below(weak)}
            if not clear:
                continue
            lowest = min(clear.values(), key=lambda found: found.value)
            each = ", ".join(f"{percent(found)} under {names[a]}" for a, found in clear.items())
            broken.append(
                Finding(
                    f"{network} at eps {shown(eps)}: {percent(weak)} of the images survive "
                    f"{names['no-start']}, but only {each}. "
                    f"{100 * (weak.value - lowest.value):.1f} points of its accuracy there are an "
                    "artefact of the weak attack.",
                    True,
                )
            )
        if len(broken) == before:
            spared.append(network)
    if spared:
        broken.append(
            Finding(
                f"{_listed(spared)}: at no radius does a stronger attack leave clearly fewer "
                f"images than {names['no-start']} (95 % intervals overlap everywhere).",
                False,
            )
        )
    return broken


def trained_eps(summary: Summary) -> list[Finding]:
    """What is left where the networks were trained to hold, image by image the worst attack."""
    eps = summary.protocol.trained_eps
    if "worst" not in summary.attacks or eps not in summary.protocol.eps:
        return []
    shown, found = show_eps(eps, summary.protocol.dataset), []
    for network in summary.networks:
        weak, worst = (summary.accuracy(network, attack, eps) for attack in ("no-start", "worst"))
        found.append(
            Finding(
                f"{network} at eps {shown}, which training aims at: {percent(weak)} under "
                f"{summary.attacks['no-start']}, {percent(worst)} in the worst of all attacks; "
                f"{weak.correct - worst.correct} of {weak.examples} images fall to a stronger "
                "attack only.",
                False,
            )
        )
    return found


def transfer(summary: Summary) -> list[Finding]:
    """Attacks crafted on another network must not work better than those on the network itself."""
    if len(summary.networks) < 2:
        return []
    eps = show_eps(summary.protocol.trained_eps, summary.protocol.dataset)
    found = []
    for target in summary.networks:
        own = summary.transfer(target, target)
        for source in summary.networks:
            other = summary.transfer(source, target)
            if other.clearly_below(own):
                found.append(
                    Finding(
                        f"{target}: images crafted on {source} at eps {eps} leave "
                        f"{percent(other)}, those crafted on {target} itself {percent(own)}. An "
                        "attack that works better from outside is a sign of masked gradients.",
                        True,
                    )
                )
    return found or [
        Finding(
            f"Transfer: at eps {eps} no network is hurt more by another's adversarial images than "
            "by its own.",
            False,
        )
    ]


def more_steps(summary: Summary) -> list[Finding]:
    """More steps must not help the defender."""
    counts, found = summary.protocol.steps, []
    for network in summary.networks:
        for eps in summary.protocol.eps:
            along = [summary.accuracy(network, "no-start", eps, count) for count in counts]
            for i, (few, many) in enumerate(pairwise(along)):
                if many.value > few.value + MORE_STEPS_TOLERANCE + 1e-9:
                    found.append(
                        Finding(
                            f"{network} at eps {show_eps(eps, summary.protocol.dataset)}: PGD "
                            f"with {counts[i + 1]} steps leaves {percent(many)}, with "
                            f"{counts[i]} steps {percent(few)}. More steps help the defender: the "
                            "attack's gradient leads astray.",
                            True,
                        )
                    )
    return found or [Finding("More steps never help a defender.", False)]


def unbounded(summary: Summary) -> list[Finding]:
    """With nothing to hold it back an attack must reach 0."""
    left = {n: summary.unbounded(n) for n in summary.networks if summary.unbounded(n).correct}
    found = [
        Finding(
            f"{network}: {percent(accuracy)} of the images survive PGD with eps {UNBOUNDED:g}, "
            "which may turn an image into any other. The attack does not work on this network, "
            "and none of its numbers is to be believed.",
            True,
        )
        for network, accuracy in left.items()
    ]
    return found or [Finding("An unbounded attack reaches accuracy 0 on every network.", False)]


def landscape(summary: Summary) -> list[Finding]:
    """The loss must rise along an attack, and higher than along random signs."""
    eps, found = show_eps(summary.protocol.trained_eps, summary.protocol.dataset), []
    for network in summary.networks:
        loss = summary.landscape(network)
        for attack in ("no start", "random start"):
            end, noise, top = loss[attack][-1], loss["signs"][-1], max(loss[attack])
            if end < noise:
                found.append(
                    Finding(
                        f"{network}: at eps {eps} random signs raise the mean loss to {noise:.3g}, "
                        f"PGD ({attack}) to {end:.3g} only. Noise beats the gradient.",
                        True,
                    )
                )
            elif end < 0.9 * top:
                found.append(
                    Finding(
                        f"{network}: on the way to PGD's result ({attack}, eps {eps}) the mean "
                        f"loss is {top:.3g} and at the end {end:.3g}. The ascent went past its "
                        "goal.",
                        True,
                    )
                )
    return found or [
        Finding("The loss rises along every attack, and higher than along random signs.", False)
    ]


def sneaking(summary: Summary) -> list[Finding]:
    """How much of the one-class and of the two-class discrepancy an attacker can hide."""
    found = []
    for network in summary.sneaked:
        one, two = (summary.sneaking(network, classes) for classes in ("one", "two"))
        if one is None or two is None or not one.images or not two.images:
            continue
        hidden = [100 * (1 - each.means[-1] / each.means[0]) for each in (one, two)]
        found.append(
            Finding(
                f"{network}: given {one.ratios[-1]:g} times the least eps, a sneaking attack hides "
                f"{hidden[0]:.0f} % of the one-class discrepancy ({one.means[0]:.3f} to "
                f"{one.means[-1]:.3f}) and {hidden[1]:.0f} % of the two-class one "
                f"({two.means[0]:.3f} to {two.means[-1]:.3f}).",
                False,
            )
        )
    return found


def proposition_1(summary: Summary) -> list[Finding]:
    """The two-class discrepancy must not be below half the margin: it is a theorem."""
    found = []
    for network in summary.networks:
        points = summary.bound(network)
        if points is None or not points["margin"]:
            continue
        below = sum(
            d < m - BOUND_TOLERANCE * max(1.0, abs(m))
            for d, m in zip(points["discrepancy"], points["margin"], strict=True)
        )
        count = len(points["margin"])
        text = (
            f"{network}: {below} of {count} images lie below Proposition 1's bound, which no "
            "network with CAM can do: something is computed wrongly."
            if below
            else f"{network}: Proposition 1's bound holds on all {count} images that were fooled."
        )
        found.append(Finding(text, bool(below)))
    return found


def percent(accuracy) -> str:
    return f"{100 * accuracy.value:.1f} %"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
