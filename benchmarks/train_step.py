"""Wall time of Int training beside a plain eager PyTorch loop, alternating, in one process.

    python -m benchmarks.train_step --data-dir DIR [--steps 1100] [--device cuda] [--csv FILE]

Both sides train MNIST Small from the same weights on the same batches and random starts: recipe
mnist-small-int-1epoch (batch 50, 40 attack steps). 1,100 steps are the epoch. The eager side is
what a careful user writes: clean maps once per batch, one forward pass for maps and logits, no
weight gradients in the attack, torch.optim.Adam. Nothing is timed unless both sides' first step
agrees in float64. On a GPU both also run as a CUDA graph, and `fastinterp train` is timed with and
without one. Without MNIST's files the images are noise of its shape: a step takes as long.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from tabulate import tabulate
from torch.nn import functional as F

from benchmarks import record
from fastinterp.data import Dataset, Split, load_dataset
from fastinterp.graphs import GraphedStep
from fastinterp.models import create_model, init_paper
from fastinterp.objectives import Int
from fastinterp.training import RunOptions, StopRequest, Trainer, recipe
from fastinterp.training.metrics import read_metrics
from fastinterp.training.optimizer import EpsilonHatAdam
from fastinterp.training.rng import PaperRng

CONFIG = recipe("mnist-small-int-1epoch")
EPOCH = 1100  # batches of an epoch
BLOCK = 10  # steps of one side before it is the other's turn


class Side:
    """One training step from a ``loss`` and an ``optimizer``."""

    def step(self, x, y, start):
        loss = self.loss(x, y, start)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()


class Eager(Side):
    """The plain PyTorch side."""

    def __init__(self, net):
        self.net = net
        device = net.head.weight.device
        self.optimizer = torch.optim.Adam(
            net.parameters(), lr=CONFIG.lr[0], capturable=device.type == "cuda"
        )

    def maps(self, x):
        features = self.net.features(x)
        maps = torch.einsum("kc,nchw->nkhw", self.net.head.weight, features)
        return maps, maps.mean((2, 3))

    def discrepancy(self, clean, maps, logits, y):
        distances = (clean - maps).abs().sum((2, 3))
        p = logits.softmax(1)
        true = F.one_hot(y, p.shape[1]).to(p.dtype)
        q = p * (1 - true)
        return ((true + q / q.sum(1, keepdim=True)) * distances).sum(1)

    def loss(self, x, y, start):
        eps = CONFIG.eps
        clean, logits = self.maps(x)
        z = (x + start).clamp(0, 1)
        for _ in range(CONFIG.attack_steps):
            z.requires_grad_()
            d = self.discrepancy(clean.detach(), *self.maps(z), y)
            (grad,) = torch.autograd.grad(d.sum(), z)
            z = z.detach() + CONFIG.step_size * grad.sign()
            z = torch.min(torch.max(z, x - eps), x + eps).clamp(0, 1)
        d = self.discrepancy(clean, *self.maps(z), y)
        return F.cross_entropy(logits, y) + CONFIG.gamma * d.mean()


class Ours(Side):
    """The objective and the optimizer of the training loop."""

    def __init__(self, net):
        self.optimizer = EpsilonHatAdam(net.parameters(), lr=CONFIG.lr[0])
        self.objective = Int(
            net, step_size=CONFIG.step_size, steps=CONFIG.attack_steps, gamma=CONFIG.gamma
        )

    def loss(self, x, y, start):
        return self.objective(x, y, CONFIG.eps, start)[0]


def new_net():
    net = create_model("small", 1, 10)
    init_paper(net, np.random.RandomState(CONFIG.seed))
    return net


def check(batch) -> float:
    """Largest relative difference of the two sides' gradients at the first step, in float64."""
    x, y, start = (t.double() if t.is_floating_point() else t for t in batch)
    gradients = []
    for side in (Eager, Ours):
        net = new_net().double()
        loss = side(net).loss(x, y, start)
        gradients.append(
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, net.parameters())])
        )
    return ((gradients[0] - gradients[1]).norm() / gradients[0].norm()).item()


class Graphed:
    """A side's step as a CUDA graph, its sums and its optimizer in it."""

    def __init__(self, side: Side):
        self.step = GraphedStep(side.step, mode="on")


def mnist(data_dir: str | None) -> Dataset:
    """MNIST, or noise of its shape where its files are not there."""
    try:
        return load_dataset("mnist", data_dir)
    except FileNotFoundError:
        print("MNIST's files are not there: noise of its shape takes their place")
    generator = torch.Generator().manual_seed(0)

    def split(n):
        images = torch.randint(0, 256, (n, 1, 28, 28), dtype=torch.uint8, generator=generator)
        return Split(images, torch.randint(0, 10, (n,), generator=generator))

    return Dataset("mnist", 10, tuple("0123456789"), *map(split, (55_000, 5_000, 10_000)))


def trained(data: Dataset, device: torch.device, steps: int, cuda_graph: bool) -> list[float]:
    """Seconds per step of ``fastinterp train`` on the recipe, one for every ten steps."""
    options = RunOptions(limit_steps=steps, cuda_graph=cuda_graph, checkpoint_seconds=1e9)
    config = dataclasses.replace(CONFIG, rng="torch")  # whose random starts are drawn on a GPU
    with tempfile.TemporaryDirectory() as folder:
        Trainer(config, "int", data, Path(folder), device, options).run(StopRequest(), quiet=True)
        rows = read_metrics(Path(folder) / "metrics.jsonl")
    return [config.batch_size / row["images_per_second"] for row in rows[1:]]  # warm


def rows_of(case: str, seconds: dict[str, list[float]], check: str) -> list[dict]:
    """Rows of the CSV; the speed-up is over the first side."""
    median = {name: statistics.median(times) for name, times in seconds.items()}
    first = next(iter(median.values()))
    return [
        {
            "benchmark": "train_step",
            "case": case,
            "side": name,
            **record.quantiles(times),
            "ratio": f"{first / median[name]:.2f}",
            "check": check,
            "note": f"{CONFIG.batch_size / median[name]:.0f} images/s",
        }
        for name, times in seconds.items()
    ]


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir")
    parser.add_argument("--steps", type=int, default=EPOCH, help="of each side; 1100 are an epoch")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--csv", type=Path, default=record.RESULTS / "cpu.csv")
    arguments = parser.parse_args(argv)
    if arguments.steps < 2:
        parser.error(f"--steps must be at least 2, got {arguments.steps}")

    record.require_core()
    device, steps = torch.device(arguments.device), arguments.steps
    data = mnist(arguments.data_dir)
    rng = PaperRng(CONFIG.seed)
    order = rng.permutation(len(data.train)).split(CONFIG.batch_size)

    def batch(i):
        x, y = data.train.batch(order[i % EPOCH])
        return tuple(t.to(device) for t in (x, y, rng.start(x, CONFIG.eps)))

    difference = check(t.cpu() for t in batch(0))
    if not difference < 1e-6:
        print(f"the two sides disagree at the first step: {difference:.2e}; nothing is timed")
        return 1
    sides = {
        "eager": Eager(new_net().to(device)),
        "eager channels_last": Eager(new_net().to(device, memory_format=torch.channels_last)),
        "fastinterp": Ours(new_net().to(device)),
    }
    if device.type == "cuda":
        sides["eager, CUDA graph"] = Graphed(Eager(new_net().to(device)))
        sides["fastinterp, CUDA graph"] = Graphed(Ours(new_net().to(device)))
    seconds = {name: [] for name in sides}
    for begin in range(0, steps, BLOCK):
        batches = [batch(i) for i in range(begin, min(begin + BLOCK, steps))]
        for name, side in sides.items():
            for one in batches:
                start = time.perf_counter()
                side.step(*one)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                seconds[name].append(time.perf_counter() - start)
    rows = rows_of(f"mnist-small-int-1epoch, {steps} steps", seconds, f"{difference:.1e}")
    if device.type == "cuda":
        programs = {
            f"fastinterp train{' --cuda-graph' * graph}": trained(data, device, 3 * steps, graph)
            for graph in (False, True)
        }
        rows += rows_of(f"mnist-small-int-1epoch, program, {3 * steps} steps", programs, "")
    record.append(arguments.csv, rows)
    shown = [[row["side"], row["ms_p50"], row["ratio"], row["note"]] for row in rows]
    print(tabulate(shown, ["side", "ms per step (median)", "speed-up", ""]))
    print(f"gradients of the first step differ by {difference:.1e} in float64")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
