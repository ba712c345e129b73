"""fastinterp eval: accuracy of saved weights, clean and under attack."""

from __future__ import annotations

import json
import os
from pathlib import Path

from jsonargparse import ArgumentParser
from tabulate import tabulate
from tqdm import tqdm

from fastinterp._files import write_atomically
from fastinterp.cli._attack import add_examples, add_pgd, pgd_settings
from fastinterp.cli._networks import add_one_network, load_one_network
from fastinterp.evaluation import choose_examples, evaluate_pgd

HELP = "accuracy of saved weights, clean and under attack"
ATTACKS = ("pgd", "none")


def parser(argv: list[str]) -> ArgumentParser:
    evaluate = ArgumentParser(description=__doc__)
    add_one_network(evaluate)
    evaluate.add_argument("--attack", default="pgd", help=", ".join(ATTACKS))
    evaluate.add_argument(
        "--eps", type=float, nargs="+", default=[0.3], help="radii, images in [0,1]"
    )
    add_pgd(evaluate)
    add_examples(evaluate, examples=0)
    evaluate.add_argument("--json", type=str | None, default=None, help="also write results here")
    return evaluate


def run(arguments) -> int:
    if arguments.attack not in ATTACKS:
        raise ValueError(f"--attack must be one of {', '.join(ATTACKS)}, got {arguments.attack!r}")
    radii = arguments.eps if arguments.attack == "pgd" else []
    settings = pgd_settings(arguments, radii)
    output = Path(arguments.json) if arguments.json else None
    if output is not None and not output.parent.is_dir():
        raise FileNotFoundError(f"--json {output}: there is no folder {output.parent}")
    if output is not None and output.is_dir():
        raise IsADirectoryError(f"--json {output} is a folder; name a file")
    if output is not None and not os.access(output.parent, os.W_OK):
        raise PermissionError(f"--json {output}: the folder {output.parent} cannot be written")
    network, data = load_one_network(arguments)
    index = choose_examples(len(data.test), arguments.examples, arguments.seed)

    # disable=None shows the bar on a terminal only.
    with tqdm(total=len(index) * len(radii), desc="attack", unit="img", disable=None) as bar:
        scores = evaluate_pgd(
            network.model,
            data.test,
            index,
            eps=radii,
            batch_size=arguments.batch_size,
            seed=arguments.seed,
            progress=bar.update,
            **settings,
        )
    print(f"{arguments.weights}: {scores['examples']} test images of {data.name}")
    rows = [["clean", f"{100 * scores['clean_accuracy']:.2f}"]]
    rows += [[f"PGD {r['eps']:g}", f"{100 * r['accuracy']:.2f}"] for r in scores["results"]]
    print(tabulate(rows, ["", "accuracy %"], disable_numparse=True, colalign=("left", "right")))
    if output is not None:
        text = json.dumps(_document(scores, arguments, settings), indent=2) + "\n"
        write_atomically(output, lambda temporary: temporary.write_text(text))
    return 0


def _document(scores: dict, arguments, settings: dict) -> dict:
    attack = {"name": arguments.attack}
    if arguments.attack == "pgd":
        attack |= {
            "eps": arguments.eps if len(arguments.eps) > 1 else arguments.eps[0],
            **settings,
        }
    document = {
        "clean_accuracy": scores["clean_accuracy"],
        "examples": scores["examples"],
        "attack": attack,
    }
    if len(scores["results"]) == 1:
        document["accuracy"] = scores["results"][0]["accuracy"]
    elif scores["results"]:
        document["results"] = scores["results"]
    return document
