"""Networks and images as eval, attack, explain and report name them on the command line."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from jsonargparse import ArgumentParser

from fastinterp.cli import add_common, set_up_device
from fastinterp.data import DATASETS, Dataset, load_dataset
from fastinterp.evaluation.pieces import Network
from fastinterp.models import MODELS, check_model, create_model, load_weights
from fastinterp.training.run import CONFIG_FILE, read_config

_DEFAULTS = {"model": "small", "dataset": "mnist"}
_PART = "_"  # what file names of weights are made of


@dataclass(frozen=True)
class Weights:
    """Weights of one network: their file or folder, and the folder of the run they are from."""

    path: Path
    run: Path | None

    @property
    def stem(self) -> str:
        return self.path.name if self.path.is_dir() else self.path.stem


def add_networks(parser: ArgumentParser) -> None:
    models = (*MODELS, "torchvision:NAME or timm:NAME")
    for name, known in (("model", models), ("dataset", DATASETS)):
        parser.add_argument(
            f"--{name}",
            type=str | None,
            default=None,
            help=f"{', '.join(known)} (default: the run's, else {_DEFAULTS[name]})",
        )
    add_common(parser)


def add_one_network(parser: ArgumentParser) -> None:
    """The weights of one network and what they are of."""
    parser.add_argument(
        "weights", type=str, help=".npz, .safetensors, or the folder of a method in a run"
    )
    add_networks(parser)


def find_weights(paths: list[str]) -> list[Weights]:
    """The weights that are meant: files, folders of a method, or whole runs of fastinterp train.

    Raises:
        FileNotFoundError: a run has no finished method.
    """
    found = []
    for path in map(Path, paths):
        if not (path / CONFIG_FILE).is_file():
            run = path.parent if (path.parent / CONFIG_FILE).is_file() and path.is_dir() else None
            found.append(Weights(path, run))
            continue
        methods = read_config(path).methods
        finished = [path / m for m in methods if (path / m / "model.safetensors").is_file()]
        if not finished:
            raise FileNotFoundError(
                f"no method of the run {path} is finished ({', '.join(methods)}); go on with "
                f"fastinterp train --resume {path}"
            )
        found += [Weights(folder, path) for folder in finished]
    return found


def model_and_dataset(weights: list[Weights], arguments) -> tuple[str, str]:
    """--model and --dataset, or those of the runs that the weights are from.

    Raises:
        ValueError: unknown names, or runs that differ.
    """
    chosen = []
    for option in ("model", "dataset"):
        value = arguments[option]
        if value is None:
            of_runs = {getattr(read_config(w.run), option) for w in weights if w.run is not None}
            if len(of_runs) > 1:
                raise ValueError(
                    f"the runs are of more than one {option} ({', '.join(sorted(of_runs))}): give "
                    f"them one by one, or name a --{option} that fits all"
                )
            value = of_runs.pop() if of_runs else _DEFAULTS[option]
        chosen.append(value)
    model, dataset = chosen
    check_model(model)
    if dataset not in DATASETS:
        raise ValueError(f"unknown dataset {dataset!r}; use one of {', '.join(DATASETS)}")
    return model, dataset


def load_images(name: str, arguments) -> Dataset:
    """The data set, fit for an evaluation.

    Raises:
        ValueError: its test images are all of one class.
    """
    data = load_dataset(name, arguments.data_dir, arguments.download)
    seen = data.test.labels.unique()
    if len(seen) < 2:
        raise ValueError(
            f"the {len(data.test)} test images of {name} are all of class "
            f"{', '.join(data.classes[i] for i in seen.tolist())}: accuracy and attacks need at "
            "least two classes"
        )
    return data


def load_networks(
    weights: list[Weights], model: str, data: Dataset, device: torch.device
) -> list[Network]:
    """The networks with names of their own, short ones where the files' names allow it."""
    networks = []
    for name, each in zip(_short_names(weights), weights, strict=True):
        network = create_model(model, data.test.image_shape[0], data.num_classes)
        load_weights(network, each.path)
        networks.append(Network(name, str(each.path), network.to(device).eval()))
    return networks


def load_one_network(arguments) -> tuple[Network, Dataset]:
    """The network that ``arguments.weights`` names, on the device, and its data set.

    Raises:
        ValueError: a run of several methods is named.
    """
    weights = find_weights([arguments.weights])
    if len(weights) > 1:
        raise ValueError(
            f"{arguments.weights} is a run of several methods; name one of "
            f"{', '.join(str(each.path) for each in weights)}"
        )
    model, dataset = model_and_dataset(weights, arguments)
    device = set_up_device(arguments.device, arguments.threads)
    data = load_images(dataset, arguments)
    return load_networks(weights, model, data, device)[0], data


def _short_names(weights: list[Weights]) -> list[str]:
    """Names of files without what all of them begin and end with, if they stay different."""
    names = [each.stem for each in weights]
    if len(set(names)) < len(names):
        names = [f"{each.path.resolve().parent.name}-{each.stem}" for each in weights]
    if len(set(names)) < len(names):
        raise ValueError(f"the same weights are given twice: {', '.join(names)}")
    parts = [name.split(_PART) for name in names]
    if len(parts) > 1:
        for _ in range(2):  # from the front, then from the back
            while min(map(len, parts)) > 1 and len({part[0] for part in parts}) == 1:
                parts = [part[1:] for part in parts]
            parts = [part[::-1] for part in parts]
    return [_PART.join(part) for part in parts]


def writable_folder(option: str, path: str | Path) -> Path:
    """The folder, made if it is not there.

    Raises:
        OSError: it cannot be made or written.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{option} {folder}: the folder cannot be made: {error.strerror}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{option} {folder}: the folder cannot be written")
    return folder
