import math

import pytest
import torch
from map_networks import ReluNet, assert_gradients_close, images
from test_maps_gradient import some_loss
from torch import nn
from torch.nn import functional as F

import fastinterp as fi
from fastinterp.maps import grad_cam, input_gradient, softplus_surrogate

FORMS = {
    "module": nn.ReLU(),
    "in-place module": nn.ReLU(inplace=True),
    "F.relu": F.relu,
    "F.relu in place": lambda x: F.relu(x, inplace=True),
    "F.relu_": lambda x: (F.relu_(x), x)[1],
    "torch.relu": torch.relu,
    "torch.relu_": torch.relu_,
    "method": lambda x: x.relu(),
    "in-place method": lambda x: (x.relu_(), x)[1],
}


class EveryRelu(nn.Module):
    """The same layer behind every way to write a ReLU."""

    def __init__(self, form):
        super().__init__()
        self.act = FORMS[form]
        self.conv, self.head = nn.Conv2d(2, 4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.act(self.conv(x)).mean((2, 3)))


@pytest.mark.parametrize("beta", [3.0, 10])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_relu_is_replaced_and_comes_back(form, beta):
    net, x = EveryRelu(form).double(), images().requires_grad_()
    hard = net(x)
    smooth = net.head(F.softplus(net.conv(x), beta).mean((2, 3)))
    with softplus_surrogate(net, beta):
        value = net(x)
        saliency = input_gradient(net, x, 1)
    torch.testing.assert_close(value, smooth)
    assert "forward" not in net.__dict__
    assert torch.equal(net(x), hard)
    (expected,) = torch.autograd.grad(smooth[:, 1].sum(), x, create_graph=True)
    torch.testing.assert_close(saliency, expected)
    of = [x, *net.parameters()]
    got = torch.autograd.grad(some_loss(saliency), of, allow_unused=True)
    wanted = torch.autograd.grad(some_loss(expected), of, allow_unused=True)
    assert_gradients_close(got, wanted)
    assert got[0].abs().sum() > 0


@pytest.mark.parametrize("training", [True, False])
def test_fused_models(backend, training):
    net, x = ReluNet().double().train(training), images().requires_grad_()
    net.features[1] = nn.GroupNorm(2, 6).double()
    with softplus_surrogate(net, 5):
        expected = input_gradient(net, x)
    of = [x, *net.parameters()]
    wanted = torch.autograd.grad(some_loss(expected), of, allow_unused=True)
    fi.fuse(net)
    hard = net(x)
    with softplus_surrogate(net, 5):
        value = input_gradient(net, x)
    torch.testing.assert_close(value, expected)
    assert_gradients_close(torch.autograd.grad(some_loss(value), of, allow_unused=True), wanted)
    if not training:
        assert torch.equal(net(x), hard)


def test_it_tends_to_relu():
    net, x = ReluNet().double().eval(), images()
    with softplus_surrogate(net, 1e5):
        value = grad_cam(net, x, relu=True)
    torch.testing.assert_close(value, grad_cam(net, x, relu=True), atol=1e-4, rtol=0)


def test_other_models_and_what_happens_outside_are_not_affected():
    net, other, x = EveryRelu("F.relu"), EveryRelu("F.relu"), torch.rand(2, 2, 5, 5)
    hard = other(x)
    with softplus_surrogate(net):
        assert torch.equal(other(x), hard)
        assert torch.equal(torch.relu(x - 0.5), (x - 0.5).clamp(min=0))


def test_nested_and_after_an_exception():
    net, x = EveryRelu("F.relu").double(), images()
    hard = net(x)
    with softplus_surrogate(net, 1):
        outer = net(x)
        with softplus_surrogate(net, 100):
            assert (net(x) - hard).abs().max() < (outer - hard).abs().max()
        assert torch.equal(net(x), outer)
        with pytest.raises(RuntimeError):
            net(x[:, :1])
        assert torch.equal(torch.relu(x - 0.5), (x - 0.5).clamp(min=0))
    with pytest.raises(KeyError), softplus_surrogate(net):
        raise KeyError
    assert torch.equal(net(x), hard)
    net.forward = own = lambda x: torch.relu(x).sum((1, 2))
    with softplus_surrogate(net, 1):
        assert (net(x) > torch.relu(x).sum((1, 2))).all()
    assert net.forward is own


@pytest.mark.parametrize("beta", [0, -1, math.inf, math.nan])
def test_beta_out_of_range(beta):
    with (
        pytest.raises(ValueError, match="beta must be a finite number > 0"),
        softplus_surrogate(nn.ReLU(), beta),
    ):
        pass


def test_the_hessian_of_a_relu_network_is_not_zero_inside():
    net, x = ReluNet().double().eval(), images().requires_grad_()
    hard = input_gradient(net, x, 1)
    (zero,) = torch.autograd.grad(hard.square().sum(), x, allow_unused=True)
    assert zero is None or not zero.any()
    with softplus_surrogate(net):
        soft = input_gradient(net, x, 1)
    assert torch.autograd.grad(soft.square().sum(), x)[0].abs().sum() > 0
