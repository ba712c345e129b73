import copy

import pytest
import torch
from map_networks import (
    ReluNet,
    SmoothNet,
    assert_gradients_close,
    images,
    parameter_gradients,
)
from torch import nn
from torch.nn import functional as F

import fastinterp as fi
from fastinterp.maps import (
    cam,
    grad_cam,
    grad_cam_plus_plus,
    gradient_x_input,
    input_gradient,
)

TARGETS = {
    "class": 2,
    "one each": torch.tensor([3, 0, 1]),
    "two each": torch.tensor([[3, 0], [1, 1], [0, 2]]),
    "all": None,
}


def plain(net, x, target, of, times_input=False):
    """Class by class with torch alone; (N, k, C, H, W), or without k for one class."""
    z = x if x.requires_grad else x.detach().requires_grad_()
    logits = net(z)
    n, classes = logits.shape
    index = torch.arange(classes).expand(n, -1) if target is None else torch.as_tensor(target)
    index = index.expand(n)[:, None] if index.dim() < 2 else index
    score = {
        "logit": lambda t: logits.gather(1, t[:, None]).sum(),
        "log_prob": lambda t: logits.log_softmax(1).gather(1, t[:, None]).sum(),
        "loss": lambda t: F.cross_entropy(logits, t, reduction="sum"),
    }[of]
    maps = [torch.autograd.grad(score(t), z, create_graph=True)[0] for t in index.unbind(1)]
    maps = torch.stack(maps, 1)
    if times_input:
        maps = x[:, None] * maps
    return maps[:, 0] if target is not None and torch.as_tensor(target).dim() < 2 else maps


def some_loss(value):
    """Not symmetric and with curvature of its own."""
    weights = torch.arange(1.0, value.numel() + 1, dtype=value.dtype).view(value.shape).sin()
    return (value.tanh() * weights).sum() + value.square().sum()


@pytest.mark.parametrize("of", ["logit", "log_prob", "loss"])
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [input_gradient, gradient_x_input])
def test_values_and_gradients_are_those_of_double_backprop(kind, training, target, of):
    net = SmoothNet().double().train(training)
    x = images().requires_grad_()
    value = kind(net, x, target, of=of)
    expected = plain(net, x, target, of, times_input=kind is gradient_x_input)
    assert value.shape == expected.shape
    torch.testing.assert_close(value, expected)
    assert_gradients_close(
        torch.autograd.grad(some_loss(value), [x, *net.parameters()], allow_unused=True),
        torch.autograd.grad(some_loss(expected), [x, *net.parameters()], allow_unused=True),
    )
    constant = kind(net, x, target, of=of, detach=True)
    assert not constant.requires_grad
    torch.testing.assert_close(constant, expected.detach())


def test_the_graph_of_x_goes_on():
    """x = g(u): the map is differentiable to u through both places that x stands in."""
    net, u = SmoothNet().double(), images().requires_grad_()
    for kind in (input_gradient, gradient_x_input):
        (got,) = torch.autograd.grad(some_loss(kind(net, u.sigmoid(), 1)), u)
        expected = plain(net, u.sigmoid(), 1, "logit", kind is gradient_x_input)
        torch.testing.assert_close(got, torch.autograd.grad(some_loss(expected), u)[0])


def test_gradcheck_to_x_and_a_parameter():
    net, x = SmoothNet(1, 2).double().eval(), images(1, 1, 4).requires_grad_()
    weight = net.first._parameters.pop("weight")

    def value(x, weight):
        net.first.weight = weight
        return input_gradient(net, x.sigmoid(), 1)

    assert torch.autograd.gradcheck(value, (x, weight))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("target", [TARGETS["one each"], None], ids=["one", "all"])
def test_fused_models(backend, training, target):
    net, x = ReluNet().double().train(training), images()
    expected = plain(net, x, target, "logit")
    wanted = parameter_gradients(some_loss(expected), net)
    fi.fuse(net)
    value = input_gradient(net, x, target)
    torch.testing.assert_close(value, expected)
    assert_gradients_close(parameter_gradients(some_loss(value), net), wanted)


def test_logits_share_the_graph():
    net, x = SmoothNet().double(), images()
    calls = []
    net.first.register_forward_hook(lambda *_: calls.append(1))
    value, logits = input_gradient(net, x, 1, return_logits=True)
    assert len(calls) == 1
    torch.testing.assert_close(logits, net(x))
    y = torch.tensor([0, 1, 2])
    loss = F.cross_entropy(logits, y) + value.abs().sum()
    expected = F.cross_entropy(net(x), y) + plain(net, x, 1, "logit").abs().sum()
    assert_gradients_close(parameter_gradients(loss, net), parameter_gradients(expected, net))
    value, logits = input_gradient(net, x, 1, return_logits=True, detach=True)
    assert not value.requires_grad and not logits.requires_grad


@pytest.mark.parametrize(
    "kind", [cam, grad_cam, grad_cam_plus_plus, input_gradient, gradient_x_input]
)
def test_the_pass_whose_logits_are_returned_counts(kind):
    """As model(x): running statistics move once, and the next step drops other units."""
    net, x = ReluNet().double(), images()
    net.features.insert(3, nn.Dropout(0.3))
    plain = copy.deepcopy(net)
    for seed in range(2):
        torch.manual_seed(seed)
        _, logits = kind(net, x, 1, return_logits=True)
        drawn = torch.rand(1)
        torch.manual_seed(seed)
        torch.testing.assert_close(logits, plain(x))
        assert drawn == torch.rand(1)
        torch.testing.assert_close(dict(net.named_buffers()), dict(plain.named_buffers()))
    before = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    kind(net, x, 1)
    kind(net, x, 1, detach=True, return_logits=True)
    torch.testing.assert_close((net.state_dict(), torch.get_rng_state()), before, rtol=0, atol=0)


def test_many_classes_are_one_backward_pass():
    net, x = SmoothNet().double(), images()
    calls = []
    net.second.register_full_backward_hook(lambda *_: calls.append(1))
    input_gradient(net, x, None)
    assert len(calls) == 1


class NoBatching(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * (1.0 if grad.abs().max() >= 0 else 0.0)  # asks for a value


def test_a_backward_pass_that_cannot_be_batched_runs_class_by_class():
    class Net(SmoothNet):
        def forward(self, x):
            return super().forward(NoBatching.apply(x))

    net, x = Net().double(), images()
    with pytest.warns(RuntimeWarning, match="one after the other"):
        value = input_gradient(net, x)
    torch.testing.assert_close(value, plain(net, x, None, "logit"))


@pytest.mark.parametrize("fused", [False, True])
def test_autocast_maps_are_float32(fused):
    net, x = ReluNet(), images(dtype=torch.float32)
    exact = input_gradient(net, x)
    if fused:
        fi.fuse(net)
    with torch.autocast("cpu", torch.bfloat16):
        value, logits = input_gradient(net, x, return_logits=True)
    assert value.dtype == torch.float32 and logits.dtype == torch.bfloat16
    assert (value - exact).norm() < 0.05 * exact.norm()
    assert all(p is None or p.dtype == torch.float32 for p in parameter_gradients(value.sum(), net))
    half = input_gradient(ReluNet().bfloat16(), x.bfloat16(), 1)
    assert half.dtype == torch.float32


def test_frozen_models_and_empty_batches():
    net, x = SmoothNet().double().requires_grad_(False).eval(), images()
    torch.testing.assert_close(input_gradient(net, x, 1), plain(net, x, 1, "logit"))
    assert input_gradient(net, x[:0], None).shape == (0, 4, 2, 9, 9)
    assert input_gradient(net, x[:0], 1, detach=True).shape == (0, 2, 9, 9)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    net, x = SmoothNet().double(), images()
    expected = input_gradient(net, x, 1, detach=True)
    with mode():
        with pytest.raises(RuntimeError, match="pass detach=True .* or call it outside"):
            input_gradient(net, x, 1)
        torch.testing.assert_close(input_gradient(net, x.clone(), 1, detach=True), expected)


class Broken(SmoothNet):
    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, x):
        return self.how(super().forward(x), x)


@pytest.mark.parametrize(
    ("net", "error", "match"),
    [
        (Broken(lambda y, x: y.detach()), RuntimeError, "no gradient to its input: look for"),
        (
            Broken(lambda y, x: y.detach() * y.new_ones((), requires_grad=True)),
            RuntimeError,
            "look",
        ),
        (Broken(lambda y, x: (y, x)), ValueError, r"logits \(N, K\).* got tuple; wrap it"),
        (Broken(lambda y, x: y[:, :, None]), ValueError, r"got \(3, 4, 1\)"),
        (
            Broken(lambda y, x: y.sum(0, keepdim=True)),
            ValueError,
            r"for N = 3 images, got \(1, 4\)",
        ),
        (lambda x: x, TypeError, "model must be an nn.Module, got function"),
    ],
)
def test_models_without_a_gradient(net, error, match):
    net = net.double() if isinstance(net, nn.Module) else net
    for target in (1, None):
        with pytest.raises(error, match=match):
            input_gradient(net, images(), target)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (
            dict(x=images() + 1),
            ValueError,
            r"x must lie in \[0, 1\].*normalisation inside the model",
        ),
        (dict(x=images()[0]), ValueError, r"x must be images \(N, C, H, W\)"),
        (dict(x=torch.zeros(2, 2, 9, 9, dtype=torch.uint8)), TypeError, "convert uint8"),
        (dict(target=4), ValueError, "a class below 4.* got 4"),
        (dict(target=torch.tensor([0, 1, -1])), ValueError, "a class below 4.* got -1"),
        (dict(target=torch.tensor([0, 1])), ValueError, r"\(3,\) or \(3, k\).* got shape \(2,\)"),
        (dict(target=torch.zeros(3, 0).long()), ValueError, r"got shape \(3, 0\)"),
        (dict(target=torch.tensor([0.0, 1, 2])), TypeError, r"int64.*target\.long\(\)"),
        (dict(target="cat"), TypeError, "got str"),
        (dict(of="prob"), ValueError, "of must be one of logit, log_prob, loss, got 'prob'"),
    ],
)
@pytest.mark.parametrize("kind", [input_gradient, gradient_x_input])
def test_arguments_out_of_range(kind, change, error, match):
    arguments = dict(x=images(), target=None) | change
    with pytest.raises(error, match=match):
        kind(SmoothNet().double(), arguments.pop("x"), arguments.pop("target"), **arguments)


def test_compiled_models_run_as_they_were_written():
    net, x = SmoothNet().double(), images()
    expected = input_gradient(net, x, 1)
    wanted = parameter_gradients(some_loss(expected), net)
    compiled = torch.compile(net, backend="aot_eager")
    with pytest.warns(RuntimeWarning, match="cannot be differentiated again") as seen:
        for _ in range(2):
            value = input_gradient(compiled, x, 1)
    assert len(seen) == 1
    torch.testing.assert_close(value, expected)
    assert_gradients_close(parameter_gradients(some_loss(value), net), wanted)
    in_place = SmoothNet().double()
    in_place.load_state_dict(net.state_dict())
    in_place.second.compile(backend="aot_eager")
    with pytest.warns(RuntimeWarning, match="cannot be differentiated again"):
        value = input_gradient(in_place, x, 1)
    assert_gradients_close(parameter_gradients(some_loss(value), in_place), wanted)


def test_parallel_wrappers():
    net, x = SmoothNet().double(), images()
    wrapped = nn.DataParallel(net)
    torch.testing.assert_close(input_gradient(wrapped, x, 1), input_gradient(net, x, 1))


@pytest.mark.parametrize("target", [torch.tensor([1, 0]), None], ids=["one", "all"])
def test_vision_transformer(target):
    timm = pytest.importorskip("timm")
    net = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=24, num_heads=2, num_classes=3
    ).double()
    x = images(2, 3, 32)
    value = input_gradient(net, x, target)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = plain(net, x, target, "logit")
    torch.testing.assert_close(value, expected)
    assert_gradients_close(
        parameter_gradients(some_loss(value), net), parameter_gradients(some_loss(expected), net)
    )
