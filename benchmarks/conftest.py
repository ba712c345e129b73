"""`compare`: times two sides alternately in one process; --csv FILE keeps the rows."""

import statistics
import time
from pathlib import Path

import pytest
import torch
from tabulate import tabulate

from benchmarks import record
from benchmarks.bandwidth import backend

SECONDS = 0.5  # of measuring per case, both sides together
ROWS = pytest.StashKey[list]()


def pytest_addoption(parser):
    parser.addoption("--csv", type=Path, help="append the comparisons to this file")


def pytest_configure(config):
    config.stash[ROWS] = []
    record.require_core()


def _seconds(function) -> float:
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _ours(function):
    """Ours; where the choice on a GPU is CUDA C++, also its twin in Triton."""
    sides = {"fastinterp": function}

    def on(name):
        with backend(name):
            return function()

    if torch.cuda.is_available():
        try:
            on("cuda")
        except RuntimeError:  # there is no such kernel
            return sides
        sides["fastinterp triton"] = lambda: on("triton")
    return sides


@pytest.fixture
def compare(request, benchmark):
    """compare(case, ours, eager, check): a row for each side and pytest-benchmark's own of ours."""

    def run(case, ours, eager, check):
        sides = {"eager": eager, **_ours(ours)}
        for _ in range(3):
            once = sum(_seconds(side) for side in sides.values())
        times = {name: [] for name in sides}
        for _ in range(max(15, int(SECONDS / once))):
            for name, side in sides.items():
                times[name].append(_seconds(side))
        median = {name: statistics.median(values) for name, values in times.items()}
        benchmark_name = request.node.originalname.removeprefix("test_")
        request.config.stash[ROWS] += [
            {
                "benchmark": benchmark_name,
                "case": case,
                "side": name,
                **record.quantiles(values),
                "ratio": f"{median['eager'] / median[name]:.2f}",
                "check": f"{check:.1e}",
            }
            for name, values in times.items()
        ]
        benchmark.pedantic(lambda: _seconds(ours), rounds=20, warmup_rounds=2)

    return run


def pytest_terminal_summary(terminalreporter, config):
    rows = [row for row in config.stash[ROWS] if row["side"].startswith("fastinterp")]
    if not rows:
        return
    columns = ("benchmark", "case", "side", "ms_p50", "ratio")
    shown = [[row[name] for name in columns] for row in rows]
    terminalreporter.write_line(tabulate(shown, ["op", "case", "side", "ms", "eager / side"]))
    if config.getoption("--csv"):
        record.append(config.getoption("--csv"), config.stash[ROWS])
