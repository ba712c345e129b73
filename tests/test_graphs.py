"""CUDA graphs of whole steps, as far as they can be told without a GPU; see test_gpu_graphs.py."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastinterp.graphs import GraphedStep, Waits
from fastinterp.objectives import METHODS
from fastinterp.regularizers import InterpretationRegularizer
from fastinterp.training.optimizer import EpsilonHatAdam

EPS = 0.1


def network():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, 2, 1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, 1, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 5, bias=False),
    )


@pytest.fixture
def images():
    return torch.rand(4, 1, 8, 8), torch.randint(0, 5, (4,))


def waits_of(step):
    step()  # what a loop does once, finding the last feature maps, may wait
    with Waits() as waits:
        step()
    # The value of an eps that is on the CPU is read and checked; of one on a GPU it is not.
    return [line for line in waits.found if "attack_step.py" not in line]


@pytest.mark.parametrize("eps", [0.0, EPS, torch.tensor(EPS)], ids=["0", "number", "tensor"])
@pytest.mark.parametrize("method", METHODS)
def test_no_step_of_an_objective_waits_for_the_device(images, method, eps):
    x, y = images
    objective = METHODS[method](network(), step_size=0.05, steps=2, ig_steps=2)
    start = (
        None if method == "normal" or (not isinstance(eps, torch.Tensor) and eps == 0) else x / 20
    )
    optimizer = EpsilonHatAdam(objective.parameters(), lr=torch.tensor(1e-3))

    def step():
        optimizer.zero_grad(set_to_none=True)
        objective(x, y, eps, start)[0].backward()
        for group in optimizer.param_groups:
            optimizer._step_on_device(group)

    assert not waits_of(step)


@pytest.mark.parametrize("map", ["cam", "grad_cam", "input_gradient", "integrated_gradients"])
def test_no_regularizer_waits_for_the_device(images, map):
    x, y = images
    options = {"steps": 2} if map == "integrated_gradients" else None
    net = network()
    reg = InterpretationRegularizer(
        map, classes="one", eps=EPS, step_size=0.05, steps=2, map_options=options
    )
    assert not waits_of(lambda: reg(net, x, y, eps=torch.tensor(EPS), validate=False).backward())


@pytest.mark.parametrize("method", METHODS)
def test_an_eps_may_be_a_tensor(images, method):
    x, y = images
    results = []
    for eps in (EPS, torch.tensor(EPS, dtype=torch.float64)):
        torch.manual_seed(1)
        objective = METHODS[method](network(), step_size=0.05, steps=2, ig_steps=2)
        loss, parts = objective(x, y, eps, None if method == "normal" else x / 20)
        results.append((loss.detach(), *parts.values()))
    assert all(map(torch.equal, *results))


def test_what_waits_is_named():
    x = torch.randn(4)
    with Waits() as waits:
        if x.sum() > 0:
            x = x + 1
        x[x > 0] = 0
        x[x > 0]
        torch.nonzero(x)
    assert [line.split()[0].split(".")[1] for line in waits.found] == [
        *("_local_scalar_dense", "index_put_", "index", "nonzero")
    ]
    assert "test_graphs.py" in waits.found[0]


def test_on_a_cpu_it_runs_as_it_is_and_says_why(images):
    step = GraphedStep(lambda x, y, eps: (x.sum() + eps, y))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        total, y = step(*images, 1.0)
    assert total == images[0].sum() + 1 and y is images[1]
    assert step.graphs == 0 and step.reason == "its tensor inputs are cpu, not on one CUDA device"
    with pytest.raises(RuntimeError, match=r"cannot be captured .* are cpu"):
        GraphedStep(lambda x: x, mode="on")(images[0])
    assert GraphedStep(lambda x: x, mode="off").reason == "mode is off"


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="mode must be one of auto, on, off, got 'yes'"):
        GraphedStep(lambda x: x, mode="yes")
    with pytest.raises(ValueError, match="warmup must be at least 1, got 0"):
        GraphedStep(lambda x: x, warmup=0)


def test_adam_on_the_device_takes_the_step_of_the_one_on_a_cpu():
    """The form that runs on a GPU, run here; its lr_t is float32."""
    results = []
    for on_device in (False, True):
        torch.manual_seed(0)
        net = nn.Linear(7, 3).double()
        rate = torch.tensor(0.1, dtype=torch.float64) if on_device else 0.1
        optimizer = EpsilonHatAdam(net.parameters(), lr=rate)
        for i in range(5):
            optimizer.zero_grad()
            F.mse_loss(net(torch.randn(4, 7).double()), torch.zeros(4, 3).double()).backward()
            rate = 0.1 / (i + 1)
            for group in optimizer.param_groups:
                if on_device:
                    group["lr"].fill_(rate)
                    optimizer._step_on_device(group)
                else:
                    group["lr"] = rate
            if not on_device:
                optimizer.step()
        results.append([p.detach() for p in net.parameters()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-7 * 0.1)
