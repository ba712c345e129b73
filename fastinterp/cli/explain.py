"""fastinterp explain: maps of the true and the predicted class over images, clean and perturbed."""

from __future__ import annotations

from pathlib import Path

import torch
from jsonargparse import ArgumentParser
from tabulate import tabulate

from fastinterp._files import write_atomically
from fastinterp.cli._attack import add_attack, chosen_attack
from fastinterp.cli._networks import add_one_network, load_one_network, writable_folder
from fastinterp.data import Dataset, Split
from fastinterp.data.pictures import find_pictures, read_pictures
from fastinterp.evaluation import choose_examples
from fastinterp.evaluation.accuracy import attacked_batches
from fastinterp.evaluation.overlays import MAPS, Explained, explain, overlay_figure

HELP = "overlays of interpretation maps, clean beside perturbed"


def parser(argv: list[str]) -> ArgumentParser:
    options = ArgumentParser(description=__doc__)
    add_one_network(options)
    options.add_argument(
        "--images",
        type=str,
        nargs="+",
        default=[],
        help="image files or folders; their true class is what the network says of them",
    )
    options.add_argument("--index", type=int, nargs="+", default=[], help="test images by number")
    options.add_argument("--map", default="cam", help=", ".join(MAPS))
    options.add_argument("--out", type=str, default="explained", help="folder of the PNG files")
    add_attack(options, examples=5)
    return options


def run(arguments) -> int:
    function, settings = chosen_attack(arguments)
    if arguments.map not in MAPS:
        raise ValueError(f"--map must be one of {', '.join(MAPS)}, got {arguments.map!r}")
    if arguments.images and arguments.index:
        raise ValueError("--images and --index name two kinds of images; give one")
    files = find_pictures(arguments.images)
    network, data = load_one_network(arguments)
    split, names = _images(arguments, data, files)
    folder = writable_folder("--out", arguments.out)

    def attack(model, x, y, **context):
        # A file has no label: what the network says of it is to be left.
        labels = model(x).argmax(1) if files else y
        return function(model, x, labels, **settings, **context)

    rows = []
    batches = attacked_batches(
        network.model,
        split,
        torch.arange(len(split)),
        attack,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
    )
    for x, y, x_adv in batches:
        found = explain(network.model, x, x_adv, None if files else y, arguments.map)
        for i in range(len(x)):
            name = names[len(rows)]
            figure = overlay_figure(found.at(i), data.classes)
            write_atomically(
                folder / f"{name}.png",
                lambda temporary, figure=figure: figure.savefig(temporary, format="png", dpi=130),
            )
            rows.append(_row(name, found, i, data))
    head = ["image", "true" if not files else "", "clean", "perturbed", "D"]
    print(tabulate(rows, head, disable_numparse=True))
    print(f"\n{len(rows)} overlays in {folder}; D is the two-class l1 distance of the maps")
    return 0


def _images(arguments, data: Dataset, files: list[Path]) -> tuple[Split, list[str]]:
    """The images with a name for each; files get the label 0, which is not used."""
    if files:
        images = read_pictures(files, data.test.image_shape)
        names = [file.stem for file in files]
        if len(set(names)) < len(names):
            names = [f"{i}-{name}" for i, name in enumerate(names)]
        return Split(images, torch.zeros(len(files), dtype=torch.int64)), names
    index = torch.tensor(arguments.index)
    if not arguments.index:
        index = choose_examples(len(data.test), arguments.examples, arguments.seed)
    elif index.min() < 0 or index.max() >= len(data.test):
        raise ValueError(
            f"--index must lie in 0 .. {len(data.test) - 1}, got "
            f"{' '.join(map(str, arguments.index))}"
        )
    split = Split(data.test.pixels(index), data.test.labels[index])
    return split, [f"test-{i}" for i in index.tolist()]


def _row(name: str, found: Explained, i: int, data: Dataset) -> list[str]:
    classes = [data.classes[int(c[i])] for c in (found.true, found.before, found.after)]
    if not found.labelled:
        classes[0] = ""
    return [name, *classes, f"{found.discrepancy[i].item():.4g}"]
