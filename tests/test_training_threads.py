"""The number of threads that a run chooses, and keeps."""

import pytest
import torch

from fastinterp.cli import main
from fastinterp.data import load_dataset
from fastinterp.training import Interrupted, RunOptions, StopRequest, TrainConfig, Trainer, threads
from fastinterp.training.metrics import read_metrics
from fastinterp.training.run import execute, prepare


@pytest.fixture(autouse=True)
def two_threads(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        ({4: 3, 2: 1, 1: 2}, 2),
        ({4: 3, 2: 2, 1: 1}, 1),
        ({4: 1.00, 2: 0.98, 1: 0.95}, 4),
        ({4: 1, 2: 2}, 4),  # one is not tried: two are so much slower
        ({4: 6}, 4),  # nor is any other for so long a step
    ],
)
def test_the_fastest_number_or_all_where_nothing_is_gained(monkeypatch, seconds, best):
    clock = [0.0]
    monkeypatch.setattr(threads.time, "perf_counter", lambda: clock[0])

    def step():
        clock[0] += seconds[torch.get_num_threads()]

    assert threads.fastest(step, 4) == best


def config():
    return TrainConfig(
        model="small", compare=["normal"], epochs=1, batch_size=10, attack_steps=1, eps=0.1,
        eval_examples=10, eval_steps=1,
    )  # fmt: skip


def test_a_run_chooses_once_without_a_trace_and_keeps_it_when_it_is_resumed(tmp_path, monkeypatch):
    data, tried = load_dataset("digits"), []

    def fastest(step, most):
        step()
        tried.append(most)
        return 1

    monkeypatch.setattr(threads, "fastest", fastest)

    def run(folder, options, resume=False):
        prepare(tmp_path / folder, config(), resume)
        results = execute(
            *(tmp_path / folder, config(), data, torch.device("cpu")),
            resume=resume,
            quiet=True,
            options=options,
        )
        return [{k: v for k, v in row.items() if k != "train_seconds"} for row in results]

    run("chosen", RunOptions(choose_threads=True, limit_steps=3))
    assert tried == [2] and torch.get_num_threads() == 2  # as before
    whole = RunOptions(choose_threads=True, limit_steps=6)
    resumed = run("chosen", whole, resume=True)
    rows = read_metrics(tmp_path / "chosen" / "int" / "metrics.jsonl")
    assert tried == [2] and {row["threads"] for row in rows} == {1}
    assert resumed == run("again", whole) and tried == [2, 2]


def test_a_run_of_an_earlier_version_goes_on_with_all_threads(tmp_path):
    def trainer(**options):
        data, options = load_dataset("digits"), RunOptions(choose_threads=True, **options)
        return Trainer(config(), "normal", data, tmp_path, torch.device("cpu"), options)

    trainer(limit_steps=1).run(StopRequest(), quiet=True)
    (file,) = tmp_path.glob("checkpoints/*/state.pt")
    state = torch.load(file, weights_only=True)
    assert state.pop("threads") == 2
    torch.save(state, file)
    assert trainer().resume() and torch.get_num_threads() == 2


@pytest.mark.parametrize(
    ("arguments", "environment", "chooses"),
    [([], None, True), (["--threads", "1"], None, False), ([], "1", False)],
)
def test_who_names_a_number_has_chosen(monkeypatch, tmp_path, arguments, environment, chooses):
    if environment:
        monkeypatch.setenv("OMP_NUM_THREADS", environment)
    seen = []

    def execute(*args, options, **kwargs):
        seen.append(options.choose_threads)
        raise Interrupted("seen")

    monkeypatch.setattr("fastinterp.cli.train.execute", execute)
    command = ["train", "--device", "cpu", "--out", str(tmp_path / "run"), *arguments]
    assert main(command) == 130 and seen == [chooses]
