"""Whatever borrows a model gives it back as it was, also when the model raises in the middle.

Add a function here by an entry in BORROWERS or LOSSES: name -> function(model, x, y).
"""

import contextlib

import pytest
import torch
from map_networks import images
from torch import nn

import fastinterp as fi
from fastinterp import attr, maps, regularizers


def _surrogate(model, x, y):
    with maps.softplus_surrogate(model):
        return model(x)


BORROWERS = {
    **{
        f"{function.__name__}, {how}": lambda model, x, y, f=function, o=options: f(
            model, x, o.get("target", y), detach=o.get("detach", False)
        )
        for function in (
            *(maps.cam, maps.grad_cam, maps.grad_cam_plus_plus, maps.input_gradient),
            *(maps.gradient_x_input, maps.integrated_gradients),
        )
        for how, options in {
            "true class": {},
            "every class": dict(target=None),
            "constant": dict(detach=True),
        }.items()
    },
    "integrated_gradients, delta": lambda model, x, y: maps.integrated_gradients(
        model, x, y, steps=3, internal_batch_size=4, return_delta=True
    ),
    "smooth_grad": lambda model, x, y: maps.smooth_grad(
        model, x, y, samples=2, generator=torch.Generator()
    ),
    "expected_gradients": lambda model, x, y: maps.expected_gradients(
        model, x, y, baselines=x.detach() / 2, generator=torch.Generator()
    ),
    "explained_layer": lambda model, x, y: maps.explained_layer(model, x),
    "CamNetwork": lambda model, x, y: maps.CamNetwork(model, x),
    "attr.IntegratedGradients": lambda model, x, y: attr.IntegratedGradients(model).attribute(
        x, target=y, n_steps=3
    ),
    "attr.Saliency": lambda model, x, y: attr.Saliency(model).attribute(x, y),
    "attr.InputXGradient": lambda model, x, y: attr.InputXGradient(model).attribute(x, y),
    "attr.LayerGradCam": lambda model, x, y: attr.LayerGradCam(model, "body.0").attribute(x, y),
}
ATTACK = dict(eps=0.1, step_size=0.05, steps=2)


def _regularizer(map, **options):
    def call(model, x, y):
        reg = fi.InterpretationRegularizer(map, **ATTACK, **options)
        return reg(model, x, y, start=torch.full_like(x, 0.05))

    return call


def _neighbour(name, noisy=False, **options):
    def call(model, x, y):
        more = {k: v(x) if callable(v) else v for k, v in options.items()}
        if noisy:
            more["generator"] = torch.Generator()
        return getattr(regularizers, name)(model, x, y, **more)

    return call


# The model's own dropout draws in these as in any training step.
LOSSES = {
    "InterpretationRegularizer, cam": _regularizer("cam"),
    "InterpretationRegularizer, grad_cam": _regularizer("grad_cam", classes="two"),
    "InterpretationRegularizer, input_gradient": _regularizer("input_gradient", softplus_beta=5.0),
    "pgd": lambda model, x, y: fi.attacks.pgd(model, x, y, **ATTACK),
    "unforeseen": lambda model, x, y: fi.attacks.unforeseen(model, x, y, "gabor", eps=9.0, steps=2),
    **{
        case[0]: _neighbour(case[0], *case[1:-1], **case[-1])
        for case in (
            ("input_gradient_norm", {}),
            ("jacobian_norm", True, {}),
            ("right_for_right_reasons", dict(mask=torch.ones_like)),
            ("finite_difference_gradient_norm", dict(kinks="ignore")),
            ("grad_align", True, dict(eps=0.1)),
            ("local_gradient_alignment", True, dict(eps=0.1)),
            ("integrated_gradients_alignment", dict(x_adv=lambda x: x.detach() / 2, steps=2)),
            ("cure", {}),
            ("local_linearity", True, ATTACK),
            ("expected_gradients_prior", True, dict(baselines=lambda x: x.detach() / 2)),
            ("saliency_guided", True, {}),
        )
    },
}
# These call the model as its owner would, statistics, random numbers and all.
CALLS_THE_MODEL = {"softplus_surrogate": _surrogate}


class Fragile(nn.Module):
    """Passes on what it gets and raises at a chosen call."""

    def __init__(self):
        super().__init__()
        self.calls_left = -1

    def forward(self, x):
        self.calls_left -= 1
        if self.calls_left == -1:
            raise MemoryError("in the middle of the model")
        return x


class Net(nn.Module):
    """Holds something of each kind that a borrower might change."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(2, 6, 3),
            nn.BatchNorm2d(6),
            nn.ReLU(inplace=True),
            nn.Dropout(0.3),
            nn.utils.parametrizations.spectral_norm(nn.Conv2d(6, 8, 3)),
            nn.BatchNorm2d(8, momentum=None),
        )
        self.fragile = Fragile()
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.fragile(self.pool(self.body(x))).flatten(1))


def build(fused):
    net = Net()
    net.body[1].eval()
    net.body[0].weight.requires_grad_(False)
    net.head.weight.grad = torch.ones_like(net.head.weight)
    net.body[5].register_forward_hook(lambda *_: None)
    net.head.register_full_backward_hook(lambda *_: None)
    net.body[5].weight.register_hook(lambda g: g)
    return fi.fuse(net) if fused else net


def snapshot(net, x):
    modules = dict(net.named_modules())
    tensors = {**dict(net.named_parameters()), **dict(net.named_buffers()), "x": x}
    hooks = [k for k in nn.Module().__dict__ if "hook" in k]
    return {
        "flags": {name: m.training for name, m in modules.items()},
        "classes": {name: type(m) for name, m in modules.items()},
        "own attributes": {name: {k: id(v) for k, v in m.__dict__.items() if k != "calls_left"}
                           for name, m in modules.items()},
        "tensors": {name: (id(t), t.clone(), t._version) for name, t in tensors.items()},
        "requires_grad": {name: t.requires_grad for name, t in tensors.items()},
        "grad": {
            name: (id(t.grad), None if t.grad is None else t.grad.clone())
            for name, t in tensors.items()
        },
        "tensor hooks": {name: len(t._backward_hooks or ()) for name, t in tensors.items()},
        "hooks": {
            name: {k: list(v.items()) for k in hooks if isinstance(v := m.__dict__[k], dict)}
            for name, m in modules.items()
        },
        "random numbers": torch.get_rng_state(),
        "global": (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.is_autocast_enabled("cpu"),
        ),
    }  # fmt: skip


def assert_same(before, after, path=""):
    if isinstance(before, torch.Tensor):
        assert torch.equal(before, after), path
    elif isinstance(before, dict):
        assert before.keys() == after.keys(), path
        for key in before:
            assert_same(before[key], after[key], f"{path} {key}")
    elif isinstance(before, (tuple, list)):
        assert len(before) == len(after), path
        for a, b in zip(before, after, strict=True):
            assert_same(a, b, path)
    else:
        assert before == after, path


@pytest.mark.parametrize("fails_at", [None, 0, 1], ids=["", "raises", "raises later"])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("name", [*BORROWERS, *LOSSES])
def test_a_borrowed_model_comes_back_as_it_was(name, fused, fails_at):
    borrow = {**BORROWERS, **LOSSES}[name]
    net, x = build(fused), images(dtype=torch.float32).requires_grad_()
    y = torch.tensor([0, 1, 3])
    before = snapshot(net, x)
    if fails_at is None:
        borrow(net, x, y)
    else:
        net.fragile.calls_left = fails_at
        # Not everybody calls the model twice.
        with pytest.raises(MemoryError) if fails_at == 0 else contextlib.suppress(MemoryError):
            borrow(net, x, y)
    after = snapshot(net, x)
    if name in LOSSES:
        del before["random numbers"], after["random numbers"]
    assert_same(before, after)


@pytest.mark.parametrize("borrow", CALLS_THE_MODEL.values(), ids=CALLS_THE_MODEL.keys())
def test_the_context_goes_with_the_call(borrow):
    net, x = build(False).eval(), images(dtype=torch.float32).requires_grad_()
    for fails_at in (-1, 0):
        before = snapshot(net, x)
        net.fragile.calls_left = fails_at
        with contextlib.suppress(MemoryError):
            borrow(net, x, None)
        assert_same(before, snapshot(net, x))


def test_the_snapshot_sees_changes():
    x = images(dtype=torch.float32)

    def change(net):
        yield lambda: net.body[0].eval()
        yield lambda: net.head.bias.requires_grad_(False)
        yield lambda: net.head.weight.grad.add_(1)
        yield lambda: setattr(net.head.weight, "grad", net.head.weight.grad.clone())
        yield lambda: net.body[1].running_mean.add_(1)
        yield lambda: net.body[1].register_buffer("running_var", net.body[1].running_var.clone())
        yield lambda: net.head.register_forward_hook(lambda *_: None)
        yield lambda: net.head.weight.register_hook(lambda g: g)
        yield lambda: setattr(net, "forward", lambda x: x)
        yield lambda: torch.rand(1)
        yield lambda: fi.unfuse(net)

    for i in range(len(list(change(build(True))))):
        net = build(True)
        before = snapshot(net, x)
        list(change(net))[i]()
        with pytest.raises(AssertionError):
            assert_same(before, snapshot(net, x))
