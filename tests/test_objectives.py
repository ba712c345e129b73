"""Every training objective against the table of METHOD written in plain torch, in float64."""

import pytest
import torch
from torch.nn import functional as F

from fastinterp.attacks import random_start
from fastinterp.objectives import METHODS

EPS, STEP, STEPS, GAMMA, BETA = 0.1, 0.02, 3, 0.05, 2.0


def ce(net, z, y):
    return F.cross_entropy(net(z), y, reduction="none")


def class_distances(net, x, z):
    """|| I_c(x) - I_c(z) ||_1 for every class, (N, K)."""
    maps = [torch.einsum("kc,nchw->nkhw", net.head.weight, net.features(v)) for v in (x, z)]
    return (maps[0] - maps[1]).abs().sum((2, 3))


def one_class(net, x, z, y):
    return class_distances(net, x, z).gather(1, y[:, None])[:, 0]


def weighted(net, x, z, y):
    p = net(z).softmax(1)
    others = torch.ones_like(p).scatter(1, y[:, None], 0)
    q = p * others / (p * others).sum(1, keepdim=True)
    return one_class(net, x, z, y) + (q * class_distances(net, x, z)).sum(1)


def kl(net, x, z, y):
    p, q = net(x).softmax(1), net(z).softmax(1)
    return (p * (p.log() - q.log())).sum(1)


def ig_norm(net, x, z, y, points=5):
    """|| (z - x) / m sum_k dCE(x + k/m (z - x)) ||_1, right Riemann sum."""
    total = 0
    for k in range(1, points + 1):
        at = x + k / points * (z - x)
        at = at if at.requires_grad else at.detach().requires_grad_()
        (grad,) = torch.autograd.grad(ce(net, at, y).sum(), at, create_graph=True)
        total = total + grad
    return ((z - x) * total / points).abs().sum((1, 2, 3))


# method: minimised(net, x, x', y) and maximised(net, x, z, y), per example
TABLE = {
    "normal": (lambda n, x, z, y: ce(n, x, y), None),
    "adv": (lambda n, x, z, y: ce(n, z, y), lambda n, x, z, y: ce(n, z, y)),
    "trades": (lambda n, x, z, y: ce(n, x, y) + BETA * kl(n, x, z, y), kl),
    "int": (lambda n, x, z, y: ce(n, x, y) + GAMMA * weighted(n, x, z, y), weighted),
    "int-one-class": (lambda n, x, z, y: ce(n, x, y) + GAMMA * one_class(n, x, z, y), one_class),
    "int-adv": (
        lambda n, x, z, y: ce(n, z, y) + GAMMA * weighted(n, x, z, y),
        lambda n, x, z, y: ce(n, z, y) + GAMMA * weighted(n, x, z, y),
    ),
    "int2": (
        lambda n, x, z, y: ce(n, x, y) + GAMMA * weighted(n, x, z, y),
        lambda n, x, z, y: ce(n, z, y),
    ),
    "int2-adv": (
        lambda n, x, z, y: ce(n, z, y) + GAMMA * weighted(n, x, z, y),
        lambda n, x, z, y: ce(n, z, y),
    ),
    "ig-norm": (lambda n, x, z, y: ce(n, x, y) + 0.3 * ig_norm(n, x, z, y), ig_norm),
    "ig-norm-sum": (
        lambda n, x, z, y: ce(n, z, y) + 0.3 * ig_norm(n, x, z, y),
        lambda n, x, z, y: ce(n, z, y) + 0.3 * ig_norm(n, x, z, y),
    ),
}


def plain(method, net, x, y, start):
    minimised, maximised = TABLE[method]
    z = x
    if maximised is not None:
        z = (x + start).clamp(0, 1)
        for _ in range(STEPS):
            z = z.detach().requires_grad_()
            (grad,) = torch.autograd.grad(maximised(net, x, z, y).sum(), z)
            z = (z.detach() + STEP * grad.sign()).clamp(x - EPS, x + EPS).clamp(0, 1)
    return minimised(net, x, z, y).mean()


@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradients_are_those_of_the_table(small_net, batch, method):
    net, (x, y) = small_net.double(), (batch[0].double(), batch[1])
    start = random_start(x, EPS)
    how = dict(step_size=STEP, steps=STEPS, gamma=GAMMA, beta=BETA, ig_weight=0.3)
    objective = METHODS[method](net, **how)
    expected = plain(method, net, x, y, start)
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
