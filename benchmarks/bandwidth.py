"""Device time of single ops against what a copy reaches on the same device.

    python -m benchmarks.bandwidth --traffic traffic.csv [--csv FILE] [--tiny]

All three orders of a layer, or an attack step, are captured in a CUDA graph and replayed, so that
the host is not in the times. The share is the floor of benchmarks.traffic over the time, as a part
of the measured bandwidth of a copy. On a CPU the ops are called as they are: Triton's interpreter
takes part where TRITON_INTERPRET=1, and --tiny makes that bearable.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tabulate import tabulate
from torch.nn import functional as F

from benchmarks import record
from benchmarks.test_network_ops import DEVICE, LAYOUTS, three_orders
from benchmarks.test_ops import plain_step
from fastinterp import ops

BACKENDS = ("cuda", "triton")
SAMPLES, SECONDS = 9, 0.02
# Beyond any L2 cache, but the first, which is a layer of ResNet-18 on CIFAR-10 at N = 128
MAPS = ((128, 64, 32, 32), (64, 64, 112, 112), (64, 256, 56, 56))


@contextmanager
def backend(name: str | None):
    before = os.environ.pop("FASTINTERP_BACKEND", None)
    if name is not None:
        os.environ["FASTINTERP_BACKEND"] = name
    try:
        yield
    finally:
        os.environ.pop("FASTINTERP_BACKEND", None)
        if before is not None:
            os.environ["FASTINTERP_BACKEND"] = before


def floors(path: Path) -> dict[str, float]:
    """Tensors like x that all orders of an op have to move, by the first word of its cases."""
    found: dict[tuple[str, str], float] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["kernel"] == "together" and "residual" not in row["case"]:
                found.setdefault((row["case"].split(" ")[0], row["order"]), float(row["floor_a"]))
    names = {name for name, _ in found}
    together = {name: sum(v for (n, _), v in found.items() if n == name) for name in names}
    return together | {"attack": 4.0}  # x, gradient and centre are read, one is written


def _layer(case, ours, eager, shape, others, dtype, layout="NCHW"):
    x, v = torch.randn(2, *shape, device=DEVICE, dtype=dtype).unbind()
    x, v = (t.contiguous(memory_format=LAYOUTS[layout]) for t in (x, v))
    others = [t.to(DEVICE) for t in others]
    c = torch.randn_like(eager(x, *others))
    name = f"{case} {shape} {str(dtype).removeprefix('torch.')} {layout}"
    sides = (lambda f=f: three_orders(f, x, others, c, v) for f in (ours, eager))
    return name, *sides, x


def cases(tiny: bool) -> Iterator[tuple[str, Callable, Callable, torch.Tensor]]:
    """(what, ours, eager, a tensor like x)"""
    bf16 = torch.bfloat16

    def sized(shape):
        return (2, min(shape[1], 8), *(min(n, 8) for n in shape[2:])) if tiny else shape

    for shape in map(sized, MAPS):
        running = torch.zeros(shape[1], device=DEVICE), torch.ones(shape[1], device=DEVICE)
        vectors = torch.rand(shape[1]) + 0.5, torch.randn(shape[1])

        def ours(x, weight, bias, running=running):
            return ops.batch_norm_act(x, weight, bias, *running, training=True, activation="relu")

        def eager(x, weight, bias, running=running):
            return F.relu(F.batch_norm(x, *running, weight, bias, True))

        for layout in LAYOUTS:
            yield _layer("batch norm + relu", ours, eager, shape, vectors, bf16, layout)
    shape = sized((64, 64, 112, 112))
    yield _layer("silu", lambda x: ops.activation(x, "silu"), F.silu, shape, [], bf16)
    for layout in LAYOUTS:
        yield _layer(
            *("max pool 2x2", lambda x: ops.max_pool2d(x, 2), lambda x: F.max_pool2d(x, 2)),
            *(shape, [], bf16, layout),
        )
    rows = (8, 100) if tiny else (16_384, 1_000)
    target = torch.randint(0, rows[1], rows[:1], device=DEVICE)
    yield _layer(
        *("cross entropy", lambda z: ops.cross_entropy(z, target)),
        *(lambda z: F.cross_entropy(z.float(), target), rows, [], bf16),
    )
    shape = sized((256, 3, 224, 224))
    x, grad, origin = torch.rand(3, *shape, device=DEVICE).unbind()
    yield (
        f"attack step Linf {shape} float32",
        lambda: ops.attack_step(x, grad, origin, eps=0.1, step_size=0.01),
        lambda: plain_step(x, grad, origin, 0.1, 0.01),
        x,
    )


def seconds(call: Callable) -> list[float]:
    """Of a call, several times: on a GPU of a replay of its graph, between events."""
    for _ in range(3):
        call()
    if DEVICE == "cpu":
        times = []
        for _ in range(3):
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
        return times
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def timed(replays):
        marks[0].record()
        for _ in range(replays):
            graph.replay()
        marks[1].record()
        marks[1].synchronize()
        return marks[0].elapsed_time(marks[1]) / 1e3 / replays

    replays = max(3, int(SECONDS / timed(3)))
    times = [timed(replays) for _ in range(SAMPLES)]
    del kept
    return times


def copy_bandwidth(tiny: bool) -> float:
    """Bytes a second that a copy reads and writes."""
    source = torch.zeros(2**20 if tiny else 2**30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / statistics.median(seconds(lambda: target.copy_(source)))


def rows_of(case, ours, eager, x, floor: float, bandwidth: float) -> list[dict]:
    """Eager, and ours on every backend that has kernels for it."""
    sides = {"eager": seconds(eager)}
    for name in BACKENDS:
        with backend(name):
            try:
                ours()
            except RuntimeError as error:
                if "FASTINTERP_BACKEND" not in str(error):
                    raise
                continue  # there is no such kernel
            sides[f"fastinterp {name}"] = seconds(ours)
    needed = floor * x.numel() * x.element_size()
    first = statistics.median(sides["eager"])
    return [
        {
            "benchmark": "bandwidth",
            "case": case,
            "side": side,
            **record.quantiles(times),
            "ratio": f"{first / statistics.median(times):.2f}",
            "note": f"{100 * needed / statistics.median(times) / bandwidth:.0f}% of a copy",
        }
        for side, times in sides.items()
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bandwidth", description=__doc__)
    parser.add_argument("--traffic", type=Path, required=True, help="CSV of benchmarks.traffic")
    parser.add_argument("--tiny", action="store_true", help="maps of a few pixels")
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    arguments = parser.parse_args(argv)
    record.require_core()
    bandwidth, needed = copy_bandwidth(arguments.tiny), floors(arguments.traffic)
    print(f"a copy moves {bandwidth / 1e9:.0f} GB/s")
    table = []
    for case in cases(arguments.tiny):
        rows = rows_of(*case, needed[case[0].split(" ")[0]], bandwidth)
        table += [[r["case"], r["side"], r["ms_p50"], r["ratio"], r["note"]] for r in rows]
        if arguments.csv:
            record.append(arguments.csv, rows)
    print(tabulate(table, ["op", "side", "ms", "eager / side", "floor's share"]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
