"""Peak memory of one step, above what was held before it.

On a GPU torch keeps the peak. On a CPU it is the resident set of a process of its own, in which
malloc gives large blocks back at once (see ENVIRONMENT):

    python -m benchmarks.memory --net wrn16-4 --side ours    # options of benchmarks.step
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import peers, problem

# A fixed threshold is not raised by malloc: blocks above it are mapped, and unmapped when freed.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
WARM_UP = 2
_MARK = "peak MB:"


def _status(field: str) -> float:
    """MB of a field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def peak_mb(step, device: str) -> float:
    """MB that one ``step()`` needs at its peak, above what is held before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from VmRSS
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def available() -> bool:
    """Whether this system keeps the peak of a process's resident set, and can reset it."""
    return os.access("/proc/self/clear_refs", os.W_OK)


def in_own_process(side: str, of: problem.Problem) -> float | None:
    """``peak_mb`` of a side in a fresh process; None where this system cannot tell.

    Raises:
        RuntimeError: the process failed; the message is the last line it wrote.
    """
    if not available():
        return None
    options = [f"--{name}={value}" for name, value in dataclasses.asdict(of).items()]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", "--side", side, *options],
        cwd=Path(__file__).parents[1],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    for line in done.stdout.splitlines():
        if line.startswith(_MARK):
            return float(line.removeprefix(_MARK))
    said = (done.stderr.strip() or "it said nothing").splitlines()[-1]
    raise RuntimeError(f"measuring the memory of {side} failed: {said}")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory")
    problem.add_arguments(parser)
    parser.add_argument("--side", choices=peers.SIDES, default="ours")
    arguments = parser.parse_args(argv)
    side = peers.SIDES[arguments.side].build(problem.from_arguments(arguments))
    for _ in range(WARM_UP):
        side.step()
    print(_MARK, f"{peak_mb(side.step, arguments.device):.1f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
