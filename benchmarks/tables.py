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
        recorded = list(csv.DictReader(file))
    newest = {(r["benchmark"], r["case"], r["side"]): r for r in recorded}
    rows = []
    for (benchmark, case, side), row in newest.items():
        if side != "eager":
            eager = newest[benchmark, case, "eager"]["ms_p50"]
            rows.append([benchmark, case, side, row["ms_p50"], eager, f"{row['ratio']}x"])
    last = recorded[-1]
    note = f"Medians, {last['device']}, {last['threads']} threads, torch {last['torch']}."
    text = tabulate(
        rows,
        ["benchmark", "case", "side", "ms", "eager ms", "speed-up"],
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
