"""Image files and folders of them, as a network of one input size takes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ._files import DataError

SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".webp")
# What Pillow's readers raise where a file is damaged.
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


def find_pictures(paths: Sequence[str | Path]) -> list[Path]:
    """The files that are named, and those directly in folders that are named, in their order.

    Raises:
        FileNotFoundError: a path does not exist, or a folder has no images.
    """
    found = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
            if not inside:
                raise FileNotFoundError(f"{path} has no images ({', '.join(SUFFIXES)})")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise FileNotFoundError(f"there is no image file or folder {path}")
    return found


def read_pictures(files: Sequence[Path], shape: tuple[int, int, int]) -> torch.Tensor:
    """The images of files, grey or RGB as the network wants them.

    Args:
        files: image files.
        shape: (C, H, W) of an image, C 1 or 3.

    Returns:
        uint8 (N, C, H, W), 0..255.

    Raises:
        DataError: a file cannot be decoded or is of another size.
    """
    channels, height, width = shape
    images = torch.empty(len(files), *shape, dtype=torch.uint8)
    for place, file in zip(images, files, strict=True):
        try:
            with Image.open(file) as picture:
                pixels = np.array(picture.convert("L" if channels == 1 else "RGB"))
        except UNREADABLE as error:
            raise DataError(f"{file} is damaged or no image: {error}") from error
        if pixels.shape[:2] != (height, width):
            raise DataError(
                f"{file} is {pixels.shape[1]}x{pixels.shape[0]} pixels, but the network takes "
                f"{width}x{height}: crop or resize it first"
            )
        place.copy_(torch.from_numpy(pixels.reshape(height, width, channels)).permute(2, 0, 1))
    return images
