"""The report: which tables, sentences and figures, in which order."""

from __future__ import annotations

import csv
import io
import statistics
from dataclasses import astuple, dataclass, fields

import torch

from fastinterp.attacks import pgd
from fastinterp.data import Dataset
from fastinterp.evaluation import figures
from fastinterp.evaluation.findings import findings
from fastinterp.evaluation.overlays import explain, overlay_figure
from fastinterp.evaluation.page import Notice, Picture, Section, Table, Text
from fastinterp.evaluation.pieces import UNBOUNDED, Network
from fastinterp.evaluation.summary import SIMILARITIES, Accuracy, Row, Summary, show_eps
from fastinterp.maps import find_cam_network

STATISTICS = (statistics.median, min)
DRAWN = 3  # images of the heat-map figure


@dataclass(frozen=True)
class Run:
    """What a network's run of fastinterp train tells: metrics.jsonl's rows and the settings."""

    metrics: list[dict]
    batch_size: int
    config: dict


def sections(
    summary: Summary,
    networks: list[Network],
    data: Dataset,
    runs: dict[str, Run],
    facts: dict[str, str],
    batch_size: int,
) -> list[Section]:
    """What the results of a protocol say; see page.py for how it is written down.

    Args:
        summary: of the results.
        networks: for the heat maps.
        data: the data set.
        runs: by network, where it is known how they were trained.
        facts: settings and versions, by name.
        batch_size: images that were attacked at a time.
    """
    found = [
        Section("Findings", [Notice(f.text, f.warning) for f in findings(summary)]),
        _accuracy(summary),
        _similarity(summary),
        _sneaking(summary),
        _bound(summary),
        _heat_maps(summary, networks, data),
        _unforeseen(summary),
        _sanity(summary),
        _training(runs),
        _cost(summary, runs, batch_size),
        _settings(facts, runs),
    ]
    return [section for section in found if section.blocks]


def to_csv(rows: list[Row]) -> str:
    """One line per number, with a header."""
    with io.StringIO() as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in fields(Row))
        writer.writerows(["" if v is None else v for v in astuple(row)] for row in rows)
        return file.getvalue()


def _accuracy(summary: Summary) -> Section:
    protocol = summary.protocol
    radii = (0.0, *protocol.eps)
    shown = [show_eps(eps, protocol.dataset) for eps in radii]
    tables = [
        Table(
            "Clean accuracy on all test images",
            ["network", "accuracy"],
            [[network, _percent(summary.clean(network))] for network in summary.networks],
        )
    ]
    for attack, name in summary.attacks.items():
        rows = [
            [network, *(_share(summary.accuracy(network, attack, eps)) for eps in radii)]
            for network in summary.networks
        ]
        tables.append(Table(f"{name}: accuracy by eps", ["network", *shown], rows))
    if len(protocol.steps) > 1:
        rows = [
            [
                f"{network}, {show_eps(eps, protocol.dataset)}",
                *(_share(summary.accuracy(network, "no-start", eps, n)) for n in protocol.steps),
            ]
            for network in summary.networks
            for eps in protocol.eps
        ]
        head = ["network, eps", *(f"{n} steps" for n in protocol.steps)]
        tables.append(Table("PGD without a random start: accuracy by steps", head, rows))
    text = Text(
        f"{len(summary.index)} test images. PGD takes sign steps of {protocol.step_size:g} in the "
        "Linf ball on the cross-entropy, and its last iterate counts. Small print: 95 % Wilson "
        "intervals."
    )
    curves = Picture(figures.accuracy_curves(summary), "Accuracy against eps, with 95 % bands.")
    return Section("Accuracy under attack", [text, *tables[:-1], curves, *tables[-1:]])


def _unforeseen(summary: Summary) -> Section:
    kinds = summary.protocol.unforeseen
    if not kinds:
        return Section("Unforeseen attacks", [])
    rows = [
        [network, *(_share(accuracy) for accuracy in summary.unforeseen(network).values())]
        for network in summary.networks
    ]
    text = Text(
        "Distortions that no Lp ball holds, after Kang et al. (2019), each searched for a wrong "
        f"class drawn at random, {summary.last} steps from a random point, the worst iterate kept. "
        "Sizes are the published ones for CIFAR-10 and ImageNet; grey digits have none of their "
        "own and get those of CIFAR-10."
    )
    head = ["network", "clean", *(f"{kind} {eps:g}" for kind, eps in kinds)]
    return Section("Unforeseen attacks", [text, Table("Accuracy by attack and size", head, rows)])


def _sanity(summary: Summary) -> Section:
    eps = show_eps(summary.protocol.trained_eps, summary.protocol.dataset)
    names = summary.networks
    blocks = []
    if len(names) > 1:
        rows = [
            [source, *(_share(summary.transfer(source, target)) for target in names)]
            for source in names
        ]
        title = f"Transfer at eps {eps}: rows crafted on, columns tried on"
        blocks.append(Table(title, ["crafted on", *names], rows))
    blocks.append(
        Table(
            f"Unbounded attack, eps {UNBOUNDED:g}: must be 0",
            ["network", "accuracy"],
            [[network, _share(summary.unbounded(network))] for network in names],
        )
    )
    caption = f"Mean loss from the clean image to the attacked one, eps {eps}."
    return Section("Sanity", [*blocks, Picture(figures.landscapes(summary), caption)])


def _similarity(summary: Summary) -> Section:
    protocol = summary.protocol
    if not summary.mapped:
        return Section("Interpretation under attack", [])
    shown = [show_eps(eps, protocol.dataset) for eps in protocol.aai_eps]
    tables = []
    for metric, name in SIMILARITIES.items():
        rows = [
            [network, *(_mean(summary.similarity(network, e, metric)) for e in protocol.aai_eps)]
            for network in summary.mapped
        ]
        tables.append(Table(f"{name} by eps (images)", ["network", *shown], rows))
    text = Text(
        f"AAI lowers the sum of the true class's map over its {protocol.aai_k} largest cells, "
        f"{protocol.aai_steps} steps of {protocol.step_size:g} from a random point. Means over the "
        "images whose predicted class stayed, with their number."
    )
    caption = "Kendall's tau between the clean and the attacked map of the true class."
    curves = Picture(figures.similarity_curves(summary), caption)
    return Section("Interpretation under attack", [text, tables[0], curves, *tables[1:]])


def _sneaking(summary: Summary) -> Section:
    protocol, shown = summary.protocol, summary.sneaked
    title = "Interpretability sneaking attack"
    if not shown:
        return Section(title, [])
    rows = []
    for network in shown:
        for classes in protocol.isa_classes:
            found = summary.sneaking(network, classes)
            rows.append([f"{network}, {classes}-class", str(found.images), f"{found.eps:.3g}"])
            rows[-1] += [f"{mean:.3f}" for mean in found.means] + [f"{found.slope:.3f}"]
    head = ["network, maps", "images", "least eps, median", *map(str, protocol.isa_ratios), "slope"]
    text = Text(
        "ISA turns an image into a random other class while the CAMs of the true class (one-class),"
        " of the true and the target class (two-class) or of all classes stay as near as possible. "
        f"Normalised {protocol.isa_norm} discrepancy, in units of the size of the clean maps, at "
        "eps from the least that reaches the class upwards, and the slope of the least-squares "
        "line. Means over the images that are classified right and can be turned."
    )
    caption = "The less a curve can fall, the less an attacker can hide that the class has changed."
    return Section(
        title,
        [
            text,
            Table("Normalised discrepancy by eps / least eps", head, rows),
            Picture(figures.sneaking_curves(summary), caption),
        ],
    )


def _bound(summary: Summary) -> Section:
    shown = [name for name in summary.networks if summary.bound(name) is not None]
    if not shown:
        return Section("Proposition 1", [])
    rows = []
    for name in shown:
        points = summary.bound(name)
        ratios = [
            d / m for d, m in zip(points["discrepancy"], points["margin"], strict=True) if m > 0
        ]
        rows.append([name, str(len(ratios))])
        rows[-1] += [
            f"{f(v):.3g}" if v else "" for v in (points["eps"], ratios) for f in STATISTICS
        ]
    head = ["network", "images", "eps, median", "eps, least", "ratio, median", "ratio, least"]
    caption = (
        "Two-class discrepancy of CAM / (h w) against half the margin of the clean image, at the "
        "least eps that fools the network. No point can lie below the dashed line."
    )
    table = Table("Discrepancy by half margin at the least successful eps", head, rows)
    return Section(
        "Proposition 1", [table, Picture(figures.bound_scatter(summary, shown), caption)]
    )


def _mean(similarity: tuple[float, int]) -> tuple[str, str]:
    value, images = similarity
    return (f"{value:.3f}" if images else "none"), f"({images})"


def _heat_maps(summary: Summary, networks: list[Network], data: Dataset) -> Section:
    protocol = summary.protocol
    eps = show_eps(protocol.trained_eps, protocol.dataset)
    blocks = []
    for network in networks:
        device = next(network.model.parameters()).device
        x, y = (t.to(device) for t in data.test.batch(summary.index[:DRAWN]))
        x_adv = pgd(
            network.model,
            x,
            y,
            eps=protocol.trained_eps,
            step_size=protocol.step_size,
            steps=summary.last,
            random_start=True,
            generator=torch.Generator().manual_seed(protocol.seed),
        )
        kind = "input_gradient" if find_cam_network(network.model, x) is None else "cam"
        figure = overlay_figure(explain(network.model, x, x_adv, y, kind), data.classes)
        caption = (
            f"{network.name}: {kind} of the true and of the predicted class, before and after PGD "
            f"from a random start with eps {eps}. The maps of a row share one colour scale; D is "
            "their two-class l1 distance."
        )
        blocks.append(Picture(figure, caption, pixels=True))
    return Section("Maps", blocks)


def _training(runs: dict[str, Run]) -> Section:
    if not any(run.metrics for run in runs.values()):
        return Section("Training", [])
    curves = figures.training_curves({name: run.metrics for name, run in runs.items()})
    return Section("Training", [Picture(curves, "Loss and discrepancy in training.")])


def _cost(summary: Summary, runs: dict[str, Run], batch_size: int) -> Section:
    trained = []
    for name, run in runs.items():
        rates = [row["images_per_second"] for row in run.metrics if "images_per_second" in row]
        if rates:
            rate = statistics.median(rates)
            trained.append([name, f"{rate:.0f}", f"{1e3 * run.batch_size / rate:.1f}"])
    steps = summary.last * len(summary.index) * len(summary.protocol.eps)
    attacked = []
    for name in summary.networks:
        rate = steps / summary.seconds(name, "random-start")
        attacked.append(
            [name, f"{rate:.0f}", f"{1e3 * min(batch_size, len(summary.index)) / rate:.1f}"]
        )
    blocks = [
        Table("Cost of a PGD step", ["network", "images/s", "ms per step of a batch"], attacked)
    ]
    if trained:
        head = ["network", "images/s", "ms per step (median)"]
        blocks.insert(0, Table("Cost of a training step", head, trained))
    return Section("Cost", blocks)


def _settings(facts: dict[str, str], runs: dict[str, Run]) -> Section:
    tables = [
        Table("Of this report", ["setting", "value"], [[*pair] for pair in facts.items()], True)
    ]
    for name, run in runs.items():
        rows = [[key, str(value)] for key, value in run.config.items()]
        tables.append(Table(f"Training run of {name}", ["setting", "value"], rows, True))
    return Section("Settings and versions", tables)


def _share(accuracy: Accuracy) -> tuple[str, str]:
    low, high = accuracy.interval
    return f"{accuracy.value:.3f}", f"{low:.3f} to {high:.3f}"


def _percent(accuracy: Accuracy) -> tuple[str, str]:
    low, high = accuracy.interval
    return f"{100 * accuracy.value:.2f} %", f"{100 * low:.2f} to {100 * high:.2f}"
