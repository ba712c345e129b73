"""The figures of a report, as matplotlib figures."""

from __future__ import annotations

from collections.abc import Sequence

from fastinterp.evaluation.measure import LANDSCAPE
from fastinterp.evaluation.summary import Summary, show_eps

WIDTH = 4.6  # inches, of one pair of axes


def accuracy_curves(summary: Summary):
    """Accuracy against eps: a panel per attack, a line with its 95 % band per network."""
    attacks = {a: name for a, name in summary.attacks.items() if not a.startswith("strong-")}
    figure, panels = _panels(len(attacks), sharey=True)
    radii = (0.0, *summary.protocol.eps)
    for axis, (attack, name) in zip(panels, attacks.items(), strict=True):
        for network in summary.networks:
            found = [summary.accuracy(network, attack, eps) for eps in radii]
            (line,) = axis.plot(radii, [f.value for f in found], marker="o", ms=3, label=network)
            low, high = zip(*(f.interval for f in found), strict=True)
            axis.fill_between(radii, low, high, alpha=0.12, color=line.get_color(), linewidth=0)
        axis.set(title=name, xlabel="eps", ylim=(-0.03, 1.03))
        _eps_axis(axis, radii, summary)
    panels[0].set_ylabel("accuracy")
    panels[0].legend(fontsize=8)
    return figure


def similarity_curves(summary: Summary):
    """Kendall's tau of the true class's map against eps, and how many images it is the mean of."""
    figure, panels = _panels(2)
    radii = summary.protocol.aai_eps
    for network in summary.mapped:
        found = [summary.similarity(network, eps) for eps in radii]
        for axis, values in zip(panels, zip(*found, strict=True), strict=True):
            axis.plot(radii, values, marker="o", ms=3, label=network)
    panels[0].set(title="Kendall tau under AAI", xlabel="eps", ylabel="tau", ylim=(-1.03, 1.03))
    panels[1].set(title="images whose class stayed", xlabel="eps", ylabel="images")
    panels[1].set_ylim(bottom=0)
    for axis in panels:
        _eps_axis(axis, radii, summary)
    panels[0].legend(fontsize=8)
    return figure


def sneaking_curves(summary: Summary):
    """Normalised discrepancy under ISA against eps / eps_min: a panel per network."""
    figure, panels = _panels(len(summary.sneaked), sharey=True)
    for axis, network in zip(panels, summary.sneaked, strict=True):
        for classes in summary.protocol.isa_classes:
            found = summary.sneaking(network, classes)
            axis.plot(found.ratios, found.means, marker="o", ms=3, label=f"{classes}-class")
        axis.set(title=network, xlabel="eps / least eps")
        axis.grid(alpha=0.3)
    panels[0].set_ylim(bottom=0)  # of all, when all curves are there to set the top
    panels[0].set_ylabel("normalised discrepancy")
    panels[0].legend(fontsize=8)
    return figure


def bound_scatter(summary: Summary, networks: list[str]):
    """Two-class discrepancy against half the margin, with Proposition 1's bound: a panel each."""
    figure, panels = _panels(len(networks))
    for axis, network in zip(panels, networks, strict=True):
        points = summary.bound(network)
        axis.scatter(points["margin"], points["discrepancy"], s=9, alpha=0.6)
        top = max(points["margin"], default=1.0)
        axis.plot((0, top), (0, top), "k--", linewidth=1, label="bound")
        axis.set(title=network, xlabel="(f_t - f_t') / 2 of x")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    panels[0].set_ylabel("(d_t + d_t') / 2")
    panels[0].legend(fontsize=8)
    return figure


def landscapes(summary: Summary):
    """Mean loss from x to x' and to random signs: a panel per network."""
    figure, panels = _panels(len(summary.networks))
    names = {"no start": "to PGD, no random start", "random start": "to PGD, random start"}
    names["signs"] = "to random signs"
    for axis, network in zip(panels, summary.networks, strict=True):
        for (key, name), style in zip(names.items(), ("-", "--", ":"), strict=True):
            axis.plot(LANDSCAPE, summary.landscape(network)[key], style, label=name)
        axis.set(title=network, xlabel="share of the way")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    panels[0].set_ylabel("mean cross-entropy")
    panels[0].legend(fontsize=8)
    return figure


def training_curves(rows: dict[str, list[dict]]):
    """Loss and discrepancy against the step, by network; rows as read from metrics.jsonl."""
    figure, panels = _panels(2)
    for axis, (key, label) in zip(
        panels, {"loss": "training loss", "discrepancy": "discrepancy D"}.items(), strict=True
    ):
        for network, lines in rows.items():
            points = [(row["step"], row[key]) for row in lines if key in row]
            if points:
                axis.plot(*zip(*points, strict=True), label=network, linewidth=1)
        axis.set(xlabel="step", ylabel=label)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    return figure


def _panels(count: int, sharey: bool = False):
    from matplotlib.figure import Figure

    columns = min(count, 3)
    lines = -(-count // columns)
    figure = Figure(figsize=(WIDTH * columns, 3.2 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, sharey=sharey).flatten()
    for spare in axes[count:]:
        spare.set_visible(False)
    return figure, axes[:count]


def _eps_axis(axis, radii: Sequence[float], summary: Summary) -> None:
    axis.set_xticks(radii, [show_eps(eps, summary.protocol.dataset) for eps in radii])
    axis.tick_params(axis="x", labelsize=7, rotation=45 if len(radii) > 5 else 0)
    axis.grid(alpha=0.3)
