"""The training objectives as a careful user writes them in plain PyTorch.

    loss(method, net, x, y, start, **settings)     the table of fastinterp/objectives.py

``net`` has ``features`` (last feature maps) and ``head`` behind global average pooling, or is a
ResNet of torchvision. The int family compares CAMs, or the integrated gradients of the logits. The
attack and integrated gradients run in evaluation mode; of the passes in training mode the one whose
cross-entropy is minimised moves the running statistics. The attack wants no parameter gradients.
"""

from __future__ import annotations

import contextlib

import torch
from torch import nn
from torch.nn import functional as F

IG_POINTS = 5
_RESNET = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")


def map_of(method, map):
    """``map`` for the int family; no other method has a choice."""
    return map if method.startswith("int") else "cam"


def head(net):
    return net.head if hasattr(net, "head") else net.fc


def run(net, z):
    """Last feature maps and logits of one forward pass."""
    if hasattr(net, "features"):
        features = net.features(z)
    else:
        features = z
        for name in _RESNET:
            features = getattr(net, name)(features)
    return features, head(net)(features.mean((2, 3)))


def class_ig(net, z, y=None):
    """z / m sum_k ds_c(k/m z) of every logit, (N, K, C, H, W), or of that of y, (N, 1, C, H, W)."""
    with evaluation(net):
        points = torch.cat([k / IG_POINTS * z for k in range(1, IG_POINTS + 1)])
        points = points if points.requires_grad else points.requires_grad_()
        logits = net(points)
    if y is not None:
        logits = logits.gather(1, y.repeat(IG_POINTS)[:, None])
    gradients = [
        torch.autograd.grad(s.sum(), points, create_graph=True)[0] for s in logits.unbind(1)
    ]
    return z[:, None] * torch.stack([g.unflatten(0, (IG_POINTS, -1)).mean(0) for g in gradients], 1)


@contextlib.contextmanager
def evaluation(net):
    training = [module for module in net.modules() if module.training]
    net.eval()
    yield
    for module in training:
        module.training = True


@contextlib.contextmanager
def still(net):
    """Running statistics are put aside: passes inside move copies of them."""
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    saved = [dict(m._buffers) for m in norms]
    for m in norms:
        m._buffers = {name: b.clone() for name, b in m._buffers.items()}
    yield
    for m, buffers in zip(norms, saved, strict=True):
        m._buffers = buffers


def _ce(logits, y):
    return F.cross_entropy(logits, y, reduction="none")


def _class_distances(net, clean, moved):
    """|| I_c(x) - I_c(x') ||_1 for every class, (N, K), or for those whose maps are given."""
    maps = clean[0] - moved[0]
    if maps.dim() == 4:  # features
        maps = torch.einsum("kc,nchw->nkhw", head(net).weight, maps)
    return maps.abs().flatten(2).sum(2)


def _one_class(net, clean, moved, y):
    distances = _class_distances(net, clean, moved)
    return distances[:, 0] if distances.shape[1] == 1 else distances.gather(1, y[:, None])[:, 0]


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
    "int": lambda net, x, z, y, clean, w: _weighted(net, clean, w["explain"](net, z), y),
    "int-one-class": lambda net, x, z, y, clean, w: _one_class(net, clean, w["explain"](net, z), y),
    "ig-norm": lambda net, x, z, y, clean, w: _ig(net, x, z, y),
    "ig-norm-sum": lambda net, x, z, y, clean, w: _ce(net(z), y) + w["ig"] * _ig(net, x, z, y),
}
_MAXIMISED["int2"] = _MAXIMISED["int2-adv"] = _MAXIMISED["adv"]


def _int_adv(net, x, z, y, clean, w):
    moved = w["explain"](net, z)
    return _ce(moved[1], y) + w["gamma"] * _weighted(net, clean, moved, y)


_MAXIMISED["int-adv"] = _int_adv
_COMPARED = ("trades", "int", "int-one-class", "int-adv")  # with x


def attack(method, net, x, y, start, eps, step_size, steps, weights):
    """x', found by sign steps from x + start."""
    maximised = _MAXIMISED[method]
    parameters = [p for p in net.parameters() if p.requires_grad]
    for p in parameters:
        p.requires_grad_(False)
    with evaluation(net):
        clean = None
        if method in _COMPARED:
            with torch.set_grad_enabled(weights["explain"] is not run):
                clean = [t.detach() for t in weights["explain"](net, x)]
        z = (x + start).clamp(0, 1)
        for _ in range(steps):
            z.requires_grad_()
            (grad,) = torch.autograd.grad(maximised(net, x, z, y, clean, weights).sum(), z)
            z = z.detach() + step_size * grad.sign()
            z = torch.clamp(z, x - eps, x + eps).clamp_(0, 1)
    for p in parameters:
        p.requires_grad_(True)
    return z


def loss(
    method,
    net,
    x,
    y,
    start,
    *,
    eps,
    step_size,
    steps,
    gamma=0.01,
    beta=1.0,
    ig_weight=1.0,
    map="cam",
):
    """What the method minimises on a batch; ``map`` of the int family, cam or ig."""
    if method == "normal":
        return F.cross_entropy(net(x), y)
    only = y if method == "int-one-class" else None

    def explain_ig(net, z):
        return class_ig(net, z, only), net(z)

    map = map_of(method, map)
    weights = dict(gamma=gamma, ig=ig_weight, explain=run if map == "cam" else explain_ig)
    z = attack(method, net, x, y, start, eps, step_size, steps, weights)
    if method == "adv":
        return F.cross_entropy(net(z), y)
    if method.startswith("ig-norm"):
        with still(net), evaluation(net):
            ig = _ig(net, x, z, y).mean()
        return F.cross_entropy(net(z if method == "ig-norm-sum" else x), y) + ig_weight * ig
    adversarial = method.endswith("-adv")
    with still(net):  # backward passes read the statistics, which must not have moved meanwhile
        maps = [class_ig(net, each, only) for each in (x, z)] if map == "ig" else None
    with still(net) if adversarial else contextlib.nullcontext():
        clean = run(net, x)
    with contextlib.nullcontext() if adversarial else still(net):
        moved = run(net, z)
    if maps:
        clean, moved = ((m, each[1]) for m, each in zip(maps, (clean, moved), strict=True))
    ce = F.cross_entropy((moved if adversarial else clean)[1], y)
    if method == "trades":
        return ce + beta * _kl(clean, moved).mean()
    distance = _one_class if method == "int-one-class" else _weighted
    return ce + gamma * distance(net, clean, moved, y).mean()
