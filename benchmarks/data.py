"""Images per second off the disk: python -m benchmarks.data --data-dir DIR [--csv FILE]

Ours reads folders of images and shards; beside it stands the usual way, torchvision's ImageFolder
with Resize(256), CenterCrop(224) and ToTensor in a DataLoader. All take the same images in the same
order, with as many workers and as large batches, to float32 images in [0,1]; the files are in the
page cache, and the start of the workers counts. Before anything is timed the sides' labels are the
same, and no image's pixels differ by more than a level of 255 on average: ours resizes only what it
keeps, and decodes large JPEGs at a part of their size.
"""

from __future__ import annotations

import argparse
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from tabulate import tabulate
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from benchmarks import record
from fastinterp.data import DiskSplit
from fastinterp.data.folders import class_files, class_names
from fastinterp.data.image_files import ImageFiles
from fastinterp.data.shards import shard_files

SAMPLE = "restricted-imagenet-sample"  # folders of classes
PER_SHARD = 100
ALLOWED = 1.0  # levels of 255 between the sides, mean of an image
THEIRS = "torchvision"

Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]


def write_shards(folder: Path, files: list[tuple[str, int]]) -> Path:
    """The files with their labels as WebDataset's ShardWriter lays them out."""
    for first in range(0, len(files), PER_SHARD):
        with tarfile.open(folder / f"{first:06}.tar", "w") as tar:
            for i, (path, label) in enumerate(files[first : first + PER_SHARD], first):
                tar.add(path, f"{i:06}{Path(path).suffix}")
                (folder / "cls").write_text(str(label))
                tar.add(folder / "cls", f"{i:06}.cls")
    return folder


def ours(files: ImageFiles, index: torch.Tensor, batch: int, workers: int) -> Batches:
    return DiskSplit(files, files.labels, workers).batches(index.split(batch))


def theirs(images: ImageFolder, index: torch.Tensor, batch: int, workers: int) -> Batches:
    return DataLoader(images, batch, sampler=index.tolist(), num_workers=workers)


def sides(sample: Path, shards: Path) -> dict[str, Callable[..., Batches]]:
    steps = transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor()
    images = ImageFolder(sample, transforms.Compose(steps))
    labels = {name: label for label, name in enumerate(class_names(sample))}
    return {
        THEIRS: partial(theirs, images),
        "folders": partial(ours, class_files(sample, labels)),
        "shards": partial(ours, shard_files(write_shards(shards, images.samples))),
    }


def check(by_side: dict[str, Callable[..., Batches]], count: int, workers: int) -> float:
    """The largest mean difference of an image's pixels, in levels; infinite if labels differ."""
    index, worst = torch.arange(count), 0.0
    readers = [take(index, 32, workers) for take in by_side.values()]
    for (x, y), *others in zip(*readers, strict=True):
        for x_other, y_other in others:
            if not torch.equal(y, y_other):
                return float("inf")
            worst = max(worst, 255 * (x - x_other).abs().mean((1, 2, 3)).max().item())
    return worst


def measure(
    by_side: dict[str, Callable[..., Batches]],
    index: torch.Tensor,
    batch: int,
    workers: int,
    repeats: int,
) -> dict[str, list[float]]:
    """Seconds per image of each side, the sides in turn."""
    seconds = {side: [] for side in by_side}
    for _ in range(repeats):
        for side, take in by_side.items():
            begin = time.perf_counter()
            taken = sum(len(y) for _, y in take(index, batch, workers))
            seconds[side].append((time.perf_counter() - begin) / taken)
    return seconds


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", type=Path, required=True, help=f"folder of {SAMPLE}")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--images", type=int, default=2000, help="the sample's, again and again")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--csv", type=Path)
    args = record.parse_with_repeats(parser, argv)
    sample = args.data_dir / SAMPLE
    if not sample.is_dir():
        parser.error(f"there is no folder {sample}")

    with tempfile.TemporaryDirectory() as shards:
        by_side = sides(sample, Path(shards))
        count = sum(1 for path in sample.glob("*/*") if path.is_file())
        error = check(by_side, count, args.workers)
        if not error <= ALLOWED:
            raise SystemExit(f"the sides' images differ by {error:.2g} levels, not timed")
        order = torch.randperm(args.images, generator=torch.Generator().manual_seed(0)) % count
        seconds = measure(by_side, order, args.batch, args.workers, args.repeats)
    median = {side: statistics.median(times) for side, times in seconds.items()}
    for ours_from in ("folders", "shards"):
        rows = [
            {
                "benchmark": "data",
                "case": f"{ours_from} 224x224, {args.workers} workers, batches of {args.batch}, "
                "per image",
                "side": named,
                **record.quantiles(seconds[side]),
                "ratio": f"{median[THEIRS] / median[side]:.3g}",
                "check": f"{error:.1e}",
                "note": f"{1 / median[side]:.3g} images/s",
            }
            for side, named in ((THEIRS, THEIRS), (ours_from, "fastinterp"))
        ]
        if args.csv:
            record.append(args.csv, rows)
    table = [[side, 1 / m, 1e3 * m, median[THEIRS] / m] for side, m in median.items()]
    print(tabulate(table, ["side", "images/s", "ms", f"over {THEIRS}"], floatfmt=".3g"))


if __name__ == "__main__":
    main()
