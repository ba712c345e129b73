"""Images per second of PGD and AAI: python -m benchmarks.attacks [--steps 50] [--csv FILE]

Ours is what evaluation runs, all images in one batch. Beside it stands the plain way, one image at
a time as the paper's released evaluation does ("eager"), and the same loop over the whole batch
("eager batched"); neither stops early. The images that the sides end at agree in float64 before
anything is timed, and times are per image.
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
from fastinterp.attacks import attack_interpretation, pgd
from fastinterp.data import load_dataset
from fastinterp.models import create_model, init_paper

EPS, STEP_SIZE, K = 0.3, 0.01, 8
CHECKED, CHECKED_STEPS = 6, 20  # images and steps of the comparison in float64
ALLOWED = 1e-9
BATCH, ALONE = 200, 20  # images of the batched sides and of the one that takes them one by one


def pgd_loss(net, x, y):
    return lambda z: F.cross_entropy(net(z), y, reduction="none")


def aai_loss(net, x, y):
    def maps(z):
        return torch.einsum("nc,nchw->nhw", net.head.weight[y], net.features(z)).flatten(1)

    with torch.no_grad():
        top = maps(x).topk(K, 1).indices
    return lambda z: -maps(z).gather(1, top).sum(1)


def plain(loss, net, x, y, start, steps):
    """The loop of a careful user: no parameter gradients, sign steps, projection, clipping."""
    raised = loss(net, x, y)
    z = (x + start).clamp(0, 1)
    for _ in range(steps):
        z.requires_grad_()
        (grad,) = torch.autograd.grad(raised(z).sum(), z)
        z = z.detach() + STEP_SIZE * grad.sign()
        z = torch.min(torch.max(z, x - EPS), x + EPS).clamp(0, 1)
    return z


def one_by_one(loss, net, *batch, steps):
    parts = [plain(loss, net, *(t[i : i + 1] for t in batch), steps) for i in range(len(batch[0]))]
    return torch.cat(parts)


def our_pgd(net, x, y, start, steps):
    how = dict(eps=EPS, step_size=STEP_SIZE, steps=steps, start=start)
    return pgd(net, x, y, **how)


def our_aai(net, x, y, start, steps):
    how = dict(eps=EPS, step_size=STEP_SIZE, steps=steps, start=start, k=K)
    return attack_interpretation(net, x, y, **how).x_adv


ATTACKS = {"PGD": (pgd_loss, our_pgd), "AAI": (aai_loss, our_aai)}


def problem(dtype: torch.dtype):
    """Small as the paper initialises it, with test images of digits and random starts."""
    net = create_model("small", 1, 10)
    init_paper(net, np.random.RandomState(99))
    net = net.to(dtype).eval().requires_grad_(False)
    x, y = load_dataset("digits").test.batch(slice(0, BATCH), dtype)
    generator = torch.Generator().manual_seed(0)
    start = EPS * (2 * torch.rand(x.shape, dtype=dtype, generator=generator) - 1)
    return net, x, y, start


def check(name: str) -> float:
    """The largest difference of a pixel between the sides' results, in float64."""
    loss, ours = ATTACKS[name]
    net, *batch = problem(torch.float64)
    batch = [t[:CHECKED] for t in batch]
    alone = one_by_one(loss, net, *batch, steps=CHECKED_STEPS)
    others = plain(loss, net, *batch, CHECKED_STEPS), ours(net, *batch, CHECKED_STEPS)
    return max((other - alone).abs().max().item() for other in others)


def measure(name: str, steps: int, repeats: int) -> dict[str, list[float]]:
    """Seconds per image of each side, the sides in turn."""
    loss, ours = ATTACKS[name]
    net, *batch = problem(torch.float32)
    few = [t[:ALONE] for t in batch]
    sides = {
        "eager": (ALONE, lambda steps: one_by_one(loss, net, *few, steps=steps)),
        "eager batched": (BATCH, lambda steps: plain(loss, net, *batch, steps)),
        "fastinterp": (BATCH, lambda steps: ours(net, *batch, steps)),
    }
    for _, side in sides.values():
        side(2)  # what is made once
    seconds = {side: [] for side in sides}
    for _ in range(repeats):
        for side, (images, run) in sides.items():
            begin = time.perf_counter()
            run(steps)
            seconds[side].append((time.perf_counter() - begin) / images)
    return seconds


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS, default=list(ATTACKS))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--csv", type=Path)
    args = record.parse_with_repeats(parser, argv)
    record.require_core()

    table = []
    for name in args.attacks:
        error = check(name)
        if not error <= ALLOWED:
            raise SystemExit(f"{name}: the sides' images differ by {error:.1e}, not timed")
        seconds = measure(name, args.steps, args.repeats)
        median = {side: statistics.median(times) for side, times in seconds.items()}
        rows = [
            {
                "benchmark": "attacks",
                "case": f"{name} small 28x28, {args.steps} steps, per image",
                "side": side,
                **record.quantiles(times),
                "ratio": f"{median['eager'] / median[side]:.3g}",
                "check": f"{error:.1e}",
                "note": f"{1 / median[side]:.3g} images/s, "
                + (f"{ALONE} one by one" if side == "eager" else f"{BATCH} at a time"),
            }
            for side, times in seconds.items()
        ]
        table += [[name, side, 1 / m, 1e3 * m, median["eager"] / m] for side, m in median.items()]
        if args.csv:
            record.append(args.csv, rows)
    print(tabulate(table, ["attack", "side", "images/s", "ms", "over eager"], floatfmt=".3g"))


if __name__ == "__main__":
    main()
