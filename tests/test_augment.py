"""Augmentation against one image at a time with torch's pad, flip and slices."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fastinterp.data import Augmentation, Dataset, Split
from fastinterp.training import Trainer
from fastinterp.training.config import TrainConfig
from fastinterp.training.recipes import RECIPES, recipe


def one_by_one(images, seed, padding, flip, cutout):
    draws = np.random.Generator(np.random.PCG64(seed))
    n, _, h, w = images.shape
    shift = draws.integers(-padding, padding + 1, (2, n))
    mirrored, centre = draws.random(n) < 0.5 * flip, draws.random((2, n))
    changed = []
    for i, image in enumerate(images):
        image = F.pad(image.flip(2) if mirrored[i] else image, (padding,) * 4)
        top, left = shift[:, i] + padding
        image = image[:, top : top + h, left : left + w]
        if cutout:
            y, x = (int(c * s) - cutout // 2 for c, s in zip(centre[:, i], (h, w), strict=True))
            image = image.clone()
            image[:, max(y, 0) : max(y + cutout, 0), max(x, 0) : max(x + cutout, 0)] = 0
        changed.append(image)
    return torch.stack(changed)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize(
    ("padding", "flip", "cutout"), [(4, True, 8), (3, False, 0), (0, True, 0), (0, False, 5)]
)
def test_like_one_image_at_a_time(padding, flip, cutout, dtype):
    images = torch.randint(1, 256, (40, 3, 10, 14)).to(dtype)
    images = images.contiguous(memory_format=torch.channels_last)
    before = images.clone()
    found = Augmentation(padding, flip, cutout)(images, (7, 3))
    assert torch.equal(found, one_by_one(images, (7, 3), padding, flip, cutout))
    assert torch.equal(images, before) and found.stride() == images.stride()
    assert not torch.equal(found, Augmentation(padding, flip, cutout)(images, (7, 4)))


def test_parts_of_a_batch_are_changed_as_in_the_whole():
    images, augment = torch.rand(12, 3, 8, 8), Augmentation(2, True, 3)
    whole = augment(images, (1, 2))
    parts = [augment(images[p], (1, 2), p, 12) for p in (slice(0, 4), slice(4, 12))]
    assert torch.equal(torch.cat(parts), whole)


def split(channels, size, n=4):
    images = torch.randint(256, (n, channels, size, size), dtype=torch.uint8)
    return Split(images, torch.arange(n) % 3)


def test_a_resumed_run_sees_the_same_images(tmp_path):
    data = Dataset("x", 10, ("",) * 10, *(split(1, 28, 8) for _ in range(3)))
    config = TrainConfig(
        batch_size=4, epochs=2, crop_padding=3, flip=True, cutout=5, method="normal"
    )
    trainer = Trainer(config, "normal", data, tmp_path, torch.device("cpu"))
    seen = []
    for trainer.step in range(4):
        seen.append(trainer._next_batch()[0])
        if trainer.step == 1:
            order = trainer.order
    again = Trainer(config, "normal", data, tmp_path, torch.device("cpu"))
    again.step, again.order = 1, order
    assert torch.equal(again._next_batch()[0], seen[1])
    assert not torch.equal(seen[1], data.train.batch(order[4:8])[0])


@pytest.mark.parametrize("option", ["crop_padding", "cutout"])
def test_negative_sizes_are_refused(option):
    with pytest.raises(ValueError, match=f"{option} must be at least 0, got -1"):
        TrainConfig(**{option: -1}).check()


def test_paper_recipes_do_not_augment():
    assert not any(
        recipe(n).augmentation for n in RECIPES if "resnet18" not in n and "resnet50" not in n
    )
    assert recipe("cifar10-resnet18-int").augmentation


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in RECIPES if "1epoch" not in n])
def test_every_recipe_trains(name, tmp_path):
    settings = {
        **RECIPES[name],
        "batch_size": 2,
        "eps_warmup": [],
        "attack_steps": 1,
        "ig_steps": 2,
    }
    config = TrainConfig(**settings)
    config.check()
    channels, size = (1, 28) if config.dataset in ("mnist", "digits") else (3, 32)
    data = Dataset("x", 9, ("",) * 9, *(split(channels, size) for _ in range(3)))
    trainer = Trainer(config, config.method, data, tmp_path, torch.device("cpu"))
    before = [p.clone() for p in trainer.model.parameters()]
    for _ in range(2):
        trainer._step()
    after = list(trainer.model.parameters())
    assert all(torch.isfinite(p).all() for p in after)
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
