"""fastinterp eval: accuracy of saved weights, clean and under attack."""

from __future__ import annotations

import json
import os
from pathlib import Path

from jsonargparse import ArgumentParser
from tabulate import tabulate
from tqdm import tqdm

from fastinterp._checks import check_attack
from fastinterp._files import write_atomically
from fastinterp.cli import add_common, set_up_device
from fastinterp.data import DATASETS, load_dataset
from fastinterp.evaluation import choose_examples, evaluate_pgd
from fastinterp.models import MODELS, create_model, load_weights

HELP = "accuracy of saved weights, clean and under attack"
ATTACKS = ("pgd", "none")


def parser(argv: list[str]) -> ArgumentParser:
    evaluate = ArgumentParser(description=__doc__)
    evaluate.add_argument(
        "weights", type=str, help=".npz, .safetensors, or the folder of a method in a run"
    )
    evaluate.add_argument("--model", default="small", help=", ".join(MODELS))
    evaluate.add_argument("--dataset", default="mnist", help=", ".join(DATASETS))
    add_common(evaluate)
    evaluate.add_argument("--attack", default="pgd", help=", ".join(ATTACKS))
    evaluate.add_argument(
        "--eps", type=float, nargs="+", default=[0.3], help="radii, images in [0,1]"
    )
    evaluate.add_argument("--steps", type=int, default=200, help="attack steps")
    evaluate.add_argument("--step-size", type=float, default=0.01, help="size of one step")
    evaluate.add_argument(
        "--examples", type=int, default=0, help="test images, chosen by --seed; 0 for all"
    )
    evaluate.add_argument("--seed", type=int, default=99, help="of the choice of images")
    evaluate.add_argument("--batch-size", type=int, default=500, help="images at a time")
    evaluate.add_argument("--json", type=str | None, default=None, help="also write results here")
    return evaluate


def run(arguments) -> int:
    if arguments.attack not in ATTACKS:
        raise ValueError(f"--attack must be one of {', '.join(ATTACKS)}, got {arguments.attack!r}")
    if arguments.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {arguments.batch_size}")
    radii = arguments.eps if arguments.attack == "pgd" else []
    for eps in radii:
        check_attack(eps, arguments.step_size, arguments.steps)
    output = Path(arguments.json) if arguments.json else None
    if output is not None and not output.parent.is_dir():
        raise FileNotFoundError(f"--json {output}: there is no folder {output.parent}")
    if output is not None and output.is_dir():
        raise IsADirectoryError(f"--json {output} is a folder; name a file")
    if output is not None and not os.access(output.parent, os.W_OK):
        raise PermissionError(f"--json {output}: the folder {output.parent} cannot be written")
    device = set_up_device(arguments.device, arguments.threads)
    data = load_dataset(arguments.dataset, arguments.data_dir, arguments.download)
    model = create_model(arguments.model, data.test.images.shape[1], data.num_classes)
    load_weights(model, arguments.weights)
    model.to(device)
    index = choose_examples(len(data.test), arguments.examples, arguments.seed)

    # disable=None shows the bar on a terminal only.
    with tqdm(total=len(index) * len(radii), desc="attack", unit="img", disable=None) as bar:
        scores = evaluate_pgd(
            model,
            data.test,
            index,
            eps=radii,
            steps=arguments.steps,
            step_size=arguments.step_size,
            batch_size=arguments.batch_size,
            progress=bar.update,
        )
    print(f"{arguments.weights}: {scores['examples']} test images of {arguments.dataset}")
    rows = [["clean", f"{100 * scores['clean_accuracy']:.2f}"]]
    rows += [[f"PGD {r['eps']:g}", f"{100 * r['accuracy']:.2f}"] for r in scores["results"]]
    print(tabulate(rows, ["", "accuracy %"], disable_numparse=True, colalign=("left", "right")))
    if output is not None:
        text = json.dumps(_document(scores, arguments), indent=2) + "\n"
        write_atomically(output, lambda temporary: temporary.write_text(text))
    return 0


def _document(scores: dict, arguments) -> dict:
    attack = {"name": arguments.attack}
    if arguments.attack == "pgd":
        attack |= {
            "norm": "Linf",
            "eps": arguments.eps if len(arguments.eps) > 1 else arguments.eps[0],
            "steps": arguments.steps,
            "step_size": arguments.step_size,
            "random_start": False,
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
