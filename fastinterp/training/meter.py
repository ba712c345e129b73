"""What a training run tells while it runs: speed, memory, a profiler's trace."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from fastinterp._timing import Clock

PROFILE_AFTER = 3  # steps of a process that are not profiled


class NoProfiler:
    def step(self) -> None:
        pass


@contextlib.contextmanager
def profiler(steps: int, path: Path) -> Iterator:
    """A torch.profiler over so many of the first steps, its Chrome trace in ``path``; 0: none."""
    if not steps:
        yield NoProfiler()
        return
    with torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=PROFILE_AFTER - 1, warmup=1, active=steps, repeat=1),
        on_trace_ready=lambda p: p.export_chrome_trace(str(path)),
    ) as running:
        yield running


class Meter:
    """Time of the steps since the last ``take``, and of their attacks."""

    def __init__(self, step: int, device: torch.device):
        self.clock = Clock(device)
        self._step, self._time = step, time.perf_counter()

    def take(self, step: int) -> tuple[int, float, float]:
        """Steps, seconds and seconds in attacks since the last call."""
        now, attack = time.perf_counter(), self.clock.take().get("attack", 0.0)
        passed = step - self._step, max(now - self._time, 1e-9), attack
        self._step, self._time = step, now
        return passed


def peak_memory(device: torch.device) -> int:
    """The most bytes that the process has held: of tensors on a GPU, else of all of it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def postfix(row: dict) -> dict[str, str]:
    shown = {"loss": f"{row['loss']:.3f}"}
    if "discrepancy" in row:
        shown["D"] = f"{row['discrepancy']:.2f}"
    shown["img/s"] = f"{row['images_per_second']:.0f}"
    if "attack_share" in row:
        shown["attack"] = f"{100 * row['attack_share']:.0f}%"
    return {**shown, "MB": f"{row['memory_mb']:.0f}"}
