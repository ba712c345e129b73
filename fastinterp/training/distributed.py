"""The processes of one job, as torchrun starts them; one process alone is a world of size 1."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist


class RankFailed(RuntimeError):
    """Something went wrong in this process of several; the others stop too."""


@dataclass(frozen=True)
class World:
    """This process among those of the job.

    Attributes:
        rank: 0 to size - 1; 0 is the one that prints and writes.
        size: number of processes.
        local_rank: among the processes of this machine, which is the number of its GPU.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls) -> World:
        """The world that torchrun describes, or a process alone."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        if not all(name in os.environ for name in names):
            return cls()
        return cls(*(int(os.environ[name]) for name in names))

    @contextmanager
    def connected(self, device: torch.device) -> Iterator[None]:
        """Joins the process group: NCCL for tensors on GPUs, gloo for others."""
        if self.size == 1:
            yield
            return
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        yield
        # Not after an exception: the others may be dead and then nobody answers.
        dist.destroy_process_group()

    def part(self, n: int) -> slice:
        """This process's share of a batch of ``n``, a multiple of ``size``."""
        share = n // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def wait(self) -> None:
        """Until all processes are here."""
        self.any(False)

    def any(self, *flags: bool) -> list[bool]:
        """Each flag, true where it is in any process."""
        if self.size == 1:
            return list(flags)
        shared = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return shared.bool().tolist()

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean over the processes of a small tensor, on the CPU."""
        values = values.cpu()
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values

    def from_first(self, value):
        """What rank 0 passes, in every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]
