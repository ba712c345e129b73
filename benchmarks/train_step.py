"""Wall time of Int training beside a plain eager PyTorch loop, alternating, in one process.

    python -m benchmarks.train_step --data-dir DIR [--steps 1100] [--csv FILE]

Both sides train MNIST Small from the same weights on the same batches and random starts: recipe
mnist-small-int-1epoch (batch 50, 40 attack steps). 1,100 steps are the epoch. The eager side is
what a careful user writes: clean maps once per batch, one forward pass for maps and logits, no
weight gradients in the attack, torch.optim.Adam. Nothing is timed unless both sides' first step
agrees in float64.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from tabulate import tabulate
from torch.nn import functional as F

from benchmarks import record
from fastinterp.data import load_dataset
from fastinterp.models import create_model, init_paper
from fastinterp.objectives import Int
from fastinterp.training import recipe
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


class Eager(Side):
    """The plain PyTorch side."""

    def __init__(self, net):
        self.net = net
        self.optimizer = torch.optim.Adam(net.parameters(), lr=CONFIG.lr[0])

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


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir")
    parser.add_argument("--steps", type=int, default=EPOCH, help="of each side; 1100 are an epoch")
    parser.add_argument("--csv", type=Path, default=record.RESULTS / "cpu.csv")
    arguments = parser.parse_args(argv)

    record.require_core()
    train = load_dataset("mnist", arguments.data_dir).train
    rng = PaperRng(CONFIG.seed)
    order = rng.permutation(len(train)).split(CONFIG.batch_size)

    def batch(i):
        x, y = train.batch(order[i % EPOCH])
        return x, y, rng.start(x, CONFIG.eps)

    difference = check(batch(0))
    if not difference < 1e-6:
        print(f"the two sides disagree at the first step: {difference:.2e}; nothing is timed")
        return 1
    sides = {
        "eager": Eager(new_net()),
        "eager channels_last": Eager(new_net().to(memory_format=torch.channels_last)),
        "fastinterp": Ours(new_net()),
    }
    seconds = {name: [] for name in sides}
    for begin in range(0, arguments.steps, BLOCK):
        batches = [batch(i) for i in range(begin, min(begin + BLOCK, arguments.steps))]
        for name, side in sides.items():
            for one in batches:
                start = time.perf_counter()
                side.step(*one)
                seconds[name].append(time.perf_counter() - start)

    median = {name: statistics.median(times) for name, times in seconds.items()}
    rows = [
        {
            "benchmark": "train_step",
            "case": f"mnist-small-int-1epoch, {arguments.steps} steps",
            "side": name,
            **record.quantiles(times),
            "ratio": f"{median['eager'] / median[name]:.2f}",
            "check": f"{difference:.1e}",
        }
        for name, times in seconds.items()
    ]
    record.append(arguments.csv, rows)
    shown = [
        [row["side"], row["ms_p50"], f"{sum(seconds[row['side']]):.1f}", row["ratio"]]
        for row in rows
    ]
    print(tabulate(shown, ["side", "ms per step (median)", "s in all", "speed-up"]))
    print(f"gradients of the first step differ by {difference:.1e} in float64")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
