"""fastinterp train: trains the methods of a recipe, compares them and leaves a run folder.

On several GPUs or machines: torchrun --nproc-per-node N -m fastinterp train ...
"""

from __future__ import annotations

import argparse
import os
import typing
import warnings
from pathlib import Path

import yaml
from jsonargparse import ActionYesNo, ArgumentParser

from fastinterp.cli import add_common, set_up_device
from fastinterp.data import load_dataset
from fastinterp.training import (
    DEFAULT_RECIPE,
    RECIPES,
    Interrupted,
    RunOptions,
    TrainConfig,
    recipe,
)
from fastinterp.training.config import OPTIONS
from fastinterp.training.distributed import World
from fastinterp.training.metrics import import_wandb
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
    train.add_argument(
        "--limit-steps", type=int, default=0, help="end every method after so many steps; 0: do not"
    )
    train.add_argument(
        "--workers",
        type=int | None,
        default=None,
        help="read the images of restricted-imagenet or folder from disk in so many processes "
        "(default: hold them in memory where they fit half of it, else one per core)",
    )
    train.add_argument(
        "--profile", type=int, default=0, help="write a Chrome trace of so many steps, trace.json"
    )
    train.add_argument(
        "--wandb", type=str | None, default=None, help="project of Weights & Biases to log to"
    )
    train.add_argument(
        "--cuda-graph", action="store_true", help="replay steps as a CUDA graph: for a single GPU"
    )
    add_common(train)
    train.add_argument("--quiet", action="store_true", help="no progress bar")
    defaults = _defaults(argv) if argv[:1] == ["train"] else recipe(DEFAULT_RECIPE)
    kinds, groups = typing.get_type_hints(TrainConfig), {}
    for option in OPTIONS:
        group = option.metadata["group"]
        if group not in groups:
            groups[group] = train.add_argument_group(group)
        kind = kinds[option.name]
        if kind is bool:
            how = {"action": ActionYesNo}
        elif typing.get_origin(kind) is list:
            how = {"type": typing.get_args(kind)[0], "nargs": "*"}
        else:
            how = {"type": kind}
        groups[group].add_argument(
            f"--{option.name.replace('_', '-')}",
            default=getattr(defaults, option.name),
            help=option.metadata["help"],
            **how,
        )
    return train


def run(arguments) -> int:
    config = TrainConfig(**{option.name: arguments[option.name] for option in OPTIONS})
    config.check()
    world = World.from_environment()
    if world.rank > 0:
        warnings.simplefilter("ignore")  # rank 0 has said it
    device = set_up_device(_local(arguments.device, world), arguments.threads)
    options = RunOptions(
        checkpoint_seconds=arguments.checkpoint_seconds,
        limit_steps=arguments.limit_steps,
        profile=arguments.profile,
        wandb=arguments.wandb,
        cuda_graph=arguments.cuda_graph,
        choose_threads=device.type == "cpu"
        and world.size == 1
        and not (arguments.threads or "OMP_NUM_THREADS" in os.environ),
    )
    if options.wandb is not None:
        import_wandb()
    config.check_world(world.size, device)
    options.check_world(world.size, device)
    data = load_dataset(config.dataset, arguments.data_dir, arguments.download, arguments.workers)
    config.check(data)
    with world.connected(device):
        folder, resume = world.from_first(_folder(arguments, config, world))
        try:
            results = execute(
                folder,
                config,
                data,
                device,
                resume=resume,
                quiet=arguments.quiet,
                options=options,
                world=world,
            )
        except Interrupted as stopped:
            if world.rank == 0:
                again = f"fastinterp train --resume {folder}"
                for name, value in (
                    ("data-dir", arguments.data_dir),
                    ("workers", arguments.workers),
                ):
                    again += f" --{name} {value}" if value else ""
                print(f"{stopped}; go on with: {again}")
            return 130
    if world.rank == 0:
        examples = results[0]["examples"]
        print(f"\naccuracy in percent on {examples} test images of {config.dataset}")
        print(table(results))
        print(f"\nweights, metrics, curves.png and results.json are in {folder}")
    return 0


def _local(device: str, world: World) -> str:
    """Each process of a machine takes the GPU of its number."""
    if world.size == 1 or device not in ("auto", "cuda"):
        return device
    import torch

    return f"cuda:{world.local_rank}" if device == "cuda" or torch.cuda.is_available() else "cpu"


def _folder(arguments, config: TrainConfig, world: World) -> tuple[Path, bool] | None:
    """The prepared run folder and whether it is continued; None but in rank 0."""
    if world.rank > 0:
        return None
    folder = _resumed_folder(arguments.recipe, arguments.resume, arguments.out)
    resume = folder is not None
    if folder is None:
        folder = Path(arguments.out) if arguments.out else new_folder(RUNS, arguments.recipe)
    prepare(folder, config, resume)
    print(f"{'continuing' if resume else 'run folder'}: {folder}", flush=True)
    return folder, resume
