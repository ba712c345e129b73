"""Images in folders of classes, in memory and read from disk by worker processes."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import save_file
from torchvision import transforms
from torchvision.datasets import ImageFolder

from fastinterp.data import DataError, DataWorkerDied, DiskSplit, Split, disk, load_dataset
from fastinterp.evaluation.results import fingerprint, images_fingerprint
from fastinterp.models import create_model
from fastinterp.training import Interrupted, RunOptions, StopRequest, TrainConfig, Trainer
from fastinterp.training.distributed import World

CPU = torch.device("cpu")
SIZES = ((300, 200), (180, 260), (256, 256), (260, 401), (1500, 1100))


def photograph(seed: int, size: tuple[int, int]) -> Image.Image:
    """Smooth colours with a little noise, which a JPEG does not turn into something else."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), dtype=np.int16)
    noise = rng.integers(-8, 9, smooth.shape, dtype=np.int16)
    return Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8))


def save(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    photograph(seed, SIZES[seed % len(SIZES)]).save(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three classes, 24 images of them for training and 6 for testing."""
    root = tmp_path_factory.mktemp("images")
    for seed in range(24):
        save(root / "train" / "abc"[seed % 3] / f"{seed:02}.jpg", seed)
    for seed in range(24, 30):
        suffix = "png" if seed % 2 else "JPEG"
        save(root / "val" / "abc"[seed % 3] / "deeper" / f"{seed}.{suffix}", seed)
    Image.new("L", (230, 300), 77).save(root / "train" / "a" / "grey.png")
    (root / "train" / "a" / "notes.txt").write_text("no image")
    return root


def children() -> set[int]:
    """Processes that this one has started."""
    here = os.getpid()
    return set(map(int, Path(f"/proc/{here}/task/{here}/children").read_text().split()))


def test_both_forms_have_the_same_pixels_and_batches(folder):
    held, read = load_dataset("folder", folder), load_dataset("folder", folder, workers=2)
    assert held.classes == read.classes == ("a", "b", "c") and held.num_classes == 3
    assert [len(getattr(held, part)) for part in ("train", "validation", "test")] == [22, 3, 6]
    for part in ("train", "validation", "test"):
        whole, split = getattr(held, part), getattr(read, part)
        assert isinstance(whole, Split) and isinstance(split, DiskSplit)
        assert whole.image_shape == split.image_shape == (3, 224, 224)
        assert torch.equal(whole.images, split.pixels(slice(None)))
        assert torch.equal(whole.labels, split.labels) and len(whole) == len(split)
        every = torch.arange(len(whole))
        assert images_fingerprint(split, every) == images_fingerprint(whole, every)
        assert images_fingerprint(whole, every) == fingerprint(whole.images, whole.labels)
    indices = torch.tensor([[5, 0, 21, 5], [20, 7, 1, 2]])
    state = torch.get_rng_state()
    batches = list(read.train.batches(indices))
    assert torch.equal(torch.get_rng_state(), state)
    for index, (x, y), (x_held, y_held) in zip(
        indices, batches, held.train.batches(indices), strict=True
    ):
        assert x.dtype == torch.float32 and torch.equal(x, x_held) and torch.equal(y, y_held)
        assert torch.equal(x, read.train.batch(index)[0])


def test_a_batch_of_many_parts_and_batches_of_none(folder, monkeypatch):
    split = load_dataset("folder", folder, workers=2).train
    monkeypatch.setattr(disk, "PART", 3)
    indices = [torch.arange(11), torch.arange(0), torch.arange(11, 22)]
    images = torch.cat([x for x, _ in split.batches(indices)])
    assert torch.equal(images, split.batch(slice(None))[0])
    assert list(split.batches([])) == []


def test_pixels_are_those_of_torchvision(folder):
    """But for large JPEGs, which are decoded at a part of their size."""
    resize = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])
    theirs = ImageFolder(folder / "val", resize)
    ours = load_dataset("folder", folder).test
    assert ours.labels.tolist() == theirs.targets
    for (image, _), pixels, (path, _) in zip(theirs, ours.images, theirs.samples, strict=True):
        difference = (pixels.permute(1, 2, 0).int() - torch.tensor(np.asarray(image)).int()).abs()
        large = path.endswith("JPEG") and int(Path(path).stem) % len(SIZES) == 4
        assert difference.max() <= (8 if large else 1)
        assert difference.float().mean() < (1 if large else 0.1)


def test_moving_a_split_decodes_nothing(tmp_path, folder):
    damaged = tmp_path / "data"
    for part in ("train", "val"):
        for name in "ab":
            (damaged / part / name).mkdir(parents=True)
            for number in range(2):
                (damaged / part / name / f"{number}.jpg").write_bytes(b"no JPEG")
    data = load_dataset("folder", damaged, workers=1)
    assert len(data.test.to("cpu")) == 4 and data.test.image_shape == (3, 224, 224)


def test_memory_decides_which_form(folder, monkeypatch):
    monkeypatch.setattr(disk.os, "sysconf", lambda name: 3200)
    assert isinstance(load_dataset("folder", folder).train, Split)  # 31 images take 4.7 MB
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # each process would hold them
    data = load_dataset("folder", folder)
    assert isinstance(data.train, DiskSplit)
    assert data.train.workers == max(1, len(os.sched_getaffinity(0)) // 2)


def test_a_damaged_image_is_named(tmp_path):
    for part in ("train", "val"):
        for i in range(3):
            save(tmp_path / part / "a" / f"{i}.jpg", i)
    bad = tmp_path / "train" / "a" / "2.jpg"
    bad.write_bytes(bad.read_bytes()[:-2000])
    message = rf"{bad} is not an image that can be decoded: image file is truncated"
    with pytest.raises(DataError, match=message):
        load_dataset("folder", tmp_path)
    train = load_dataset("folder", tmp_path, workers=2).train
    before = children()
    batches = train.batches(torch.arange(2).view(2, 1))
    next(batches)
    with pytest.raises(DataError, match=f"^{message}") as error:
        next(batches)
    assert "Traceback" not in str(error.value) and children() == before
    bad.unlink()
    with pytest.raises(DataError, match="No such file"):
        train.batch(torch.tensor([1]))


def test_workers_ignore_ctrl_c_and_end_with_the_iterator(folder):
    split = load_dataset("folder", folder, workers=2).train
    before = children()
    handler = signal.getsignal(signal.SIGCHLD)
    batches = split.batches(torch.arange(20).view(20, 1))
    next(batches)
    assert signal.getsignal(signal.SIGCHLD) is handler
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    workers = children() - before
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker, signal.SIGINT)
    assert len([next(batches) for _ in range(18)]) == 18
    batches.close()
    assert children() == before


def test_a_killed_worker(tmp_path, folder):
    """The steps before are saved, and the message says what to do."""
    trainer = make_trainer(tmp_path / "normal", folder, workers=1, options=RunOptions(30))
    step, before = trainer._step, children()

    def killing(stop):
        done = step(stop)
        if trainer.step == 2:
            (worker,) = children() - before
            os.kill(worker, signal.SIGKILL)
        return done

    trainer._step = killing
    # Enough batches that the worker cannot have decoded all of them ahead.
    trainer.last_step = 20
    with pytest.raises(DataWorkerDied) as error:
        trainer.run(StopRequest(), quiet=True)
    message = str(error.value)
    assert "a data worker, a process that reads images, has died" in message
    assert "use fewer of them (workers= of load_dataset, --workers of train, now 1)" in message
    assert f"Finished steps are saved; go on with --resume {tmp_path}" in message
    saved = trainer.step
    assert 2 <= saved < 20 and children() == before
    again = make_trainer(tmp_path / "normal", folder, workers=1)
    assert again.resume() and again.step == saved


def test_a_signal_to_the_whole_job_stops_it(tmp_path, folder, monkeypatch):
    """Workers that the same signal has ended are no failure."""
    stop, pixels = StopRequest(), DiskSplit._decoded

    def interrupted(split, indices):
        for number, part in enumerate(pixels(split, indices)):
            if number == 2:
                stop.requested = True
                raise DataWorkerDied("gone")
            yield part

    monkeypatch.setattr(DiskSplit, "_decoded", interrupted)
    trainer = make_trainer(tmp_path / "normal", folder, workers=1)
    with pytest.raises(Interrupted, match="stopped normal after step 2"):
        trainer.run(stop, quiet=True)
    assert make_trainer(tmp_path / "normal", folder, workers=1).resume()


def make_trainer(path, folder, workers, options=None, batch_size=1, world=None):
    config = TrainConfig(
        dataset="folder",
        method="normal",
        compare=[],
        model="torchvision:shufflenet_v2_x0_5",
        epochs=20,
        batch_size=batch_size,
        lr=[1e-3],
    )
    data = load_dataset("folder", folder, workers=workers)
    return Trainer(config, "normal", data, path, CPU, options, world)


def test_a_stopped_run_lands_on_the_same_images(tmp_path, folder):
    """With another number of workers, in the middle of the second epoch, and with all in memory."""
    stop = StopRequest()

    def run(name, workers, stopping=False):
        trainer = make_trainer(tmp_path / name, folder, workers, RunOptions(30, 16), batch_size=2)
        trainer.resume()
        step = trainer._step

        def stopped(now):
            stop.requested = stopping and trainer.step == 12
            return step(now)

        trainer._step = stopped
        if stopping:
            with pytest.raises(Interrupted, match="after step 13"):
                trainer.run(stop, quiet=True)
            stop.requested = False
        else:
            trainer.run(stop, quiet=True)
        return trainer.model.state_dict()

    whole = run("whole", None)
    run("stopped", 2, stopping=True)
    resumed = run("stopped", 1)
    for name, weight in whole.items():
        assert torch.equal(weight, resumed[name])


def test_two_ranks_take_the_halves_of_every_batch(tmp_path, folder):
    def images(world):
        trainer = make_trainer(tmp_path, folder, 1, batch_size=4, world=world)
        return [trainer._next_batch() for _ in range(2)]

    whole = images(World())
    # DistributedDataParallel wants a group; no step is taken here.
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        ranks = [images(World(rank, 2, rank)) for rank in range(2)]
    finally:
        dist.destroy_process_group()
    for batch, *halves in zip(whole, *ranks, strict=True):
        for all_of_it, *parts in zip(batch, *halves, strict=True):
            assert [len(part) for part in parts] == [2, 2]
            assert torch.equal(all_of_it, torch.cat(parts))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda root: (root / "val" / "d").mkdir(),
            DataError,
            "differ: val/ has class d, which train/ has not",
        ),
        (
            lambda root: (root / "train" / "d").mkdir(),
            DataError,
            "differ: train/ has class d, which val/ has not",
        ),
        (
            lambda root: [(p / "d").mkdir() for p in (root / "train", root / "val")],
            FileNotFoundError,
            r"train has no images \(.*\) of class d$",
        ),
        (
            lambda root: None,
            FileNotFoundError,
            "train has too few images of class a: one in ten of all, in their order, is held out",
        ),
        (
            lambda root: (root / "train").rename(root / "training"),
            FileNotFoundError,
            "no folders train/ and val/ with one folder of images per class, or",
        ),
    ],
    ids=["val", "train", "empty", "few", "missing"],
)
def test_folders_that_are_no_data_set(tmp_path, change, error, message):
    for part in ("train", "val"):
        for name in "abc":
            save(tmp_path / part / name / "0.jpg", 0)
    change(tmp_path)
    with pytest.raises(error, match=message):
        load_dataset("folder", tmp_path)


def test_workers_of_data_sets_without(folder, capsys):
    from fastinterp.cli import main  # not at the top: what it needs may not be where the GPU is

    for name in ("mnist", "cifar10", "digits"):
        with pytest.raises(ValueError, match=f"workers must be left out with {name}, which is"):
            load_dataset(name, workers=2)
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        load_dataset("folder", folder, workers=0)
    assert main(["train", "--dataset", "mnist", "--workers", "2"]) == 1
    assert "workers must be left out with mnist" in capsys.readouterr().err


def test_commands_read_images_from_disk(tmp_path, folder, monkeypatch, capsys):
    from fastinterp.cli import main  # not at the top: what it needs may not be where the GPU is

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(disk, "_fit_memory", lambda images: False)
    net = create_model("small", 3, 3)
    save_file(net.state_dict(), "net.safetensors")
    shared = ["net.safetensors", "--dataset", "folder", "--data-dir", str(folder)]
    few = "--examples 2 --steps 1 --eps 0.01".split()
    assert main(["eval", *shared, *few, "--json", "read.json"]) == 0
    assert main(["attack", *shared, *few, "--out", "attacked"]) == 0
    assert main(["explain", *shared, *few[2:], "--index", "5", "--out", "explained"]) == 0
    assert (tmp_path / "explained" / "test-5.png").exists()
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert main(["eval", *shared, *few, "--json", "held.json"]) == 0
    assert Path("read.json").read_text() == Path("held.json").read_text()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_batches_on_a_gpu(folder, monkeypatch):
    """Copied ahead on a stream of their own, while a slow kernel holds up the one in use."""
    monkeypatch.setattr(disk, "PART", 3)
    split = load_dataset("folder", folder, workers=2).train
    indices = torch.arange(20).view(4, 5).repeat(8, 1)
    batches = split.to("cuda").batches(indices)
    for index, (x, y) in zip(indices, batches, strict=True):
        torch.cuda._sleep(10_000_000)
        expected = split.batch(index)
        assert torch.equal(x.cpu(), expected[0]) and torch.equal(y.cpu(), expected[1])
