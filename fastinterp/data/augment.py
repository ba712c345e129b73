"""Random crop, horizontal flip and cutout of a whole batch, on its device, in one gather.

Sources: He et al., "Deep Residual Learning" (2016), crops of the padded image and flips; DeVries
and Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout" (2017).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Augmentation:
    """What may happen to an image of a batch.

    Attributes:
        crop_padding: zeros put around the image before a crop of its size; 0 for none.
        flip: mirror half of the images.
        cutout: side of a square of zeros, its centre anywhere in the image; 0 for none.
    """

    crop_padding: int = 0
    flip: bool = False
    cutout: int = 0

    def __bool__(self) -> bool:
        return bool(self.crop_padding or self.flip or self.cutout)

    def __call__(
        self, images: torch.Tensor, seed: tuple[int, ...], part: slice | None = None, of: int = 0
    ) -> torch.Tensor:
        """The images, each changed in its own way.

        Args:
            images: (N, C, H, W), any dtype.
            seed: of the numbers drawn, (seed, step): they follow from it alone, so a run that is
                resumed, or on more processes, sees the same images.
            part: which images these are of the batch of all processes, of size ``of``; by default
                all of it.

        Returns:
            A new tensor like images, in their memory format.
        """
        n, _, height, width = images.shape
        draws = np.random.Generator(np.random.PCG64(seed))
        total, padding = of or n, self.crop_padding
        shift = draws.integers(-padding, padding + 1, (2, total))
        mirrored = draws.random(total) < 0.5 * self.flip
        centre = draws.random((2, total))

        def here(values):
            values = np.ascontiguousarray(values[..., part or slice(None)])
            return torch.from_numpy(values).to(images.device, non_blocking=True)

        shift, mirrored, centre = here(shift), here(mirrored)[:, None], here(centre)
        y, x = (torch.arange(size, device=images.device).expand(n, -1) for size in (height, width))
        row, column = y + shift[0, :, None], x + shift[1, :, None]
        column = torch.where(mirrored, width - 1 - column, column)
        kept = _outer(_inside(row, height), _inside(column, width))
        if self.cutout:
            first = (
                (c * size).long()[:, None] - self.cutout // 2
                for c, size in zip(centre, (height, width), strict=True)
            )
            cut = [
                (at >= begin) & (at < begin + self.cutout)
                for at, begin in zip((y, x), first, strict=True)
            ]
            kept = kept & ~_outer(*cut)
        which = torch.arange(n, device=images.device)[:, None, None]
        row, column = row.clamp(0, height - 1), column.clamp(0, width - 1)
        moved = images.permute(0, 2, 3, 1)[which, row[:, :, None], column[:, None, :]]
        moved = (moved * kept[..., None]).permute(0, 3, 1, 2)
        return torch.empty_like(images).copy_(moved)


def _inside(index: torch.Tensor, size: int) -> torch.Tensor:
    return (index >= 0) & (index < size)


def _outer(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    return rows[:, :, None] & columns[:, None, :]
