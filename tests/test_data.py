from __future__ import annotations

import dataclasses
import gzip
import hashlib
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastinterp.data import DATASETS, DataError, Split, cifar10, digits, load_dataset, mnist
from fastinterp.data._files import resolve_data_dir

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
needs_mnist = pytest.mark.skipif(not (SHARED / "mnist").is_dir(), reason="no ../shared/data/mnist")
needs_cifar10 = pytest.mark.skipif(
    not (SHARED / "cifar10-packed").is_dir(), reason="no ../shared/data/cifar10-packed"
)
MNIST_STEMS = [forms[0].names[0] for forms in mnist.SOURCE.files]
CIFAR10_NAMES = [forms[0].names[0] for forms in cifar10.SOURCE.files]


def publish(monkeypatch, module, files: dict[str, bytes], folder: Path) -> None:
    """Write `files` and make them what `module` takes for the published ones."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    published = []
    for forms in module.SOURCE.files:
        form, data = next((f, files[name]) for f in forms for name in f.names if name in files)
        md5 = hashlib.md5(data).hexdigest()
        published.append((dataclasses.replace(form, md5=md5, size=len(data)),))
    source = dataclasses.replace(module.SOURCE, files=tuple(published))
    monkeypatch.setattr(module, "SOURCE", source)


def idx(array: np.ndarray) -> bytes:
    header = [0x800 + array.ndim, *array.shape]
    return np.array(header, ">u4").tobytes() + array.tobytes()


def idx_files(arrays: list[np.ndarray]) -> dict[str, bytes]:
    return {stem: idx(array) for stem, array in zip(MNIST_STEMS, arrays, strict=True)}


@pytest.fixture
def small_mnist(monkeypatch) -> list[np.ndarray]:
    """Seven training and three test images of MNIST's layout, two of them for validation."""
    rng = np.random.default_rng(0)
    shapes = ((7, 28, 28), (7,), (3, 28, 28), (3,))
    monkeypatch.setattr(mnist, "SHAPES", shapes)
    monkeypatch.setattr(mnist, "VALIDATION_SIZE", 2)
    return [rng.integers(0, 10, shape, dtype=np.uint8) for shape in shapes]


@pytest.fixture
def small_cifar10(monkeypatch) -> tuple[np.ndarray, np.ndarray, dict[str, bytes]]:
    """Images (24, 3, 32, 32) and labels (24,) in six batches of four, three for validation."""
    rng = np.random.default_rng(0)
    monkeypatch.setattr(cifar10, "BATCH_SIZE", 4)
    monkeypatch.setattr(cifar10, "VALIDATION_SIZE", 3)
    images = rng.integers(0, 256, (24, 3, 32, 32), dtype=np.uint8)
    labels = rng.integers(0, 10, 24)
    files = {
        name: pickle.dumps(
            {"data": images[k : k + 4].reshape(4, -1), "labels": [*labels[k : k + 4]]}
        )
        for name, k in zip(CIFAR10_NAMES, range(0, 24, 4), strict=True)
    }
    return images, labels, files


def assert_split(split: Split, images: np.ndarray, labels: np.ndarray) -> None:
    assert split.images.dtype == torch.uint8 and split.images.is_contiguous()
    assert split.labels.dtype == torch.int64 and len(split) == len(labels)
    np.testing.assert_array_equal(split.images.numpy(), images)
    np.testing.assert_array_equal(split.labels.numpy(), labels)


@needs_mnist
def test_mnist_values():
    data = load_dataset("mnist", SHARED)
    assert (data.name, data.num_classes, data.classes) == ("mnist", 10, tuple("0123456789"))
    raw = [
        np.frombuffer(gzip.decompress((SHARED / "mnist" / f"{stem}.gz").read_bytes()), np.uint8)
        for stem in MNIST_STEMS
    ]
    images, labels = raw[0][16:].reshape(-1, 1, 28, 28), raw[1][8:]
    assert_split(data.validation, images[:5000], labels[:5000])
    assert_split(data.train, images[5000:], labels[5000:])
    assert_split(data.test, raw[2][16:].reshape(-1, 1, 28, 28), raw[3][8:])
    assert [len(data.train), len(data.validation), len(data.test)] == [55_000, 5_000, 10_000]
    assert data.validation.labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert data.test.labels[:5].tolist() == [7, 2, 1, 0, 4]
    counts = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert data.test.labels.bincount().tolist() == counts
    assert data.test.images.long().sum() == 264_923_200


@needs_mnist
def test_download_leaves_unpacked_mnist_equal_to_the_gzipped(monkeypatch, tmp_path):
    def download(self):
        """Leave the unpacked files where torchvision does."""
        Path(self.raw_folder).mkdir(parents=True)
        for stem in MNIST_STEMS:
            data = gzip.decompress((SHARED / "mnist" / f"{stem}.gz").read_bytes())
            (Path(self.raw_folder) / stem).write_bytes(data)

    monkeypatch.setattr("torchvision.datasets.MNIST.download", download)
    raw = load_dataset("mnist", tmp_path / "new", download=True)
    packed = load_dataset("mnist", SHARED / "mnist")
    for part in ("train", "validation", "test"):
        assert_split(
            getattr(raw, part),
            getattr(packed, part).images.numpy(),
            getattr(packed, part).labels.numpy(),
        )


@pytest.mark.parametrize("joint", ["-idx", ".idx"])
@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("folder", ["", "mnist", "MNIST/raw"])
def test_mnist_layout(small_mnist, monkeypatch, tmp_path, folder, ending, joint):
    pack = gzip.compress if ending else bytes
    files = {
        stem.replace("-idx", joint) + ending: pack(data)
        for stem, data in idx_files(small_mnist).items()
    }
    publish(monkeypatch, mnist, files, tmp_path / folder)
    data = load_dataset("mnist", tmp_path)
    images, labels, test_images, test_labels = small_mnist
    assert_split(data.validation, images[:2, None], labels[:2])
    assert_split(data.train, images[2:, None], labels[2:])
    assert_split(data.test, test_images[:, None], test_labels)


@pytest.mark.parametrize(
    "damage",
    [lambda d: d[:-5], lambda d: b"", lambda d: d[:9] + bytes([d[9] ^ 1]) + d[10:]],
    ids=["truncated", "empty", "one bit"],
)
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_damaged_file(small_mnist, monkeypatch, tmp_path, damage, ending):
    pack = gzip.compress if ending else bytes
    files = {stem + ending: pack(data) for stem, data in idx_files(small_mnist).items()}
    publish(monkeypatch, mnist, files, tmp_path)
    name = MNIST_STEMS[2] + ending
    good, bad = files[name], damage(files[name])
    (tmp_path / name).write_bytes(bad)
    with pytest.raises(DataError) as error:
        load_dataset("mnist", tmp_path)
    message = str(error.value)
    assert message.startswith(str(tmp_path / name))
    assert f"expected {len(good):,} bytes with md5 {hashlib.md5(good).hexdigest()}" in message
    assert f"found {len(bad):,} bytes with md5 {hashlib.md5(bad).hexdigest()}" in message
    assert "--download" in message and isinstance(error.value, ValueError)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: b"\0\0\x0d" + idx(a)[3:], "magic number 00000d03, expected 00000803"),
        (lambda a: idx(a[0]), "magic number 00000802, expected 00000803"),
        (lambda a: b"", "magic number , expected 00000803"),
        (
            lambda a: idx(a[:, :14]),
            r"header of shape \(7, 14, 28\), expected 5,504 and \(7, 28, 28\)",
        ),
        (lambda a: idx(a)[:-1], r"5,503 bytes .* expected 5,504"),
    ],
    ids=["type", "rank", "empty", "shape", "length"],
)
def test_wrong_idx_format(small_mnist, monkeypatch, tmp_path, change, message):
    files = idx_files(small_mnist) | {MNIST_STEMS[0]: change(small_mnist[0])}
    publish(monkeypatch, mnist, files, tmp_path)
    with pytest.raises(DataError, match=f"{MNIST_STEMS[0]}.*{message}"):
        load_dataset("mnist", tmp_path)


@pytest.mark.parametrize(("name", "module"), [("mnist", mnist), ("cifar10", cifar10)])
def test_missing_files(tmp_path, name, module):
    with pytest.raises(FileNotFoundError) as error:
        load_dataset(name, tmp_path / "nowhere")
    message = str(error.value)
    assert f"The data folder {tmp_path / 'nowhere'} does not exist" in message
    for folder in module.SOURCE.folders:
        assert f"\n  {tmp_path / 'nowhere' / folder}\n" in message
    for form in (form for forms in module.SOURCE.files for form in forms):
        assert all(spelling in message for spelling in form.names)
        assert f"md5 {form.md5}, {form.size:,} bytes" in message
    assert all(way in message for way in ("--data-dir", "FASTINTERP_DATA", "--download"))


def test_one_missing_file_is_the_only_one_named(small_cifar10, monkeypatch, tmp_path):
    publish(monkeypatch, cifar10, small_cifar10[2], tmp_path)
    (tmp_path / "data_batch_4").unlink()
    with pytest.raises(FileNotFoundError) as error:
        load_dataset("cifar10", tmp_path)
    named = [name for name in CIFAR10_NAMES if name in str(error.value)]
    assert named == ["data_batch_4"] and "does not exist" not in str(error.value)


@pytest.mark.parametrize("folder", ["", "cifar10", "cifar-10-batches-py"])
def test_cifar10_layout(small_cifar10, monkeypatch, tmp_path, folder):
    images, labels, files = small_cifar10
    publish(monkeypatch, cifar10, files, tmp_path / folder)
    data = load_dataset("cifar10", tmp_path)
    assert_split(data.validation, images[:3], labels[:3])
    assert_split(data.train, images[3:20], labels[3:20])
    assert_split(data.test, images[20:], labels[20:])


class Touch:
    """Unpickling it creates the file `path`."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_cifar10_checks_before_it_unpickles(small_cifar10, monkeypatch, tmp_path):
    publish(monkeypatch, cifar10, small_cifar10[2], tmp_path)
    payload = pickle.dumps(Touch(tmp_path / "ran"))
    (tmp_path / "data_batch_1").write_bytes(payload)
    with pytest.raises(DataError, match="data_batch_1 is damaged"):
        load_dataset("cifar10", tmp_path)
    assert not (tmp_path / "ran").exists()
    pickle.loads(payload)
    assert (tmp_path / "ran").exists(), "the payload is harmless, so the test proves nothing"


@pytest.mark.parametrize(
    ("data", "labels"),
    [
        (np.zeros((3, 3072), np.uint8), [0] * 4),
        (np.zeros((4, 3072), np.float32), [0] * 4),
        (np.zeros((4, 3072), np.uint8), [0] * 5),
    ],
    ids=["images", "type", "labels"],
)
def test_wrong_cifar10_batch(small_cifar10, monkeypatch, tmp_path, data, labels):
    files = small_cifar10[2] | {"test_batch": pickle.dumps({"data": data, "labels": labels})}
    publish(monkeypatch, cifar10, files, tmp_path)
    with pytest.raises(DataError, match=r"test_batch: .* expected torch.uint8"):
        load_dataset("cifar10", tmp_path)


@pytest.mark.slow
@needs_cifar10
def test_cifar10_values(tmp_path):
    unpack = [sys.executable, SHARED / "cifar10_unpack.py", SHARED / "cifar10-packed", tmp_path]
    subprocess.run(unpack, check=True)
    data = load_dataset("cifar10", tmp_path)
    batches = [pickle.loads((tmp_path / n).read_bytes(), encoding="latin1") for n in CIFAR10_NAMES]
    images = np.concatenate([b["data"].reshape(-1, 3, 32, 32) for b in batches])
    labels = np.concatenate([b["labels"] for b in batches])
    assert_split(data.validation, images[:5000], labels[:5000])
    assert_split(data.train, images[5000:50_000], labels[5000:50_000])
    assert_split(data.test, images[50_000:], labels[50_000:])
    assert data.test.labels.bincount().tolist() == [1000] * 10
    assert [data.classes[k] for k in data.test.labels[:4]] == ["cat", "ship", "ship", "airplane"]
    assert data.test.images[0, :, 0, 0].tolist() == [158, 112, 49]


def test_download_of_cifar10(small_cifar10, monkeypatch, tmp_path):
    from torchvision import datasets

    images, labels, files = small_cifar10
    publish(monkeypatch, cifar10, files, tmp_path / "published")
    base_folder = datasets.CIFAR10.base_folder
    roots = []

    def fake(root, download):
        assert download is True
        roots.append(root)
        (tmp_path / "published").rename(Path(root) / base_folder)

    monkeypatch.setattr("torchvision.datasets.CIFAR10", fake)
    for _ in range(2):
        data = load_dataset("cifar10", tmp_path, download=True)
        assert_split(data.test, images[20:], labels[20:])
    assert roots == [str(tmp_path)], "what is there already is not downloaded again"


def test_failed_download(monkeypatch, tmp_path):
    def fake(root, download):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.CIFAR10", fake)
    with pytest.raises(RuntimeError, match="no route to host") as error:
        load_dataset("cifar10", tmp_path, download=True)
    assert str(tmp_path / "cifar-10-batches-py") in str(error.value)
    assert isinstance(error.value.__cause__, OSError)


def test_download_without_torchvision(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match="needs torchvision") as error:
        load_dataset("mnist", tmp_path, download=True)
    assert str(tmp_path / "MNIST" / "raw") in str(error.value)


def test_import_needs_neither_torchvision_nor_sklearn():
    code = "import sys; sys.modules.update(torchvision=None, sklearn=None); import fastinterp.data"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_digits():
    from sklearn.datasets import load_digits

    data, again = load_dataset("digits"), load_dataset("digits")
    source, order = load_digits(), np.random.RandomState(99).permutation(1797)
    # Bilinear weights (28, 8) written out: pixel centres, clamped at the border.
    position = np.clip((np.arange(28) + 0.5) * 8 / 28 - 0.5, 0, 7)
    weights = np.maximum(0, 1 - np.abs(position[:, None] - np.arange(8)))
    exact = (weights @ source.images @ weights.T * 255 / 16)[:, None]
    # numpy rounds halves to even as well; 1e-9 settles which values are halves.
    images = np.round(np.round(exact, 9))
    # Rounding errors of another machine must not move a half to the other side.
    noisy = torch.from_numpy(source.images[:, None] - 1e-9)
    np.testing.assert_array_equal(digits._resize(noisy).numpy(), images)
    for part, index in (
        ("test", order[:360]),
        ("validation", order[360:497]),
        ("train", order[497:]),
    ):
        split = getattr(data, part)
        assert_split(split, images[index], source.target[index])
        assert torch.equal(split.images, getattr(again, part).images)
    assert data.train.images.shape == (1300, 1, 28, 28)
    assert data.train.images.min() == 0 and data.train.images.max() == 255
    assert data.num_classes == 10 and len(data.classes) == 10


def test_data_dir(small_cifar10, monkeypatch, tmp_path):
    images, labels, files = small_cifar10
    publish(monkeypatch, cifar10, files, tmp_path / "here")
    monkeypatch.setenv("FASTINTERP_DATA", str(tmp_path / "here"))
    assert_split(load_dataset("cifar10").test, images[20:], labels[20:])
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        load_dataset("cifar10", tmp_path / "elsewhere")

    monkeypatch.setenv("FASTINTERP_DATA", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert resolve_data_dir(None) == tmp_path / "cache" / "fastinterp" / "data"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_data_dir(None) == tmp_path / ".cache" / "fastinterp" / "data"
    assert resolve_data_dir("~/data") == tmp_path / "data"


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
            ],
        ),
    ],
)
def test_batch(device, dtype):
    values = np.arange(256, dtype=np.uint8).reshape(4, 1, 8, 8)
    split = Split(torch.from_numpy(values).to(device), torch.tensor([3, 1, 2, 0], device=device))
    expected = values.astype(dtype) / np.array(255, dtype)
    index = torch.tensor([2, 0, 2], device=device)
    for choice, rows in ((slice(None), [0, 1, 2, 3]), (slice(1, 3), [1, 2]), (index, [2, 0, 2])):
        images, labels = split.batch(choice, getattr(torch, dtype))
        assert images.dtype == getattr(torch, dtype) and labels.dtype == torch.int64
        np.testing.assert_array_equal(images.cpu().numpy(), expected[rows])
        assert labels.tolist() == [[3, 1, 2, 0][row] for row in rows]
    assert split.batch(slice(None))[0].dtype == torch.float32


def test_unknown_name():
    with pytest.raises(ValueError, match="'mnits'; there are: digits, mnist, cifar10, restricted"):
        load_dataset("mnits")
    assert DATASETS == ("digits", "mnist", "cifar10", "restricted-imagenet", "folder")
