"""Find, check and, on request, download the published files of a data set."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


class DataError(ValueError):
    """A data file is not the published one: damaged, truncated or of another format."""


@dataclass(frozen=True)
class PublishedFile:
    """One file as its authors published it: accepted names, md5 (hex) and size in bytes."""

    names: tuple[str, ...]
    md5: str
    size: int

    def __str__(self) -> str:
        return f"{' or '.join(self.names)} (md5 {self.md5}, {self.size:,} bytes)"


@dataclass(frozen=True)
class Source:
    """The files of one data set and where they are looked for.

    `files` has one entry per needed file: its interchangeable forms, the preferred one first.
    `folders` are relative to the data folder and include the one that torchvision's class
    `torchvision_name` downloads into.
    """

    torchvision_name: str
    folders: tuple[str, ...]
    files: tuple[tuple[PublishedFile, ...], ...]


def resolve_data_dir(data_dir: str | os.PathLike[str] | None) -> Path:
    """`data_dir`, else `$FASTINTERP_DATA`, else `fastinterp/data` in the user's cache folder."""
    # An empty variable counts as unset: it would otherwise name the working directory.
    chosen = data_dir or os.environ.get("FASTINTERP_DATA")
    if chosen:
        return Path(chosen).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "fastinterp" / "data"


def locate(source: Source, data_dir: Path, download: bool) -> list[tuple[Path, PublishedFile]]:
    """The place and the published form of every file of `source`, in its order.

    Raises:
        FileNotFoundError: files are missing (after the download, where one was asked for).
        ImportError, RuntimeError: the download could not start, or failed.
    """
    folders = [data_dir / folder for folder in source.folders]
    missing = _missing(source, folders)
    if missing and download:
        _download(source, data_dir)
        missing = _missing(source, folders)
    if missing:
        raise FileNotFoundError(_missing_message(source, missing, data_dir, folders))
    return [_copies(forms, folders)[0] for forms in source.files]


def read_verified(path: Path, published: PublishedFile) -> bytes:
    """The bytes of `path`; raises `DataError` unless they are those of `published`."""
    data = path.read_bytes()
    # The authors published md5s, and builds of Python may forbid md5 where security is at stake.
    md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
    if md5 != published.md5 or len(data) != published.size:
        raise DataError(
            f"{path} is damaged or is another file: expected {published.size:,} bytes with md5 "
            f"{published.md5}, found {len(data):,} bytes with md5 {md5}. Delete it, then put the "
            "published file in its place or download it again: --download on the command line, "
            "download=True in Python."
        )
    return data


def _copies(
    forms: Sequence[PublishedFile], folders: Sequence[Path]
) -> list[tuple[Path, PublishedFile]]:
    return [
        (folder / name, form)
        for folder in folders
        for form in forms
        for name in form.names
        if (folder / name).is_file()
    ]


def _missing(source: Source, folders: Sequence[Path]) -> list[tuple[PublishedFile, ...]]:
    return [forms for forms in source.files if not _copies(forms, folders)]


def _describe(files: Sequence[Sequence[PublishedFile]]) -> list[str]:
    return ["  " + ", or ".join(map(str, forms)) for forms in files]


def _missing_message(
    source: Source,
    missing: Sequence[Sequence[PublishedFile]],
    data_dir: Path,
    folders: Sequence[Path],
) -> str:
    lines = [f"{source.torchvision_name} files are missing:", *_describe(missing)]
    if not data_dir.is_dir():
        lines.append(f"The data folder {data_dir} does not exist.")
    lines.append("Folders looked in:")
    lines += [f"  {folder}" for folder in folders]
    lines.append(
        "Put the files into one of them, or name another data folder (--data-dir or data_dir=, "
        "or the environment variable FASTINTERP_DATA), or have them downloaded (--download or "
        "download=True)."
    )
    return "\n".join(lines)


def _download(source: Source, data_dir: Path) -> None:
    advice = f"Put the files into {data_dir / source.folders[-1]} by hand instead:"
    by_hand = "\n".join([advice, *_describe(source.files)])
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError, OSError) as error:
        # A torchvision built for another torch fails with the latter two.
        raise ImportError(
            f"Downloading {source.torchvision_name} needs torchvision, which cannot be imported "
            f"({error}).\n{by_hand}"
        ) from error
    try:
        getattr(datasets, source.torchvision_name)(root=str(data_dir), download=True)
    except Exception as error:
        # Network, archive and disk fail with unrelated types; the remedy is the same for all.
        raise RuntimeError(
            f"Downloading {source.torchvision_name} into {data_dir} failed "
            f"({type(error).__name__}: {error}).\n{by_hand}"
        ) from error
