"""Files that are either whole or not there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

TEMPORARY = ".writing-"  # what the name of an unfinished file or folder begins with


def sync(path: Path) -> None:
    """Returns when the file's or folder's content is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls ``write(temporary_path)`` and moves the result to ``path`` in one step."""
    temporary = path.with_name(TEMPORARY + path.name)
    try:
        write(temporary)
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def is_temporary(path: Path) -> bool:
    """Whether ``path`` is what a write that was killed has left."""
    return path.name.startswith(TEMPORARY)
