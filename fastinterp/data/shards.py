"""WebDataset shards: tar files in which KEY.jpg lies beside KEY.cls, the number of its class.

The members are listed once; then an image is a slice of its shard, read as if it were a file, in
any order. Convention: https://github.com/webdataset/webdataset.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from ._files import DataError
from .image_files import Entry, ImageFiles
from .pictures import SUFFIXES

SUFFIX, LABEL = ".tar", ".cls"
DIGITS = 9  # of a class, at most
AT_ONCE = 2**20  # bytes


def find_shards(part: Path) -> list[Path]:
    """The shards directly in ``part``, in the order of their names."""
    return sorted(path for path in part.iterdir() if path.suffix == SUFFIX)


def shard_files(part: Path) -> ImageFiles:
    """The images in the shards of ``part``, in the order of the shards and within them.

    A sample is the members of a shard whose names agree up to the first dot of the file's name: one
    image, a ``.cls`` with the class, 0 or more, as text, and whatever else, which is not looked at.

    Raises:
        FileNotFoundError: there are no shards, or no images in them.
        DataError: a shard is damaged, or a sample has not one image and one class; the message
            names the shard and the sample.
    """
    entries = [entry for shard in find_shards(part) for entry in _entries(shard)]
    if not entries:
        raise FileNotFoundError(f"{part} has no images ({', '.join(SUFFIXES)}) in shards (*.tar)")
    return ImageFiles.of(part, entries)


def _entries(shard: Path) -> Iterator[Entry]:
    name = os.fsencode(shard.name)
    with shard.open("rb") as file:
        for key, members in _samples(shard, file).items():
            images = [suffix for suffix in members if suffix in SUFFIXES]
            if len(images) != 1 or LABEL not in members:
                raise DataError(
                    f"{shard}: {key} has {' '.join(members)}, but a sample is one image "
                    f"({', '.join(SUFFIXES)}) with its class ({LABEL})"
                )
            start, size = members[LABEL]
            file.seek(start)
            text = file.read(size).strip()
            if not text.isdigit() or len(text) > DIGITS:
                raise DataError(
                    f"{shard}: {key}{LABEL} is {os.fsdecode(text[:20])!r}, but must be the number "
                    "of a class, 0 or more"
                )
            start, size = members[images[0]]
            yield Entry(name, int(text), start, size, os.fsencode(key + images[0]))


def _samples(shard: Path, file: IO[bytes]) -> dict[str, dict[str, tuple[int, int]]]:
    """Where the members of every sample begin and how long they are, by key and suffix."""
    samples = {}
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                folder, slash, base = member.name.rpartition("/")
                stem, dot, suffix = base.partition(".")
                if not (member.isfile() and stem and suffix):
                    continue
                members = samples.setdefault(folder + slash + stem, {})
                if members.setdefault(dot + suffix.lower(), place := _place(member)) != place:
                    raise DataError(f"{shard}: {member.name} is there twice")
            # tarfile takes a damaged header for the end: after a real one there are only zeros.
            file.seek(tar.offset)
            end = file.read(tarfile.BLOCKSIZE)
            if end != bytes(tarfile.BLOCKSIZE) or not _only_zeros(file):
                raise tarfile.ReadError(f"it breaks off, or is damaged, at byte {tar.offset:,}")
    except tarfile.TarError as error:
        raise DataError(f"{shard} is no sound tar file: {error}") from error
    return samples


def _only_zeros(file: IO[bytes]) -> bool:
    """Whether the rest of a file is zeros."""
    while block := file.read(AT_ONCE):
        if block.strip(b"\0"):
            return False
    return True


def _place(member: tarfile.TarInfo) -> tuple[int, int]:
    return member.offset_data, member.size
