"""WebDataset shards: the same images as in folders, and everything that may be wrong with one."""

import io
import os
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastinterp.data import DataError, load_dataset

MTIME = 1_600_000_000


def jpeg(colour: int) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (300, 260), (colour, 255 - colour, 0)).save(data, "JPEG")
    return data.getvalue()


def write(shard: Path, members: dict[str, bytes]) -> None:
    shard.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(shard, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), MTIME
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def shards(tmp_path) -> Path:
    """Three classes in two shards of ten for training and one of six for testing."""
    for part, counts in (("train", (10, 10)), ("val", (6,))):
        colour = 0
        for number, count in enumerate(counts):
            members = {}
            for i in range(count):
                suffix = ("jpg", "JPEG")[i % 2]
                members[f"some/{colour:03}.x.json"] = b"{}"
                members[f"some/{colour:03}.{suffix}"] = jpeg(10 * colour)
                members[f"some/{colour:03}.cls"] = str(colour % 3).encode() + b"\n" * (i % 2)
                colour += 1
            write(tmp_path / part / f"{number:04}.tar", members)
    return tmp_path


def test_shards_have_the_images_of_folders(shards, tmp_path_factory):
    folders = tmp_path_factory.mktemp("unpacked")
    for shard in shards.glob("*/*.tar"):
        with tarfile.open(shard) as tar:
            for name in tar.getnames():
                if not name.lower().endswith(("jpg", "jpeg")):
                    continue
                label = tar.extractfile(f"{name.partition('.')[0]}.cls").read().strip().decode()
                to = folders / shard.parent.name / label / Path(name).name
                to.parent.mkdir(parents=True, exist_ok=True)
                to.write_bytes(tar.extractfile(name).read())
    packed, loose = load_dataset("folder", shards), load_dataset("folder", folders)
    assert packed.classes == loose.classes == ("0", "1", "2")
    assert packed.train.labels[:4].tolist() == [1, 2, 0, 1] and len(packed.train) == 18

    def images(data):
        """By the red of its corner, which differs from image to image: label and pixels."""
        return {
            int(image[0, 0, 0]): (label, image)
            for split in (data.train, data.validation)
            for image, label in zip(split.images, split.labels.tolist(), strict=True)
        }

    ours, theirs = images(packed), images(loose)
    assert len(ours) == 20 and ours.keys() == theirs.keys()
    for colour, (label, image) in ours.items():
        assert label == theirs[colour][0] and torch.equal(image, theirs[colour][1])
    read = load_dataset("folder", shards, workers=2)
    index = torch.tensor([17, 3, 3, 0])
    ((x, y),) = read.train.batches([index])
    assert torch.equal(x, packed.train.batch(index)[0])
    assert torch.equal(y, packed.train.labels[index])


def rewritten(members):
    return lambda root: write(root / "train" / "0001.tar", members)


def cut(at: int):
    """Without the bytes from there on, counted from the end."""

    def change(root):
        shard = root / "train" / "0001.tar"
        shard.write_bytes(shard.read_bytes()[:at])

    return change


def overwritten(root):
    """The second header is no header."""
    shard = root / "train" / "0001.tar"
    data = bytearray(shard.read_bytes())
    data[1024:1030] = b"damage"
    shard.write_bytes(data)


def appended(root):
    """A whole tar file behind the other's end."""
    shard = root / "train" / "0001.tar"
    shard.write_bytes(2 * shard.read_bytes())


GOOD = {"a.jpg": jpeg(1), "a.cls": b"1"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rewritten({"a.jpg": jpeg(1)}), "0001.tar: a has .jpg, but a sample is one image"),
        (rewritten({"d/a.cls": b"1"}), "0001.tar: d/a has .cls, but a sample is one image"),
        (rewritten({**GOOD, "a.png": b""}), r"0001.tar: a has .jpg .cls .png, but a sample is one"),
        (rewritten({**GOOD, "a.CLS": b"1"}), "0001.tar: a.CLS is there twice"),
        (rewritten({**GOOD, "a.cls": b"-1"}), "0001.tar: a.cls is '-1', but must be the number of"),
        (rewritten({**GOOD, "a.cls": b"cat"}), "0001.tar: a.cls is 'cat', but must be the number"),
        (rewritten({**GOOD, "a.cls": b""}), "0001.tar: a.cls is '', but must be the number of a"),
        (
            rewritten({**GOOD, "a.cls": b"999999999"}),
            "0001.tar: a.jpg is of class 999999999, but .*train has no images of class 3",
        ),
        (
            lambda root: write(root / "val" / "1.tar", {**GOOD, "a.cls": b"3"}),
            "val/1.tar: a.jpg is of class 3, but .*train has the classes 0 to 2",
        ),
        (cut(0), "0001.tar is no sound tar file: empty file"),
        (cut(700), "0001.tar is no sound tar file: unexpected end of data"),
        (cut(1024), "0001.tar is no sound tar file: it breaks off, or is damaged, at byte 1,024"),
        (appended, "0001.tar is no sound tar file: it breaks off, or is damaged, at byte"),
        (overwritten, "0001.tar is no sound tar file: it breaks off, or is damaged, at byte 1,024"),
        (
            lambda root: (root / "train" / "0001.tar").write_bytes(b"no tar file" * 1000),
            "0001.tar is no sound tar file",
        ),
        (rewritten({**GOOD, "a.jpg": jpeg(1)[:-90]}), "0001.tar: a.jpg is not an image that can"),
    ],
)
def test_a_damaged_shard_is_named(shards, change, message):
    change(shards)
    with pytest.raises(DataError, match=message):
        load_dataset("folder", shards)


def test_shards_are_missing_on_one_side(shards):
    os.remove(shards / "val" / "0000.tar")
    with pytest.raises(FileNotFoundError, match=r"val has no images \(.*\) in shards \(\*.tar\)"):
        load_dataset("folder", shards)
