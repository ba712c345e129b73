"""Restricted ImageNet: nine super classes of ImageNet, from folders of images."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ._files import DataError

# Super class and its first and last ImageNet class.
RANGES = {
    "dog": (151, 268),
    "cat": (281, 285),
    "frog": (30, 32),
    "turtle": (33, 37),
    "bird": (80, 100),
    "primate": (365, 382),
    "fish": (389, 397),
    "crab": (118, 121),
    "insect": (300, 319),
}
CLASSES = tuple(RANGES)
RESIZED, SIZE = 256, 224
FOLDERS = ("", "restricted-imagenet", "restricted-imagenet-sample", "imagenet")
VALIDATION_SIZE = 5_000  # at most, and a tenth of the training images at most
SUFFIXES = (".jpeg", ".jpg", ".png")

Files = list[tuple[Path, int]]  # images and their labels


def load(data_dir: Path, download: bool) -> list[tuple[Tensor, Tensor]]:
    """(images, labels) of train, validation and test.

    Source: the super classes of Tsipras et al., "Robustness May Be at Odds with Accuracy" (2019).
    Looked for in ``data_dir`` and its subfolders FOLDERS: ``train/`` and ``val/``, each with
    ImageNet's 1,000 folders or with one per super class; or folders of super classes alone, of
    which, in the order of their names, every tenth image is for testing. Validation is every tenth
    (or rarer, 5,000 in all) of the training images that are left.

    Args:
        data_dir: see above.
        download: not possible: ImageNet's licence asks everybody to fetch it for themselves.

    Returns:
        Images uint8 (N, 3, 224, 224), RGB, 0..255: the middle of the image after its shorter side
        was resized to 256; labels int64 (N,), 0..8. All are held in memory, 150 kB each.

    Raises:
        FileNotFoundError: there are no such folders.
        DataError: an image cannot be decoded.
        MemoryError: the images would fill more than half of the machine's memory.
    """
    root = next((data_dir / f for f in FOLDERS if _is_root(data_dir / f)), None)
    if root is None:
        places = ", ".join(str(data_dir / folder) for folder in FOLDERS)
        raise FileNotFoundError(
            f"Restricted ImageNet was not found. Looked in {places} for folders train/ and val/ of "
            f"ImageNet, or for folders {', '.join(CLASSES)}. Name another data folder (--data-dir "
            "or data_dir=, or the environment variable FASTINTERP_DATA)."
            + (" It cannot be downloaded by a program." if download else "")
        )
    if (root / "train").is_dir():
        train, test = _files(root / "train"), _files(root / "val")
    else:
        files = _files(root)
        test, train = files[::10], [file for i, file in enumerate(files) if i % 10]
    every = max(10, -(-len(train) // VALIDATION_SIZE))
    validation, train = train[::every], [file for i, file in enumerate(train) if i % every]
    _check_memory(len(train) + len(validation) + len(test))
    return [_decode(files) for files in (train, validation, test)]


def _is_root(folder: Path) -> bool:
    return ((folder / "train").is_dir() and (folder / "val").is_dir()) or all(
        (folder / name).is_dir() for name in CLASSES
    )


def _files(folder: Path) -> Files:
    """Images below ``folder`` with their labels, in the order of class and name."""
    if all((folder / name).is_dir() for name in CLASSES):
        folders = [(folder / name, label) for label, name in enumerate(CLASSES)]
    else:
        synsets = sorted(path for path in folder.iterdir() if path.is_dir())
        if len(synsets) != 1000:
            raise FileNotFoundError(
                f"{folder} has {len(synsets)} folders, neither ImageNet's 1,000 nor one for each "
                f"of {', '.join(CLASSES)}"
            )
        folders = [
            (synset, label)
            for label, (first, last) in enumerate(RANGES.values())
            for synset in synsets[first : last + 1]
        ]
    files = [
        (path, label)
        for place, label in folders
        for path in sorted(place.iterdir())
        if path.suffix.lower() in SUFFIXES
    ]
    if not files:
        raise FileNotFoundError(f"{folder} has no images ({', '.join(SUFFIXES)})")
    return files


def _check_memory(images: int) -> None:
    needed, there = (
        images * 3 * SIZE * SIZE,
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    )
    if needed > there / 2:
        raise MemoryError(
            f"{images:,} images take {needed / 1e9:.0f} GB of the {there / 1e9:.0f} GB that this "
            "machine has; use a folder with fewer images per class"
        )


def _decode(files: Files) -> tuple[Tensor, Tensor]:
    images = torch.empty(len(files), 3, SIZE, SIZE, dtype=torch.uint8)

    def decode(i: int) -> None:
        images[i] = _read(files[i][0])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(decode, range(len(files))))
    return images, torch.tensor([label for _, label in files])


def _read(path: Path) -> Tensor:
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except (OSError, SyntaxError) as error:  # what Pillow's readers raise
        raise DataError(f"{path} is not an image that can be decoded: {error}") from error
    scale = RESIZED / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    left, top = (width - SIZE) // 2, (height - SIZE) // 2
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    image = image.crop((left, top, left + SIZE, top + SIZE))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
