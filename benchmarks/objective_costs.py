"""What a training step of each objective costs: python -m benchmarks.objective_costs --net small

Ours (fastinterp.objectives on the fused network) and the same objective in plain PyTorch
(benchmarks/methods.py), one step each in turn, from the images to the parameters' gradients. The
gradients agree in float64 before anything is timed.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from pathlib import Path

import torch
from tabulate import tabulate

from benchmarks import gate, methods, networks, record
from fastinterp import fuse
from fastinterp.objectives import METHODS

EPS, STEP_SIZE = 8 / 255, 2 / 255
ALLOWED = 1e-6  # relative, in float64; a pixel whose gradient is zero but for rounding may turn


class Case:
    """One objective on one network, ours and plain."""

    def __init__(self, name: str, method: str, steps: int, batch: int, dtype, layout):
        network = networks.NETWORKS[name]
        generator = torch.Generator().manual_seed(0)
        size = (batch, network.channels, network.size, network.size)
        x, start = (torch.rand(size, generator=generator, dtype=torch.float64) for _ in range(2))
        self.x, self.start = (
            t.to(dtype).contiguous(memory_format=layout) for t in (x, EPS * (2 * start - 1))
        )
        self.y = torch.randint(0, 10, (batch,), generator=generator)
        self.method, self.steps = method, steps
        self.plain = networks.build(name).to(dtype, memory_format=layout)
        self.objective = METHODS[method](
            fuse(copy.deepcopy(self.plain)), step_size=STEP_SIZE, steps=steps
        )

    def ours(self) -> list[torch.Tensor]:
        model = self.objective.model
        model.zero_grad(set_to_none=True)
        self.objective(self.x, self.y, EPS, self.start)[0].backward()
        return [p.grad for p in model.parameters()]

    def eager(self) -> list[torch.Tensor]:
        self.plain.zero_grad(set_to_none=True)
        how = dict(eps=EPS, step_size=STEP_SIZE, steps=self.steps)
        methods.loss(self.method, self.plain, self.x, self.y, self.start, **how).backward()
        return [p.grad for p in self.plain.parameters()]


def measure(name, method, steps, batch, repeats) -> tuple[float, list[float], list[float]]:
    """The gate's error in float64, and seconds of ours and of plain PyTorch in float32."""
    exact = Case(name, method, steps, min(batch, 8), torch.float64, torch.contiguous_format)
    error = gate.relative_error(exact.ours(), exact.eager())
    if not error <= ALLOWED:
        raise SystemExit(f"{method} on {name}: gradients differ by {error:.1e}, not timed")
    case = Case(name, method, steps, batch, torch.float32, torch.channels_last)
    seconds = [], []
    for i in range(repeats + 1):
        for side, step in zip(seconds, (case.ours, case.eager), strict=True):
            begin = time.perf_counter()
            step()
            if i:
                side.append(time.perf_counter() - begin)
    return error, *seconds


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--net", choices=("small", "wresnet", "wrn16-4"), default="small")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--steps", type=int, default=10, help="of the attack")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args(argv)
    if args.repeats < 2:
        parser.error(f"--repeats must be at least 2, got {args.repeats}")
    record.require_core()

    batch, rows, normal, table = networks.NETWORKS[args.net].batch, [], None, []
    for method in args.methods:
        error, ours, eager = measure(args.net, method, args.steps, batch, args.repeats)
        medians = [1e3 * statistics.median(side) for side in (ours, eager)]
        normal = medians if method == "normal" else normal
        relative = [m / n for m, n in zip(medians, normal, strict=True)] if normal else ["", ""]
        table.append([method, *medians, medians[1] / medians[0], *relative])
        rows += [
            {
                "benchmark": "objective",
                "case": f"{args.net} {method} N={batch} channels_last, {args.steps} attack steps",
                "side": side,
                **record.quantiles(seconds),
                "ratio": f"{medians[1] / median:.3g}",
                "check": f"{error:.1e}",
                "note": f"{times:.3g}x normal" if normal else "",
            }
            for side, seconds, median, times in zip(
                ("fastinterp", "eager"), (ours, eager), medians, relative, strict=True
            )
        ]
        if args.csv:
            record.append(args.csv, rows[-2:])
    headers = ["method", "ours, ms", "eager, ms", "eager / ours", "ours / normal", "eager / normal"]
    print(tabulate(table, headers, floatfmt=".3g"))


if __name__ == "__main__":
    main()
