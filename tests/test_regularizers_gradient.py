"""Norms, Jacobian, right for the right reasons, finite differences."""

import pytest
import torch
from regularizer_formulas import MASK, SIZE, C, Functional, K, N, batch, gradients, make_net, seeded
from test_double_backprop import Passes, conv_net, images
from torch import nn
from torch.nn import functional as F

import fastinterp as fi
from fastinterp import regularizers as R


def test_random_projections_estimate_the_jacobian():
    net, (x, y) = make_net().eval(), batch()
    exact = R.jacobian_norm(net, x, exact=True)
    torch.testing.assert_close(
        R.jacobian_norm(net, x, y, n_proj=800, generator=seeded()), exact, rtol=0.1, atol=0
    )


def test_right_for_right_reasons_looks_only_where_the_mask_is():
    net, (x, y) = make_net(), batch()
    everywhere, channelwise = torch.ones(N, 1, SIZE, SIZE), torch.zeros(N, C, SIZE, SIZE)
    parts = [R.right_for_right_reasons(net, x, mask=m) for m in (MASK, ~MASK, everywhere)]
    torch.testing.assert_close(parts[0] + parts[1], parts[2])
    assert R.right_for_right_reasons(net, x, y, mask=channelwise) == 0
    channelwise[:, 1] = 1
    assert 0 < R.right_for_right_reasons(net, x, mask=channelwise) < parts[2]


def wide_net(act):
    """Units enough that any segment crosses some kinks."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(C if i == 0 else 32, 32, 3, padding=1) for i in range(3)]
    for conv in layers:
        nn.init.kaiming_normal_(conv.weight)
    layers = [module for conv in layers for module in (conv, act())]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, K)).double()


def cosine_with_double_backprop(net, norm, step):
    """Of the parameter gradients."""
    x, y = batch()
    values = (
        R.finite_difference_gradient_norm(net, x, y, norm=norm, step=step, kinks="ignore"),
        R.input_gradient_norm(net, x, y, norm=norm),
    )
    flat = (torch.cat([g.flatten() for g in gradients(value, net)]) for value in values)
    return F.cosine_similarity(*flat, dim=0).item()


@pytest.mark.parametrize("norm", ["l1", "l2", "squared"])
def test_finite_differences_are_for_smooth_networks(norm):
    """There they converge with the step; across ReLUs they are another regularizer."""
    for smooth in (make_net(), make_net().eval(), wide_net(nn.SiLU)):
        assert cosine_with_double_backprop(smooth, norm, 1e-3) > 0.99999
    for step in (1e-2, 1e-3):
        assert cosine_with_double_backprop(wide_net(nn.ReLU), norm, step) < 0.9


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("norm", ["l1", "l2", "squared"])
def test_finite_differences_have_an_error_of_second_order(norm, training):
    net, (x, y) = make_net().train(training), batch()
    exact = R.input_gradient_norm(net, x, y, norm=norm)
    found = gradients(exact, net)
    errors = []
    for h in (4e-3, 1e-3):
        value = R.finite_difference_gradient_norm(net, x, y, step=h, norm=norm)
        off = [(a - b).norm() for a, b in zip(gradients(value, net), found, strict=True)]
        errors.append(((value - exact).abs() / exact, sum(off) / sum(g.norm() for g in found)))
    for i in range(2):
        assert errors[1][i] < errors[0][i] / 12 and errors[1][i] < 1e-3


@pytest.mark.parametrize(
    "function",
    [
        *(F.relu, F.relu6, F.leaky_relu, F.hardswish, lambda z: z.clamp(min=0), torch.relu_),
        *(
            nn.PReLU().double(),
            nn.Threshold(0.1, 0),
            nn.MaxPool2d(2),
            lambda z: fi.ops.activation(z, "relu"),
        ),
    ],
)
def test_kinks_are_found(function):
    net, (x, y) = Functional(function), batch()
    with pytest.raises(ValueError, match="has kinks .*use input_gradient_norm, or smooth"):
        R.finite_difference_gradient_norm(net, x, y)
    with pytest.warns(UserWarning, match="has kinks"):
        value = R.finite_difference_gradient_norm(net, x, y, kinks="warn")
    assert value == R.finite_difference_gradient_norm(net, x, y, kinks="ignore")


@pytest.mark.parametrize("act", [nn.ReLU, nn.LeakyReLU, nn.SiLU])
def test_kinks_are_found_in_fused_models(act):
    net, (x, y) = fi.fuse(make_net(act)), batch()
    if act is nn.SiLU:
        assert R.finite_difference_gradient_norm(net, x, y) > 0
    else:
        with pytest.raises(ValueError, match=r"has kinks \((leaky_)?relu\)"):
            R.finite_difference_gradient_norm(net, x, y)


def test_nobody_pays_twice():
    """F, D for the gradient and the logits, then F, W for the penalty and D, W for the loss."""
    net, (x, labels) = fi.fuse(conv_net(4)), images()
    x = x.sigmoid()
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    with Passes({m.weight.shape for m in convs}) as counter:
        value, logits = R.input_gradient_norm(net, x, labels, of="logit", return_logits=True)
        assert counter.count == dict(F=4, D=4, W=0)
        (value + F.cross_entropy(logits, labels)).backward(inputs=list(net.parameters()))
    assert counter.count == dict(F=2 * 4, D=2 * 4 - 1, W=2 * 4)
