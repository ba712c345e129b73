"""Images on disk, each a file or a slice of one, and the square of pixels that is made of them."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ._files import DataError
from .pictures import UNREADABLE

RESIZED, SIZE = 256, 224
SHAPE = (3, SIZE, SIZE)


class Entry(NamedTuple):
    """Where an image lies: ``size`` bytes of a file from ``start`` on, by default all of them.

    Names are as os.fsencode gives them: ``file`` below the folder of ImageFiles, ``member`` what a
    slice is called in the archive that it is of.
    """

    file: bytes
    label: int
    start: int = 0
    size: int = -1
    member: bytes = b""


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Images on disk with their labels.

    Held as one array, of tens of bytes an image: processes share its pages, whereas objects would
    be copied to each of them, page by page, by the counting of references.

    Attributes:
        root: folder of the files.
        entries: structured (N,), with the fields of Entry.
    """

    root: Path
    entries: np.ndarray

    @classmethod
    def of(cls, root: Path, entries: Sequence[Entry]) -> ImageFiles:
        """The images at ``entries`` below ``root``, in their order."""
        file, member = (
            max((len(getattr(entry, name)) for entry in entries), default=0) or 1
            for name in ("file", "member")
        )
        fields = [("file", f"S{file}"), ("label", "i8"), ("start", "i8"), ("size", "i8")]
        return cls(root, np.array(entries, dtype=[*fields, ("member", f"S{member}")]))

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: np.ndarray | slice) -> ImageFiles:
        """The images at int64 (B,), where bool (N,) is true, or of a slice."""
        return ImageFiles(self.root, self.entries[index])

    @property
    def labels(self) -> Tensor:
        """int64 (N,), class indices."""
        return torch.from_numpy(self.entries["label"].copy())

    def where(self, i: int) -> str:
        """The file of image ``i``, and its name in there, for messages."""
        file, member = (os.fsdecode(self.entries[i][name]) for name in ("file", "member"))
        return f"{self.root / file}" + (f": {member}" if member else "")

    def decode(self, threads: int = 1) -> Tensor:
        """The middle 224x224 pixels of every image after its shorter side was resized to 256.

        Those of torchvision's Resize(256) and CenterCrop(224), but for one level in few of the
        pixels, since only what is kept is resized. A JPEG of more than 1,024 pixels in its shorter
        side is decoded at a half, a quarter or an eighth of its size, 512 pixels at least: that
        moves its pixels by less than a level on average.

        Returns:
            uint8 (N, 3, 224, 224), RGB, 0..255.

        Raises:
            DataError: an image cannot be read or decoded; the message names it.
        """
        images = torch.empty(len(self), *SHAPE, dtype=torch.uint8)
        # numpy moves the channels in one thread, where torch would take all in each of ours.
        places = images.numpy()

        def place(i: int) -> None:
            places[i] = self._pixels(i).transpose(2, 0, 1)

        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(place, range(len(self))):
                pass
        return images

    def _pixels(self, i: int) -> np.ndarray:
        entry = self.entries[i]
        try:
            with open(self.root / os.fsdecode(entry["file"]), "rb") as file:
                file.seek(entry["start"])
                encoded = io.BytesIO(file.read(entry["size"]))
            with Image.open(encoded) as image:
                image.draft(None, (2 * RESIZED, 2 * RESIZED))
                return np.asarray(_middle(image if image.mode == "RGB" else image.convert("RGB")))
        except UNREADABLE as error:
            raise DataError(
                f"{self.where(i)} is not an image that can be decoded: {error}"
            ) from error


def _middle(image: Image.Image) -> Image.Image:
    begin, end = [], []
    for side in image.size:
        resized = int(RESIZED * side / min(image.size))
        first = round((resized - SIZE) / 2)
        begin.append(first * side / resized)
        end.append((first + SIZE) * side / resized)
    return image.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=(*begin, *end))


@dataclass(frozen=True, eq=False)
class Found:
    """A data set found on disk: the names of its classes and the images of its splits."""

    classes: tuple[str, ...]
    train: ImageFiles
    validation: ImageFiles
    test: ImageFiles
