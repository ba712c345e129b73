"""What a training step of each objective costs: python -m benchmarks.objective_costs --net small

    ... --net resnet18-cifar --methods normal int --map ig --dtype bf16 --batch 8 --steps 1

Ours (fastinterp.objectives on the fused network) and the same objective in plain PyTorch
(benchmarks/methods.py), one step each in turn, from the images to the parameters' gradients. The
gradients agree in float64 before anything is timed. bf16 is autocast on both sides. Of ours the
share of the step that the inner maximisation takes is measured too.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch
from tabulate import tabulate

from benchmarks import gate, methods, networks, record
from fastinterp import fuse
from fastinterp._timing import Clock
from fastinterp.objectives import METHODS

EPS, STEP_SIZE = 8 / 255, 2 / 255
ALLOWED = 1e-6  # relative, in float64; a pixel whose gradient is zero but for rounding may turn
MAPS = {"cam": "cam", "ig": "integrated_gradients"}


class Case:
    """One objective on one network, ours and plain."""

    def __init__(
        self, name: str, method: str, map: str, steps: int, batch: int, dtype, layout, amp=False
    ):
        network = networks.NETWORKS[name]
        generator = torch.Generator().manual_seed(0)
        size = (batch, network.channels, network.size, network.size)
        x, start = (torch.rand(size, generator=generator, dtype=torch.float64) for _ in range(2))
        self.x, self.start = (
            t.to(dtype).contiguous(memory_format=layout) for t in (x, EPS * (2 * start - 1))
        )
        self.y = torch.randint(0, 10, (batch,), generator=generator)
        self.method, self.map, self.steps, self.amp = method, map, steps, amp
        self.plain = networks.build(name).to(dtype, memory_format=layout)
        self.objective = METHODS[method](
            fuse(copy.deepcopy(self.plain)),
            step_size=STEP_SIZE,
            steps=steps,
            map=MAPS[map],
            ig_steps=methods.IG_POINTS,
        )
        self.clock = Clock(torch.device("cpu"))

    def autocast(self):
        return torch.autocast("cpu", torch.bfloat16, enabled=self.amp)

    def ours(self) -> list[torch.Tensor]:
        model = self.objective.model
        model.zero_grad(set_to_none=True)
        with self.clock.running(), self.autocast():
            loss, _ = self.objective(self.x, self.y, EPS, self.start)
        loss.backward()
        return [p.grad for p in model.parameters()]

    def eager(self) -> list[torch.Tensor]:
        self.plain.zero_grad(set_to_none=True)
        how = dict(eps=EPS, step_size=STEP_SIZE, steps=self.steps, map=self.map)
        with self.autocast():
            loss = methods.loss(self.method, self.plain, self.x, self.y, self.start, **how)
        loss.backward()
        return [p.grad for p in self.plain.parameters()]


class Measured(NamedTuple):
    error: float  # of the gate, in float64
    ours: list[float]  # seconds
    eager: list[float]
    attack: float  # share of ours


def measure(method: str, args) -> Measured:
    batch, steps = args.batch or networks.NETWORKS[args.net].batch, args.steps
    exact = Case(
        *(args.net, method, args.map, steps, min(batch, 8)), torch.float64, torch.contiguous_format
    )
    error = gate.relative_error(exact.ours(), exact.eager())
    if not error <= ALLOWED:
        raise SystemExit(f"{method} on {args.net}: gradients differ by {error:.1e}, not timed")
    case = Case(
        *(args.net, method, args.map, steps, batch),
        *(torch.float32, torch.channels_last, args.dtype == "bf16"),
    )
    seconds = [], []
    for i in range(args.repeats + 1):
        for side, step in zip(seconds, (case.ours, case.eager), strict=True):
            begin = time.perf_counter()
            step()
            side.append(time.perf_counter() - begin)
        if i == 0:
            case.clock.take()  # warm now
    ours, eager = (side[1:] for side in seconds)
    return Measured(error, ours, eager, case.clock.take().get("attack", 0.0) / sum(ours))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    nets = ("small", "wresnet", "wrn16-4", "resnet18-cifar")
    parser.add_argument("--net", choices=nets, default="small")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--map", choices=MAPS, default="cam", help="of the int family")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--batch", type=int, help="default: as the network is trained")
    parser.add_argument("--steps", type=int, default=10, help="of the attack")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--csv", type=Path)
    args = record.parse_with_repeats(parser, argv)
    record.require_core()

    batch, normal, table = args.batch or networks.NETWORKS[args.net].batch, None, []
    for method in args.methods:
        measured = measure(method, args)
        medians = [1e3 * statistics.median(side) for side in (measured.ours, measured.eager)]
        normal = medians if method == "normal" else normal
        relative = [m / n for m, n in zip(medians, normal, strict=True)] if normal else ["", ""]
        speeds = [1e3 * batch / m for m in medians]
        share = f"{100 * measured.attack:.0f} %"
        table.append([method, *medians, medians[1] / medians[0], *relative, speeds[0], share])
        mapped = methods.map_of(method, args.map)
        case = f"{args.net} {method}{f' map={mapped}' * (mapped != 'cam')} N={batch}"
        case += f"{f' {args.dtype}' * (args.dtype != 'fp32')} channels_last"
        notes = [[f"{speed:.4g} images/s"] for speed in speeds]
        for note, times in zip(notes, relative, strict=True):
            note[:0] = [f"{times:.3g}x normal"] if normal else []
        notes[0].append(f"{share} attack")
        if args.csv:
            record.append(
                args.csv,
                [
                    {
                        "benchmark": "objective",
                        "case": f"{case}, {args.steps} attack steps",
                        "side": side,
                        **record.quantiles(seconds),
                        "ratio": f"{medians[1] / median:.3g}",
                        "check": f"{measured.error:.1e}",
                        "note": ", ".join(note),
                    }
                    for side, seconds, median, note in zip(
                        ("fastinterp", "eager"),
                        (measured.ours, measured.eager),
                        medians,
                        notes,
                        strict=True,
                    )
                ],
            )
    headers = ["method", "ours, ms", "eager, ms", "eager / ours", "ours / normal", "eager / normal"]
    headers += ["images/s", "attack"]
    print(tabulate(table, headers, floatfmt=".3g"))


if __name__ == "__main__":
    main()
