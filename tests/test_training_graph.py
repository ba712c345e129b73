"""Training with steps that the host does not watch, as in a CUDA graph; launched one by one."""

import math

import pytest
import test_training
import torch
from test_training import trainer

from fastinterp.cli import main
from fastinterp.training import RunOptions, StopRequest, TrainingDiverged
from fastinterp.training.metrics import read_metrics
from fastinterp.training.optimizer import EpsilonHatAdam
from fastinterp.training.update import GraphedUpdate

data = test_training.data


@pytest.fixture
def on_device(monkeypatch):
    """Adam as it is on a GPU."""

    def step(optimizer):
        for group in optimizer.param_groups:
            optimizer._step_on_device(group)

    monkeypatch.setattr(EpsilonHatAdam, "step", step)


def unwatched(folder, data, **change):
    made = trainer(folder, data, epochs=8, batch_size=20, **change)  # two steps an epoch
    made._graphed = GraphedUpdate(made.update)
    return made


def poisoned_at(step, made, value):
    """Makes the loss of one step ``value``; a loop that is told nothing goes on."""
    forward, calls = made.objective.forward, iter(range(1000))

    def replaced(*args):
        loss, parts = forward(*args)
        return (loss * value if next(calls) == step else loss), parts

    made.objective.forward = replaced


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_the_weights_are_those_of_watched_steps(tmp_path, data, on_device, optimizer):
    how = dict(optimizer=optimizer, clip_grad_norm=0.5, eps_warmup=[2, 6], lr_warmup=3)
    runs = unwatched(tmp_path / "a", data, **how), unwatched(tmp_path / "b", data, **how)
    runs[1]._graphed = None
    runs[1].optimizer.found_inf = None
    results = [run.run(StopRequest(), quiet=True).state_dict() for run in runs]
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    rows = [read_metrics(tmp_path / name / "metrics.jsonl")[-1] for name in "ab"]
    assert rows[0]["loss"] == rows[1]["loss"] and "attack_share" not in rows[0]


@pytest.mark.parametrize("at", [0, 3, 12], ids="step {}".format)
@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_a_step_that_is_not_finite_is_not_applied_nor_what_follows(
    tmp_path, data, on_device, optimizer, at
):
    if optimizer == "sgd" and at == 0:
        pytest.skip("torch's momentum begins at the first step, whatever it is")
    broken = unwatched(tmp_path / "run", data, optimizer=optimizer)
    poisoned_at(at, broken, torch.nan)
    message = rf"loss of int: nan.* at step {at}; .*diverged-step-{at:08d}"
    with pytest.raises(TrainingDiverged, match=message):
        broken.run(StopRequest(), quiet=True)
    good = unwatched(tmp_path / "good", data, optimizer=optimizer)
    for _ in range(at):
        good._step()
    for one, other in zip(good.model.parameters(), broken.model.parameters(), strict=True):
        assert torch.equal(one, other)
    again = unwatched(tmp_path / "run", data, optimizer=optimizer)
    assert again.resume() and again.step == at
    batch = torch.load(tmp_path / "run" / f"diverged-step-{at:08d}.pt")
    drawn = again._draw()
    assert batch["step"] == at and batch["eps"] == drawn.eps
    assert all(torch.equal(batch[name], getattr(drawn, name)) for name in ("x", "y", "start"))


def test_nothing_is_saved_that_was_not_looked_at(tmp_path, data, on_device):
    broken = unwatched(tmp_path, data)
    poisoned_at(1, broken, torch.inf)
    for _ in range(4):
        broken._step()
    with pytest.raises(TrainingDiverged, match="loss of int: inf.* at step 1"):
        broken.save()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert math.isfinite(sum(p.sum().item() for p in broken.model.parameters()))


def test_without_a_gpu_it_is_an_error(tmp_path, data, capsys):
    with pytest.raises(ValueError, match="cuda_graph needs a GPU, got cpu; leave it out"):
        trainer(tmp_path, data, options=RunOptions(cuda_graph=True))
    with pytest.raises(ValueError, match="cuda_graph needs a single process, got 2"):
        RunOptions(cuda_graph=True).check_world(2, torch.device("cuda"))
    folder = tmp_path / "run"
    arguments = ["train", "--cuda-graph", "--device", "cpu", "--out", str(folder)]
    assert main(arguments) == 1 and not folder.exists()
    assert "cuda_graph needs a GPU, got cpu" in capsys.readouterr().err
