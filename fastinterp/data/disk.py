"""Images that are read from disk while they are used, by worker processes ahead of their use."""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .image_files import SHAPE, ImageFiles
from .split import Batches, LabelledImages, Split, scaled

# Images that a worker decodes at a time: few, so that all of them work on a batch that is waited
# for, and little memory is held for batches to come.
PART = 32


class DataWorkerDied(RuntimeError):
    """A process that reads images has ended before its work."""


def open_splits(parts: Sequence[ImageFiles], workers: int | None) -> list[LabelledImages]:
    """The images of each of ``parts``, in memory or read from disk.

    Args:
        parts: where they lie.
        workers: read from disk in so many processes; None: hold them in memory when all fit half
            of it, else a process per core.

    Raises:
        DataError: they are held in memory and one cannot be decoded.
    """
    if workers is None and _fit_memory(sum(map(len, parts))):
        return [Split(files.decode(_cores()), files.labels) for files in parts]
    return [DiskSplit(files, files.labels, workers or _cores()) for files in parts]


@dataclass(frozen=True, eq=False)
class DiskSplit(LabelledImages):
    """Images that stay on disk; a batch is decoded when it is asked for, or ahead by `batches`.

    Attributes:
        files: where the images are.
        labels: int64 (N,), class indices, on the device that batches are wanted on.
        workers: processes that decode for `batches`, and threads for a single batch, at least 1.
    """

    files: ImageFiles
    labels: Tensor
    workers: int

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return SHAPE

    def to(self, device: torch.device | str) -> DiskSplit:
        return replace(self, labels=self.labels.to(device))

    def pixels(self, index: Tensor | slice) -> Tensor:
        chosen = index if isinstance(index, slice) else index.cpu().numpy()
        return self.files[chosen].decode(self.workers).to(self.labels.device)

    def batches(self, indices: Iterable[Tensor]) -> Batches:
        """The batch of every int64 (B,) of `indices`, in their order, whatever `workers` is.

        On a GPU a batch is copied while the one before it is used. The processes live until the
        iterator is at its end, closed or dropped.

        Raises:
            DataError: an image cannot be decoded; the message names it.
            DataWorkerDied: a worker was killed.
        """
        device = self.labels.device
        indices = [index.cpu() for index in indices]
        with closing(self._decoded(indices)) as decoded:
            images = (_joined(decoded, len(index), device) for index in indices)
            if device.type == "cuda":
                images = _copied_ahead(images, device)
            for index, batch in zip(indices, images, strict=True):
                yield scaled(batch, torch.float32), self.labels[index.to(device)]

    def _decoded(self, indices: list[Tensor]) -> Generator[Tensor, None, None]:
        """The pixels at `indices` in their order, PART at a time, decoded by the workers."""
        parts = [part.numpy() for index in indices for part in index.split(PART)]
        workers = max(1, min(self.workers, len(parts)))
        per_batch = len(parts) / max(1, len(indices))
        loader = DataLoader(
            _Parts(self.files),
            batch_size=None,
            sampler=parts,
            num_workers=workers,
            # Of each worker: enough for two batches, so that a long step leaves none idle.
            prefetch_factor=max(2, math.ceil(2 * per_batch / workers)),
            pin_memory=self.labels.is_cuda,
            generator=torch.Generator(),  # leaves torch's own as it is
        )
        with _starting_workers():
            iterator = iter(loader)
        try:
            for _ in parts:
                try:
                    part = next(iterator)
                except Exception as error:
                    # What is noticed first when one was killed: that it is gone, or its images.
                    raise DataWorkerDied(
                        "a data worker, a process that reads images, has died "
                        f"({type(error).__name__}: {str(error).strip()}). Often memory ran out, or "
                        "/dev/shm is full: use fewer of them (workers= of load_dataset, --workers "
                        f"of train, now {self.workers})"
                    ) from error
                if isinstance(part, Exception):
                    raise part
                yield part
        finally:
            # Not left to when it is collected: a traceback may hold it for long.
            iterator._shutdown_workers()


class _Parts(Dataset):
    """Decodes parts of a split in a worker."""

    def __init__(self, files: ImageFiles):
        self.files = files

    def __getitem__(self, index: np.ndarray) -> Tensor | Exception:
        # One that is raised gets the worker's traceback for its message, and looks like a death.
        try:
            return self.files[index].decode()
        except Exception as error:
            return error


@contextmanager
def _starting_workers() -> Iterator[None]:
    """They start deaf to Ctrl-C, and this process's signals are left as they were.

    Ctrl-C reaches every process of the terminal, and whoever iterates decides what it means.
    DataLoader's handler of SIGCHLD would raise in the midst of whatever runs when a worker dies;
    without it that is noticed within seconds, when its images are asked for.
    """
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGCHLD) if main else None
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        if handler is not None:
            signal.signal(signal.SIGCHLD, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _joined(parts: Iterator[Tensor], size: int, device: torch.device) -> Tensor:
    """The next ``size`` images of ``parts``, uint8 (size, C, H, W) on ``device``."""
    batch = torch.empty(size, *SHAPE, dtype=torch.uint8, device=device)
    filled = 0
    while filled < size:
        part = next(parts)
        batch[filled : filled + len(part)].copy_(part, non_blocking=True)
        filled += len(part)
    return batch


def _copied_ahead(batches: Iterator[Tensor], device: torch.device) -> Iterator[Tensor]:
    """The same, each made on a stream of its own before the one ahead of it is handed out."""
    side = torch.cuda.Stream(device)

    def ahead() -> tuple[Tensor | None, torch.cuda.Event]:
        with torch.cuda.stream(side):
            return next(batches, None), side.record_event()

    batch, copied = ahead()
    while batch is not None:
        following = ahead()
        stream = torch.cuda.current_stream(device)
        stream.wait_event(copied)
        # Its memory is the side stream's, which may fill it anew only after this one has read it.
        batch.record_stream(stream)
        yield batch
        batch, copied = following


def _processes() -> int:
    """Of this job on this machine, as torchrun tells."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _cores() -> int:
    """Of this process's share of the machine."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, here // _processes())


def _fit_memory(images: int) -> bool:
    needed = images * SHAPE[0] * SHAPE[1] * SHAPE[2] * _processes()
    return needed <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2
