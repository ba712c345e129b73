"""Labelled images, in the splits that the released networks were trained on.

    >>> from fastinterp.data import load_dataset
    >>> mnist = load_dataset("mnist", data_dir="data")
    >>> images, labels = mnist.train.batch(slice(0, 50))  # float32 (50, 1, 28, 28), int64 (50,)

What fits is held whole, as uint8: there a batch is one indexing operation, on whichever device the
tensors of the split are. Folders of images that do not fit are read from disk by worker processes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from . import cifar10, digits, folders, mnist, restricted_imagenet
from ._files import DataError, resolve_data_dir
from .augment import Augmentation
from .disk import DataWorkerDied, DiskSplit, open_splits
from .split import LabelledImages, Split

__all__ = [
    "DATASETS",
    "Augmentation",
    "DataError",
    "DataWorkerDied",
    "Dataset",
    "DiskSplit",
    "LabelledImages",
    "Split",
    "load_dataset",
]

_WHOLE = {"digits": digits, "mnist": mnist, "cifar10": cifar10}
_FOLDERS = {"restricted-imagenet": restricted_imagenet, "folder": folders}
DATASETS = (*_WHOLE, *_FOLDERS)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set in three disjoint splits.

    Attributes:
        name: one of `DATASETS`.
        num_classes: number of classes.
        classes: their names, in the order of the labels.
        train, validation, test: the splits.
    """

    name: str
    num_classes: int
    classes: tuple[str, ...]
    train: LabelledImages
    validation: LabelledImages
    test: LabelledImages


def load_dataset(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    download: bool = False,
    workers: int | None = None,
) -> Dataset:
    """Load a data set; MNIST's and CIFAR-10's files are checked against their md5.

    Args:
        name: "digits" (28x28 grey, ships with scikit-learn), "mnist" (28x28 grey), "cifar10"
            (32x32 RGB), "restricted-imagenet" (224x224 RGB, nine super classes) or "folder"
            (224x224 RGB, `train/` and `val/` with one folder per class, or with WebDataset shards).
        data_dir: folder of the files, or of a folder of the set's name with them. Default:
            `$FASTINTERP_DATA`, else `fastinterp/data` in `$XDG_CACHE_HOME` or `~/.cache`.
        download: download missing files into `data_dir` with torchvision.
        workers: of the last two, read the images from disk in so many processes, at least 1.
            Default: hold them in memory where all fit half of it, else a process per core.

    Returns:
        `Dataset`. For "mnist" and "cifar10" the first 5,000 training images are its validation
        split, the others its train split; its test split is the official one.

    Raises:
        ValueError: `name` is not one of `DATASETS`, or `workers` is below 1 or not for this set.
        FileNotFoundError: a file is missing; the message lists the files and the folders.
        DataError: a file is damaged, truncated or of another format (a `ValueError`), or training
            and test images are of other classes.
        ImportError, RuntimeError: the download could not start, or failed.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}; there are: {', '.join(DATASETS)}")
    if workers is not None and name in _WHOLE:
        raise ValueError(f"workers must be left out with {name}, which is held in memory whole")
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    folder = resolve_data_dir(data_dir)
    if name in _WHOLE:
        module = _WHOLE[name]
        classes = module.CLASSES
        splits = [Split(*part) for part in module.load(folder, download)]
    else:
        found = _FOLDERS[name].find(folder, download)
        classes = found.classes
        splits = open_splits((found.train, found.validation, found.test), workers)
    return Dataset(name, len(classes), classes, *splits)
