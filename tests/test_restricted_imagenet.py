import pytest
import torch
from PIL import Image

from fastinterp.data import DataError, load_dataset, restricted_imagenet
from fastinterp.models import create_model
from fastinterp.objectives import METHODS


def write(path, colour, size=(200, 280)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def super_classes(tmp_path):
    """Twelve images of each super class, of a colour that tells class and number."""
    for label, name in enumerate(restricted_imagenet.CLASSES):
        for i in range(12):
            write(tmp_path / name / f"{i:02}.png", (label, i, 200))
    return tmp_path


def test_folders_of_super_classes(super_classes):
    data = load_dataset("restricted-imagenet", super_classes)
    assert data.num_classes == 9 and data.classes[0] == "dog" and data.classes[8] == "insect"
    seen = set()
    for split in (data.train, data.validation, data.test):
        assert split.images.shape[1:] == (3, 224, 224) and split.images.dtype == torch.uint8
        colours = split.images[:, :, 100, 100]
        torch.testing.assert_close(colours[:, 0].long(), split.labels)
        seen |= {tuple(c[:2].tolist()) for c in colours}
    assert len(seen) == 9 * 12
    assert (len(data.train), len(data.validation), len(data.test)) == (87, 10, 11)


def test_imagenet_folders(tmp_path):
    for part in ("train", "val"):
        for synset in range(1000):
            (tmp_path / part / f"n{synset:08}").mkdir(parents=True)
    for part, count in (("train", 3), ("val", 1)):
        for synset, label in ((151, 0), (268, 0), (281, 1), (31, 2), (319, 8), (0, 9), (999, 9)):
            for i in range(count):
                write(tmp_path / part / f"n{synset:08}" / f"{i}.png", (label, i, 0))
    data = load_dataset("restricted-imagenet", tmp_path)
    assert sorted(data.test.labels.tolist()) == [0, 0, 1, 2, 8]
    assert len(data.train) + len(data.validation) == 15
    torch.testing.assert_close(data.test.images[:, 0, 0, 0].long(), data.test.labels)


def test_missing_and_damaged(tmp_path, super_classes):
    with pytest.raises(FileNotFoundError, match="Restricted ImageNet was not found"):
        load_dataset("restricted-imagenet", tmp_path / "nowhere")
    damaged = super_classes / "dog" / "05.png"
    damaged.write_bytes(damaged.read_bytes()[:60])
    with pytest.raises(DataError, match=r"05\.png is not an image"):
        load_dataset("restricted-imagenet", super_classes)


def test_a_step_on_real_images(data_dir):
    if not (data_dir / "restricted-imagenet-sample").is_dir():
        pytest.skip(f"the sample of Restricted ImageNet is not in {data_dir}")
    data = load_dataset("restricted-imagenet", data_dir)
    assert len(data.train) + len(data.validation) + len(data.test) == 203
    x, y = data.train.batch(slice(0, 2))
    objective = METHODS["int"](create_model("wresnet", 3, 9), step_size=0.1, steps=1)
    loss, _ = objective(x, y, 0.003, torch.rand_like(x) * 0.006 - 0.003)
    loss.backward()
    assert torch.isfinite(loss)
