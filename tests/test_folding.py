"""The form that attacks run: equal to the network as written, which is the oracle."""

import copy
import functools
import gc
import types
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastinterp as fi
from fastinterp.attacks import attacked, pgd
from fastinterp.folding import AttackForm, find_attack_form
from fastinterp.fusion.tracing import NotTraceable
from fastinterp.maps import CamNetwork, UnsupportedModelError, cam
from fastinterp.models import create_model
from fastinterp.objectives import METHODS

EXACT = dict(rtol=1e-12, atol=1e-12)


def with_statistics(net):
    """As after some training: no batch norm is the identity."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    return net.double()


class NormedTail(nn.Module):
    """Pre-activation blocks whose last sum of three is pooled; a head with a bias."""

    def __init__(self, in_place=False):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.a = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.b = nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Dropout())
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 4)
        self.in_place = in_place

    def forward(self, x):
        x = self.stem(x)
        y = self.a(x)
        if self.in_place:
            y += self.b(x)
        else:
            y = y + self.b(x)
        return self.fc(torch.flatten(self.pool(y + x), 1))


NETWORKS = {
    "small": (lambda: create_model("small", 3, 10), ("conv2",), 0),
    "pool": (lambda: create_model("pool", 3, 10), (), 0),
    "wresnet": (lambda: create_model("wresnet", 3, 10), ("conv30",), 0),
    "resnet18-cifar": (lambda: create_model("resnet18-cifar", 3, 10), (), 20),
    "normed tail": (NormedTail, ("a.0", "b.1"), 2),
    "in place": (lambda: NormedTail(True), ("a.0", "b.1"), 2),
}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_logits_maps_and_gradients_are_those_of_the_network(name, fused):
    make, tails, norms = NETWORKS[name]
    net = with_statistics(make())
    if fused:
        fi.fuse(net)
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    network = CamNetwork(net, x)
    assert network.form.tails == tails and network.form.batch_norms == norms
    with network.attacked() as run:
        features, head, logits = run(x)
        maps = features if head is None else torch.einsum("kc,nchw->nkhw", head, features)
        (gradient,) = torch.autograd.grad(maps.square().sum() + logits.sin().sum(), x)
    assert (head is None) == bool(tails) and net.training
    net.eval()
    expected, plain_logits = cam(net, x, return_logits=True)
    (plain,) = torch.autograd.grad(expected.square().sum() + plain_logits.sin().sum(), x)
    torch.testing.assert_close(logits, plain_logits, **EXACT)
    torch.testing.assert_close(maps, expected, **EXACT)
    torch.testing.assert_close(gradient, plain, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("name", "method", "how"),
    [
        *((name, "int", {}) for name in ("small", "wresnet", "normed tail")),
        *(("normed tail", m, {}) for m in ("adv", "trades", "int-adv", "ig-norm")),
        ("normed tail", "int", {"softplus_beta": 5.0}),
        ("normed tail", "int", {"map": "integrated_gradients", "softplus_beta": 5.0}),
        ("normed tail", "int", {"map": "grad_cam"}),
        ("resnet18-cifar", "int", {}),
    ],
)
def test_training_step_is_that_without_folding(name, method, how, fused, monkeypatch):
    net = with_statistics(NETWORKS[name][0]())
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if fused:
        fi.fuse(net)
    x, start = torch.rand(2, 2, 3, 12, 12, dtype=torch.float64).unbind()
    y = torch.tensor([1, 3])
    sides = []
    for fold in ("on", "off"):
        monkeypatch.setenv("FASTINTERP_FOLD", fold)
        model = copy.deepcopy(net)
        objective = METHODS[method](model, step_size=0.02, steps=2, gamma=0.1, **how)
        loss, _ = objective(x, y, 0.05, 0.1 * start - 0.05)
        loss.backward()
        sides.append([loss, *(p.grad for p in model.parameters()), *model.buffers()])
    torch.testing.assert_close(*sides, rtol=1e-9, atol=1e-9)


def test_it_follows_the_weights_and_the_statistics():
    net = with_statistics(NormedTail())
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    form = CamNetwork(net, x).form
    for _ in range(2):
        with torch.no_grad():
            net(x + torch.randn(()))
            net.stem.weight.mul_(1.5)
            net.fc.bias.add_(1)
        with attacked(net, x) as model:
            logits = model(x)
        torch.testing.assert_close(logits, copy.deepcopy(net).eval()(x), **EXACT)
    assert CamNetwork(net, x).form is form


class Switched(nn.Module):
    """Its forward depends on attributes of several kinds."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, c, 3, padding=1) for c in (3, 6))
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(6, 4)
        self.flag, self.order, self.act = False, {"first": [0, 0, 1]}, F.relu
        self.extra = nn.Conv2d(3, 3, 3, padding=1)
        self.active, self.settings = self.extra, types.SimpleNamespace(factor=1.0)
        self.one, self.two = nn.Parameter(torch.ones(())), nn.Parameter(torch.full((), 2.0))
        self.shift = self.one
        self.double()

    def forward(self, x):
        x = self.active(x.to(self.one.dtype))
        for i in self.order["first"]:
            x = self.act(self.convs[i](x)) + self.shift
        return self.fc(self.pool(self.settings.factor * (-x if self.flag else x)).flatten(1))


def negated(self, x):
    return self.fc(self.pool(self.convs[1](-x)).flatten(1))


def of_another_class(net):
    net.__class__ = type("Another", (Switched,), {"forward": negated})


CHANGES = {
    "a flag": lambda net: setattr(net, "flag", True),
    "a function": lambda net: setattr(net, "act", F.silu),
    "a list in a dictionary": lambda net: net.order["first"].pop(0),
    "a parameter": lambda net: setattr(net.convs[1], "bias", None),
    "a tuple of a child": lambda net: setattr(net.convs[1], "dilation", (2, 2)),
    "a hook": lambda net: net.convs[1].register_forward_hook(lambda *args: 2 * args[2]),
    "a child": lambda net: net.convs.__setitem__(0, nn.Sequential(net.convs[0], nn.Tanh())),
    "fused": fi.fuse,
    "which child": lambda net: setattr(net, "active", copy.deepcopy(net.active)),
    "which of its children": lambda net: setattr(net, "active", net.convs[0]),
    "which parameter": lambda net: setattr(net, "shift", net.two),
    "an attribute of an object": lambda net: setattr(net.settings, "factor", 3.0),
    "a class": of_another_class,
    "a type": lambda net: net.float(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_it_is_made_again_when_the_network_has_changed(change):
    net, x = Switched(), torch.rand(2, 3, 8, 8, dtype=torch.float64)
    for do in (lambda net: None, change):
        do(net)
        x = x.to(net.fc.weight.dtype)
        how = EXACT if x.dtype == torch.float64 else {}
        with attacked(net, x) as model:
            torch.testing.assert_close(model(x), net(x), **how)
        form = find_attack_form(net)  # its head is left as it is
        assert (form is None) == (do is CHANGES["a hook"])
        if form is not None:
            with form.made() as run:
                torch.testing.assert_close(run(x)[1], net(x), **how)


def test_it_is_made_again_when_a_class_or_a_function_is_another_at_the_same_place(monkeypatch):
    net, x = Switched(), torch.rand(2, 3, 8, 8, dtype=torch.float64)
    for i in range(8):
        # The new one often has the address of the one before.
        net.act = None
        net.act = functools.partial(torch.mul, other=float(i))
        with attacked(net, x) as model:
            torch.testing.assert_close(model(x), net(x), **EXACT)
    monkeypatch.setattr(Switched, "forward", negated)
    with attacked(net, x) as model:
        torch.testing.assert_close(model(x), net(x), **EXACT)


class NoCam(nn.Module):
    """Something stands between its pooling and its head; counts its passes."""

    def __init__(self):
        super().__init__()
        self.conv, self.pool, self.fc = nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Linear(6, 4)
        self.double()

    def forward(self, x):
        PASSES.append(len(x))
        return self.fc(F.relu(self.pool(self.conv(x)) - 0.1).flatten(1))


PASSES = []


def test_no_images_say_nothing_and_a_refusal_is_remembered():
    net, x = NoCam(), torch.rand(2, 3, 8, 8, dtype=torch.float64)
    assert CamNetwork(net, x[:0]).form is None
    for passes in (1, 0):
        PASSES.clear()
        with pytest.raises(UnsupportedModelError, match="something else stands between"):
            CamNetwork(net, x)
        assert len(PASSES) == passes
    with attacked(net, x) as model:
        torch.testing.assert_close(model(x), net(x), **EXACT)


def test_it_keeps_no_parameters():
    net, x = Switched(), torch.rand(2, 3, 8, 8, dtype=torch.float64)
    form = CamNetwork(net, x).form
    with form.made() as run:
        weights = [weakref.ref(p) for p in run.parameters() if p.dim() == 4]
        run(x)
    del run
    gc.collect()
    assert weights and not any(weight() is not None for weight in weights)


def test_it_does_not_keep_a_network_alive():
    net, x = Switched(), torch.rand(2, 3, 8, 8, dtype=torch.float64)
    with attacked(net, x) as model:
        model(x)
    with find_attack_form(net).made() as model:
        model(x)
    gone = [weakref.ref(each) for each in (net, net.fc, net.fc.weight, net.convs[1].weight)]
    del net, model
    gc.collect()
    assert not any(each() is not None for each in gone)


def test_attacks_within_one_another_have_parameters_of_their_own():
    net, x = Switched(), torch.rand(2, 3, 8, 8, dtype=torch.float64)
    with attacked(net, x) as outer:
        before = outer(x)
        with torch.no_grad():
            net.convs[0].weight.mul_(2)
        with attacked(net, x) as inner:
            torch.testing.assert_close(inner(x), net(x), **EXACT)
        assert torch.equal(outer(x), before)


def test_a_network_without_cam_is_folded_too(monkeypatch):
    net = with_statistics(
        nn.Sequential(
            *(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.LazyLinear(5, dtype=torch.float64)),
        )
    )
    x, y = torch.rand(2, 3, 12, 12, dtype=torch.float64), torch.tensor([0, 4])
    net(x)
    assert find_attack_form(net).batch_norms == 1
    how = dict(eps=0.1, step_size=0.02, steps=4)
    folded = pgd(net, x, y, **how)
    monkeypatch.setenv("FASTINTERP_FOLD", "off")
    torch.testing.assert_close(folded, pgd(net, x, y, **how), **EXACT)


class Written(nn.Module):
    """Two convolutions, and what stands between them and the pooling."""

    def __init__(self, tail):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(3, 6, 3)
        self.pool, self.fc, self.tail = nn.AdaptiveAvgPool2d(1), nn.Linear(6, 4), tail

    def forward(self, x):
        return self.fc(self.pool(self.tail(self, x)).flatten(1))


def _used_later(net, x):
    a = net.a(x)
    kept = a * 1
    a += net.b(x)
    return a + kept.relu() + a


def _broadcast(net, x):
    return net.a(x) + net.b(x).mean((2, 3), keepdim=True)


def _decides(net, x):
    return net.a(x) if x.sum() > 0 else net.b(x)


@pytest.mark.parametrize(
    ("tail", "tails"),
    [
        (lambda net, x: net.a(x) + net.b(x), ("a", "b")),
        (lambda net, x: net.a(x).add(net.b(x)), ("a", "b")),
        (lambda net, x: net.a(x).relu_() + net.b(x), ("b",)),
        (lambda net, x: torch.add(net.a(x), net.b(x), alpha=2), ()),
        (lambda net, x: F.relu(net.a(x) + net.b(x)), ()),
        (lambda net, x: net.a(x) * net.b(x), ()),
        (_used_later, ()),
        (_broadcast, ()),
        (_decides, None),
    ],
)
def test_only_what_is_linear_is_folded(tail, tails):
    net, x = Written(tail).double(), torch.rand(2, 3, 8, 8, dtype=torch.float64)
    network = CamNetwork(net, x)
    assert (network.form and network.form.tails) == tails
    with network.attacked() as run:
        _, _, logits = run(x)
    torch.testing.assert_close(logits, net(x), **EXACT)


@pytest.mark.parametrize("where", ["before", "after"])
def test_a_network_with_hooks_runs_as_it_is(where, batch):
    net, calls = create_model("small", 1, 10), []
    network = CamNetwork(net, batch[0])
    net.conv1.register_forward_hook(lambda *_: calls.append(1))
    if where == "before":
        network = CamNetwork(net, batch[0])
        calls.clear()
    with network.attacked() as run:
        features, head, _ = run(batch[0])
    assert calls == [1] and head is not None and features.shape[1] == 100


def test_autocast_casts_weights_once_to_the_same_values(batch, monkeypatch):
    net, x = create_model("pool", 1, 10), batch[0]
    network, logits = CamNetwork(net, x), []
    with torch.autocast("cpu", torch.bfloat16):
        for fold in ("on", "off"):
            monkeypatch.setenv("FASTINTERP_FOLD", fold)
            with network.attacked() as run:
                logits.append(run(x)[2])
    assert logits[0].dtype == torch.bfloat16
    assert torch.equal(*logits)


def test_nothing_of_the_model_is_touched():
    net = with_statistics(NormedTail())
    before = {
        name: (t, t.clone(), t._version) for name, t in net.state_dict(keep_vars=True).items()
    }
    form = AttackForm(net)
    with pytest.raises(KeyError), form.made():
        assert all(module.training for module in net.modules())
        raise KeyError
    for name, tensor in net.state_dict(keep_vars=True).items():
        same, value, version = before[name]
        assert tensor is same and tensor._version == version and torch.equal(tensor, value)


def test_what_cannot_be_traced_says_why(monkeypatch):
    net = create_model("small", 1, 10)
    torch.nn.utils.parametrizations.weight_norm(net.conv0)
    with pytest.raises(NotTraceable, match="parametrized"):
        AttackForm(net)
    monkeypatch.setenv("FASTINTERP_FOLD", "yes")
    with pytest.raises(ValueError, match="FASTINTERP_FOLD must be on or off, got 'yes'"):
        find_attack_form(net)


class Tail(nn.Module):
    """Two convolutions under a head; the last may be called twice or have something behind it."""

    def __init__(self, twice=False, behind=None):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(6, 4)
        self.twice, self.behind = twice, behind or nn.Identity()

    def forward(self, x):
        x = self.a(x).relu()
        x = self.b(self.b(x)) if self.twice else self.b(x)
        return self.fc(self.pool(self.behind(x)).flatten(1))


def widths_of(monkeypatch):
    """Output channels of every convolution from now on."""
    widths, conv2d = [], F.conv2d

    def counted(x, weight, *rest):
        widths.append(len(weight))
        return conv2d(x, weight, *rest)

    monkeypatch.setattr(F, "conv2d", counted)
    return widths


@pytest.mark.parametrize("last", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("frozen", [(), ("fc.weight",), ("b.weight", "a.bias")])
def test_the_passes_that_are_differentiated_have_the_head_in_the_last_convolution(
    frozen, last, monkeypatch
):
    net = Tail().eval().double().to(memory_format=last)
    for name in frozen:
        net.get_parameter(name).requires_grad_(False)
    x, y = torch.rand(2, 3, 6, 5, dtype=torch.float64), torch.tensor([0, 3])
    reg = fi.InterpretationRegularizer("cam", eps=0.1, step_size=0.05, steps=2)
    start, sides = 0.1 * torch.rand_like(x) - 0.05, []
    weights = [p.clone() for p in net.parameters()]
    for fold in ("on", "off"):
        monkeypatch.setenv("FASTINTERP_FOLD", fold)
        with monkeypatch.context() as patch:
            widths = widths_of(patch)
            value, aux = reg(net, x, y, start=start, return_aux=True)
        # two steps of the attack, then x and x'
        assert widths.count(4) == (4 if fold == "on" else 0)
        loss = value + F.cross_entropy(aux.logits, y) + aux.maps.square().sum()
        net.zero_grad()
        loss.backward()
        sides.append([loss, *aux, *(p.grad for p in net.parameters() if p.requires_grad)])
    assert all(p.grad is None for p in net.parameters() if not p.requires_grad)
    assert all(torch.equal(a, b) for a, b in zip(weights, net.parameters(), strict=True))
    torch.testing.assert_close(*sides, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Tail(twice=True).eval(),
        lambda: Tail(behind=nn.Dropout(0.5)),
        lambda: Tail(behind=nn.BatchNorm2d(6)),
        lambda: Tail(behind=nn.BatchNorm2d(6)).eval(),
        lambda: Tail(behind=nn.ReLU()).eval(),
        lambda: create_model("wresnet", 3, 10),
    ],
    ids=["twice", "dropout", "batch norm", "batch norm, evaluated", "relu", "sum"],
)
def test_in_training_the_head_stays_where_it_is(make):
    net, x = make(), torch.rand(2, 3, 8, 8)
    assert not CamNetwork(net, x).folds()


def test_in_training_the_head_stays_where_it_is_under_autocast_and_hooks(monkeypatch):
    net, x = Tail(), torch.rand(2, 3, 8, 8)
    assert not CamNetwork(net, x).folds()  # who knows what a class of somebody's does in training
    assert CamNetwork(net.eval(), x).folds()
    with torch.autocast("cpu", torch.bfloat16):
        assert not CamNetwork(net, x).folds()
    handle = net.b.register_forward_hook(lambda *_: None)
    assert not CamNetwork(net, x).folds()
    handle.remove()
    monkeypatch.setenv("FASTINTERP_FOLD", "off")
    assert not CamNetwork(net, x).folds()
