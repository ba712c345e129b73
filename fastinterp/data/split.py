"""Labelled images as a training loop or an evaluation takes them, batch by batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

Batches = Generator[tuple[Tensor, Tensor], None, None]


class LabelledImages(ABC):
    """Images with their labels, wherever the images are kept.

    Attributes:
        labels: int64 (N,), class indices.
        image_shape: (C, H, W) of every image.
    """

    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    @abstractmethod
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""

    @abstractmethod
    def to(self, device: torch.device | str) -> LabelledImages:
        """The same images, whose batches are on ``device``."""

    @abstractmethod
    def pixels(self, index: Tensor | slice) -> Tensor:
        """uint8 (B, C, H, W), 0..255, of int64 (B,) or a slice."""

    @abstractmethod
    def batches(self, indices: Iterable[Tensor]) -> Batches:
        """The batch of every int64 (B,) of `indices`, one after the other."""

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
        return scaled(self.pixels(index), dtype), self.labels[index]


@dataclass(frozen=True, eq=False)
class Split(LabelledImages):
    """Images held whole in memory, so that a batch is one indexing operation.

    Attributes:
        images: uint8 (N, C, H, W), contiguous, 0..255.
        labels: int64 (N,), class indices.
    """

    images: Tensor
    labels: Tensor

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return tuple(self.images.shape[1:])

    def to(self, device: torch.device | str) -> Split:
        return Split(self.images.to(device), self.labels.to(device))

    def pixels(self, index: Tensor | slice) -> Tensor:
        return self.images[index]

    def batches(self, indices: Iterable[Tensor]) -> Batches:
        for index in indices:
            yield self.batch(index.to(self.images.device))


def scaled(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Images of `dtype` in [0, 1], the correctly rounded quotients of uint8 ones by 255."""
    # On a GPU, torch divides by a Python number by multiplying with its reciprocal, which is off
    # by one unit in the last place for half of the values; by a tensor it divides.
    return images.to(dtype) / torch.full((), 255, dtype=dtype, device=images.device)
