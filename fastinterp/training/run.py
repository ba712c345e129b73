"""A run: a folder with its configuration, one sub-folder per method, a table and a curve."""

from __future__ import annotations

import json
import re
import time
from dataclasses import fields
from pathlib import Path

import torch
import yaml
from tabulate import tabulate
from torch import nn

from fastinterp._files import is_temporary, write_atomically
from fastinterp.data import Dataset, DataWorkerDied
from fastinterp.evaluation import choose_examples, evaluate_pgd
from fastinterp.training.config import TrainConfig
from fastinterp.training.distributed import World
from fastinterp.training.loop import Trainer
from fastinterp.training.metrics import plot_curves
from fastinterp.training.options import RunOptions, StopRequest

CONFIG_FILE = "config.yaml"


def new_folder(parent: Path, name: str) -> Path:
    """A name for a run that is not taken yet, ``parent/name-YYYYmmdd-HHMMSS``."""
    folder = parent / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    candidate, number = folder, 1
    while candidate.exists():
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate


def newest_folder(parent: Path, name: str) -> Path | None:
    """The most recent run of that name below ``parent``, or None."""
    dated = re.compile(re.escape(name) + r"-\d{8}-\d{6}(-\d+)?")
    runs = [
        path.parent
        for path in parent.glob(f"{name}-*/{CONFIG_FILE}")
        if dated.fullmatch(path.parent.name)
    ]
    return max(runs, key=lambda run: (run / CONFIG_FILE).stat().st_mtime, default=None)


def prepare(folder: Path, config: TrainConfig, resume: bool) -> None:
    """Creates a run folder, or checks that an existing one may be continued with ``config``.

    Raises:
        FileExistsError: there is a run already and ``resume`` is False.
        FileNotFoundError: there is none and ``resume`` is True.
        ValueError: it was started with another configuration.
        OSError: the folder cannot be written.
    """
    path = folder / CONFIG_FILE
    if resume:
        if not path.exists():
            raise FileNotFoundError(f"no run to resume in {folder}: it has no {CONFIG_FILE}")
        _require_same(config, read_config(folder), folder)
        return
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; choose another --out")
    # A run killed while it wrote its configuration has left a temporary file and nothing else.
    if folder.exists() and any(not is_temporary(path) for path in folder.iterdir()):
        raise FileExistsError(
            f"{folder} is not empty; add --resume auto to continue the run there, or choose "
            "another --out"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(config.to_dict(), sort_keys=False)
        write_atomically(path, lambda temporary: temporary.write_text(text))
    except OSError as error:
        raise OSError(f"cannot write the run folder {folder}: {error.strerror}") from error


def read_config(folder: Path) -> TrainConfig:
    """The configuration a run was started with."""
    try:
        values = yaml.safe_load((folder / CONFIG_FILE).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{folder / CONFIG_FILE} is damaged: {error}") from error
    names = {option.name for option in fields(TrainConfig)}
    # Options that a run of an earlier version does not name have their defaults, as then.
    if not isinstance(values, dict) or not {"dataset", "model"} <= values.keys() <= names:
        raise ValueError(f"{folder / CONFIG_FILE} is not the configuration of a fastinterp run")
    return TrainConfig(**values)


def _require_same(config: TrainConfig, started: TrainConfig, folder: Path) -> None:
    now, then = config.to_dict(), started.to_dict()
    changed = [
        f"{name}: {then[name]!r}, now {now[name]!r}" for name in now if now[name] != then[name]
    ]
    if changed:
        raise ValueError(
            f"{folder} was started with another configuration ({'; '.join(changed)}); use the same "
            "options, or choose another --out"
        )


def execute(
    folder: Path,
    config: TrainConfig,
    data: Dataset,
    device: torch.device,
    *,
    resume: bool,
    quiet: bool = False,
    options: RunOptions | None = None,
    world: World | None = None,
) -> list[dict]:
    """Trains every method of the run, evaluates them on the same images and writes the results.

    Args:
        folder: prepared by ``prepare``.
        config: checked.
        data: the data set that it names.
        device: where to train.
        resume: continue from the checkpoints in ``folder``.
        quiet: no progress bars.
        options: see RunOptions.
        world: the processes of the job, connected; rank 0 evaluates alone.

    Returns:
        One row per method, and one per average of its weights, as written to ``results.json``; in
        other processes than rank 0 nothing.

    Raises:
        Interrupted, TrainingDiverged, DataError, DataWorkerDied, RankFailed: see Trainer.run.
    """
    options, world = options or RunOptions(), world or World()
    threads = torch.get_num_threads()
    try:
        with StopRequest().listening() as stop:
            trained = _train(folder, config, data, device, resume, quiet, options, world, stop)
            if world.rank > 0:
                return []
            results = _evaluate(trained, config, data, stop)
    finally:
        torch.set_num_threads(threads)
    text = json.dumps(results, indent=2) + "\n"
    write_atomically(folder / "results.json", lambda temporary: temporary.write_text(text))
    plot_curves(folder, config.methods)
    return results


def _train(
    folder, config, data, device, resume, quiet, options, world, stop
) -> list[tuple[str, nn.Module, float]]:
    """Name, network and seconds of every method, and of the average of its weights."""
    trained = []
    chosen = not options.choose_threads
    for method in config.methods:
        trainer = Trainer(config, method, data, folder / method, device, options, world)
        chosen = (resume and trainer.resume()) or chosen
        if not chosen:
            trainer.choose_threads()
            chosen = True
        model = trainer.run(stop, quiet)
        trained.append((method, model, trainer.seconds))
        if trainer.ema is not None:
            trained.append((f"{method} (ema)", trainer.ema.module, trainer.seconds))
    return trained


def _evaluate(trained, config: TrainConfig, data: Dataset, stop: StopRequest) -> list[dict]:
    index = choose_examples(len(data.test), config.eval_examples, config.seed)
    results = []
    for name, model, seconds in trained:
        try:
            scores = evaluate_pgd(
                model,
                data.test,
                index,
                eps=config.eval_eps,
                steps=config.eval_steps,
                step_size=config.eval_step_size,
                progress=lambda _: stop.check("evaluating"),
            )
        except DataWorkerDied:
            stop.check("evaluating")  # the signal may have reached the workers too
            raise
        results.append({"method": name, **scores, "train_seconds": round(seconds, 2)})
    return results


def table(results: list[dict]) -> str:
    """The results as text: clean accuracy and accuracy at every PGD radius, in percent."""
    radii = [entry["eps"] for entry in results[0]["results"]]
    rows = [
        [row["method"], row["clean_accuracy"], *(entry["accuracy"] for entry in row["results"])]
        for row in results
    ]
    rows = [[name, *(f"{100 * value:.1f}" for value in values)] for name, *values in rows]
    return tabulate(rows, ["method", "clean", *(f"PGD {eps:g}" for eps in radii)], stralign="right")
