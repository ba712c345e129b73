"""What fuse did to a model, and what it left."""

from __future__ import annotations

from dataclasses import dataclass

from tabulate import tabulate


@dataclass(frozen=True)
class Entry:
    """One layer or call site, by its qualified name ("" is the model itself)."""

    name: str
    what: str
    fused_as: str | None = None
    reason: str | None = None


@dataclass(frozen=True)
class FusionReport:
    """``print(model.fusion_report)`` shows it as tables; ``entries`` has every layer and site."""

    entries: tuple[Entry, ...]

    @property
    def fused(self) -> tuple[Entry, ...]:
        return tuple(e for e in self.entries if e.fused_as is not None)

    @property
    def left(self) -> tuple[Entry, ...]:
        return tuple(e for e in self.entries if e.fused_as is None)

    def __str__(self) -> str:
        tables = []
        for title, outcome, entries in (
            ("fused", "as", self.fused),
            ("left as it was", "because", self.left),
        ):
            groups: dict[tuple[str, str], list[str]] = {}
            for e in entries:
                names = groups.setdefault((e.what, e.fused_as or e.reason), [])
                names.append(e.name or "(model)")
            rows = [
                (what, how, len(names), ", ".join(names[:3]) + (", ..." if names[3:] else ""))
                for (what, how), names in groups.items()
            ]
            head = f"{len(entries)} {title}"
            table = tabulate(rows, headers=("what", outcome, "count", "where"))
            tables.append(f"{head}\n{table}" if rows else head)
        return "\n\n".join(tables)
