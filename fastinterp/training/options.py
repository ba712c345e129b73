"""How a run is run, and how it ends before its end."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from dataclasses import dataclass

import torch


class Interrupted(Exception):
    """The run was asked to stop; its last finished step is saved."""


class TrainingDiverged(RuntimeError):
    """A loss, gradient or weight is NaN or infinite; the last checkpoint is from before."""


@dataclass(frozen=True)
class RunOptions:
    """How a run is run, which changes nothing of what a step computes.

    Attributes:
        checkpoint_seconds: how much work a killed process may lose; an exception or a request to
            stop loses at most the current step.
        limit_steps: stop every method after so many steps as if that were the end; 0 for none.
        profile: steps of which a Chrome trace is written; 0 for none.
        wandb: project of Weights & Biases to log to, or None.
        cuda_graph: replay steps as a CUDA graph. The host then looks every LOG_EVERY steps whether
            one was not finite. Such a step is not applied, nor are those after it, and its batch is
            saved, as without a graph; but running statistics and the average of the weights have
            seen the batches after it.
        choose_threads: try how many CPU threads are fastest, see threads.py, and go on with those
            when the run is resumed; for a single process on a CPU.
    """

    checkpoint_seconds: float = 10.0
    limit_steps: int = 0
    profile: int = 0
    wandb: str | None = None
    cuda_graph: bool = False
    choose_threads: bool = False

    def __post_init__(self):
        for name in ("checkpoint_seconds", "limit_steps", "profile"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")

    def check_world(self, processes: int, device: torch.device) -> None:
        """Raises ValueError where a run on this device, in so many processes, has no CUDA graph."""
        if self.cuda_graph and device.type != "cuda":
            raise ValueError(f"cuda_graph needs a GPU, got {device}; leave it out")
        if self.cuda_graph and processes > 1:
            raise ValueError(f"cuda_graph needs a single process, got {processes}; leave it out")


class StopRequest:
    """Turns Ctrl-C and SIGTERM into a flag that the loop reads between steps."""

    def __init__(self):
        self.requested = False

    def _handle(self, signum, frame):
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def check(self, doing: str) -> None:
        """Raises Interrupted, saying what was going on, when a stop was requested."""
        if self.requested:
            raise Interrupted(f"stopped {doing}")

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopRequest]:
        previous = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)
