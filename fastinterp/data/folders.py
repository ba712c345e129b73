"""Anybody's images: train/ and val/, each with one folder per class, or with shards."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ._files import DataError
from .image_files import Entry, Found, ImageFiles
from .pictures import SUFFIXES
from .shards import find_shards, shard_files

PLACES = ("", "folder")
VALIDATION_SIZE = 5_000  # at most, and a tenth of the training images at most
NAMED = 5  # classes in a message


def find(data_dir: Path, download: bool) -> Found:
    """The classes and images of a folder with ``train/`` and ``val/``.

    Each has one folder per class, as torchvision's ImageFolder wants them; classes are numbered in
    the order of their names, images are found below them at any depth. Or, where there are no such
    folders, shards with numbers of classes, see shards.py. The test split is ``val/``, validation
    is every tenth (or rarer, 5,000 in all) of the training images.

    Args:
        data_dir: that folder, or one with it under the name ``folder``.
        download: not possible.

    Raises:
        FileNotFoundError: there are no such folders, or a class has no images.
        DataError: ``train/`` and ``val/`` have other classes, or a shard is damaged.
    """
    root = next((data_dir / place for place in PLACES if has_parts(data_dir / place)), None)
    if root is None:
        raise FileNotFoundError(
            f"{data_dir} has no folders train/ and val/ with one folder of images per class, or "
            "with shards (*.tar): name the folder that has (--data-dir or data_dir=, or the "
            "environment variable FASTINTERP_DATA)."
            + (" It cannot be downloaded." if download else "")
        )
    parts = root / "train", root / "val"
    if not any(map(class_names, parts)) and any(map(find_shards, parts)):
        classes, train, test = _from_shards(*parts)
    else:
        classes, train, test = _from_folders(*parts)
    kept, validation = hold_out(train)
    if lost := _without_images(classes, kept):
        raise FileNotFoundError(
            f"{parts[0]} has too few images of {_some(lost)}: one in ten of all, in their order, "
            "is held out for validation"
        )
    return Found(tuple(classes), kept, validation, test)


def _from_folders(*parts: Path) -> tuple[list[str], ImageFiles, ImageFiles]:
    classes = class_names(parts[0])
    _require_same(classes, class_names(parts[1]), parts[0].parent)
    labels = {name: label for label, name in enumerate(classes)}
    train, test = (class_files(part, labels) for part in parts)
    for part in (train, test):
        if empty := _without_images(classes, part):
            raise FileNotFoundError(
                f"{part.root} has no images ({', '.join(SUFFIXES)}) of {_some(empty)}"
            )
    return classes, train, test


def _from_shards(*parts: Path) -> tuple[list[str], ImageFiles, ImageFiles]:
    train, test = map(shard_files, parts)
    seen, largest = set(train.labels.tolist()), int(train.labels.argmax())
    count = int(train.labels[largest]) + 1
    if len(seen) < count:
        gap = next(label for label in range(count) if label not in seen)
        raise DataError(
            f"{train.where(largest)} is of class {count - 1}, but {train.root} has no images of "
            f"class {gap}: classes are numbered from 0, and none is left out"
        )
    for beyond in (test.labels >= count).nonzero().flatten().tolist():
        raise DataError(
            f"{test.where(beyond)} is of class {test.labels[beyond]}, but {train.root} has the "
            f"classes 0 to {count - 1}"
        )
    return [str(label) for label in range(count)], train, test


def has_parts(folder: Path) -> bool:
    """Whether ``train/`` and ``val/`` are in ``folder``."""
    return (folder / "train").is_dir() and (folder / "val").is_dir()


def class_names(part: Path) -> list[str]:
    """The folders in ``part``, sorted."""
    return sorted(path.name for path in part.iterdir() if path.is_dir())


def class_files(part: Path, labels: Mapping[str, int]) -> ImageFiles:
    """The images below the folders of ``part`` that ``labels`` names, in its order, then by name.

    Raises:
        FileNotFoundError: there are none.
    """
    entries = []
    for name, label in labels.items():
        for folder, _, files in sorted(os.walk(part / name, followlinks=True)):
            below = Path(folder).relative_to(part)
            entries += [
                Entry(os.fsencode(below / file), label)
                for file in sorted(files)
                if file.lower().endswith(SUFFIXES)
            ]
    if not entries:
        raise FileNotFoundError(f"{part} has no images ({', '.join(SUFFIXES)})")
    return ImageFiles.of(part, entries)


def hold_out(train: ImageFiles) -> tuple[ImageFiles, ImageFiles]:
    """Training images without every tenth, or rarer, and those, VALIDATION_SIZE at most."""
    every = max(10, -(-len(train) // VALIDATION_SIZE))
    return without(train, every), train[::every]


def without(files: ImageFiles, every: int) -> ImageFiles:
    """``files`` but those at 0, ``every``, 2 ``every`` and so on."""
    return files[np.arange(len(files)) % every > 0]


def _without_images(classes: list[str], files: ImageFiles) -> list[str]:
    seen = set(files.labels.tolist())
    return [name for label, name in enumerate(classes) if label not in seen]


def _require_same(classes: list[str], others: list[str], root: Path) -> None:
    differences = [
        f"{part}/ has {_some(sorted(more))}, which {other}/ has not"
        for part, other, more in (
            ("train", "val", set(classes) - set(others)),
            ("val", "train", set(others) - set(classes)),
        )
        if more
    ]
    if differences:
        raise DataError(f"the classes in {root} differ: {'; '.join(differences)}")


def _some(names: list[str]) -> str:
    """The first names, and how many more there are."""
    shown = f"{'classes' if len(names) > 1 else 'class'} {', '.join(names[:NAMED])}"
    return shown + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
