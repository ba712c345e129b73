"""metrics.jsonl, TensorBoard when it is installed, Weights & Biases, and the training curve."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

from fastinterp._files import write_atomically


def read_metrics(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl; a last line cut short by a crash is left out."""
    rows = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows


def import_wandb():
    """The wandb package.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import wandb
    except ImportError as error:
        raise ImportError("logging to wandb needs it: pip install wandb") from error
    return wandb


class MetricsLog:
    """Appends rows to ``folder/metrics.jsonl``, to TensorBoard and, if asked, to wandb.

    Args:
        folder: of one method in a run.
        after_step: rows of later steps, left by a run that was killed, are dropped.
        wandb: project of Weights & Biases, or None.

    Raises:
        ImportError: wandb is asked for and not installed.
    """

    def __init__(self, folder: Path, after_step: int, wandb: str | None = None):
        self.path = folder / "metrics.jsonl"
        kept = [row for row in read_metrics(self.path) if row["step"] <= after_step]
        text = "".join(json.dumps(row) + "\n" for row in kept)
        write_atomically(self.path, lambda temporary: temporary.write_text(text))
        self._file = self.path.open("a")
        self._board = None
        if importlib.util.find_spec("tensorboard") is not None:
            os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(folder / "tensorboard", purge_step=after_step + 1)
        self._wandb = None
        if wandb is not None:
            name = f"{folder.parent.name}/{folder.name}"
            # An id made of the name, so that a run that goes on is the same run there.
            self._wandb = import_wandb().init(
                project=wandb, name=name, id=name.replace("/", "-"), resume="allow", dir=folder
            )

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *exception) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def write(self, row: dict) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in row.items():
                if name != "step":
                    self._board.add_scalar(name, value, row["step"])
        if self._wandb is not None:
            self._wandb.log(row, step=row["step"])


def plot_curves(run: Path, methods: list[str]) -> Path:
    """Draws the loss and the discrepancy of every method against the step into ``curves.png``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    axes = figure.subplots(1, 2)
    for method in methods:
        rows = read_metrics(run / method / "metrics.jsonl")
        for axis, name in zip(axes, ("loss", "discrepancy"), strict=True):
            points = [(row["step"], row[name]) for row in rows if name in row]
            if points:
                axis.plot(*zip(*points, strict=True), label=method, linewidth=1)
    for axis, name in zip(axes, ("training loss", "discrepancy D"), strict=True):
        axis.set(xlabel="step", ylabel=name)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    path = run / "curves.png"
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
    return path
