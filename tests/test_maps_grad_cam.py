import pytest
import torch
from map_networks import ReluNet, SmoothNet, assert_gradients_close, images, parameter_gradients
from test_maps_gradient import TARGETS, some_loss
from torch import nn
from torch.nn import functional as F

import fastinterp as fi
from fastinterp.maps import (
    UnsupportedModelError,
    cam,
    explained_layer,
    grad_cam,
    grad_cam_plus_plus,
    input_gradient,
)


def plain(kind, net, layer, x, target):
    """Class by class with torch alone, as the formulas are written."""
    kept = []
    handle = net.get_submodule(layer).register_forward_hook(lambda *a: kept.append(a[2]))
    logits = net(x)
    handle.remove()
    (features,) = kept
    n, classes = logits.shape
    index = torch.arange(classes).expand(n, -1) if target is None else torch.as_tensor(target)
    index = index.expand(n)[:, None] if index.dim() < 2 else index
    maps = []
    for t in index.unbind(1):
        score = logits.gather(1, t[:, None]).sum()
        (g,) = torch.autograd.grad(score, features, create_graph=True)
        if kind is grad_cam:
            weights = g.mean((2, 3))
        else:
            h = torch.where(g > 0, g, 1)
            alpha = h**2 / (2 * h**2 + features.sum((2, 3), keepdim=True) * h**3)
            alpha = torch.where(g > 0, alpha, 0)
            total = alpha.sum((2, 3), keepdim=True)
            alpha = alpha / torch.where(total != 0, total, 1)
            weights = (alpha * g.relu()).sum((2, 3))
        maps.append((weights[:, :, None, None] * features).sum(1))
    return torch.stack(maps, 1)


class Spatial(SmoothNet):
    """A head that sees where things are, so that the gradient differs from pixel to pixel."""

    def __init__(self):
        super().__init__()
        self.third = nn.Conv2d(6, 7, 3)

    def forward(self, x):
        x = F.silu(self.norm(self.first(x)))
        x = F.softplus(self.third(F.silu(self.second(x))))
        return self.head(x[:, :6].mean((2, 3)) * x[:, 1:].amax((2, 3)))


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())
@pytest.mark.parametrize("layer", ["first", "norm", "second", "third"])
@pytest.mark.parametrize("kind", [grad_cam, grad_cam_plus_plus])
def test_values_and_gradients_are_those_of_double_backprop(kind, layer, target):
    net, x = Spatial().double(), images().requires_grad_()
    of = [x, *net.parameters()]
    expected = plain(kind, net, layer, x, target)
    wanted = torch.autograd.grad(some_loss(expected), of, allow_unused=True)
    value, logits = kind(net, x, target, layer=layer, return_logits=True)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(logits, net(x))
    got = torch.autograd.grad(some_loss(value), of, allow_unused=True, retain_graph=True)
    assert_gradients_close(got, wanted)
    got = torch.autograd.grad(some_loss(value) + logits.sum(), of, allow_unused=True)
    both = some_loss(plain(kind, net, layer, x, target)) + net(x).sum()
    assert_gradients_close(got, torch.autograd.grad(both, of, allow_unused=True))
    module = net.get_submodule(layer)
    positive = kind(net, x, target, layer=module, relu=True, detach=True)
    assert not positive.requires_grad
    torch.testing.assert_close(positive, expected.detach().clamp(min=0))


@pytest.mark.parametrize("name", ["small", "pool", "wresnet"])
def test_behind_global_average_pooling_they_are_cam(name):
    net, x = fi.create_model(name, 1, 10).double(), images(2, 1, 12)
    maps, (h, w) = cam(net, x), cam(net, x).shape[2:]
    torch.testing.assert_close(grad_cam(net, x) * h * w, maps)
    torch.testing.assert_close(grad_cam(net, x, 3) * h * w, maps[:, 3:4])
    with torch.no_grad():
        net.head.weight.clamp_(min=0)
    expected = cam(net, x)
    with torch.no_grad():
        net.head.weight.copy_(torch.where(net.head.weight > 0, net.head.weight, -1.0))
    torch.testing.assert_close(grad_cam_plus_plus(net, x) * h * w, expected)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layer", [None, "features.4", "features.0"])
def test_fused_models(backend, layer, training, target):
    net, x = ReluNet().double().train(training), images()
    expected = grad_cam(net, x, target, layer=layer)
    wanted = parameter_gradients(some_loss(expected), net)
    fi.fuse(net)
    value = grad_cam(net, x, target, layer=layer)
    torch.testing.assert_close(value, expected)
    assert_gradients_close(parameter_gradients(some_loss(value), net), wanted)


def test_the_weights_of_cam_are_differentiated_whichever_the_target():
    net, x = fi.create_model("small", 1, 10).double(), images(3, 1, 12).requires_grad_()
    features = net.features(x)
    every = torch.einsum("kc,nchw->nkhw", net.head.weight, features)
    for target in (None, 2, torch.tensor([3, 0, 9]), torch.tensor([[3, 0], [1, 1], [0, 2]])):
        index = torch.arange(10).expand(3, -1) if target is None else torch.as_tensor(target)
        index = index.expand(3)[:, None] if index.dim() < 2 else index
        expected = every[torch.arange(3)[:, None], index]
        value, logits = cam(net, x, target, return_logits=True)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(logits, net(x))
        of = [x, *net.parameters()]
        wanted = torch.autograd.grad(some_loss(expected), of, retain_graph=True)
        assert_gradients_close(torch.autograd.grad(some_loss(value), of), wanted)
        value, logits = cam(net, x, target, detach=True, return_logits=True)
        assert not value.requires_grad and not logits.requires_grad


class Activated(nn.Sequential):
    """An activation behind the layer works in place on its output."""

    def __init__(self, inplace):
        super().__init__(
            *(nn.Conv2d(2, 4, 3), nn.ReLU(inplace), nn.Conv2d(4, 4, 3), nn.ReLU(inplace)),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)),
        )


@pytest.mark.parametrize("layer", ["0", "2", None])
def test_activations_in_place_change_nothing(layer):
    net, x = Activated(True).double(), images()
    other = Activated(False).double()
    other.load_state_dict(net.state_dict())
    value, expected = (grad_cam(n, x, layer=layer) for n in (net, other))
    torch.testing.assert_close(value, expected)
    assert_gradients_close(
        parameter_gradients(some_loss(value), net), parameter_gradients(some_loss(expected), other)
    )


class FunctionalNet(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.features, self.head = features, nn.LazyLinear(3)

    def forward(self, x):
        return self.head(self.features(x).flatten(1))


def torchvision_net(name):
    return getattr(pytest.importorskip("torchvision").models, name)(weights=None)


def timm_net(name, **options):
    return pytest.importorskip("timm").create_model(name, **options)


@pytest.mark.parametrize(
    ("make", "size", "expected"),
    [
        (lambda: fi.create_model("small", 2, 10), 12, "conv2"),
        (lambda: fi.create_model("pool", 2, 10), 12, "input of pool"),
        (ReluNet, 9, "features"),
        (SmoothNet, 9, "second"),
        (lambda: torchvision_net("resnet18"), 64, "layer4"),
        (lambda: torchvision_net("vgg11"), 64, "features"),
        (lambda: torchvision_net("densenet121"), 64, "features"),
        (lambda: torchvision_net("convnext_tiny"), 64, "features"),
        (lambda: torchvision_net("mobilenet_v3_small"), 64, "features"),
        (lambda: timm_net("resnet18"), 64, "layer4"),
    ],
)
def test_the_layer_chosen(make, size, expected):
    net = make()
    channels = next(net.parameters()).shape[1]
    x = torch.rand(2, channels, size, size)
    name = explained_layer(net, x)
    assert name == expected
    net.eval()
    torch.testing.assert_close(
        grad_cam(net, x, 1, detach=True), grad_cam(net, x, 1, layer=name, detach=True)
    )


@pytest.mark.parametrize(
    ("make", "size", "match"),
    [
        (lambda: FunctionalNet(nn.AdaptiveAvgPool2d(1)), 9, "no spatial layer found.*integrated"),
        (
            lambda: timm_net("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=3),
            32,
            r"goes on with tokens \(1, 4, 192\).*which have no height and width; use input_grad",
        ),
        (
            lambda: torchvision_net("swin_t").features[:2],
            32,
            r"looks like \(N, h, w, C\); name a layer",
        ),
    ],
)
def test_no_layer_to_choose(make, size, match):
    net = make()
    x = torch.rand(1, 2 if size == 9 else 3, size, size)
    with pytest.raises(UnsupportedModelError, match=match):
        explained_layer(net, x)
    with pytest.raises(UnsupportedModelError, match=match):
        grad_cam(net, x)


@pytest.mark.parametrize("kind", [grad_cam, grad_cam_plus_plus])
@pytest.mark.parametrize(
    ("layer", "error", "match"),
    [
        ("fist", ValueError, "no layer 'fist'; its last ones are .*first, norm, second"),
        (nn.ReLU(), ValueError, "layer, a ReLU, is not a module of the model"),
        (3, TypeError, "its dotted name or None, got int"),
        ("head", UnsupportedModelError, r"layer 'head' answers with \(3, 4\), not feature maps"),
        ("unused", UnsupportedModelError, "layer 'unused' is not called"),
        ("cut", RuntimeError, "layer 'cut': .*no gradient"),
        ("pair", UnsupportedModelError, "layer 'pair' answers with a tuple"),
    ],
)
def test_layers_that_cannot_be_explained(kind, layer, error, match):
    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    class Net(SmoothNet):
        def __init__(self):
            super().__init__()
            self.unused, self.cut, self.pair = nn.ReLU(), nn.Conv2d(2, 2, 1), Pair()

        def forward(self, x):
            self.cut(x)
            return super().forward(self.pair(x)[0])

    for target in (1, None):
        with pytest.raises(error, match=match):
            kind(Net().double(), images(), target, layer=layer)


def test_token_layers_name_the_way_out():
    net = timm_net("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=3)
    with pytest.raises(UnsupportedModelError, match=r"\(1, 5, 192\).*use input_gradient"):
        grad_cam(net, torch.rand(1, 3, 32, 32), layer="blocks.0")


@pytest.mark.parametrize("target", [1, None])
def test_frozen_layers_before_the_explained_one(target):
    net, x = Spatial().double(), images()
    expected = plain(grad_cam, net, "second", x, target)
    wanted = parameter_gradients(some_loss(expected), net)
    for module in (net.first, net.norm, net.second):
        module.requires_grad_(False)
    value = grad_cam(net, x, target, layer="second")
    torch.testing.assert_close(value, expected)
    rest = [net.third.weight, net.head.weight, net.head.bias]
    got = torch.autograd.grad(some_loss(value), rest, allow_unused=True)
    names = [name for name, _ in net.named_parameters()]
    of_rest = [wanted[names.index(n)] for n in ("third.weight", "head.weight", "head.bias")]
    assert_gradients_close(got, of_rest)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", [grad_cam, grad_cam_plus_plus, input_gradient])
def test_without_gradients(kind, mode):
    net, x = SmoothNet().double(), images()
    expected = kind(net, x, detach=True)
    with mode():
        with pytest.raises(RuntimeError, match=f"{kind.__name__} .*pass detach=True"):
            kind(net, x)
        torch.testing.assert_close(kind(net, x.clone(), detach=True), expected)


def test_cam_without_gradients_is_a_constant():
    net, x = fi.create_model("small", 2, 10), images(dtype=torch.float32)
    with torch.no_grad():
        value = cam(net, x, 1)
    torch.testing.assert_close(value, cam(net, x, 1).detach())


@pytest.mark.parametrize("kind", [cam, grad_cam, grad_cam_plus_plus])
def test_autocast_maps_are_float32(kind):
    net, x = ReluNet().eval(), images(dtype=torch.float32)
    exact = kind(net, x, 1)
    with torch.autocast("cpu", torch.bfloat16):
        value = kind(net, x, 1)
    assert value.dtype == torch.float32
    assert (value - exact).norm() < 0.05 * exact.norm()
    parameter_gradients(value.sum(), net)
