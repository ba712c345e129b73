"""What is known of the GPU kernels without a GPU, as pages: results/resources.md and traffic.md.

python -m benchmarks.resources --arch 90 --csv 90.csv        # and 80, 100: minutes each
python -m benchmarks.traffic --csv traffic.csv
python -m benchmarks.gpu_tables --resources 80.csv 90.csv 100.csv --traffic traffic.csv
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from tabulate import tabulate

from benchmarks.record import RESULTS, commit


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _page(head: str, columns: list[str], rows: list[list]) -> str:
    table = tabulate(rows, columns, tablefmt="github", disable_numparse=True)
    return f"{head} Commit {commit()}.\n\n{table}\n"


def resources(paths: list[Path]) -> str:
    """The most that any variant of a kernel takes, for each kernel and architecture."""
    families: dict[tuple[str, str, int], list[dict[str, str]]] = {}
    for row in (row for path in paths for row in _read(path)):
        compiled = row["case"] == "built core" or row["case"].endswith(".cu")
        kernel = row["kernel"].split("<")[0], "CUDA C++" if compiled else "Triton"
        families.setdefault((*kernel, int(row["arch"])), []).append(row)
    most = [
        [
            *(kernel, source, f"sm_{arch}", len(variants)),
            *(
                max(int(v[name]) for v in variants)
                for name in ("registers", "shared_bytes", "spill_bytes")
            ),
        ]
        for (kernel, source, arch), variants in sorted(
            families.items(), key=lambda item: (item[0][1], *item[0])
        )
    ]
    columns = ["kernel", "source", "architecture", "variants", "registers"]
    head = "Registers, shared memory and spilled bytes of the GPU kernels: the most of any variant."
    return _page(head, [*columns, "shared bytes", "spilled bytes"], most)


def traffic(path: Path) -> str:
    """Bytes of whole orders beside the floor."""
    rows = [
        [
            *(row["case"], row["order"]),
            *(f"{float(row[name]):.2f}" for name in ("mb", "a", "floor_a")),
            f"{float(row['a']) / float(row['floor_a']):.3f}",
            f"{float(row['us']):.1f}",
        ]
        for row in _read(path)
        if row["kernel"] == "together"
    ]
    head = (
        "Predicted bytes of the GPU kernels, in megabytes and in tensors like x, beside the floor "
        "of benchmarks.traffic; microseconds at an H100's 3.35 TB/s."
    )
    return _page(head, ["case", "order", "MB", "x", "floor, x", "of the floor", "us"], rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_tables", description=__doc__)
    parser.add_argument("--resources", type=Path, nargs="+", default=[], help="CSV files")
    parser.add_argument("--traffic", type=Path, help="a CSV file")
    arguments = parser.parse_args(argv)
    if arguments.resources:
        (RESULTS / "resources.md").write_text(resources(arguments.resources))
    if arguments.traffic:
        (RESULTS / "traffic.md").write_text(traffic(arguments.traffic))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
