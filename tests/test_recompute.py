"""recompute: the same gradients of two orders, with fewer tensors kept."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastinterp as fi
from fastinterp.ops import _recompute


class Net(nn.Module):
    """One batch norm in front of each of three convolutions, the second with a residual."""

    def __init__(self, act):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.act, self.fc = act, nn.Linear(8, 5)

    def forward(self, x):
        x = self.first(x)
        y = self.convs[0](self.act(self.norms[0](x)))
        z = self.convs[1](self.act(self.norms[1](y) + x))
        z = self.convs[2](self.act(self.norms[2](z)))
        return self.fc(z.mean((2, 3)))


def step(net, x, y, inside):
    """Gradients of cross-entropy and an input-gradient penalty, and the buffers afterwards."""
    net.zero_grad()
    x = x.clone().requires_grad_()
    with inside():
        ce = F.cross_entropy(net(x), y)
    (gradient,) = torch.autograd.grad(ce, x, create_graph=True)
    (ce + gradient.abs().sum()).backward()
    return [x.grad, *(p.grad for p in net.parameters())], dict(net.named_buffers())


@pytest.fixture
def recipes(monkeypatch):
    """What was packed as a recipe, and how often one was made."""
    count = dict(packed=0, made=0)

    def pack(t):
        kept = real_pack(t)
        count["packed"] += not isinstance(kept, torch.Tensor)
        return kept

    def unpack(kept):
        count["made"] += not isinstance(kept, torch.Tensor)
        return real_unpack(kept)

    real_pack, real_unpack = _recompute._pack, _recompute._unpack
    monkeypatch.setattr(_recompute, "_pack", pack)
    monkeypatch.setattr(_recompute, "_unpack", unpack)
    return count


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("act", [nn.ReLU(), nn.SiLU()], ids=["relu", "silu"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_of_two_orders(backend, recipes, training, act, layout):
    torch.manual_seed(0)
    x, y = torch.rand(4, 3, 7, 6, dtype=torch.float64), torch.randint(0, 5, (4,))
    net = fi.fuse(Net(act).double().train(training)).to(memory_format=layout)
    for norm in net.norms:
        nn.init.normal_(norm.running_mean)
        nn.init.normal_(norm.weight)
    other = copy.deepcopy(net)
    expected = step(net, x, y, torch.enable_grad)
    assert recipes == dict(packed=0, made=0)
    found = step(other, x, y, fi.recompute)
    assert recipes["packed"] == 2 and recipes["made"] >= 2  # the norm with a residual is kept
    for a, b in zip(*(result[0] for result in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=0)


def test_a_changed_output_is_kept(recipes):
    x = torch.rand(4, 3, 5, 5, requires_grad=True)
    with fi.recompute():
        y = fi.ops.batch_norm_act(x, training=True, activation="relu")
        y.add_(1)
        squares = y.square()
    torch.testing.assert_close(squares, y**2)
    (gradient,) = torch.autograd.grad(squares.sum(), y)
    torch.testing.assert_close(gradient, 2 * y)
    assert recipes["packed"] == 0


def test_a_view_of_an_output_is_kept(recipes):
    x = torch.rand(4, 3, 5, 5, requires_grad=True)
    with fi.recompute():
        y = fi.ops.batch_norm_act(x, training=True, activation="relu")
        part = y[:2]
        part.square().sum().backward()
    assert recipes["packed"] == 0 and x.grad.any()


def test_nothing_is_made_outside_or_after_an_error(recipes):
    x = torch.rand(4, 3, 5, 5, requires_grad=True)
    with pytest.raises(ZeroDivisionError), fi.recompute(), fi.recompute():
        raise ZeroDivisionError
    y = fi.ops.batch_norm_act(x, training=True, activation="relu")
    y.square().sum().backward()
    assert recipes["packed"] == 0 and not hasattr(y, "_fastinterp_recipe")
