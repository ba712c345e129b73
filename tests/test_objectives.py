"""Every training objective against the same written in plain torch, in float64."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import methods
from benchmarks.objective_costs import MAPS
from fastinterp import fuse
from fastinterp.attacks import random_start
from fastinterp.objectives import METHODS

EPS, STEP, STEPS, GAMMA, BETA = 0.1, 0.02, 3, 0.05, 2.0


@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradients_are_those_of_the_table(small_net, batch, method):
    net, (x, y) = small_net.double(), (batch[0].double(), batch[1])
    start = random_start(x, EPS)
    how = dict(step_size=STEP, steps=STEPS, gamma=GAMMA, beta=BETA, ig_weight=0.3)
    objective = METHODS[method](net, **how)
    expected = methods.loss(method, net, x, y, start, eps=EPS, **how)
    wanted = torch.autograd.grad(expected, list(net.parameters()))
    loss, parts = objective(x, y, EPS, start)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    got = torch.autograd.grad(loss, list(net.parameters()))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
    assert all(torch.isfinite(part) and not part.requires_grad for part in parts.values())


class BatchNormNet(nn.Module):
    """Batch norm of two kinds, and dropout, which draws from the global generator."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(1, 6, 3, 2, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.2)),
            *(nn.Conv2d(6, 8, 3, 2), nn.BatchNorm2d(8, momentum=None), nn.ReLU(inplace=True)),
            nn.Conv2d(8, 8, 3),
        )
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 10)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 2)
                nn.init.normal_(module.bias)
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)

    def forward(self, x):
        return self.head(self.pool(self.features(x)).flatten(1))


@pytest.mark.parametrize("fused", [False, True], ids=["stock", "fused"])
@pytest.mark.parametrize(
    ("method", "map"),
    [*((m, "cam") for m in METHODS), *((m, "ig") for m in ("int", "int-one-class", "int-adv"))],
)
def test_batch_norm_and_dropout_see_what_they_see_in_plain_code(batch, method, map, fused):
    """Parameters, running statistics and the generator after two steps of plain SGD."""
    plain, how = (
        BatchNormNet().double(),
        dict(step_size=STEP, steps=STEPS, gamma=0.3, ig_weight=0.3),
    )
    ours = fuse(copy.deepcopy(plain)) if fused else copy.deepcopy(plain)
    objective = METHODS[method](ours, **how, map=MAPS[map], ig_steps=methods.IG_POINTS)
    how["map"] = map
    x, y = batch[0].double(), batch[1]

    def step(net, loss, seed):
        torch.manual_seed(seed)
        value = loss(random_start(x, EPS))
        gradients = torch.autograd.grad(value, list(net.parameters()))
        with torch.no_grad():
            for p, g in zip(net.parameters(), gradients, strict=True):
                p.sub_(g, alpha=0.05)
        return value, gradients, torch.rand(1)

    for seed in range(2):
        wanted = step(
            plain, lambda start: methods.loss(method, plain, x, y, start, eps=EPS, **how), seed
        )
        got = step(ours, lambda start: objective(x, y, EPS, start)[0], seed)
        torch.testing.assert_close(got, wanted, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(dict(ours.named_buffers()), dict(plain.named_buffers()))
        assert ours.features[1].num_batches_tracked == seed + 1
    assert ours.training and all(module.training for module in ours.modules())


@pytest.mark.parametrize("method", METHODS)
def test_without_a_radius_every_objective_is_cross_entropy(small_net, batch, method):
    x, y = batch
    objective = METHODS[method](small_net, step_size=STEP, steps=STEPS)
    loss, parts = objective(x, y, 0, None)
    torch.testing.assert_close(loss, F.cross_entropy(small_net(x), y))
    assert not any(value for name, value in parts.items() if name != "ce")


def test_the_weight_of_the_released_ig_norm_falls_with_the_batch(small_net, batch):
    net, (x, y) = small_net.double(), (batch[0].double(), batch[1])
    start = random_start(x, EPS)
    penalties = [
        METHODS["ig-norm"](net, step_size=STEP, steps=STEPS, ig_weighting=weighting)(
            x, y, EPS, start
        )[1]["ig_norm"]
        for weighting in ("sum", "batch-mean")
    ]
    torch.testing.assert_close(penalties[1] * len(x), penalties[0])


@pytest.mark.parametrize(
    ("method", "part"),
    [("adv", None), ("int", "discrepancy"), ("int-adv", None), ("ig-norm", "ig_norm")],
)
def test_more_starts_find_what_is_at_least_as_bad(small_net, batch, method, part):
    """What is raised, a part of the loss or all of it; the draws are of torch's generator."""
    net, (x, y) = small_net.double(), (batch[0].double(), batch[1])
    start = random_start(x, EPS)

    def raised(restarts, seed=0):
        torch.manual_seed(seed)
        objective = METHODS[method](net, step_size=STEP, steps=1, gamma=0.5, restarts=restarts)
        loss, parts = objective(x, y, EPS, start)
        return parts.get(part, loss)

    once, often = raised(1), raised(8)
    assert often > once
    assert often == raised(8) and often != raised(8, seed=1)
