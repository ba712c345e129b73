"""How much of a step a part of it takes, for those who ask."""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from contextlib import contextmanager

import torch

_clocks: list[Clock] = []


class Clock:
    """Adds up the seconds of the parts that are ``timed`` while it is ``running``.

    On a GPU they are between events on the current stream, so that nothing waits for the device
    before ``take``.

    Args:
        device: where the work is done.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._marks: dict[str, list] = defaultdict(list)

    @contextmanager
    def running(self):
        _clocks.append(self)
        try:
            yield self
        finally:
            _clocks.remove(self)

    @contextmanager
    def part(self, name: str):
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            yield  # events of a graph have no times
            return
        begin = self._now()
        with torch.profiler.record_function(f"fastinterp.{name}"):
            yield
        self._marks[name].append((begin, self._now()))

    def take(self) -> dict[str, float]:
        """Seconds of every part since the last call."""
        seconds = {name: sum(map(self._between, marks)) for name, marks in self._marks.items()}
        self._marks.clear()
        return seconds

    def _now(self):
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, marks) -> float:
        begin, end = marks
        if self._device.type != "cuda":
            return end - begin
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def timed(name: str):
    """A function whose calls are a part of that name for the clocks that run."""

    def decorate(function):
        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            if not _clocks:
                return function(*args, **kwargs)
            with _clocks[-1].part(name):
                return function(*args, **kwargs)

        return wrapper

    return decorate
