"""One MNIST epoch of an objective, replayed from the released code's seed, against its weights.

    python -m benchmarks.replay --method trades --data-dir DATA --released FOLDER --runs FOLDER \
        [--csv FILE]

Two runs, at once and with half of the threads each, which go on where they were stopped: from the
initialisation, and from one that differs by 1e-7 of each weight. The distance between their ends is
what rounding alone does to such a run; the distance to the released network
(mnist_smallgap_METHOD_1.npz, where FOLDER has it) is to be read beside it. Both are relative: norm
of the difference over norm of the first run's update, all weights together.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch

from benchmarks import record
from fastinterp.data import load_dataset
from fastinterp.models import create_model, load_weights
from fastinterp.objectives import IG_WEIGHTINGS, METHODS
from fastinterp.training import StopRequest, Trainer, recipe
from fastinterp.training.run import CONFIG_FILE, prepare

RELEASED = {"ig-norm": "ig"}  # names of files that are not the method's
PERTURBATION = 1e-7


def flat(model: torch.nn.Module) -> torch.Tensor:
    """All weights, copied."""
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def run(config, data_dir: str, folder: Path, perturbation: float, threads: int):
    """Weights before and after one epoch, and its seconds."""
    torch.set_num_threads(threads)
    data = load_dataset(config.dataset, data_dir)
    prepare(folder, config, resume=(folder / CONFIG_FILE).exists())
    trainer = Trainer(config, config.method, data, folder, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.mul_(1 + perturbation * torch.randn(p.shape, generator=generator))
    before = flat(trainer.model)
    trainer.resume()
    trainer.run(StopRequest())
    return before, flat(trainer.model), trainer.seconds


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--released", type=Path, required=True)
    parser.add_argument("--runs", type=Path, required=True, help="folder of the two runs")
    parser.add_argument("--ig-weighting", choices=IG_WEIGHTINGS, default="sum")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args(argv)
    record.require_core()

    config = replace(
        recipe(f"mnist-small-{args.method}-1epoch"), rng="paper", ig_weighting=args.ig_weighting
    )
    case = args.method + (f" {args.ig_weighting}" if args.method.startswith("ig") else "")
    threads = max(1, torch.get_num_threads() // 2)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        (before, after, seconds), (_, moved, _) = pool.map(
            partial(run, config, args.data_dir),
            [args.runs / case / "released-init", args.runs / case / "moved-init"],
            [0.0, PERTURBATION],
            [threads, threads],
        )
    update = (after - before).norm()
    rows = [(f"init moved by {PERTURBATION:g}", (moved - after).norm() / update)]
    name = RELEASED.get(args.method, args.method.replace("-", ""))
    file = args.released / f"mnist_smallgap_{name}_1.npz"
    if file.exists():
        released = create_model("small", 1, 10)
        load_weights(released, file)
        rows.insert(0, ("released weights", (flat(released) - after).norm() / update))
    for side, deviation in rows:
        print(f"{case}: {side}: {deviation.item():.4f} ({seconds:.0f} s an epoch)")
    if args.csv:
        record.append(
            args.csv,
            [
                {
                    "benchmark": "replay",
                    "case": f"mnist-small-{case}-1epoch",
                    "side": side,
                    "check": f"{deviation.item():.4f}",
                    "note": f"{seconds:.0f} s",
                }
                for side, deviation in rows
            ],
        )


if __name__ == "__main__":
    main()
