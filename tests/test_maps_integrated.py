import numpy as np
import pytest
import torch
from map_networks import (
    ReluNet,
    SmoothNet,
    assert_gradients_close,
    images,
    parameter_gradients,
)
from test_maps_gradient import TARGETS, plain, some_loss
from torch import nn

import fastinterp as fi
from fastinterp.maps import expected_gradients, input_gradient, integrated_gradients, smooth_grad

QUADRATURES = {
    "left": lambda m: (np.arange(m) / m, np.full(m, 1 / m)),
    "right": lambda m: (np.arange(1, m + 1) / m, np.full(m, 1 / m)),
    "middle": lambda m: ((np.arange(m) + 0.5) / m, np.full(m, 1 / m)),
    "trapezoid": lambda m: (
        np.linspace(0, 1, m),
        np.array([0.5, *[1.0] * (m - 2), 0.5]) / (m - 1),
    ),
    "gauss-legendre": lambda m: [v / 2 for v in np.polynomial.legendre.leggauss(m)],
}


def plain_integrated(net, x, target, a, steps, method, of):
    """Point by point with torch alone."""
    t, weights = QUADRATURES[method](steps)
    t = t + 0.5 if method == "gauss-legendre" else t
    net.eval()
    total = 0
    for t_k, w_k in zip(t, weights, strict=True):
        point = a + t_k * (x - a)
        total = total + w_k * plain(net, point, target, of)
    offset = x - a
    return (offset[:, None] if total.dim() == 5 else offset) * total


class Quadratic(nn.Module):
    """f_c(x) = sum (c + 1) x^2: IG from a is (c + 1) (x^2 - a^2), each quadrature's error known."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))

    def forward(self, x):
        return x.square().sum((1, 2, 3))[:, None] * self.scale


@pytest.mark.parametrize("steps", [2, 5])
@pytest.mark.parametrize("method", QUADRATURES)
def test_quadratures_on_a_quadratic(method, steps):
    x, a = images(), images() / 2
    value, delta = integrated_gradients(
        Quadratic(), x, 1, baseline=a, steps=steps, method=method, return_delta=True
    )
    # The integrand 2 c (x - a) (a + t (x - a)) is linear in t; only one-sided sums err, by h / 2.
    error = {"left": -1 / steps, "right": 1 / steps}.get(method, 0)
    expected = 2 * (x.square() - a.square() + error * (x - a).square())
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(delta, 2 * error * (x - a).square().sum((1, 2, 3)))


def test_one_step_forms():
    x = images()
    for method, t in (("left", 0), ("right", 1), ("middle", 0.5), ("gauss-legendre", 0.5)):
        value = integrated_gradients(Quadratic(), x, 0, steps=1, method=method)
        torch.testing.assert_close(value, 2 * t * x.square())


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())
@pytest.mark.parametrize("method", QUADRATURES)
def test_values_and_gradients_are_those_of_double_backprop(method, target):
    net = SmoothNet().double()
    x, a = images().requires_grad_(), (images()[:1] / 3).requires_grad_()
    wanted_of = [x, a, *net.parameters()]
    expected = plain_integrated(net, x, target, a, 4, method, "log_prob")
    wanted = torch.autograd.grad(some_loss(expected), wanted_of, allow_unused=True)
    net.train()
    arguments = dict(baseline=a, steps=4, method=method, of="log_prob")
    for size in (None, 5, 1):
        value = integrated_gradients(net, x, target, internal_batch_size=size, **arguments)
        torch.testing.assert_close(value, expected)
        got = torch.autograd.grad(some_loss(value), wanted_of, allow_unused=True)
        assert_gradients_close(got, wanted)
    constant, delta = integrated_gradients(
        net, x, target, detach=True, return_delta=True, **arguments
    )
    assert not constant.requires_grad and not delta.requires_grad
    torch.testing.assert_close(constant, expected.detach())


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())
@pytest.mark.parametrize("of", ["logit", "log_prob", "loss"])
def test_completeness(of, target):
    net, x, a = SmoothNet().double(), images(), images() / 2
    value, delta = integrated_gradients(
        net, x, target, baseline=a, steps=40, method="gauss-legendre", of=of, return_delta=True
    )
    assert delta.shape == (value.shape[:2] if value.dim() == 5 else value.shape[:1])
    assert delta.abs().max() < 1e-8
    coarse, delta = integrated_gradients(
        net, x, target, baseline=a, steps=3, of=of, return_delta=True
    )
    net.eval()
    ends = [net(z) if of == "logit" else net(z).log_softmax(1) for z in (x, a)]
    rise = (ends[0] - ends[1]) * (-1 if of == "loss" else 1)
    index = torch.arange(4).expand(3, 4) if target is None else torch.as_tensor(target)
    rise = rise.gather(1, index.expand(3)[:, None] if index.dim() < 2 else index)
    sums = coarse.flatten(-3).sum(-1)
    torch.testing.assert_close(delta, sums - rise.view(sums.shape))
    assert delta.abs().max() > 1e-5
    delta.abs().sum().backward()
    assert net.first.weight.grad.abs().sum() > 0


def test_points_do_not_mix_in_training_mode():
    net, x = ReluNet().double(), images()
    alone = torch.cat([integrated_gradients(net, x[i : i + 1], 1, steps=7) for i in range(3)])
    torch.testing.assert_close(integrated_gradients(net, x, 1, steps=7), alone)
    assert net.training


@pytest.mark.parametrize("target", [1, None])
def test_fused_models(backend, target):
    net, x = ReluNet().double(), images()
    expected = integrated_gradients(net, x, target, steps=6)
    wanted = parameter_gradients(some_loss(expected), net)
    fi.fuse(net)
    value = integrated_gradients(net, x, target, steps=6, internal_batch_size=7)
    torch.testing.assert_close(value, expected)
    assert_gradients_close(parameter_gradients(some_loss(value), net), wanted)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())
def test_smooth_grad_is_a_mean_of_input_gradients(target):
    net, x = SmoothNet().double(), images().requires_grad_()
    g = torch.Generator().manual_seed(5)
    draws = torch.randn(4, *x.shape, generator=g).double()
    net.eval()
    expected = torch.stack([plain(net, x + 0.2 * d, target, "logit") for d in draws]).mean(0)
    wanted = torch.autograd.grad(some_loss(expected), [x, *net.parameters()], allow_unused=True)
    net.train()
    for size in (None, 5):
        g.manual_seed(5)
        value = smooth_grad(
            net, x, target, noise=0.2, samples=4, generator=g, internal_batch_size=size
        )
        torch.testing.assert_close(value, expected)
        got = torch.autograd.grad(some_loss(value), [x, *net.parameters()], allow_unused=True)
        assert_gradients_close(got, wanted)
    assert not smooth_grad(net, x, target, samples=2, detach=True).requires_grad
    one = smooth_grad(net.eval(), x, target, noise=0, samples=1)
    torch.testing.assert_close(one, input_gradient(net, x, target))


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())
def test_expected_gradients_are_a_mean_over_baselines_and_points(target):
    net, x = SmoothNet().double(), images().requires_grad_()
    bank = images(5).requires_grad_()
    g = torch.Generator().manual_seed(5)
    drawn = torch.randint(5, (4, 3), generator=g)
    t = torch.rand((4, 3, 1, 1, 1), generator=g).double()
    net.eval()
    expected = 0
    for rows, t_s in zip(drawn, t, strict=True):
        b = bank[rows]
        gradient = plain(net, b + t_s * (x - b), target, "loss")
        expected = expected + ((x - b)[:, None] if gradient.dim() == 5 else x - b) * gradient / 4
    of = [x, bank, *net.parameters()]
    wanted = torch.autograd.grad(some_loss(expected), of, allow_unused=True)
    net.train()
    arguments = dict(baselines=bank, samples=4, generator=g, of="loss")
    for size in (None, 5):
        g.manual_seed(5)
        value = expected_gradients(net, x, target, internal_batch_size=size, **arguments)
        torch.testing.assert_close(value, expected)
        got = torch.autograd.grad(some_loss(value), of, allow_unused=True)
        assert_gradients_close(got, wanted)
    assert not expected_gradients(net, x, target, detach=True, **arguments).requires_grad


def test_draws_differ_from_call_to_call_and_follow_the_seed():
    net, x = SmoothNet().double(), images()
    for kind, options in ((smooth_grad, {}), (expected_gradients, dict(baselines=images()))):
        torch.manual_seed(3)
        first, second = (kind(net, x, 1, detach=True, **options) for _ in range(2))
        assert not torch.equal(first, second)
        torch.manual_seed(3)
        assert torch.equal(kind(net, x, 1, detach=True, **options), first)


def test_expected_gradients_tend_to_integrated_gradients():
    net, x, a = SmoothNet().double(), images(), images()[:1] / 2
    drawn = expected_gradients(net, x, 1, baselines=a, samples=4000, detach=True)
    exact = integrated_gradients(
        net, x, 1, baseline=a, steps=20, method="gauss-legendre", detach=True
    )
    assert (drawn - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (integrated_gradients, {}),
        (smooth_grad, {}),
        (expected_gradients, dict(baselines=images())),
    ],
)
def test_without_gradients(kind, options, mode):
    net, x = SmoothNet().double(), images()
    torch.manual_seed(3)
    expected = kind(net, x, 1, detach=True, **options)
    with mode():
        with pytest.raises(RuntimeError, match=f"{kind.__name__} .*pass detach=True"):
            kind(net, x, 1, **options)
        torch.manual_seed(3)
        torch.testing.assert_close(kind(net, x.clone(), 1, detach=True, **options), expected)


def test_empty_batches_and_autocast():
    net, x = SmoothNet(), images(dtype=torch.float32)
    assert integrated_gradients(net, x[:0], None, steps=3).shape == (0, 4, 2, 9, 9)
    exact = integrated_gradients(net, x, 1, steps=3)
    with torch.autocast("cpu", torch.bfloat16):
        value = integrated_gradients(net, x, 1, steps=3)
    assert value.dtype == torch.float32
    assert (value - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize(
    ("kind", "options", "match"),
    [
        (integrated_gradients, dict(method="simpson"), "method must be one of left, right"),
        (integrated_gradients, dict(steps=0), "steps must be an integer >= 1, got 0"),
        (integrated_gradients, dict(steps=1, method="trapezoid"), "steps must be an integer >= 2"),
        (integrated_gradients, dict(steps=2.5), "steps must be an integer"),
        (integrated_gradients, dict(baseline=torch.zeros(5)), r"broadcastable to x \(3, 2, 9, 9\)"),
        (integrated_gradients, dict(internal_batch_size=0), "internal_batch_size must be an int"),
        (integrated_gradients, dict(of="prob"), "of must be one of"),
        (integrated_gradients, dict(target=4), "a class below 4"),
        (integrated_gradients, dict(x=images() + 1), "normalisation inside the model"),
        (smooth_grad, dict(noise=-1), "noise must be a finite number >= 0, got -1"),
        (smooth_grad, dict(samples=0), "samples must be an integer >= 1"),
        (smooth_grad, dict(of="prob"), "of must be one of"),
        (expected_gradients, dict(baselines=images(4, 1)), r"images \(M, 2, 9, 9\), got \(4, 1"),
        (expected_gradients, dict(baselines=0.0), "got float"),
        (expected_gradients, dict(baselines=images()[:0]), "at least one image"),
        (expected_gradients, dict(baselines=images(), samples=0), "samples must be"),
    ],
)
def test_arguments_out_of_range(kind, options, match):
    options = dict(options)
    x, target = options.pop("x", images()), options.pop("target", 1)
    with pytest.raises(ValueError, match=match):
        kind(SmoothNet().double(), x, target, **options)
