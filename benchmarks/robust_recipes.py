"""Short recipes beside adv and trades trained the same way, under the strong protocol.

    python -m benchmarks.robust_recipes --data-dir DATA --out FOLDER [--epochs 4] [--only NAME ...]

The released Int networks lose what they keep beyond their training radius as soon as the attack
starts at a random point. The recipes here try to keep it: larger training radii, a slower ramp of
the radius, several starts of the inner maximisation, cross-entropy in it, an average of the
weights. All are MNIST Small with the same batches, learning rates and number of steps. Networks
are trained and attacked in processes of their own; what is finished is kept in FOLDER, where a
stopped run goes on. The table, FOLDER/table.md, is of those asked for that are finished.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import torch
from tabulate import tabulate

from benchmarks import record
from fastinterp._files import write_atomically
from fastinterp.data import load_dataset
from fastinterp.evaluation import choose_examples
from fastinterp.evaluation.pieces import Network, plan
from fastinterp.evaluation.protocol import Protocol, protocol
from fastinterp.evaluation.results import Results
from fastinterp.evaluation.summary import Summary
from fastinterp.models import create_model, load_weights
from fastinterp.training import StopRequest, TrainConfig, Trainer, recipe
from fastinterp.training.run import CONFIG_FILE, prepare

EPS = (0.1, 0.2, 0.3, 0.35, 0.4)
STEPS_PER_EPOCH = 1100
# Method, radius, and what else differs from ``config_of``. Of each method that of radius .3 is the
# paper's, made short.
RECIPES: dict[str, tuple[str, float, dict]] = {
    "adv-0.3": ("adv", 0.3, {}),
    "adv-0.4": ("adv", 0.4, {}),
    "trades-0.3": ("trades", 0.3, {}),
    "trades-0.4": ("trades", 0.4, {}),
    "int-0.3": ("int", 0.3, {}),
    "int-0.35": ("int", 0.35, {}),
    "int-0.4": ("int", 0.4, {}),
    "int-0.4-slow-ramp": ("int", 0.4, {"ramp": 0.8}),
    "int-0.4-2-starts": ("int", 0.4, {"restarts": 2}),
    "int2-0.4": ("int2", 0.4, {}),
    "int2-0.4-2-starts": ("int2", 0.4, {"restarts": 2}),
    "int-adv-0.3": ("int-adv", 0.3, {}),
    "int-adv-0.4": ("int-adv", 0.4, {}),
    "int-adv-0.4-slow-ramp": ("int-adv", 0.4, {"ramp": 0.8}),
    "int-adv-0.4-ema": ("int-adv", 0.4, {"ema": 0.999}),
    "int2-adv-0.4": ("int2-adv", 0.4, {}),
}


def config_of(name: str, epochs: int, attack_steps: int) -> TrainConfig:
    """The configuration of one of RECIPES."""
    method, eps, others = RECIPES[name]
    others = dict(others)
    steps = epochs * STEPS_PER_EPOCH
    ramp = others.pop("ramp", 0.4)  # share of the run until the radius is whole
    return replace(
        recipe("mnist-small-int"),
        method=method,
        epochs=epochs,
        lr=[1e-3],
        lr_schedule="cosine",
        eps=eps,
        eps_warmup=[0, int(ramp * steps)],
        attack_steps=attack_steps,
        step_size=2.5 * eps / attack_steps,
        **others,
    )


def settings_of(arguments) -> Protocol:
    """The strong protocol's accuracies, with fewer images, steps and starts."""
    return replace(
        protocol("strong", "mnist"),
        examples=arguments.examples,
        eps=EPS,
        steps=(arguments.steps,),
        restarts=arguments.restarts,
        autoattack="",
    )


def train(name: str, arguments, data) -> Network:
    """The network of a recipe, trained or found in its folder."""
    config = config_of(name, arguments.epochs, arguments.attack_steps)
    config.check(data)
    folder = arguments.out / name
    prepare(folder, config, resume=(folder / CONFIG_FILE).exists())
    weights = folder / config.method / ("ema.safetensors" if config.ema else "model.safetensors")
    if not weights.exists():
        trainer = Trainer(config, config.method, data, folder / config.method, torch.device("cpu"))
        trainer.resume()
        with StopRequest().listening() as stop:
            trainer.run(stop, quiet=True)
    model = create_model(config.model, 1, data.num_classes)
    load_weights(model, weights)
    return Network(name, str(weights), model.eval())


def attack(network: Network, arguments, data) -> dict:
    """The pieces of the protocol that are accuracies, of one network."""
    settings = settings_of(arguments)
    kinds = {"clean", "no-start", "random-start", *(f"strong-{loss}" for loss in settings.losses)}
    results = Results(arguments.out / "pieces")
    return {
        piece.key: results.get(piece.name, piece.settings, piece.compute)
        for piece in plan(settings, [network], data, batch_size=arguments.examples)
        if piece.kind in kinds
    }


def work(arguments, threads: int, name: str) -> dict:
    torch.set_num_threads(threads)
    data = load_dataset("mnist", arguments.data_dir)
    return attack(train(name, arguments, data), arguments, data)


def table(names: list[str], found: dict, arguments, examples: int) -> str:
    """Clean accuracy, and by radius that of PGD without a start and of the worst attack."""
    settings = settings_of(arguments)
    summary = Summary(
        settings, names, found, choose_examples(examples, settings.examples, settings.seed)
    )
    rows = [
        [
            name,
            f"{100 * summary.clean(name).value:.1f}",
            *(f"{100 * summary.accuracy(name, 'no-start', e).value:.1f}" for e in EPS[-2:]),
            *(f"{100 * summary.accuracy(name, 'worst', e).value:.1f}" for e in EPS),
        ]
        for name in names
    ]
    headers = ["recipe", "clean", *(f"PGD, no start, {e:g}" for e in EPS[-2:])]
    headers += [f"worst, {e:g}" for e in EPS]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--attack-steps", type=int, default=10, help="in training")
    parser.add_argument("--examples", type=int, default=200, help="test images under attack")
    parser.add_argument("--steps", type=int, default=100, help="of the attacks")
    parser.add_argument("--restarts", type=int, default=3, help="of the attacks")
    parser.add_argument("--processes", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args(argv)
    if arguments.processes < 1:
        parser.error(f"--processes must be at least 1, got {arguments.processes}")
    record.require_core()
    data = load_dataset("mnist", arguments.data_dir)
    threads = max(1, torch.get_num_threads() // arguments.processes)
    found = {}
    with ProcessPoolExecutor(arguments.processes, mp_context=get_context("spawn")) as pool:
        running = {pool.submit(work, arguments, threads, name): name for name in arguments.only}
        for future in as_completed(running):
            found |= future.result()
            done = [name for name in arguments.only if (name, "clean", None) in found]
            text = table(done, found, arguments, len(data.test)) + "\n"
            path = arguments.out / "table.md"
            write_atomically(path, lambda temporary, text=text: temporary.write_text(text))
            print(f"{running[future]} is done", flush=True)
    print(text)


if __name__ == "__main__":
    main()
