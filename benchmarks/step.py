"""Whole training steps side by side: python -m benchmarks.step --net wrn16-4 --dtype bf16

All sides take the same step from the same weights on the same images, alternating in one process.
A side whose parameter gradients are further from those of float64 than its dtype excuses is printed
as wrong, one that cannot be built as that, and neither is timed. How to read the numbers:
benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from tabulate import tabulate

from benchmarks import gate, memory, peers, problem, record, units

WARM_UP, AT_LEAST = 3, 15  # steps of each side
PLAIN = "fastinterp, plain step"
DEFAULT_SIDES = "ours,eager,eager-format"


class Candidate:
    """A side on the way through the benchmark; ``note`` says why it is not timed."""

    def __init__(self, key: str, label: str, of: problem.Problem):
        self.key, self.label, self.problem = key, label.format(format=of.format), of
        self.side, self.note, self.error = None, "", None
        self.seconds, self.peak, self.units = [], None, None

    def build(self) -> None:
        try:
            self.side = peers.SIDES[self.key].build(self.problem)
            self.error = None
            self.first = self.side.gradients(self.side.step())
        except peers.Unavailable as error:
            self.side, self.note = None, str(error)
        except torch.OutOfMemoryError:
            self.side, self.note = None, "does not fit into memory"
        except Exception as error:
            self.side, self.note = None, f"does not compile: {first_line(error)}"

    def check(self, exact, allowed: float) -> None:
        self.error = gate.relative_error([g.cpu() for g in self.first], exact)
        del self.first
        if not self.error <= allowed:
            self.side = None
            self.note = f"WRONG: relative error {self.error:.1e}, allowed {allowed:.1e}"

    def measure_resources(self, with_memory: bool) -> None:
        if self.side.net is not None:
            self.units = units.count(self.side.step, self.side.net, self.problem.batch)
        if not with_memory:
            return
        if self.problem.device == "cuda":
            if self.key not in ("jax", "ours-graph", "eager-graph"):  # whose memory is their own
                self.peak = memory.peak_mb(self.side.step, "cuda")
        else:
            self.peak = memory.in_own_process(self.key, self.problem)


def first_line(error: Exception) -> str:
    """The first line of an error, or of a compiler's own where it quotes one."""
    error = error.__cause__ or error  # what compile_step explains
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if " error: " in line] or lines
    told = lines[0].split(" error: ")[-1] if lines else ""
    return f"{type(error).__name__}: {told}"[:200].removesuffix(": ")


def candidates(of: problem.Problem, keys: list[str]) -> list[Candidate]:
    """The chosen sides, and our own plain step where ours is among them."""
    chosen = []
    for key in keys:
        if key == "eager-format" and of.format == "nchw":
            continue  # that is "eager"
        chosen.append(Candidate(key, peers.SIDES[key].label, of))
    if "ours" in keys and of.objective != "plain":
        chosen.append(Candidate("ours", PLAIN, of.but(objective="plain")))
    return chosen


def exact_gradients(of: problem.Problem) -> tuple[list[torch.Tensor], float]:
    """Gradients of the float64 eager step, and the error of the eager one in the dtype asked.

    Where float64 does not fit into memory, bf16 is measured by float32.
    """

    def gradients(dtype):
        side = peers.eager(of.but(dtype=dtype))
        return [g.cpu() for g in side.gradients(side.step())]

    try:
        exact = gradients("fp64")
    except torch.OutOfMemoryError:
        if of.dtype != "bf16":
            raise
        exact = gradients("fp32")
    in_own = gradients(of.dtype)
    if of.device == "cuda":
        torch.cuda.empty_cache()
    return exact, gate.relative_error(in_own, exact)


def alternate(runners: list[Candidate], seconds: float) -> None:
    """Fills each runner's seconds, one step at a time in turn."""
    device = runners[0].problem.device

    def timed(runner):
        start = time.perf_counter()
        result = runner.side.step()
        if device == "cuda":
            torch.cuda.synchronize()
        taken = time.perf_counter() - start
        del result
        return taken

    for runner in runners:
        for _ in range(WARM_UP):
            timed(runner)
    end = time.perf_counter() + seconds * len(runners)
    while len(runners[0].seconds) < AT_LEAST or time.perf_counter() < end:
        for runner in runners:
            runner.seconds.append(timed(runner))


def rows(of: problem.Problem, sides: list[Candidate]) -> list[dict]:
    """One row of the CSV for each side."""
    eager = next((s.seconds for s in sides if s.label == "eager" and s.seconds), None)
    table = []
    for side in sides:
        row = {"benchmark": "step", "case": str(of), "side": side.label, "note": side.note}
        if side.error is not None:
            row["check"] = f"{side.error:.1e}"
        if side.seconds:
            row |= record.quantiles(side.seconds)
            if eager and side.label != PLAIN:
                ratio = statistics.median(eager) / statistics.median(side.seconds)
                row["ratio"] = f"{ratio:.2f}"
        if side.peak is not None:
            row["peak_mb"] = f"{side.peak:.0f}"
        if side.units is not None:
            row["conv_units"] = f"{side.units:.2f}"
        table.append(row)
    return table


def show(of: problem.Problem, table: list[dict]) -> str:
    plain = next((float(r["ms_p50"]) for r in table if r["side"] == PLAIN and "ms_p50" in r), None)
    shown = []
    for row in table:
        ms = row.get("ms_p50")
        times = f"{float(ms) / plain:.2f}x" if ms and plain else ""
        cells = [row.get(k, "") for k in ("ms_p20", "ms_p80", "ratio", "check")]
        extra = [row.get(k, "") for k in ("conv_units", "peak_mb", "note")]
        shown.append([row["side"], ms or "", *cells[:3], times, *extra[:2], cells[3], extra[2]])
    head = ["side", "ms", "p20", "p80", "eager / side", "x our plain step", "units", "peak MB"]
    return f"{of}\n" + tabulate(shown, [*head, "error", ""], disable_numparse=True)


def run(of: problem.Problem, keys: list[str], seconds: float, with_memory: bool) -> list[dict]:
    sides = candidates(of, keys)
    references = {}
    for side in sides:
        if side.problem not in references:
            references[side.problem] = exact_gradients(side.problem)
        exact, eager_error = references[side.problem]
        side.build()
        if side.side is not None:
            side.check(exact, gate.allowed(eager_error, problem.DTYPES[of.dtype]))
    runners = [side for side in sides if side.side is not None]
    for side in runners:
        side.measure_resources(with_memory)
    if runners:
        alternate(runners, seconds)
    return rows(of, sides)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    problem.add_arguments(parser)
    parser.add_argument(
        "--sides",
        default=DEFAULT_SIDES,
        help=f"of {','.join(peers.SIDES)}; the compilers take minutes (default: %(default)s)",
    )
    parser.add_argument("--seconds", type=float, default=20, help="of timing for each side")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    arguments = parser.parse_args(argv)
    keys = arguments.sides.split(",")
    unknown = set(keys) - set(peers.SIDES)
    if unknown:
        parser.error(f"no side {', '.join(sorted(unknown))}; there are {', '.join(peers.SIDES)}")

    if arguments.device == "cpu":
        record.require_core()
    of = problem.from_arguments(arguments)
    table = run(of, keys, arguments.seconds, arguments.memory)
    print(show(of, table))
    if arguments.csv:
        record.append(arguments.csv, table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
