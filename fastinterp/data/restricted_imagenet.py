"""Restricted ImageNet: nine super classes of ImageNet, from folders of images."""

from __future__ import annotations

from pathlib import Path

from .folders import class_files, class_names, has_parts, hold_out, without
from .image_files import Found, ImageFiles

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
PLACES = ("", "restricted-imagenet", "restricted-imagenet-sample", "imagenet")


def find(data_dir: Path, download: bool) -> Found:
    """The images of train, validation and test.

    Source: the super classes of Tsipras et al., "Robustness May Be at Odds with Accuracy" (2019).
    Looked for in ``data_dir`` and its subfolders PLACES: ``train/`` and ``val/``, each with
    ImageNet's 1,000 folders or with one per super class; or folders of super classes alone, of
    which, in the order of their names, every tenth image is for testing. Validation is every tenth
    (or rarer, 5,000 in all) of the training images that are left.

    Args:
        data_dir: see above.
        download: not possible: ImageNet's licence asks everybody to fetch it for themselves.

    Raises:
        FileNotFoundError: there are no such folders.
    """
    roots = (data_dir / place for place in PLACES)
    root = next((r for r in roots if has_parts(r) or _has_classes(r)), None)
    if root is None:
        raise FileNotFoundError(_missing_message(data_dir, download))
    if has_parts(root):
        train, test = _files(root / "train"), _files(root / "val")
    else:
        files = _files(root)
        train, test = without(files, 10), files[::10]
    return Found(CLASSES, *hold_out(train), test)


def _has_classes(folder: Path) -> bool:
    return all((folder / name).is_dir() for name in CLASSES)


def _files(part: Path) -> ImageFiles:
    """Images below ``part``, in the order of super class, folder and name."""
    if _has_classes(part):
        return class_files(part, {name: label for label, name in enumerate(CLASSES)})
    synsets = class_names(part)
    if len(synsets) != 1000:
        raise FileNotFoundError(
            f"{part} has {len(synsets)} folders, neither ImageNet's 1,000 nor one for each of "
            f"{', '.join(CLASSES)}"
        )
    labels = {
        synset: label
        for label, (first, last) in enumerate(RANGES.values())
        for synset in synsets[first : last + 1]
    }
    return class_files(part, labels)


def _missing_message(data_dir: Path, download: bool) -> str:
    places = ", ".join(str(data_dir / place) for place in PLACES)
    return (
        f"Restricted ImageNet was not found. Looked in {places} for folders train/ and val/ of "
        f"ImageNet, or for folders {', '.join(CLASSES)}. Name another data folder (--data-dir or "
        "data_dir=, or the environment variable FASTINTERP_DATA)."
        + (" It cannot be downloaded by a program." if download else "")
    )
