"""The training program in two gloo processes against one."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file

from fastinterp.data import Dataset, Split
from fastinterp.training import StopRequest, TrainConfig, Trainer, checkpoint
from fastinterp.training.distributed import World
from fastinterp.training.metrics import read_metrics

CPU = torch.device("cpu")


def make_split(n):
    generator = torch.Generator().manual_seed(n)
    images = torch.randint(0, 256, (n, 1, 28, 28), dtype=torch.uint8, generator=generator)
    return Split(images, torch.randint(0, 10, (n,), generator=generator))


def make_trainer(folder, world, method, steps):
    config = TrainConfig(
        method=method, compare=[], epochs=4, batch_size=8, attack_steps=2, eps=0.1, lr=[1e-3]
    )
    data = Dataset("digits", 10, tuple("0123456789"), *map(make_split, (45, 11, 20)))
    trainer = Trainer(config, method, data, folder, CPU, world=world)
    trainer.last_step = steps
    batch = trainer._next_batch

    def doubled():
        x, y = batch()
        return x.double(), y

    trainer._next_batch = doubled
    return trainer


def train(rank, size, folder, method, steps):
    """Continues the run in ``folder`` to so many steps, in float64, as process ``rank``."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    world = World(rank, size, rank)
    if size > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/store-{steps}", rank=rank, world_size=size
        )
    trainer = make_trainer(Path(folder), world, method, steps)
    trainer.resume()
    trainer.run(StopRequest(), quiet=True)
    if size > 1:
        torch.save(trainer.model.state_dict(), Path(folder) / f"rank{rank}.pt")
        torch.distributed.destroy_process_group()


def in_two(folder, method, steps):
    mp.spawn(train, args=(2, str(folder), method, steps), nprocs=2)


def in_one(folder, method, steps):
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    try:
        train(0, 1, str(folder), method, steps)
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)


def assert_same(folder, other):
    one, two = (load_file(f / "model.safetensors") for f in (folder, other))
    for name in one:
        assert one[name].dtype == torch.float64
        torch.testing.assert_close(one[name], two[name], rtol=1e-9, atol=1e-12)


def test_two_processes_are_one_and_go_on_as_one(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    in_one(one, "int", 20)
    in_two(two, "int", 12)
    ranks = [torch.load(two / f"rank{rank}.pt") for rank in range(2)]
    assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in ranks[0])
    in_one(two, "int", 20)
    assert_same(one, two)
    a, b = (read_metrics(folder / "metrics.jsonl") for folder in (one, two))
    assert [row["step"] for row in a] == [10, 20] and [row["step"] for row in b] == [10, 12, 20]
    for name in ("loss", "discrepancy", "ce", "grad_norm"):
        assert a[0][name] == pytest.approx(b[0][name], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["normal", "adv", "trades", "int", "int-adv", "ig-norm"])
def test_every_way_between_one_and_two_processes(tmp_path, method):
    folders = [tmp_path / name for name in ("one", "two", "one-two", "two-one")]
    for folder in folders:
        folder.mkdir()
    one, two, one_two, two_one = folders
    in_one(one, method, 20)
    in_two(two, method, 20)
    in_one(one_two, method, 9)
    in_two(one_two, method, 20)
    in_two(two_one, method, 9)
    in_one(two_one, method, 20)
    for folder in (two, one_two, two_one):
        assert_same(one, folder)


def torchrun(folder, *options):
    """Starts two processes of the program; torchrun's own output is in stderr."""
    command = "-m torch.distributed.run --standalone --nproc-per-node 2 -m fastinterp train"
    return subprocess.Popen(
        [sys.executable, *command.split(), *"--device cpu --threads 1 --quiet".split(), *options],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


SHORT = "--epochs 1 --batch-size 50 --attack-steps 2 --compare --eval-steps 1 --eval-examples 10"


def workers(process):
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = {}
    for child in children:
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        for entry in environment:
            if entry.startswith(b"RANK="):
                ranks[int(entry[5:])] = int(child)
    return ranks


@pytest.mark.slow
def test_torchrun_prints_once_and_a_dead_process_ends_the_job(tmp_path):
    whole = torchrun(tmp_path, *SHORT.split(), "--out", "whole")
    output, errors = whole.communicate()
    assert whole.returncode == 0, errors
    assert output.count("run folder: whole") == 1 and output.count("weights, metrics") == 1

    process = torchrun(tmp_path, *SHORT.split(), "--epochs", "20", "--out", "killed")
    metrics = tmp_path / "killed" / "int" / "metrics.jsonl"
    while not read_metrics(metrics) and process.poll() is None:
        time.sleep(0.05)
    os.kill(workers(process)[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "process 0 of 2 stopped after step" in errors and "another process has died" in errors
    step = int(re.search(r"stopped after step (\d+)", errors)[1])
    newest = checkpoint.latest(tmp_path / "killed" / "int" / "checkpoints")
    assert newest.name == f"step-{step:08d}" and step >= 10
    again = torchrun(
        tmp_path,
        *SHORT.split(),
        "--epochs",
        "20",
        "--out",
        "killed",
        *"--resume auto".split(),
        "--limit-steps",
        str(step + 3),
    )
    output, errors = again.communicate()
    assert again.returncode == 0, errors
    assert "continuing: killed" in output


@pytest.mark.slow
def test_a_stop_of_one_process_stops_all_after_the_same_step(tmp_path):
    process = torchrun(tmp_path, *SHORT.split(), "--epochs", "20", "--out", "run")
    metrics = tmp_path / "run" / "int" / "metrics.jsonl"
    while not read_metrics(metrics) and process.poll() is None:
        time.sleep(0.05)
    os.kill(workers(process)[1], signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert output.count("go on with: fastinterp train --resume run") == 1


@pytest.mark.parametrize(
    ("change", "size", "message"),
    [
        (dict(batch_size=50), 4, "batch_size must be a multiple of 4 processes x accumulate 1"),
        (dict(batch_size=50, accumulate=5), 3, "a multiple of 3 processes x accumulate 5, got 50"),
        (dict(ig_weighting="batch-mean"), 2, "batch-mean needs a batch in one part"),
        (dict(sync_bn=True), 2, "sync_bn needs GPUs"),
    ],
)
def test_what_processes_cannot_share(change, size, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**change).check_world(size, CPU)
