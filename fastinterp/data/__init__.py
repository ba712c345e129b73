"""Whole data sets as uint8 tensors, in the splits that the released networks were trained on.

    >>> from fastinterp.data import load_dataset
    >>> mnist = load_dataset("mnist", data_dir="data")
    >>> images, labels = mnist.train.batch(slice(0, 50))  # float32 (50, 1, 28, 28), int64 (50,)

The sets are small enough to be held whole, so there is no loader and there are no workers: a batch
is one indexing operation, on whichever device the tensors of the split are.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import cifar10, digits, mnist, restricted_imagenet
from ._files import DataError, resolve_data_dir
from .augment import Augmentation

__all__ = ["DATASETS", "Augmentation", "DataError", "Dataset", "Split", "load_dataset"]

_MODULES = {
    "digits": digits,
    "mnist": mnist,
    "cifar10": cifar10,
    "restricted-imagenet": restricted_imagenet,
}
DATASETS = tuple(_MODULES)


@dataclass(frozen=True, eq=False)
class Split:
    """Images with their labels.

    Attributes:
        images: uint8 (N, C, H, W), contiguous, 0..255.
        labels: int64 (N,), class indices.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Split:
        """The same split with its tensors on ``device``."""
        return Split(self.images.to(device), self.labels.to(device))

    def batch(
        self, index: Tensor | slice, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """The images and labels at `index`.

        Args:
            index: int64 (B,) or a slice.
            dtype: floating-point type of the images.

        Returns:
            images: `dtype` (B, C, H, W) in [0, 1], each the correctly rounded quotient by 255.
            labels: int64 (B,).
        """
        images = self.images[index].to(dtype)
        # On a GPU, torch divides by a Python number by multiplying with its reciprocal, which is
        # off by one unit in the last place for half of the values; by a tensor it divides.
        scale = torch.full((), 255, dtype=dtype, device=images.device)
        return images / scale, self.labels[index]

    def batches(self, indices: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """The batch of every int64 (B,) of `indices`, one after the other."""
        for index in indices:
            yield self.batch(index.to(self.images.device))


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
    train: Split
    validation: Split
    test: Split


def load_dataset(
    name: str, data_dir: str | os.PathLike[str] | None = None, download: bool = False
) -> Dataset:
    """Load a data set into memory; MNIST's and CIFAR-10's files are checked against their md5.

    Args:
        name: "digits" (28x28 grey, ships with scikit-learn), "mnist" (28x28 grey), "cifar10"
            (32x32 RGB) or "restricted-imagenet" (224x224 RGB, nine super classes).
        data_dir: folder of the files, or of a folder of the set's name with them. Default:
            `$FASTINTERP_DATA`, else `fastinterp/data` in `$XDG_CACHE_HOME` or `~/.cache`.
        download: download missing files into `data_dir` with torchvision.

    Returns:
        `Dataset`. For "mnist" and "cifar10" the first 5,000 training images are its validation
        split, the others its train split; its test split is the official one.

    Raises:
        ValueError: `name` is not one of `DATASETS`.
        FileNotFoundError: a file is missing; the message lists the files and the folders.
        DataError: a file is damaged, truncated or of another format (a `ValueError`).
        ImportError, RuntimeError: the download could not start, or failed.
        MemoryError: the set does not fit.
    """
    if name not in _MODULES:
        raise ValueError(f"unknown data set {name!r}; there are: {', '.join(DATASETS)}")
    module = _MODULES[name]
    splits = module.load(resolve_data_dir(data_dir), download)
    train, validation, test = (Split(images, labels) for images, labels in splits)
    return Dataset(name, len(module.CLASSES), module.CLASSES, train, validation, test)
