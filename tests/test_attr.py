"""fastinterp.attr beside captum and pytorch-grad-cam: their values, without their traps."""

import pytest
import torch
from map_networks import ReluNet, SmoothNet, assert_gradients_close, images, parameter_gradients
from test_maps_gradient import plain, some_loss
from torch.nn import functional as F

from fastinterp import attr
from fastinterp.maps import grad_cam, integrated_gradients

TARGETS = {
    "class": 2,
    "list": [3, 0, 1],
    "tensor": torch.tensor([3, 0, 1]),
    "one element": torch.tensor([2]),
}
every_target = pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())


@pytest.fixture
def captum():
    return pytest.importorskip("captum.attr")


@pytest.fixture(params=[SmoothNet, ReluNet])
def net(request):
    return request.param().double().eval()


def wide_images():
    """Of another range than [0,1], as captum's users have."""
    return 6 * images() - 3


@every_target
@pytest.mark.parametrize("size", [None, 7])
@pytest.mark.parametrize("steps", [2, 10])
@pytest.mark.parametrize(
    "method",
    ["gausslegendre", "riemann_left", "riemann_right", "riemann_middle", "riemann_trapezoid"],
)
def test_integrated_gradients_as_captum(captum, net, target, method, steps, size):
    x = wide_images()
    options = dict(n_steps=steps, method=method, internal_batch_size=size)
    for baselines in (None, 0.5, images()[:1], images()):
        of_captum = baselines.expand_as(x) if torch.is_tensor(baselines) else baselines
        theirs, their_delta = captum.IntegratedGradients(net).attribute(
            x, of_captum, target, return_convergence_delta=True, **options
        )
        ours, delta = attr.IntegratedGradients(net).attribute(
            x, baselines, target, return_convergence_delta=True, **options
        )
        if method == "riemann_trapezoid":  # captum's weights sum to 1 - 1 / n_steps
            ours, delta = ours * (1 - 1 / steps), delta - ours.flatten(1).sum(1) / steps
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(delta, their_delta)


@every_target
def test_saliency_input_x_gradient_and_layer_grad_cam_as_captum(captum, net, target):
    x = wide_images()
    for magnitude in (True, False):
        torch.testing.assert_close(
            attr.Saliency(net).attribute(x, target, magnitude),
            captum.Saliency(net).attribute(x.clone().requires_grad_(), target, magnitude),
        )
    assert (attr.Saliency(net).attribute(x, target) >= 0).all()
    torch.testing.assert_close(
        attr.InputXGradient(net).attribute(x, target),
        captum.InputXGradient(net).attribute(x.clone().requires_grad_(), target),
    )
    name = "second" if isinstance(net, SmoothNet) else "features.4"
    for relu in (False, True):
        theirs = captum.LayerGradCam(net, net.get_submodule(name)).attribute(
            x, target, relu_attributions=relu
        )
        for layer in (name, net.get_submodule(name)):
            ours = attr.LayerGradCam(net, layer).attribute(x, target, relu_attributions=relu)
            torch.testing.assert_close(ours, theirs)


def test_one_output_needs_no_target(captum):
    net, x = SmoothNet(classes=1).double().eval(), images()
    ours = attr.IntegratedGradients(net).attribute(x)
    torch.testing.assert_close(ours, captum.IntegratedGradients(net).attribute(x, target=0))
    assert attr.Saliency(net).attribute(x).shape == x.shape
    with pytest.raises(ValueError, match="target must be given: the model has 4 outputs"):
        attr.Saliency(SmoothNet().double()).attribute(x)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (dict(method="gauss-legendre"), "method must be one of .*gausslegendre"),
        (dict(n_steps=0), "steps must be an integer"),
        (dict(target=[0, 9, 0]), "a class below 4.* got 9"),
        (dict(inputs=images()[0]), "inputs must be images"),
    ],
)
def test_arguments_out_of_range(change, match):
    arguments = dict(inputs=images(), target=1) | change
    with pytest.raises(ValueError, match=match):
        attr.IntegratedGradients(SmoothNet().double()).attribute(**arguments)


# ---- the traps: a map in a loss


def test_trap_integrated_gradients_of_captum_train_nothing(captum):
    net, x = SmoothNet().double().eval(), images()
    theirs = captum.IntegratedGradients(net).attribute(x, target=1, n_steps=4)
    assert not theirs.requires_grad
    loss = F.cross_entropy(net(x), torch.tensor([0, 1, 2])) + theirs.square().sum()
    alone = F.cross_entropy(net(x), torch.tensor([0, 1, 2]))
    assert_gradients_close(parameter_gradients(loss, net), parameter_gradients(alone, net))

    ours = attr.IntegratedGradients(net).attribute(x, target=1, n_steps=4)
    torch.testing.assert_close(ours, theirs)
    got = parameter_gradients(some_loss(ours), net)
    expected = integrated_gradients(net, x, 1, steps=4, method="gauss-legendre")
    assert all(g.abs().sum() > 0 for g in got if g is not None) and got[0] is not None
    assert_gradients_close(got, parameter_gradients(some_loss(expected), net))


def plain_grad_cam(net, layer, x, target):
    kept = []
    handle = layer.register_forward_hook(lambda *a: kept.append(a[2]))
    logits = net(x)
    handle.remove()
    (g,) = torch.autograd.grad(logits[:, target].sum(), kept[0], create_graph=True)
    return (g.mean((2, 3), keepdim=True) * kept[0]).sum(1, keepdim=True)


def test_trap_layer_grad_cam_of_captum_has_half_a_gradient(captum):
    net, x = SmoothNet().double().eval(), images()
    expected = plain_grad_cam(net, net.second, x, 1)
    wanted = torch.cat([g.flatten() for g in grads_or_zeros(some_loss(expected), net)])
    theirs = captum.LayerGradCam(net, net.second).attribute(x, target=1)
    torch.testing.assert_close(theirs, expected)
    got = torch.cat([g.flatten() for g in grads_or_zeros(some_loss(theirs), net)])
    assert (got - wanted).norm() > 0.1 * wanted.norm()

    ours = attr.LayerGradCam(net, net.second).attribute(x, target=1)
    torch.testing.assert_close(ours, expected)
    got = torch.cat([g.flatten() for g in grads_or_zeros(some_loss(ours), net)])
    torch.testing.assert_close(got, wanted)


def grads_or_zeros(value, net):
    grads = parameter_gradients(value, net)
    return [
        torch.zeros_like(p) if g is None else g
        for p, g in zip(net.parameters(), grads, strict=True)
    ]


def test_trap_pytorch_grad_cam_overwrites_gradients_and_leaves_evaluation_mode():
    theirs = pytest.importorskip("pytorch_grad_cam")
    targets = pytest.importorskip("pytorch_grad_cam.utils.model_targets")
    net, x = ReluNet(), images(dtype=torch.float32)

    def prepare():
        net.train()
        for p in net.parameters():
            p.grad = torch.ones_like(p)

    prepare()
    with theirs.GradCAM(model=net, target_layers=[net.features]) as cam:
        shown = cam(input_tensor=x, targets=[targets.ClassifierOutputTarget(1)] * 3)
    assert not net.training
    assert any(p.grad is None or not (p.grad == 1).all() for p in net.parameters())

    prepare()
    ours = grad_cam(net, x, 1)
    assert net.training
    assert all((p.grad == 1).all() for p in net.parameters())

    # The same map: theirs is of evaluation mode, and scaled before and after it is resized.
    def scaled(maps):
        maps = maps - maps.amin((2, 3), keepdim=True)
        return maps / (1e-7 + maps.amax((2, 3), keepdim=True))

    ours = scaled(grad_cam(net.eval(), x, 1, relu=True, detach=True))
    ours = scaled(F.interpolate(ours, x.shape[2:], mode="bilinear"))
    torch.testing.assert_close(ours[:, 0], torch.as_tensor(shown), atol=1e-4, rtol=0)


def test_gradients_of_every_class_are_those_of_double_backprop():
    net, x = SmoothNet().double(), images().requires_grad_()
    of = [x, *net.parameters()]
    for ours, expected in (
        (attr.Saliency(net).attribute(x, 1, abs=False), plain(net, x, 1, "logit")),
        (
            attr.InputXGradient(net).attribute(x, [3, 0, 1]),
            x * plain(net, x, TARGETS["tensor"], "logit"),
        ),
        (attr.LayerGradCam(net, "second").attribute(x, 2), plain_grad_cam(net, net.second, x, 2)),
    ):
        torch.testing.assert_close(ours, expected)
        got = torch.autograd.grad(some_loss(ours), of, allow_unused=True)
        wanted = torch.autograd.grad(some_loss(expected), of, allow_unused=True)
        assert_gradients_close(got, wanted)
        assert got[1].abs().sum() > 0
