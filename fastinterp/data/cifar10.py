"""CIFAR-10, from the six python batches its authors published."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import Tensor

from ._files import DataError, PublishedFile, Source, locate, read_verified

CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
VALIDATION_SIZE = 5_000
BATCH_SIZE = 10_000

SOURCE = Source(
    torchvision_name="CIFAR10",
    folders=("", "cifar10", "cifar-10-batches-py"),
    files=tuple(
        (PublishedFile((name,), md5, size),)
        for name, md5, size in (
            ("data_batch_1", "c99cafc152244af753f735de768cd75f", 31_035_704),
            ("data_batch_2", "d4bba439e000b95fd0a9bffe97cbabec", 31_035_320),
            ("data_batch_3", "54ebc095f3ab1f0389bbae665268c751", 31_035_999),
            ("data_batch_4", "634d18415352ddfa80567beed471001a", 31_035_696),
            ("data_batch_5", "482c414d41f54cd18b22e5b47cb7c3cb", 31_035_623),
            ("test_batch", "40351d587109b95175f43aff81a1287e", 31_035_526),
        )
    ),
)


def load(data_dir: Path, download: bool) -> list[tuple[Tensor, Tensor]]:
    """(images, labels) of train (45,000), validation (5,000) and test (10,000).

    Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009. Validation is
    the first 5,000 training images in the order of data_batch_1..5; test is the official test set.

    Args:
        data_dir: searched with its subfolders `cifar10` and `cifar-10-batches-py`.
        download: let torchvision download the set into `data_dir` when files are missing.

    Returns:
        Images uint8 (N, 3, 32, 32), RGB, 0..255; labels int64 (N,), 0..9.

    Raises:
        FileNotFoundError: a file is missing.
        DataError: a file is damaged or of another format.
        ImportError, RuntimeError: the download could not start, or failed.
    """
    batches = [_read_batch(path, form) for path, form in locate(SOURCE, data_dir, download)]
    images = torch.cat([images for images, _ in batches[:-1]])
    labels = torch.cat([labels for _, labels in batches[:-1]])
    return [
        (images[VALIDATION_SIZE:], labels[VALIDATION_SIZE:]),
        (images[:VALIDATION_SIZE], labels[:VALIDATION_SIZE]),
        batches[-1],
    ]


def _read_batch(path: Path, published: PublishedFile) -> tuple[Tensor, Tensor]:
    # Unpickling runs what the file says, so only bytes that passed the checksum get there.
    batch = pickle.loads(read_verified(path, published), encoding="latin1")
    rows, labels = torch.from_numpy(batch["data"]), torch.tensor(batch["labels"])
    if (
        rows.dtype != torch.uint8
        or rows.shape != (BATCH_SIZE, 3 * 32 * 32)
        or labels.shape != (BATCH_SIZE,)
    ):
        raise DataError(
            f"{path}: {rows.dtype} images {tuple(rows.shape)} and labels {tuple(labels.shape)}, "
            f"expected torch.uint8 ({BATCH_SIZE}, {3 * 32 * 32}) and ({BATCH_SIZE},)"
        )
    return rows.view(BATCH_SIZE, 3, 32, 32), labels
