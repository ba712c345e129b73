"""Chains of convolutions as attacks run them on a CPU; torch's own convolution is the oracle."""

import copy

import pytest
import torch
from accuracy_rule import assert_as_accurate
from torch import nn
from torch.autograd import forward_ad
from torch.func import vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import fastinterp as fi
from fastinterp import _native
from fastinterp._checks import values_unread
from fastinterp.attacks import attacked, maximise, pgd
from fastinterp.discrepancy import discrepancy
from fastinterp.folding import chain as module
from fastinterp.folding.chain import Chain
from fastinterp.maps import CamNetwork, softplus_surrogate
from fastinterp.models import create_model
from fastinterp.models._layers import SameConv2d
from fastinterp.objectives import METHODS


def chain(*layers, classes=3):
    """A network of such layers under global pooling and a head."""
    channels = [layer for layer in layers if isinstance(layer, nn.Conv2d)][-1].out_channels
    head = nn.Linear(channels, classes, bias=channels % 2 == 0)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


# network, image
NETWORKS = {
    "mnist small": (lambda: create_model("small", 1, 10), (1, 28, 28)),
    "cifar small": (lambda: create_model("small", 3, 10), (3, 32, 32)),
    "one": (lambda: chain(nn.Conv2d(3, 5, 3, padding=1)), (3, 6, 5)),
    "no relu between": (lambda: chain(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 6, 2)), (2, 5, 5)),
    "strides": (
        lambda: chain(
            nn.Conv2d(3, 7, (3, 2), stride=(2, 3), padding=(1, 2), bias=False),
            nn.ReLU(inplace=True),
            nn.Conv2d(7, 13, (1, 3), padding=(0, 2)),
        ),
        (3, 9, 11),
    ),
    "dilations": (
        lambda: chain(
            nn.Conv2d(1, 3, 3, stride=(3, 2), dilation=(2, 1), padding=3),
            nn.ReLU(),
            nn.Conv2d(3, 2, 2, dilation=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(2, 4, 3, stride=2, dilation=(1, 3), padding=4),
        ),
        (1, 12, 13),
    ),
    "steps that skip pixels": (
        lambda: chain(nn.Conv2d(2, 4, 1, stride=3), nn.ReLU(), nn.Conv2d(4, 5, 2, stride=2)),
        (2, 13, 14),
    ),
    "same, uneven": (
        lambda: chain(SameConv2d(2, 5, 3, 2), nn.ReLU(), SameConv2d(5, 6, 4)),
        (2, 8, 6),
    ),
}


@pytest.fixture
def calls(monkeypatch):
    """How often the kernel was called."""
    called = []

    class Core:
        def __getattr__(self, name):
            called.append(name)
            return getattr(_native.core, name)

    monkeypatch.setattr(module, "_native", type("native", (), {"core": Core()}))
    return called


def sides(net, x, weights=None):
    """Maps, logits and the gradient of both to x; of the chain, and of the network as written."""
    results = []
    for run in ("chain", "network"):
        z = x.clone().requires_grad_()
        with CamNetwork(net, x).attacked() as attack:
            assert isinstance(attack_of(net, x), Chain)
            maps, _, logits = attack(z) if run == "chain" else (None, None, None)
        if run == "network":
            network = CamNetwork(net, None)
            features, logits = network(z)
            maps = torch.einsum("kc,nchw->nkhw", network.head.weight, features)
        loss = (maps.sin() * weights_like(maps)).sum() + logits.square().sum()
        results.append([maps, logits, *torch.autograd.grad(loss, z)])
    return results


def weights_like(t):
    return torch.linspace(-1, 1, t.numel(), dtype=torch.float64).view(t.shape).to(t.dtype)


def attack_of(net, x):
    with CamNetwork(net, x).form.made() as run:
        return run


@pytest.mark.parametrize("examples", [8, 9, 17, 50])
@pytest.mark.parametrize("name", NETWORKS)
def test_maps_logits_and_gradient_are_those_of_the_network(name, examples, calls):
    make, image = NETWORKS[name]
    net, x = make().double(), torch.rand(examples, *image, dtype=torch.float64)
    ours, plain = sides(net, x)
    convolutions = sum(isinstance(m, nn.Conv2d) for m in net.modules())
    assert len(calls) == 2 * convolutions
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("examples", [16, 31, 50])
@pytest.mark.parametrize("name", NETWORKS)
def test_float32_is_as_accurate_as_torch(name, examples, layout):
    make, image = NETWORKS[name]
    net = make().double()
    x = torch.rand(examples, *image, dtype=torch.float64)
    _, exact = sides(net, x)
    ours, plain = sides(net.float(), x.float().contiguous(memory_format=layout))
    for a, b, e, factor in zip(ours, plain, exact, (2, 2, 3), strict=True):
        assert_as_accurate(a, b, e, factor)


def test_every_value_is_written_and_threads_change_none(monkeypatch, calls):
    """Outputs are NaN before, and the last vector of examples overlaps the one before it."""
    net, x = create_model("small", 1, 10), torch.rand(37, 1, 28, 28)
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda t, *size: new_empty(t, *size).fill_(torch.nan)
    )
    run, threads, found = attack_of(net, x), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            z = x.clone().requires_grad_()
            maps, _ = run(z)
            found.append((maps, *torch.autograd.grad(maps.sin().sum(), z)))
    finally:
        torch.set_num_threads(threads)
    assert len(calls) == 3 * 2 * 3
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    assert not any(t.isnan().any() for t in found[0])


def test_nan_and_zero_go_through_a_relu_as_torch_has_them():
    net = chain(nn.Conv2d(1, 2, 1, bias=False), nn.ReLU(), nn.Conv2d(2, 4, 1, bias=False))
    net = net.double()
    x = torch.rand(9, 1, 2, 2, dtype=torch.float64)
    x[0, 0, 0, 0], x[1] = torch.nan, 0.0
    for a, b in zip(*sides(net, x), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


def test_second_order():
    net = create_model("small", 1, 10).double()
    x = torch.rand(8, 1, 12, 12, dtype=torch.float64)
    found = []
    for run in (attack_of(net, x), lambda z: (None, net.eval()(z))):
        z = x.clone().requires_grad_()
        _, logits = run(z)
        (g,) = torch.autograd.grad(logits.exp().sum(), z, create_graph=True)
        found.append(torch.autograd.grad(g.square().sum(), z)[0])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


def test_hooks_of_the_images_run_once_and_biases_may_move_meanwhile():
    net, x = create_model("small", 1, 10).double(), torch.rand(8, 1, 28, 28).double()
    found = []
    for create_graph in (False, True):
        model = copy.deepcopy(net)
        z = x.clone().requires_grad_()
        z.register_hook(lambda g: 2 * g)
        value = attack_of(model, x)(z)[1].square().sum()
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(0.1)
        found.append(torch.autograd.grad(value, z, create_graph=create_graph)[0])
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-13)
    z = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(net(z).square().sum(), z)
    torch.testing.assert_close(found[0], 2 * expected, rtol=1e-11, atol=1e-13)


def test_what_was_saved_may_come_back_in_another_layout():
    net, x = create_model("small", 1, 10), torch.rand(16, 1, 28, 28)
    run, found = attack_of(net, x), []
    for unpack in (
        lambda t: t,
        lambda t: t.double().transpose(0, -1).contiguous().transpose(0, -1),
    ):
        z = x.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            maps, _ = run(z)
        found.append(torch.autograd.grad(maps.square().sum(), z)[0])
    assert torch.equal(*found)


def test_batched_cotangents():
    net, x = create_model("small", 1, 10).double(), torch.rand(8, 1, 28, 28).double()
    x.requires_grad_()
    logits = attack_of(net, x)(x)[1]
    each = torch.eye(10, dtype=x.dtype)[:, None].expand(10, 8, 10)
    (got,) = torch.autograd.grad(logits, x, each, is_grads_batched=True)
    (expected,) = torch.autograd.grad(net(x), x, each, is_grads_batched=True)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)


def test_maps_may_be_changed_in_place():
    net, x = create_model("small", 1, 10), torch.rand(16, 1, 28, 28, requires_grad=True)
    maps, _ = attack_of(net, x)(x)
    maps.mul_(2)
    torch.autograd.grad(maps.sum(), x)


@pytest.mark.parametrize("size", [3, 7])
def test_a_weight_of_another_size_than_the_module_says(size):
    net = chain(nn.Conv2d(1, 4, 5, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3)).double()
    net[0].weight = nn.Parameter(torch.randn(4, 1, size, size).double())
    x = torch.rand(9, 1, 12, 11, dtype=torch.float64)
    for a, b in zip(*sides(net, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_views_and_repeated_passes():
    """An earlier pass's gradient is its own, whatever ran since."""
    net = create_model("small", 1, 10).double()
    parent = torch.rand(18, 1, 30, 56, dtype=torch.float64)
    x = parent[::2, :, 1:29, ::2]
    run = attack_of(net, x)
    first, second = x.clone().requires_grad_(), (1 - x).requires_grad_()
    a, b = run(first)[1].square().sum(), run(second)[1].square().sum()
    got = torch.autograd.grad(a, first, retain_graph=True)
    again = torch.autograd.grad(a, first)
    expected = torch.autograd.grad(net(first).square().sum(), first)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)
    assert torch.equal(*got, *again)
    torch.testing.assert_close(
        torch.autograd.grad(b, second),
        torch.autograd.grad(net(second).square().sum(), second),
        rtol=1e-11,
        atol=1e-12,
    )


def test_the_kernel_runs_where_it_is_faster(calls):
    x = torch.rand(16, 3, 12, 12)
    wide = chain(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3),),
    )
    attack_of(wide, x)(x)
    assert not calls
    wide[2].stride = (2, 2)
    attack_of(wide, x)(x)
    assert len(calls) == 3


def _few(net, x, run):
    return run(x[:7])[1]


def _autocast(net, x, run):
    with torch.autocast("cpu", torch.bfloat16), attacked(net, x) as logits:
        return logits(x)


def _surrogate(net, x, run):
    with softplus_surrogate(net, 5.0), attacked(net, x) as logits:
        return logits(x)


def _traced(net, x, run):
    return make_fx(lambda z: run(z)[1])(x)(x)


def _vmapped(net, x, run):
    return vmap(lambda z: run(z)[1])(x[None])[0]


def _dual(net, x, run):
    return torch.func.jvp(lambda z: run(z)[1], (x,), (x,))[0]


def _dual_level(net, x, run):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(run(forward_ad.make_dual(x, x))[1])[0]


def _beside_a_transform(net, x, run):
    return vmap(lambda t: run(x)[1] * t)(torch.ones(1))[0]


def _jit(net, x, run):
    return torch.jit.trace(lambda z: run(z)[1], x, check_trace=False)(x)


def _functions_seen(net, x, run):
    return run(x.as_subclass(Seen))[1].as_subclass(torch.Tensor)


class Seen(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "how",
    [
        *(_few, _autocast, _surrogate, _traced, _vmapped, _dual, _dual_level),
        *(_beside_a_transform, _jit, _functions_seen),
    ],
)
def test_where_the_kernel_does_not_do_the_network_runs(how, calls):
    net, x = create_model("small", 1, 10).eval(), torch.rand(16, 1, 28, 28)
    run = attack_of(net, x)
    got = how(net, x, run)
    assert not calls
    tolerance = 0.05 if how is _autocast else 1e-5
    if how is not _surrogate:
        torch.testing.assert_close(got.float(), net(x)[: len(got)], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_backend_asked_for_is_heeded(backend, calls, monkeypatch):
    monkeypatch.setenv("FASTINTERP_BACKEND", backend)
    net, x = create_model("small", 1, 10), torch.rand(16, 1, 28, 28)
    attack_of(net, x)(x)
    assert not calls


@pytest.mark.parametrize(
    "net",
    [
        create_model("wresnet", 1, 10),
        create_model("pool", 1, 10),
        chain(nn.Conv2d(1, 4, 3, groups=1), nn.Tanh(), nn.Conv2d(4, 6, 3)),
        chain(nn.Conv2d(1, 4, 3, padding=1, padding_mode="reflect"), nn.Conv2d(4, 6, 3)),
        chain(nn.Conv2d(1, 4, 3, padding="same"), nn.Conv2d(4, 6, 3)),
        chain(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 6, 3)),
    ],
    ids=["wresnet", "pool", "tanh", "reflect", "words", "groups"],
)
def test_what_is_no_chain_is_none(net):
    assert not isinstance(attack_of(net, torch.rand(2, 1, 16, 16)), Chain)


def test_an_attack_ends_where_it_did(calls, monkeypatch):
    net = create_model("small", 1, 10).double()
    x, y = torch.rand(9, 1, 28, 28, dtype=torch.float64), torch.arange(9)
    how = dict(eps=0.2, step_size=0.05, steps=5)
    found = pgd(net, x, y, **how)
    assert "cpu_map_objective" in calls
    calls.clear()
    monkeypatch.setenv("FASTINTERP_BACKEND", "reference")
    torch.testing.assert_close(found, pgd(net, x, y, **how))
    reg = fi.InterpretationRegularizer("cam", **how)
    start = 0.1 * torch.rand_like(x)
    values = []
    for backend in ("reference", "auto"):
        assert "cpu_map_objective" not in calls
        monkeypatch.setenv("FASTINTERP_BACKEND", backend)
        values.append(reg(copy.deepcopy(net), x, y, start=start))
    assert "cpu_map_objective" in calls
    torch.testing.assert_close(*values)


RAISED = dict(
    discrepancy=dict(ce_weight=0.0, discrepancy_weight=1.0),
    ce=dict(ce_weight=1.0),
    both=dict(ce_weight=1.0, discrepancy_weight=0.01),
)


def ascended(net, x, y, clean, what="discrepancy", **how):
    """x' as the kernels make it, and as maximise does."""
    how = dict(eps=0.2, step_size=0.03, steps=4, clip=(0.0, 1.0), start=None) | how
    network, weights = CamNetwork(net, x), RAISED[what]
    compared = None if what == "ce" else clean
    with network.attacked() as run:
        ours = run.ascend(x, y=y, clean=compared, **weights, **how)

        def raised(z):
            maps, head, logits = run(z)
            value = 0.0
            if weights["ce_weight"]:
                value = F.cross_entropy(logits, y, reduction="none")
            if compared is not None:
                distance = discrepancy(clean, maps, head, logits, y)
                value = value + weights["discrepancy_weight"] * distance
            return value

        return ours, maximise(raised, x, **how)


@pytest.mark.parametrize(
    "how",
    [
        {},
        dict(clip=None, eps=0.05),
        dict(clip=(0.2, 0.7), step_size=torch.tensor(0.01), eps=torch.tensor(0.1)),
    ],
    ids=["clip", "no clip", "tensors"],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["mnist small", "strides", "same, uneven"])
@pytest.mark.parametrize("what", RAISED)
def test_ascent(what, name, dtype, how, calls):
    torch.manual_seed(3)
    make, image = NETWORKS[name]
    net, x = make().to(dtype), torch.rand(17, *image).to(dtype)
    how |= dict(start=0.2 * torch.rand_like(x) - 0.1)
    y = torch.arange(17) % net[-1].out_features if name != "mnist small" else torch.arange(17) % 10
    clean = CamNetwork(net, x).attacked_features(CamNetwork(net, None)(x)[0])
    ours, plain = ascended(net, x, y, clean, what, **how)
    assert "cpu_map_objective" in calls and not ours.requires_grad
    # Where a gradient is zero but for rounding its sign may turn, in few places.
    off = (ours - plain).abs() > (1e-12 if dtype == torch.float64 else 1e-5)
    assert off.double().mean() < (1e-9 if dtype == torch.float64 else 0.01)
    assert (ours - x).abs().max() > 0.01


def test_at_no_distance_there_is_no_slope():
    """Without a start the maps are the clean ones: nothing moves."""
    net, x = create_model("small", 1, 10).double(), torch.rand(9, 1, 28, 28, dtype=torch.float64)
    with torch.no_grad():
        clean = attack_of(net, x)(x)[0]
    ours, plain = ascended(net, x, torch.arange(9), clean)
    assert torch.equal(ours, x) and torch.equal(plain, x)


def test_a_label_of_no_class_reads_nothing():
    net, x = create_model("small", 1, 10).double(), torch.rand(16, 1, 28, 28, dtype=torch.float64)
    clean = torch.zeros(16, 10, 7, 7, dtype=torch.float64)
    with values_unread():  # or it is refused
        ours, plain = ascended(net, x, torch.tensor([-1, 10] * 8), clean)
    torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("ahead", [-300.0, -60.0, -5.0, 5.0, 60.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_ascent_on_the_cross_entropy_of_a_network_that_is_sure(dtype, ahead):
    """Where p rounds to 1 as torch does it: the class's own logit has no slope any more."""
    net = chain(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 12, 3), classes=10).to(dtype)
    with torch.no_grad():
        net[-1].bias[3] += ahead
    x, y = torch.rand(17, 1, 9, 8).to(dtype), torch.full((17,), 3)
    ours, plain = ascended(net, x, y, None, "ce")
    off = (ours - plain).abs() > 1e-5
    assert off.double().mean() < 0.01 and (ours - x).abs().max() > 0.01


def test_one_class_leaves_nothing_to_raise():
    net = chain(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), classes=1).double()
    x, y = torch.rand(9, 1, 8, 8, dtype=torch.float64), torch.zeros(9).long()
    for z in ascended(net, x, y, None, "ce"):
        assert torch.equal(z, x)


@pytest.mark.parametrize(
    ("change", "kernels"),
    [
        ({}, True),
        (dict(restarts=2), False),
        (dict(norm="L2"), False),
        (dict(classes="one"), False),
        (dict(map_norm="l2"), False),
        (dict(inner="ce+discrepancy"), True),
        (dict(inner="ce"), True),
        (dict(inner="ce", norm="L2"), False),
        (dict(inner="ce", map="input_gradient"), True),
        (dict(inner="ce", attack_target=torch.ones(16).long()), False),
        (dict(eps=torch.full((16,), 0.2)), False),
        (dict(y=torch.zeros(16, dtype=torch.int32)), False),
    ],
)
def test_which_regularizers_are_maximised_in_the_kernels(change, kernels, calls):
    net, x = create_model("small", 1, 10), torch.rand(16, 1, 28, 28)
    change = dict(change)
    eps, y = change.pop("eps", 0.2), change.pop("y", torch.zeros(16).long())
    target = change.pop("attack_target", None)
    change = dict(map="cam") | change
    reg = fi.InterpretationRegularizer(eps=0.1, step_size=0.05, steps=2, **change)
    try:
        start = 0.1 * torch.rand_like(x)
        reg(net, x, y, eps=eps, start=start, validate=False, attack_target=target)
    except (RuntimeError, TypeError):
        assert y.dtype == torch.int32
    assert ("cpu_map_objective" in calls) is kernels


@pytest.mark.parametrize("method", ["adv", "int", "int-adv", "int2", "int2-adv"])
def test_objectives_are_maximised_in_the_kernels(method, calls, monkeypatch):
    net, x = create_model("small", 1, 10).double(), torch.rand(9, 1, 28, 28, dtype=torch.float64)
    y, start = torch.arange(9), 0.1 * torch.rand_like(x)
    losses = []
    for backend in ("reference", "auto"):
        assert "cpu_map_objective" not in calls
        monkeypatch.setenv("FASTINTERP_BACKEND", backend)
        objective = METHODS[method](copy.deepcopy(net), step_size=0.05, steps=4, gamma=0.1)
        losses.append(objective(x, y, 0.2, start)[0])
    assert calls.count("cpu_map_objective") == 1  # looked up once, called at every step
    torch.testing.assert_close(*losses, rtol=1e-9, atol=1e-9)


def test_adv_ignores_the_labels_that_its_cross_entropy_ignores(calls, monkeypatch):
    net, x = create_model("small", 1, 10).double(), torch.rand(9, 1, 28, 28, dtype=torch.float64)
    y = torch.arange(9)
    y[3] = -100
    losses = []
    for backend in ("reference", "auto"):
        monkeypatch.setenv("FASTINTERP_BACKEND", backend)
        objective = METHODS["adv"](net, step_size=0.05, steps=4)
        losses.append(objective(x, y, 0.2, torch.zeros_like(x))[0])
    assert "cpu_map_objective" in calls
    torch.testing.assert_close(*losses, rtol=1e-9, atol=1e-9)


def test_the_images_keep_their_layout(calls, monkeypatch):
    net, y = create_model("small", 3, 10), torch.zeros(16).long()
    x = torch.rand(16, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    strides = []
    for backend in ("reference", "auto"):
        monkeypatch.setenv("FASTINTERP_BACKEND", backend)
        strides.append(pgd(net, x, y, eps=0.1, step_size=0.05, steps=2).stride())
    assert "cpu_map_objective" in calls and strides[0] == strides[1]


def test_a_method_of_the_model_is_not_taken_for_ours():
    class Branches(nn.Module):  # which torch.fx cannot trace
        def __init__(self):
            super().__init__()
            self.net = create_model("small", 1, 10)

        def ascend(self, *args, **kwargs):
            raise AssertionError

        def forward(self, x):
            return self.net(x) if x.sum() > 0 else self.net(-x)

    x = torch.rand(16, 1, 28, 28)
    assert pgd(Branches(), x, torch.zeros(16).long(), eps=0.1, step_size=0.1, steps=1).ne(x).any()


@pytest.mark.parametrize(
    ("change", "kernels"),
    [
        ({}, True),
        (dict(random_start=True), True),
        (dict(loss="margin"), False),
        (dict(norm="L2"), False),
        (dict(final_step_size=0.01), False),
        (dict(target=torch.ones(16).long()), False),
        (dict(restarts=2), False),
        (dict(best=True), False),
        (dict(early_stop=True), False),
    ],
)
def test_which_pgd_is_done_in_the_kernels(change, kernels, calls):
    net, x = create_model("small", 1, 10), torch.rand(16, 1, 28, 28)
    pgd(net, x, torch.zeros(16).long(), eps=0.1, step_size=0.05, steps=2, **change)
    assert ("cpu_map_objective" in calls) is kernels


def test_a_start_that_is_not_like_the_images_is_left_to_torch(calls):
    net, x = create_model("small", 1, 10), torch.rand(16, 1, 28, 28)
    y, how = torch.zeros(16).long(), dict(eps=0.1, step_size=0.05, steps=2, clip=None)
    with CamNetwork(net, x).attacked() as run:
        clean = run(x)[0].detach()
        calls.clear()
        for start in (x.double(), x.expand(16, 3, 28, 28), x[:1]):
            assert run.ascend(x, y=y, clean=clean, start=start, **how) is None
        for other in (clean.double(), clean[:, :9], clean[:8]):
            assert run.ascend(x, y=y, clean=other, start=None, **how) is None
        assert not calls
        start = 0.1 * x.requires_grad_()
        assert not run.ascend(x, y=y, clean=clean, start=start, **how).requires_grad


def test_labels_are_checked_before_the_kernels_see_them():
    net, x = create_model("small", 1, 10), torch.rand(16, 1, 28, 28)
    reg = fi.InterpretationRegularizer("cam", eps=0.1, step_size=0.05, steps=2)
    with pytest.raises(ValueError, match="y"):
        reg(net, x, torch.full((16,), 10))
