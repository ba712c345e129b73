"""Writes README's table from a benchmark CSV: python -m benchmarks.tables [--csv FILE]

Of several rows for one case the newest counts.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from tabulate import tabulate

from benchmarks.record import RESULTS

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"


def table(path: Path) -> str:
    with path.open(newline="") as file:
        newest = {(r["benchmark"], r["case"], r["side"]): r for r in csv.DictReader(file)}
    rows = []
    for (benchmark, case, side), ours in newest.items():
        if side != "fastinterp":
            continue
        eager = newest[benchmark, case, "eager"]
        rows.append([benchmark, case, eager["ms_p50"], ours["ms_p50"], f"{ours['ratio']}x"])
    last = list(newest.values())[-1]
    note = f"Medians, {last['device']}, {last['threads']} threads, torch {last['torch']}."
    text = tabulate(
        rows,
        ["benchmark", "case", "eager ms", "fastinterp ms", "speed-up"],
        tablefmt="github",
        disable_numparse=True,
    )
    return f"{note}\n\n{text}\n"


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, default=RESULTS / "cpu.csv")
    arguments = parser.parse_args(argv)
    before, rest = README.read_text().split(BEGIN)
    _, after = rest.split(END)
    README.write_text(before + BEGIN + table(arguments.csv) + END + after)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
