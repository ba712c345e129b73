"""fastinterp train: trains the methods of a recipe, compares them and leaves a run folder."""

from __future__ import annotations

import argparse
import typing
from pathlib import Path

import yaml
from jsonargparse import ArgumentParser

from fastinterp.cli import add_common, set_up_device
from fastinterp.data import load_dataset
from fastinterp.training import DEFAULT_RECIPE, RECIPES, Interrupted, TrainConfig, recipe
from fastinterp.training.config import OPTIONS
from fastinterp.training.run import (
    CONFIG_FILE,
    execute,
    new_folder,
    newest_folder,
    prepare,
    read_config,
    table,
)

HELP = "train the methods of a recipe and compare them"
RUNS = Path("runs")


def _resumed_folder(recipe_name: str, resume: str | None, out: str | None) -> Path | None:
    """The run that --resume means, or None for a new one."""
    if resume is None:
        return None
    if resume != "auto":
        if out is not None and Path(out) != Path(resume):
            raise ValueError(f"--resume {resume} and --out {out} name two folders; give one")
        return Path(resume)
    if out is None:
        return newest_folder(RUNS, recipe_name)
    return Path(out) if (Path(out) / CONFIG_FILE).exists() else None


def _defaults(argv: list[str]) -> TrainConfig:
    """The configuration that options on the command line then change: a run's or a recipe's."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--recipe", "--resume", "--out", "--config"):
        early.add_argument(name)
    known, _ = early.parse_known_args(argv)
    name = known.recipe
    if name is None and known.config is not None:
        try:
            loaded = yaml.safe_load(Path(known.config).read_text())
        except yaml.YAMLError as error:
            raise ValueError(f"--config {known.config} is not YAML: {error}") from error
        name = loaded.get("recipe") if isinstance(loaded, dict) else None
    name = name or DEFAULT_RECIPE
    base = recipe(name)
    folder = _resumed_folder(name, known.resume, known.out)
    return base if folder is None or not (folder / CONFIG_FILE).exists() else read_config(folder)


def parser(argv: list[str]) -> ArgumentParser:
    train = ArgumentParser(description=__doc__, print_config="--print-config")
    train.add_argument("--config", action="config", help="YAML file of the options below")
    train.add_argument("--recipe", default=DEFAULT_RECIPE, help=f"one of {', '.join(RECIPES)}")
    train.add_argument(
        "--out", type=str | None, default=None, help="run folder (default: runs/RECIPE-DATE-TIME)"
    )
    train.add_argument(
        "--resume",
        type=str | None,
        default=None,
        help="auto, or the folder of a run: continue it with its own configuration",
    )
    train.add_argument(
        "--checkpoint-seconds",
        type=float,
        default=10.0,
        help="write a checkpoint this often; 0 after every step",
    )
    add_common(train)
    train.add_argument("--quiet", action="store_true", help="no progress bar")
    defaults = _defaults(argv) if argv[:1] == ["train"] else recipe(DEFAULT_RECIPE)
    kinds = typing.get_type_hints(TrainConfig)
    for option in OPTIONS:
        kind, many = kinds[option.name], {}
        if typing.get_origin(kind) is list:
            (kind,), many = typing.get_args(kind), {"nargs": "*"}
        train.add_argument(
            f"--{option.name.replace('_', '-')}",
            type=kind,
            default=getattr(defaults, option.name),
            help=option.metadata["help"],
            **many,
        )
    return train


def run(arguments) -> int:
    config = TrainConfig(**{option.name: arguments[option.name] for option in OPTIONS})
    config.check()
    device = set_up_device(arguments.device, arguments.threads)
    folder = _resumed_folder(arguments.recipe, arguments.resume, arguments.out)
    resume = folder is not None
    if folder is None:
        folder = Path(arguments.out) if arguments.out else new_folder(RUNS, arguments.recipe)
    data = load_dataset(config.dataset, arguments.data_dir, arguments.download)
    config.check(data)
    prepare(folder, config, resume)
    print(f"{'continuing' if resume else 'run folder'}: {folder}", flush=True)
    try:
        results = execute(
            folder,
            config,
            data,
            device,
            resume=resume,
            quiet=arguments.quiet,
            checkpoint_seconds=arguments.checkpoint_seconds,
        )
    except Interrupted as stopped:
        data_dir = f" --data-dir {arguments.data_dir}" if arguments.data_dir else ""
        print(f"{stopped}; go on with: fastinterp train --resume {folder}{data_dir}")
        return 130
    print(f"\naccuracy in percent on {results[0]['examples']} test images of {config.dataset}")
    print(table(results))
    print(f"\nweights, metrics, curves.png and results.json are in {folder}")
    return 0
