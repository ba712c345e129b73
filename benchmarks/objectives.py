"""The losses of the whole-step benchmark, as a careful user writes them in plain PyTorch.

Each is loss(net, x, y, other, weight): ``net`` maps images to logits (N, K), ``x`` and ``other``
are images (N, C, H, W), ``y`` labels (N,) and ``weight`` multiplies the penalty. Images need not
require gradients; those that do are not made leaves again. Networks may normalise by batch, so x
and other go through ``net`` one by one.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

IG_POINTS = 5


def _saliency(net, x, y):
    """d f_y / dx, (N, C, H, W), as part of the graph; and the logits."""
    x = x if x.requires_grad else x.detach().requires_grad_()
    logits = net(x)
    true = logits.gather(1, y[:, None]).sum()
    (gradient,) = torch.autograd.grad(true, x, create_graph=True)
    return gradient, logits


def _l1(maps):
    return maps.abs().sum((1, 2, 3)).mean()


def plain(net, x, y, other, weight):
    """CE(x)."""
    return F.cross_entropy(net(x), y)


def gradient(net, x, y, other, weight):
    """CE(x) + weight ||d f_y/dx||_1."""
    saliency, logits = _saliency(net, x, y)
    return F.cross_entropy(logits, y) + weight * _l1(saliency)


def penalty(net, x, y, other, weight):
    """weight ||d f_y/dx||_1 alone, the stream of which a step with a penalty is made."""
    return weight * _l1(_saliency(net, x, y)[0])


def discrepancy(net, x, y, other, weight):
    """CE(x) + weight ||d f_y/dx (x) - d f_y/dx (other)||_1."""
    saliency, logits = _saliency(net, x, y)
    moved, _ = _saliency(net, other, y)
    return F.cross_entropy(logits, y) + weight * _l1(saliency - moved)


def ig(net, x, y, other, weight):
    """CE(x) + weight ||IG||_1, x / m sum_k d f_y/dx (k x / m): five points in one batch."""
    points = torch.cat([x * (k / IG_POINTS) for k in range(1, IG_POINTS + 1)])
    saliency, _ = _saliency(net, points, y.repeat(IG_POINTS))
    attributions = x * saliency.unflatten(0, (IG_POINTS, -1)).mean(0)
    return F.cross_entropy(net(x), y) + weight * _l1(attributions)


OBJECTIVES = {
    "plain": plain,
    "gradient": gradient,
    "penalty": penalty,
    "discrepancy": discrepancy,
    "ig": ig,
}
