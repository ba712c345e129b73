"""MNIST, from the four idx files its authors published, gzipped or not."""

from __future__ import annotations

import gzip
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from ._files import DataError, PublishedFile, Source, locate, read_verified

CLASSES = tuple("0123456789")
VALIDATION_SIZE = 5_000


def _forms(
    stem: str, md5: str, size: int, gz_md5: str, gz_size: int
) -> tuple[PublishedFile, PublishedFile]:
    # Some unpackers turn the hyphen before "idx" into a dot.
    names = (stem, stem.replace("-idx", ".idx"))
    return (
        PublishedFile(names, md5, size),
        PublishedFile(tuple(f"{name}.gz" for name in names), gz_md5, gz_size),
    )


SOURCE = Source(
    torchvision_name="MNIST",
    folders=("", "mnist", "MNIST/raw"),
    files=(
        _forms(
            "train-images-idx3-ubyte",
            "6bbc9ace898e44ae57da46a324031adb",
            47_040_016,
            "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            9_912_422,
        ),
        _forms(
            "train-labels-idx1-ubyte",
            "a25bea736e30d166cdddb491f175f624",
            60_008,
            "d53e105ee54ea40749a09fcbcd1e9432",
            28_881,
        ),
        _forms(
            "t10k-images-idx3-ubyte",
            "2646ac647ad5339dbf082846283269ea",
            7_840_016,
            "9fb629c4189551a2d022fa330f9573f3",
            1_648_877,
        ),
        _forms(
            "t10k-labels-idx1-ubyte",
            "27ae3e4e09519cfbb04c329615203637",
            10_008,
            "ec29112dd5afa0611ce80d1b7f02629c",
            4_542,
        ),
    ),
)
SHAPES = ((60_000, 28, 28), (60_000,), (10_000, 28, 28), (10_000,))


def load(data_dir: Path, download: bool) -> list[tuple[Tensor, Tensor]]:
    """(images, labels) of train (55,000), validation (5,000) and test (10,000).

    Source: LeCun, Cortes and Burges, "The MNIST database of handwritten digits". Validation is the
    first 5,000 training images in file order; test is the official test set.

    Args:
        data_dir: searched with its subfolders `mnist` and `MNIST/raw`.
        download: let torchvision download the set into `data_dir` when files are missing.

    Returns:
        Images uint8 (N, 1, 28, 28), 0 background to 255 ink; labels int64 (N,), 0..9.

    Raises:
        FileNotFoundError: a file is missing.
        DataError: a file is damaged or of another format.
        ImportError, RuntimeError: the download could not start, or failed.
    """
    arrays = []
    for (path, published), shape in zip(locate(SOURCE, data_dir, download), SHAPES, strict=True):
        data = read_verified(path, published)
        arrays.append(_parse_idx(path, data, shape))
    train_images, train_labels, test_images, test_labels = arrays
    images, labels = train_images.unsqueeze(1), train_labels.long()
    return [
        (images[VALIDATION_SIZE:], labels[VALIDATION_SIZE:]),
        (images[:VALIDATION_SIZE], labels[:VALIDATION_SIZE]),
        (test_images.unsqueeze(1), test_labels.long()),
    ]


def _parse_idx(path: Path, data: bytes, shape: tuple[int, ...]) -> Tensor:
    """The uint8 tensor of the given `shape` in an idx file; `path` tells whether it is gzipped."""
    if path.suffix == ".gz":
        data = gzip.decompress(data)
    magic, expected = data[:4], bytes((0, 0, 8, len(shape)))
    if magic != expected:
        raise DataError(
            f"{path} is no idx file of {len(shape)}-dimensional bytes: magic number "
            f"{magic.hex()}, expected {expected.hex()}"
        )
    header = 4 + 4 * len(shape)
    seen = tuple(int.from_bytes(data[i : i + 4], "big") for i in range(4, header, 4))
    if seen != shape or len(data) != header + prod(shape):
        raise DataError(
            f"{path}: {len(data):,} bytes with a header of shape {seen}, expected "
            f"{header + prod(shape):,} and {shape}"
        )
    # A bytearray, as torch wants memory that it may write to.
    return torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=header).view(shape)
