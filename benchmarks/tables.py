"""Tables and a plot from a CSV: python -m benchmarks.tables [--csv FILE] [--plot FILE.png]

Of several rows for one case and side on one machine the newest counts. README.md gets one line for
each whole step and network, benchmarks/README.md every side of the steps beside its floor, and the
single ops.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from tabulate import tabulate

from benchmarks import networks, units
from benchmarks.record import RESULTS

HERE = Path(__file__).parent
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"
OURS, PLAIN, EAGER = "fastinterp", "fastinterp, plain step", "eager"
STEP = "step"
NETWORKS = ("train_step", "fuse")  # benchmarks of whole networks beside eager

Newest = dict[tuple[str, str, str], dict[str, str]]  # (benchmark, case, side) -> row


def read(path: Path) -> list[Newest]:
    """For each machine the newest row of each side of each case, in the file's order."""
    machines: dict[tuple[str, str], Newest] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            newest = machines.setdefault((row["device"], row["threads"]), {})
            newest[row["benchmark"], row["case"], row["side"]] = row
    return list(machines.values())


def _render(head: list[str], rows: list[list[str]]) -> str:
    if not rows:
        return ""
    return tabulate(rows, head, tablefmt="github", disable_numparse=True) + "\n"


def _where(newest: Newest) -> str:
    """The machine and the versions that the rows come from."""
    seen = dict.fromkeys(
        f"{row['device']}, {row['threads']} threads, torch {row['torch']}"
        for row in newest.values()
    )
    return f"Medians, {'; '.join(seen)}.\n"


def _pick(newest: Newest, benchmarks: tuple[str, ...], without: bool = False) -> Newest:
    return {key: row for key, row in newest.items() if (key[0] in benchmarks) != without}


def beside_peers(newest: Newest) -> str:
    """One line for each side but eager, or where that was not timed another peer, beside it."""
    peers = {}
    for benchmark, case, side in newest:
        if side != OURS and peers.get((benchmark, case)) != EAGER:
            peers[benchmark, case] = side
    rows = []
    for (benchmark, case, side), row in newest.items():
        peer = peers.get((benchmark, case))
        if peer is not None and side != peer and row["ms_p50"]:
            theirs = newest[benchmark, case, peer]["ms_p50"]
            rows.append([benchmark, case, side, row["ms_p50"], peer, theirs, f"{row['ratio']}x"])
    return _render(["benchmark", "case", "side", "ms", "beside", "ms", "speed-up"], rows)


def _by_case(newest: Newest) -> dict[str, dict[str, dict[str, str]]]:
    """case -> side -> row, of the whole steps."""
    cases = {}
    for (_, case, side), row in _pick(newest, (STEP,)).items():
        cases.setdefault(case, {})[side] = row
    return cases


def _over(row: dict | None, other: dict | None) -> str:
    """How many times as long ``row`` takes as ``other``, where both were timed."""
    if not (row and other and row["ms_p50"] and other["ms_p50"]):
        return ""
    return f"{float(row['ms_p50']) / float(other['ms_p50']):.2f}x"


def _verdict(row: dict) -> str:
    """What was printed instead of a time, in two words."""
    return row["note"].split(":")[0] if row["note"] else ""


def steps(newest: Newest) -> str:
    """A line for each whole step: ours, and each peer's time as a multiple of ours."""
    cases = _by_case(newest)
    formats = {side for sides in cases.values() for side in sides if side.startswith("eager ")}
    known = [EAGER, *sorted(formats), "torch.compile", "make_fx + inductor", "JAX"]
    peers = [peer for peer in known if any(peer in sides for sides in cases.values())]
    rows = []
    for case, sides in cases.items():
        ours = sides.get(OURS)
        cells = [case, ours["ms_p50"] or _verdict(ours) if ours else ""]
        cells.append(_over(ours, sides.get(PLAIN)))
        for peer in peers:
            row = sides.get(peer)
            cells.append((_over(row, ours) or _verdict(row)) if row else "")
        rows.append(cells)
    return _render(["step", "ours, ms", "of our plain step", *(f"{p} takes" for p in peers)], rows)


def _floor(case: str, side: str) -> float:
    """The fewest convolution units of a case as benchmarks.problem writes it."""
    net, objective = case.split()[:2]
    objective = "plain" if side == PLAIN else objective
    built = networks.build(net)
    return units.floor(objective, networks.convolutions(built), networks.batch_statistics(built))


def floors(newest: Newest) -> str:
    """Every side of every whole step: time, memory and convolution units beside their floors."""
    rows = []
    for case, sides in _by_case(newest).items():
        plain = sides.get(PLAIN)
        for side, row in sides.items():
            floor = _floor(case, side)
            least = floor / _floor(case, PLAIN)
            rows.append(
                [
                    case,
                    side,
                    f"{row['ms_p50']} ({row['ms_p20']} to {row['ms_p80']})"
                    if row["ms_p50"]
                    else row["note"],
                    row["ratio"] and f"{row['ratio']}x",
                    _over(row, plain),
                    f"{least:.2f}x",
                    row["conv_units"],
                    f"{floor:.2f}",
                    row["peak_mb"],
                    row["check"],
                ]
            )
    head = [
        "step",
        "side",
        "ms (p20 to p80)",
        "speed-up over eager",
        "of our plain step",
        "at least",
    ]
    return _render([*head, "units", "at least", "peak MB", "error"], rows)


def plot(newest: Newest, path: Path) -> None:
    """A bar for each timed side of each whole step, our plain step as the line to reach."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = _by_case(newest)
    figure, axes = pyplot.subplots(
        len(cases), 1, figsize=(8, 1 + 2 * len(cases)), squeeze=False, layout="constrained"
    )
    for axis, (case, sides) in zip(axes[:, 0], cases.items(), strict=True):
        timed = {side: row for side, row in sides.items() if row["ms_p50"]}
        middle, low, high = (
            [float(row[f"ms_p{q}"]) for row in timed.values()] for q in (50, 20, 80)
        )
        spread = [
            [max(m - other, 0) for m, other in zip(middle, low, strict=True)],
            [max(other - m, 0) for m, other in zip(middle, high, strict=True)],
        ]
        colours = ["tab:orange" if side == OURS else "tab:grey" for side in timed]
        axis.barh(list(timed), middle, xerr=spread, color=colours)
        if PLAIN in timed:
            axis.axvline(float(timed[PLAIN]["ms_p50"]), color="black", linestyle=":")
        axis.invert_yaxis()
        axis.set_title(case, loc="left", fontsize="medium")
        axis.set_xlabel("ms")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def replace(page: Path, text: str) -> None:
    """Puts ``text`` between the markers of ``page``."""
    before, rest = page.read_text().split(BEGIN)
    _, after = rest.split(END)
    page.write_text(before + BEGIN + text + END + after)


def _paragraphs(newest: Newest, *tables: str) -> str:
    tables = [table for table in tables if table]
    return "\n".join([_where(newest), *tables]) if tables else ""


def short(newest: Newest) -> str:
    """What README.md gets of one machine; nothing where no whole network was timed."""
    return _paragraphs(newest, steps(newest), beside_peers(_pick(newest, NETWORKS)))


def long(newest: Newest) -> str:
    """What benchmarks/README.md gets of one machine."""
    ops = beside_peers(_pick(newest, (STEP, *NETWORKS), without=True))
    return _paragraphs(newest, floors(newest), ops)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, default=RESULTS / "cpu.csv")
    parser.add_argument("--print", action="store_true", help="do not write them, show them")
    parser.add_argument("--plot", type=Path, help="also draw the whole steps here")
    arguments = parser.parse_args(argv)
    machines = read(arguments.csv)
    if not machines:
        parser.error(f"{arguments.csv} has no rows")
    if arguments.plot:
        plot({key: row for newest in machines for key, row in newest.items()}, arguments.plot)
    if arguments.print:
        for newest in machines:
            others = beside_peers(_pick(newest, (STEP,), without=True))
            print(_paragraphs(newest, floors(newest), others))
        return 0
    replace(HERE.parent / "README.md", "\n".join(map(short, machines)))
    replace(HERE / "README.md", "\n".join(map(long, machines)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
