"""The two alignments of gradients, and the cosines under them."""

import torch
from regularizer_formulas import (
    Dead,
    batch,
    gradients,
    make_net,
    neighbour,
    plain_gradient,
)
from torch import nn

from fastinterp import regularizers as R


class Scaled(nn.Module):
    """Logits times a number, so that the gradients are any size."""

    def __init__(self, net, scale):
        super().__init__()
        self.net, self.scale = net, scale

    def forward(self, x):
        return self.net(x) * self.scale


def test_a_cosine_does_not_see_the_scale_of_gradients():
    """Squares of 1e-25 are 0 in float32."""
    net, (x, y) = make_net().float().eval(), batch(torch.float32)
    x_adv = neighbour(x)
    directions = dict(x_adv=x_adv, l2_weight=0.0)
    full = R.local_gradient_alignment(net, x, y, **directions)
    tiny = R.local_gradient_alignment(Scaled(net, 1e-25), x, y, **directions)
    assert full > 1e-5
    torch.testing.assert_close(tiny, full, rtol=1e-3, atol=0)


def test_cosines_leave_out_examples_without_a_gradient():
    net, (x, y) = make_net().eval(), batch()
    weights = dict(l2_weight=0.0)
    rest = R.local_gradient_alignment(net, x[2:], y[2:], x_adv=neighbour(x)[2:], **weights)
    some = R.local_gradient_alignment(Dead(net, [0, 1]), x, y, x_adv=neighbour(x), **weights)
    torch.testing.assert_close(some, rest)


def test_a_detached_clean_gradient_is_a_constant():
    net, (x, y) = make_net(), batch()
    value = R.local_gradient_alignment(
        net, x, y, x_adv=neighbour(x), cosine_weight=0.0, detach_clean=True
    )
    clean, moved = (plain_gradient(net, z, y, "logit")[0] for z in (x, neighbour(x)))
    expected = ((clean.detach() - moved) ** 2).sum(1).mean()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradients(value, net), gradients(expected, net))
