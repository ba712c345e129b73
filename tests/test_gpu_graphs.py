"""Steps as CUDA graphs on a GPU: bit for bit the eager steps there, and what cannot be captured."""

import copy

import pytest
import torch
from network_checks import GROUP_CASES, check_norm_act
from test_training import split

from fastinterp.data import Dataset
from fastinterp.graphs import GraphedStep
from fastinterp.models import create_model
from fastinterp.objectives import METHODS
from fastinterp.training import RunOptions, StopRequest, TrainConfig, Trainer, TrainingDiverged
from fastinterp.training.optimizer import create_optimizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
EPS, STEPS, CLASSES = 0.1, 7, 10


@pytest.fixture(autouse=True)
def _deterministic(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def batches(sizes):
    generator = torch.Generator().manual_seed(3)
    for n in sizes:
        x, noise = torch.rand(2, n, 1, 28, 28, generator=generator)
        y = torch.randint(0, CLASSES, (n,), generator=generator)
        yield x.cuda(), y.cuda(), (EPS * (2 * noise - 1)).cuda()


class Training:
    """Steps of an objective and an optimizer."""

    def __init__(self, method, optimizer, model="small"):
        torch.manual_seed(5)
        self.model = create_model(model, 1, CLASSES).cuda()
        self.objective = METHODS[method](self.model, step_size=0.05, steps=3, ig_steps=2)
        self.optimizer = create_optimizer(
            optimizer, self.model.parameters(), lr=1e-3, weight_decay=0.0, momentum=0.9
        )

    def step(self, x, y, eps, start):
        self.optimizer.zero_grad(set_to_none=True)
        loss, _ = self.objective(x, y, eps, start)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def run(self, step, sizes):
        eps = torch.full((), EPS, device="cuda", dtype=torch.float64)
        losses = [step(x, y, eps, start).clone() for x, y, start in batches(sizes)]
        return [*losses, *(p.detach().clone() for p in self.model.state_dict().values())]


def assert_equal(results, others):
    for one, other in zip(results, others, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("method", METHODS)
def test_replays_are_the_eager_steps(method, optimizer):
    eager, graphed = Training(method, optimizer), Training(method, optimizer)
    step = GraphedStep(graphed.step, mode="on")
    sizes = [8] * STEPS
    assert_equal(eager.run(eager.step, sizes), graphed.run(step, sizes))
    assert step.graphs == 1


def test_a_last_smaller_batch():
    eager, graphed = Training("int", "adam"), Training("int", "adam")
    step = GraphedStep(graphed.step, mode="on")
    sizes = [8, 8, 8, 8, 5] * 5  # the smaller one comes often enough to be captured too
    assert_equal(eager.run(eager.step, sizes), graphed.run(step, sizes))
    assert step.graphs == 2


@pytest.mark.parametrize("blunder", ["waits", "raises while it is captured"])
def test_a_step_that_cannot_be_captured_runs_as_it_is(blunder):
    eager, graphed = Training("adv", "adam"), Training("adv", "adam")

    def step(*inputs):
        loss = graphed.step(*inputs)
        if blunder == "waits":
            assert loss.item() > 0
        elif torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()
        return loss

    wrapped, sizes = GraphedStep(step), [8] * STEPS
    with pytest.warns(RuntimeWarning, match="runs without a CUDA graph, launch by launch"):
        results = graphed.run(wrapped, sizes)
    assert_equal(eager.run(eager.step, sizes), results)
    assert wrapped.reason and wrapped.graphs == 0


def trainer(folder, graph, **change):
    how = dict(model="small", method="int", compare=[], epochs=12, batch_size=10, attack_steps=2)
    config = TrainConfig(**(how | dict(eps=EPS, eps_warmup=[6, 20], lr_warmup=5) | change))
    data = Dataset("digits", 10, tuple("0123456789"), split(45), split(11), split(20))
    options = RunOptions(cuda_graph=graph)
    return Trainer(config, config.method, data, folder, torch.device("cuda"), options)


@pytest.mark.parametrize("change", [{}, {"optimizer": "adamw"}, {"optimizer": "sgd"}, {"ema": 0.9}])
def test_the_training_program(tmp_path, change):
    change = {**change, "clip_grad_norm": 0.5, "accumulate": 2}
    runs = [trainer(tmp_path / str(graph), graph, **change) for graph in (False, True)]
    eager, graphed = (run.run(StopRequest(), quiet=True).state_dict().values() for run in runs)
    assert_equal(eager, graphed)
    assert runs[1]._graphed.graphed.graphs == 2  # of eps 0, and of what follows


def test_training_stops_at_a_loss_that_is_not_finite(tmp_path):
    broken = trainer(tmp_path, True)
    good = copy.deepcopy(broken.model)
    draw = broken._draw

    def poisoned():
        batch = draw()
        if batch.step == 13:
            good.load_state_dict(broken.model.state_dict())
            batch = batch._replace(x=batch.x * torch.nan)
        return batch

    broken._draw = poisoned
    with pytest.raises(TrainingDiverged, match="at step 13; .*diverged-step-00000013"):
        broken.run(StopRequest(), quiet=True)
    for one, other in zip(good.parameters(), broken.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", GROUP_CASES, ids=str)
def test_norm_act(monkeypatch, case, dtype):
    monkeypatch.setenv("FASTINTERP_BACKEND", "triton")
    check_norm_act(case, dtype, "gelu", device="cuda")
