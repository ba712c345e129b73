"""Every training objective against the same written in plain torch, in float64."""

import pytest
import torch
from torch.nn import functional as F

from benchmarks import methods
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
