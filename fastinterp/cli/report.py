"""fastinterp report: networks under the paper's protocol or a stronger one, as one HTML page."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from pathlib import Path

from jsonargparse import ArgumentParser
from tqdm import tqdm

from fastinterp._files import write_atomically
from fastinterp.attacks.autoattack import VERSIONS, autoattack_version
from fastinterp.cli import set_up_device
from fastinterp.cli._networks import (
    add_networks,
    find_weights,
    load_images,
    load_networks,
    model_and_dataset,
    writable_folder,
)
from fastinterp.cli.info import collect
from fastinterp.evaluation import choose_examples
from fastinterp.evaluation.findings import findings
from fastinterp.evaluation.page import to_html, to_markdown
from fastinterp.evaluation.pieces import evaluate
from fastinterp.evaluation.protocol import PROTOCOLS, protocol
from fastinterp.evaluation.report import Run, sections, to_csv
from fastinterp.evaluation.results import Results
from fastinterp.evaluation.summary import Summary
from fastinterp.training.metrics import read_metrics
from fastinterp.training.run import read_config

HELP = "tables, figures and warnings about networks under attack, as one HTML page"


def parser(argv: list[str]) -> ArgumentParser:
    report = ArgumentParser(description=__doc__)
    report.add_argument(
        "weights",
        type=str,
        nargs="+",
        help=".npz or .safetensors files, or runs of fastinterp train or folders of a method there",
    )
    report.add_argument("--protocol", default="paper", help=", ".join(PROTOCOLS))
    add_networks(report)
    report.add_argument(
        "--out",
        type=str | None,
        default=None,
        help="folder of the page and of finished pieces, from which a stopped report goes on "
        "(default: reports/DATASET-MODEL-PROTOCOL)",
    )
    report.add_argument(
        "--examples",
        type=int | None,
        default=None,
        help="test images, 0 for all (default: the protocol's)",
    )
    report.add_argument(
        "--eps", type=float, nargs="+", default=[], help="other radii than the protocol's"
    )
    report.add_argument(
        "--steps", type=int, nargs="+", default=[], help="other numbers of PGD steps"
    )
    report.add_argument(
        "--autoattack",
        type=str | None,
        default=None,
        help=f"version for the strong protocol: {', '.join(VERSIONS)} or none "
        "(default: standard on a GPU, apgd on a CPU)",
    )
    report.add_argument("--batch-size", type=int, default=500, help="images at a time")
    return report


def run(arguments) -> int:
    if arguments.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {arguments.batch_size}")
    weights = find_weights(arguments.weights)
    model, dataset = model_and_dataset(weights, arguments)
    device = set_up_device(arguments.device, arguments.threads)
    settings = _settings(arguments, dataset, device)
    if settings.autoattack:
        autoattack_version()  # raises before anything is computed
    data = load_images(dataset, arguments)
    networks = load_networks(weights, model, data, device)
    default = Path("reports") / f"{dataset}-{model}-{arguments.protocol}"
    folder = writable_folder("--out", arguments.out or default)
    results = Results(folder / "pieces", say=lambda text: tqdm.write(text))
    with tqdm(desc="report", unit="piece", disable=None) as bar:

        def progress(name, pieces):
            bar.total = pieces
            bar.set_postfix_str(name)
            bar.update()

        found = evaluate(
            settings, networks, data, results, batch_size=arguments.batch_size, progress=progress
        )
    index = choose_examples(len(data.test), settings.examples, settings.seed)
    summary = Summary(settings, [n.name for n in networks], found, index)
    runs = {
        network.name: _run(each)
        for network, each in zip(networks, weights, strict=True)
        if each.run
    }
    facts = _facts(arguments, networks, settings, model)
    content = sections(summary, networks, data, runs, facts, arguments.batch_size)
    title = f"{dataset}, {model}: {arguments.protocol} protocol"
    lead = f"Written by fastinterp on {time.strftime('%Y-%m-%d %H:%M')}."
    for name, text in (
        ("report.html", to_html(title, lead, content)),
        ("report.md", to_markdown(title, lead, content)),
        ("results.csv", to_csv(summary.rows())),
    ):
        write_atomically(folder / name, lambda path, text=text: path.write_text(text))
    for finding in findings(summary):
        print(("WARNING: " if finding.warning else "") + finding.text)
    print(f"\n{folder / 'report.html'}, report.md and results.csv")
    return 0


def _settings(arguments, dataset: str, device):
    changed = {
        name: value
        for name, value in (
            ("examples", arguments.examples),
            ("eps", tuple(arguments.eps) or None),
            ("steps", tuple(arguments.steps) or None),
        )
        if value is not None
    }
    settings = protocol(arguments.protocol, dataset)
    if arguments.autoattack is not None:
        changed["autoattack"] = arguments.autoattack.replace("none", "")
    elif settings.autoattack and device.type == "cpu":
        changed["autoattack"] = "apgd"
    if arguments.steps:
        changed |= {name: arguments.steps[-1] for name in ("aai_steps", "isa_steps", "bound_steps")}
    if arguments.examples:
        for name in ("bound_examples", "sanity_examples"):
            changed[name] = min(arguments.examples, getattr(settings, name))
    return replace(settings, **changed)


def _run(weights) -> Run:
    config = read_config(weights.run)
    return Run(read_metrics(weights.path / "metrics.jsonl"), config.batch_size, config.to_dict())


def _facts(arguments, networks, settings, model: str) -> dict[str, str]:
    """Every setting and version."""
    info = collect()
    facts = {f"weights of {network.name}": network.source for network in networks}
    facts |= {"model": model} | {name: str(value) for name, value in asdict(settings).items()}
    facts["batch size"] = str(arguments.batch_size)
    facts |= {name: value or "not installed" for name, value in info["versions"].items()}
    facts |= {f"cpu {name}": str(value) for name, value in info["cpu"].items()}
    facts["gpu"] = info["gpu"]["name"] if info["gpu"] else "none"
    return facts | {"backend": info["requested_backend"]}
