"""Rows of benchmark results: one CSV for everything, with what a row needs to be read alone."""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import subprocess
from pathlib import Path

import torch

from fastinterp import _native

RESULTS = Path(__file__).parent / "results"
FIELDS = (
    *("benchmark", "case", "side", "ms_p20", "ms_p50", "ms_p80", "ratio", "check"),
    *("peak_mb", "conv_units", "note"),
    *("device", "threads", "torch", "python", "commit"),
)


def require_core() -> None:
    """Stops where the plain torch reference would be timed as if it were the kernels."""
    if _native.core is None:
        raise SystemExit(
            "the benchmarks run from this folder, which has no compiled core: install with "
            "'pip install -e .' first"
        )


def device_name() -> str:
    """The GPU's name, or the processor's as Linux reports it with its widest vectors."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name, info = platform.processor(), Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            name = line.split(":", 1)[1].strip()
    # Processors of one name differ in these.
    amx = " AMX" if getattr(_native.core, "amx_bf16", False) else ""
    return f"{name} {torch.backends.cpu.get_cpu_capability()}{amx}"


def commit() -> str:
    """Short hash of the checkout, with -dirty when it has changes."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def parse_with_repeats(parser: argparse.ArgumentParser, argv: list[str] | None):
    """The arguments, of which --repeats must be enough for ``quantiles``."""
    args = parser.parse_args(argv)
    if args.repeats < 2:
        parser.error(f"--repeats must be at least 2, got {args.repeats}")
    return args


def quantiles(seconds: list[float]) -> dict[str, str]:
    """Milliseconds at 20, 50 and 80 percent."""
    deciles = statistics.quantiles(seconds, n=10, method="inclusive")
    return {f"ms_p{name}": f"{1e3 * deciles[i]:.4g}" for name, i in ((20, 1), (50, 4), (80, 7))}


def _migrate(path: Path) -> None:
    """Gives a file of earlier columns the present ones, empty where they are new."""
    if not path.exists():
        return
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) == FIELDS:
            return
        rows = list(reader)
    unknown = set(reader.fieldnames or ()) - set(FIELDS)
    if unknown:
        raise ValueError(f"{path} has columns that are not known here: {', '.join(unknown)}")
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, restval="")
        writer.writeheader()
        writer.writerows(rows)


def append(path: Path, rows: list[dict]) -> None:
    """Adds rows to a CSV, with the machine and the versions filled in."""
    here = {
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
    }
    _migrate(path)
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, restval="")
        if new:
            writer.writeheader()
        writer.writerows({**row, **here} for row in rows)
