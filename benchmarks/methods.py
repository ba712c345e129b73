"""The training objectives as a careful user writes them in plain PyTorch.

    loss(method, net, x, y, start, **settings)     the table of fastinterp/objectives.py

``net`` has ``features`` (last feature maps) and ``head`` behind global average pooling. The clean
pass is made once, the attack runs in evaluation mode and wants no parameter gradients.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

IG_POINTS = 5


def run(net, z):
    """Last feature maps and logits of one forward pass."""
    features = net.features(z)
    return features, net.head(features.mean((2, 3)))


def _ce(logits, y):
    return F.cross_entropy(logits, y, reduction="none")


def _class_distances(net, clean, moved):
    """|| I_c(x) - I_c(x') ||_1 for every class, (N, K)."""
    maps = torch.einsum("kc,nchw->nkhw", net.head.weight, clean[0] - moved[0])
    return maps.abs().sum((2, 3))


def _one_class(net, clean, moved, y):
    return _class_distances(net, clean, moved).gather(1, y[:, None])[:, 0]


def _weighted(net, clean, moved, y):
    distances = _class_distances(net, clean, moved)
    true = F.one_hot(y, distances.shape[1]).bool()
    q = moved[1].masked_fill(true, -torch.inf).softmax(1)
    return (distances * (true + q)).sum(1)


def _kl(clean, moved):
    p, q = clean[1].log_softmax(1), moved[1].log_softmax(1)
    return (p.exp() * (p - q)).sum(1)


def _ig(net, x, z, y):
    """|| (z - x) / m sum_k dCE(x + k/m (z - x)) ||_1, right Riemann sum."""
    points = torch.cat([x + k / IG_POINTS * (z - x) for k in range(1, IG_POINTS + 1)])
    points = points if points.requires_grad else points.requires_grad_()
    ce = F.cross_entropy(net(points), y.repeat(IG_POINTS), reduction="sum")
    (gradient,) = torch.autograd.grad(ce, points, create_graph=True)
    mean = gradient.unflatten(0, (IG_POINTS, -1)).mean(0)
    return ((z - x) * mean).abs().sum((1, 2, 3))


# method: what is maximised over x', per example, of (net, x, z, y, clean, weights)
_MAXIMISED = {
    "adv": lambda net, x, z, y, clean, w: _ce(net(z), y),
    "trades": lambda net, x, z, y, clean, w: _kl(clean, run(net, z)),
    "int": lambda net, x, z, y, clean, w: _weighted(net, clean, run(net, z), y),
    "int-one-class": lambda net, x, z, y, clean, w: _one_class(net, clean, run(net, z), y),
    "ig-norm": lambda net, x, z, y, clean, w: _ig(net, x, z, y),
    "ig-norm-sum": lambda net, x, z, y, clean, w: _ce(net(z), y) + w["ig"] * _ig(net, x, z, y),
}
_MAXIMISED["int2"] = _MAXIMISED["int2-adv"] = _MAXIMISED["adv"]


def _int_adv(net, x, z, y, clean, w):
    moved = run(net, z)
    return _ce(moved[1], y) + w["gamma"] * _weighted(net, clean, moved, y)


_MAXIMISED["int-adv"] = _int_adv


def attack(method, net, x, y, start, eps, step_size, steps, weights):
    """x', found by sign steps from x + start."""
    maximised, training = _MAXIMISED[method], net.training
    parameters = [p for p in net.parameters() if p.requires_grad]
    net.eval()
    for p in parameters:
        p.requires_grad_(False)
    with torch.no_grad():
        clean = run(net, x)
    z = (x + start).clamp(0, 1)
    for _ in range(steps):
        z.requires_grad_()
        (grad,) = torch.autograd.grad(maximised(net, x, z, y, clean, weights).sum(), z)
        z = z.detach() + step_size * grad.sign()
        z = torch.clamp(z, x - eps, x + eps).clamp_(0, 1)
    for p in parameters:
        p.requires_grad_(True)
    net.train(training)
    return z


def loss(method, net, x, y, start, *, eps, step_size, steps, gamma=0.01, beta=1.0, ig_weight=1.0):
    """What the method minimises on a batch."""
    if method == "normal":
        return F.cross_entropy(net(x), y)
    weights = dict(gamma=gamma, ig=ig_weight)
    z = attack(method, net, x, y, start, eps, step_size, steps, weights)
    if method == "adv":
        return F.cross_entropy(net(z), y)
    if method.startswith("ig-norm"):
        ce = F.cross_entropy(net(z if method == "ig-norm-sum" else x), y)
        return ce + ig_weight * _ig(net, x, z, y).mean()
    clean, moved = run(net, x), run(net, z)
    ce = F.cross_entropy((moved if method.endswith("-adv") else clean)[1], y)
    if method == "trades":
        return ce + beta * _kl(clean, moved).mean()
    distance = _one_class if method == "int-one-class" else _weighted
    return ce + gamma * distance(net, clean, moved, y).mean()
