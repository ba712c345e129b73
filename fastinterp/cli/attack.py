"""fastinterp attack: adversarial images of saved weights, and what became of every image."""

from __future__ import annotations

import csv
import io
from functools import partial

import torch
from jsonargparse import ArgumentParser
from safetensors.torch import save_file
from torch.nn import functional as F
from tqdm import tqdm

from fastinterp._files import write_atomically
from fastinterp._state import eval_mode
from fastinterp.cli._attack import add_attack, chosen_attack
from fastinterp.cli._networks import add_one_network, load_one_network, writable_folder
from fastinterp.evaluation import attacked_batches, choose_examples
from fastinterp.evaluation.results import KeptBatches

HELP = "adversarial images as safetensors, and a CSV of what became of each"
IMAGES_FILE, TABLE_FILE = "adversarial.safetensors", "examples.csv"
PARTS = "unfinished"  # the batches of a run that was stopped, from which the next goes on
COLUMNS = (
    *("index", "label", "clean_prediction", "adversarial_prediction", "clean_loss"),
    *("adversarial_loss", "linf", "l2"),
)


def parser(argv: list[str]) -> ArgumentParser:
    attack = ArgumentParser(description=__doc__)
    add_one_network(attack)
    attack.add_argument(
        "--out",
        type=str,
        default="adversarial",
        help=f"folder of {IMAGES_FILE} and {TABLE_FILE}; a run that was stopped goes on there",
    )
    add_attack(attack, examples=0)
    return attack


def run(arguments) -> int:
    function, settings = chosen_attack(arguments)
    network, data = load_one_network(arguments)
    index = choose_examples(len(data.test), arguments.examples, arguments.seed)
    folder = writable_folder("--out", arguments.out)

    kept = KeptBatches(
        partial(function, **settings),
        folder / PARTS,
        {"attack": arguments.attack, **settings},
        say=lambda text: tqdm.write(text),
    )
    images, rows = [], []
    with tqdm(total=len(index), desc="attack", unit="img", disable=None) as bar:
        for x, y, x_adv in attacked_batches(
            network.model,
            data.test,
            index,
            kept,
            batch_size=arguments.batch_size,
            seed=arguments.seed,
            progress=bar.update,
        ):
            images.append(x_adv.cpu())
            rows += _rows(network.model, x, y, x_adv)
    tensors = {"images": torch.cat(images), "labels": data.test.labels[index], "index": index}
    said = {"weights": network.source, "dataset": data.name, "attack": arguments.attack}
    said |= {name: str(value) for name, value in settings.items()}
    write_atomically(
        folder / IMAGES_FILE, lambda temporary: save_file(tensors, temporary, metadata=said)
    )
    text = _csv(index.tolist(), rows)
    write_atomically(folder / TABLE_FILE, lambda temporary: temporary.write_text(text))
    kept.clear()
    clean, adversarial = (sum(row[0] == row[i] for row in rows) for i in (1, 2))
    print(
        f"{len(index)} test images of {data.name}: {clean} classified right, {adversarial} after "
        f"the attack\n{folder / IMAGES_FILE} and {folder / TABLE_FILE}"
    )
    return 0


@torch.no_grad()
def _rows(model, x, y, x_adv) -> list[list]:
    """The COLUMNS of a batch but for the index."""
    with eval_mode(model):
        logits, logits_adv = model(x), model(x_adv)
    change = (x_adv - x).flatten(1)
    columns = (
        y,
        logits.argmax(1),
        logits_adv.argmax(1),
        F.cross_entropy(logits, y, reduction="none"),
        F.cross_entropy(logits_adv, y, reduction="none"),
        change.abs().amax(1),
        torch.linalg.vector_norm(change, dim=1),
    )
    return [list(row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def _csv(index: list[int], rows: list[list]) -> str:
    with io.StringIO() as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for i, row in zip(index, rows, strict=True):
            writer.writerow([i, *(f"{v:.6g}" if isinstance(v, float) else v for v in row)])
        return file.getvalue()
