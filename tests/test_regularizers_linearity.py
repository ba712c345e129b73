"""CURE and local linearity."""

import torch
from regularizer_formulas import LLR, SIZE, C, N, batch, make_net, seeded
from torch import nn

from fastinterp import regularizers as R


def test_linear_losses_are_linear():
    """Two logits a and 0: their loss is softplus(-a), which is nearly linear far out."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(C * SIZE * SIZE, 2)).double()
    nn.init.zeros_(net[1].weight[1:])
    with torch.no_grad():
        net[1].weight[1:].zero_()
        net[1].bias.copy_(torch.tensor([0.0, 60.0]))
    x, _ = batch()
    y = torch.zeros(N, dtype=torch.int64)
    assert R.local_linearity(net, x, y, **LLR, mu=0.0) < 1e-12
    assert R.cure(net, x, y) < 1e-12
    assert R.grad_align(net, x, y, eps=0.1) < 1e-12
    rise = R.local_linearity(net, x, y, **LLR, lambda_=0.0, mu=1.0)
    assert rise > 0


def test_the_ascent_finds_less_linear_points():
    net, (x, y) = make_net(), batch()
    gaps = [
        R.local_linearity(
            net.eval(), x, y, eps=0.1, step_size=0.02, steps=n, mu=0.0, generator=seeded()
        )
        for n in (1, 4, 20)
    ]
    assert gaps == sorted(gaps) and gaps[2] > 1.2 * gaps[0]
