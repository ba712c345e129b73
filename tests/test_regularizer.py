import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from test_maps import BatchNormNet
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from fastinterp import InterpretationRegularizer, maps
from fastinterp.attacks import maximise, pgd, random_start
from fastinterp.discrepancy import CLASSES, NORMS, class_weights, map_distance
from fastinterp.regularizers import MAPS
from fastinterp.regularizers.interpretation import INNER

ATTACK = dict(eps=0.1, step_size=0.02, steps=3)


def plain_int(net, x, y, start, eps, step_size, steps):
    """The paper's regularizer as a user would write it; also x'."""

    def maps(z):
        features = net.features(z)
        return torch.einsum("kc,nchw->nkhw", net.head.weight, features)

    def d(z):
        per_class = (maps(x) - maps(z)).abs().sum((2, 3))
        p = net(z).softmax(1)
        true = F.one_hot(y, p.shape[1]).to(p)
        q = p * (1 - true) / (p * (1 - true)).sum(1, keepdim=True)
        return ((true + q) * per_class).sum(1)

    z = (x + start).clamp(0, 1)
    for _ in range(steps):
        z.requires_grad_()
        (grad,) = torch.autograd.grad(d(z).sum(), z)
        z = (z.detach() + step_size * grad.sign()).clamp(x - eps, x + eps).clamp(0, 1)
    return d(z).mean(), z


@pytest.mark.parametrize("folded", [True, False])
def test_value_and_gradients_are_those_of_the_plain_formula(backend, small_net, batch, folded):
    net, (x, y) = small_net.double(), (batch[0].double(), batch[1])
    if not folded:
        net.conv2.register_forward_hook(lambda *_: None)
    start = random_start(x, 0.1)
    reg = InterpretationRegularizer("cam", **ATTACK)
    value, aux = reg(net, x, y, start=start, return_aux=True)
    expected, z = plain_int(net, x, y, start, 0.1, 0.02, 3)
    torch.testing.assert_close(aux.x_adv, z, rtol=0, atol=1e-12)
    torch.testing.assert_close(value, expected)
    got = torch.autograd.grad(value, list(net.parameters()))
    wanted = torch.autograd.grad(expected, list(net.parameters()))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(aux.logits, net(x))


def test_the_maximisation_raises_the_discrepancy(small_net, batch):
    x, y = batch
    start = random_start(x, 0.1)
    values = [
        InterpretationRegularizer("cam", eps=0.1, step_size=0.02, steps=steps)(
            small_net, x, y, start=start
        ).item()
        for steps in (1, 5, 20)
    ]
    assert values == sorted(values) and values[2] > 1.2 * values[0]


def test_nothing_of_the_users_changes(batch):
    net, (x, y) = BatchNormNet(), (batch[0], batch[1] % 5)
    net.train()
    net.body[1].eval()
    net.fc.bias.requires_grad_(False)
    net.fc.weight.grad = torch.ones_like(net.fc.weight)
    state = {name: t.clone() for name, t in net.state_dict().items()}
    flags = [module.training for module in net.modules()]
    buffers = [id(b) for b in net.buffers()]
    reg = InterpretationRegularizer("cam", **ATTACK)
    (F.cross_entropy(net(x), y) + 0.01 * reg(net, x, y)).backward()
    assert [module.training for module in net.modules()] == flags
    assert [id(b) for b in net.buffers()] == buffers
    assert all(torch.equal(state[name], t) for name, t in net.state_dict().items())
    assert not x.requires_grad and net.fc.bias.grad is None

    net.train()
    state = {name: t.clone() for name, t in net.state_dict().items()}
    net.zero_grad()
    reg(net, x, y)
    assert all(torch.equal(state[name], t) for name, t in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    with pytest.raises(RuntimeError):
        reg(net, x[:, :, :2, :2], y)
    assert all(module.training for module in net.modules())
    assert [id(b) for b in net.buffers()] == buffers


def test_every_parameter_gets_a_gradient(small_net, batch):
    InterpretationRegularizer("cam", **ATTACK)(small_net, *batch).backward()
    assert all(p.grad.abs().sum() > 0 for p in small_net.parameters())


@pytest.mark.parametrize("arguments", [dict(norm="L2", map_norm="l2"), dict(classes="two")])
def test_other_forms_stay_in_the_ball(small_net, batch, arguments):
    x, y = batch
    reg = InterpretationRegularizer("cam", eps=0.5, step_size=0.2, steps=4, **arguments)
    value, aux = reg(small_net, x, y, return_aux=True)
    offset = (aux.x_adv - x).flatten(1)
    length = offset.norm(dim=1) if arguments.get("norm") == "L2" else offset.abs().amax(1)
    assert length.max() <= 0.5 + 1e-5 and length.min() > 0
    assert value > 0 and aux.x_adv.min() >= 0 and aux.x_adv.max() <= 1


def test_the_inner_objective(small_net, batch):
    """CE alone is PGD; with a target its cross-entropy falls; CE + D lies between."""
    net, (x, y) = small_net.double(), (batch[0].double(), batch[1])
    start, how = random_start(x, 0.1), dict(eps=0.1, step_size=0.02, steps=5)

    def x_adv(inner, **call):
        reg = InterpretationRegularizer("cam", inner=inner, inner_weight=0.01, **how)
        return reg(net, x, y, start=start, return_aux=True, **call)[1].x_adv

    attacked = x_adv("ce")
    torch.testing.assert_close(attacked, pgd(net, x, y, start=start, **how))
    target = (y + 1) % 10

    def ce(z, labels):
        return F.cross_entropy(net(z), labels)

    aimed = x_adv("ce", attack_target=target)
    assert ce(aimed, target) < ce((x + start).clamp(0, 1), target) < ce(attacked, target)
    mixed = x_adv("ce+discrepancy")
    assert ce(mixed, y) > ce(x_adv("discrepancy"), y)
    assert not torch.equal(mixed, attacked)


def test_restarts_only_raise_the_value(small_net, batch):
    x, y = batch
    start = random_start(x, 0.1)
    values = {}
    for restarts in (1, 2, 8):
        reg = InterpretationRegularizer("cam", restarts=restarts, **ATTACK)
        torch.manual_seed(0)
        values[restarts] = reg(small_net, x, y, start=start).item()
    assert values[1] <= values[2] <= values[8] and values[1] < values[8]


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("norm", NORMS)
def test_every_distance_of_every_choice_of_classes(small_net, batch, classes, norm):
    net, (x, y) = small_net.double(), (batch[0].double(), batch[1])
    reg = InterpretationRegularizer("cam", classes=classes, map_norm=norm, **ATTACK)
    value, aux = reg(net, x, y, return_aux=True)

    def maps(z):
        return torch.einsum("kc,nchw->nkhw", net.head.weight, net.features(z))

    a, b = maps(x), maps(aux.x_adv)
    torch.testing.assert_close(aux.maps, a)
    torch.testing.assert_close(aux.maps_adv, b)
    a, b = a.flatten(2), b.flatten(2)
    if norm == "pearson":
        a, b = a - a.mean(2, keepdim=True), b - b.mean(2, keepdim=True)
    per_class = {
        "l1": lambda: (a - b).abs().sum(2),
        "l2": lambda: (a - b).square().sum(2).sqrt(),
        "squared_l2": lambda: (a - b).square().sum(2),
    }.get(norm, lambda: 1 - (a * b).sum(2) / (a.norm(dim=2) * b.norm(dim=2)))()
    true = F.one_hot(y, 10).double()
    logits = net(aux.x_adv)
    others = logits.masked_fill(true.bool(), -1e30).softmax(1)
    weights = {
        "one": true,
        "two": (true + F.one_hot(logits.argmax(1), 10)) / 2,
        "all": torch.full_like(true, 0.1),
        "weighted": true + others,
    }[classes]
    expected = (weights * per_class).sum(1).mean()
    torch.testing.assert_close(value, expected)
    parameters = list(net.parameters())
    for got, wanted in zip(
        torch.autograd.grad(value, parameters),
        torch.autograd.grad(expected, parameters),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted)


def test_works_in_bfloat16_autocast_and_channels_last(backend, small_net, batch):
    x, y = batch
    reg = InterpretationRegularizer("cam", **ATTACK)
    start = random_start(x, 0.1)
    exact = reg(small_net, x, y, start=start)
    with torch.autocast("cpu", torch.bfloat16):
        low = reg(small_net, x, y, start=start)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, exact, rtol=0.1, atol=0)
    last = small_net.to(memory_format=torch.channels_last)
    again = reg(last, x.to(memory_format=torch.channels_last), y, start=start)
    torch.testing.assert_close(again, exact, rtol=1e-3, atol=0)


class Dropped(BatchNormNet):
    """Depends on the mode through a function, which no module shows."""

    def forward(self, x):
        features = F.dropout(self.body[0](x).relu(), 0.5, self.training)
        return self.fc(self.pool(self.body[4](features)).flatten(1))


def test_the_attack_compares_maps_of_one_mode(batch):
    net, (x, y) = Dropped(), (batch[0], batch[1] % 5)
    reg = InterpretationRegularizer("cam", **ATTACK)
    start = random_start(x, 0.1)
    _, training = reg(net, x, y, start=start, return_aux=True)
    _, evaluation = reg(net.eval(), x, y, start=start, return_aux=True)
    torch.testing.assert_close(training.x_adv, evaluation.x_adv)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("counts", ["x", "x_adv", None])
def test_the_pass_whose_logits_are_returned_counts(batch, name, inner, counts):
    """Once a step, after the maximisation, as in plain code; without logits nothing moves."""
    net, (x, y) = BatchNormNet().double(), (batch[0].double(), batch[1] % 5)
    net.body[3].p = 0.0  # the masks of x and x' come from one generator
    net.body[1].running_mean.normal_()
    plain, start = copy.deepcopy(net), random_start(x, 0.1)
    classes = "two" if name == "input_gradient" else "one"
    options = dict(steps=2) if name == "integrated_gradients" else None
    reg = InterpretationRegularizer(
        name, inner=inner, classes=classes, map_options=options, **ATTACK
    )
    still = reg(copy.deepcopy(net).eval(), x, y, start=start, return_aux=True)[1].x_adv
    for step in range(2):
        before = {name: b.clone() for name, b in net.named_buffers()}
        if counts is None:
            reg(net, x, y, start=start)
            torch.testing.assert_close(dict(net.named_buffers()), before, rtol=0, atol=0)
            continue
        value, aux = reg(net, x, y, start=start, return_aux=True, counts=counts)
        assert value.requires_grad
        if step == 0:
            torch.testing.assert_close(aux.x_adv, still)
        counted = plain(x if counts == "x" else aux.x_adv)
        torch.testing.assert_close(aux.logits if counts == "x" else aux.logits_adv, counted)
        torch.testing.assert_close(dict(net.named_buffers()), dict(plain.named_buffers()))


def test_what_a_forward_puts_in_the_place_of_a_buffer_stays(batch):
    class Assigned(BatchNormNet):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(()))

        def forward(self, x):
            if self.training:
                self.mean = 0.9 * self.mean + 0.1 * x.mean().detach()
            return super().forward(x)

    net, (x, y) = Assigned(), (batch[0], batch[1] % 5)
    reg = InterpretationRegularizer("cam", **ATTACK)
    reg(net, x, y)
    assert net.mean == 0
    reg(net, x, y, return_aux=True)
    torch.testing.assert_close(net.mean, 0.1 * x.mean())


def test_a_changed_model_is_looked_at_again(small_net, batch):
    x, y = batch
    reg = InterpretationRegularizer("cam", **ATTACK)
    reg(small_net, x, y)
    small_net.head = nn.Linear(100, 10)
    start = random_start(x, 0.1)
    expected = InterpretationRegularizer("cam", **ATTACK)(small_net, x, y, start=start)
    torch.testing.assert_close(reg(small_net, x, y, start=start), expected)


def test_torchvision_resnet():
    torchvision = pytest.importorskip("torchvision", exc_type=(ImportError, RuntimeError))
    net = torchvision.models.resnet18(num_classes=7)
    x, y = torch.rand(2, 3, 64, 64), torch.tensor([0, 6])
    state = {name: t.clone() for name, t in net.state_dict().items()}
    reg = InterpretationRegularizer("cam", eps=8 / 255, step_size=2 / 255, steps=2)
    value = reg(net, x, y)
    value.backward()
    assert value > 0 and net.conv1.weight.grad.abs().sum() > 0
    assert all(torch.equal(state[name], t) for name, t in net.state_dict().items())


X, Y = torch.rand(4, 1, 28, 28), torch.tensor([0, 1, 2, 9])


@pytest.mark.parametrize(
    ("x", "y", "error", "match"),
    [
        (X.masked_fill(X > 0.99, torch.nan), Y, ValueError, "x holds NaN"),
        (X * 255, Y, ValueError, r"x must lie in \[0, 1\].*put any normalisation inside"),
        (X - 0.5, Y, ValueError, r"x must lie in \[0, 1\]"),
        (X[0], Y, ValueError, r"x must be images \(N, C, H, W\), got shape \(1, 28, 28\)"),
        ((X * 255).byte(), Y, TypeError, "convert uint8 images"),
        (X, Y.float(), TypeError, "y must be an int64 tensor .* got torch.float32"),
        (X, Y[:3], ValueError, r"y must have shape \(4,\), got \(3,\)"),
        (X, Y + 1, ValueError, r"y must lie in \[0, 9\], got 1 to 10"),
        (X, Y - 1, ValueError, r"y must lie in \[0, 9\], got -1 to 8"),
    ],
)
@pytest.mark.parametrize("use", ["regularizer", "pgd"])
def test_bad_batches(small_net, use, x, y, error, match):
    with pytest.raises(error, match=match):
        if use == "pgd":
            pgd(small_net, x, y, **ATTACK)
        else:
            InterpretationRegularizer("cam", **ATTACK)(small_net, x, y)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (dict(eps=-0.1), "eps must be a finite number >= 0, got -0.1"),
        (dict(steps=0), "steps must be at least 1, got 0"),
        (dict(step_size=0.0), "step_size must be a finite number > 0"),
        (dict(classes="three"), "classes must be one of one, two, all, weighted, got 'three'"),
        (dict(map="saliency"), "map must be one of cam"),
        (dict(map_norm="l3"), "map_norm must be one of l1, l2"),
        (dict(inner="kl"), "inner must be one of discrepancy, ce, ce.discrepancy"),
        (dict(restarts=0), "restarts must be at least 1, got 0"),
        (dict(map_options=dict(steps=3)), "map_options must be None for cam"),
        (dict(normalize="mean"), "normalize must be one of none, pixels"),
    ],
)
def test_bad_settings(change, match):
    with pytest.raises(ValueError, match=match):
        InterpretationRegularizer(**(ATTACK | change))


def test_what_counts_is_one_of_two(small_net, batch):
    with pytest.raises(ValueError, match="counts must be one of x, x_adv, got 'adv'"):
        InterpretationRegularizer("cam", **ATTACK)(small_net, *batch, counts="adv")


def test_no_grad_is_refused(small_net):
    with torch.no_grad(), pytest.raises(RuntimeError, match="needs gradients"):
        InterpretationRegularizer("cam", **ATTACK)(small_net, X, Y)


@pytest.mark.parametrize("fold", ["on", "off"])
def test_pgd_is_the_plain_loop(small_net, batch, fold, monkeypatch):
    monkeypatch.setenv("FASTINTERP_FOLD", fold)
    net, (x, y) = small_net.double(), (batch[0].double(), batch[1])
    z = x
    for _ in range(4):
        z = z.detach().requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(net(z), y), z)
        z = (z.detach() + 0.03 * grad.sign()).clamp(x - 0.1, x + 0.1).clamp(0, 1)
    got = pgd(net, x, y, eps=0.1, step_size=0.03, steps=4)
    torch.testing.assert_close(got, z, rtol=0, atol=1e-12)
    assert pgd(net, x[:0], y[:0], **ATTACK).shape == (0, 1, 28, 28)


def test_pgd_on_any_model(batch):
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(784, 10))
    x, y = batch
    x_adv = pgd(net, x, y, **ATTACK)
    assert F.cross_entropy(net.eval()(x_adv), y) > F.cross_entropy(net(x), y)


def test_random_starts():
    x = torch.zeros(500, 1, 8, 8)
    box = random_start(x, 0.3)
    assert box.min() >= -0.3 and box.max() <= 0.3 and box.std() > 0.16
    ball = random_start(x, 2.0, "L2").flatten(1).norm(dim=1)
    assert ball.max() <= 2.0001 and ball.median() > 1.9
    z = maximise(lambda z: z.sum((1, 2, 3)), x[:2], eps=0.3, step_size=0.1, steps=1, start=box[:2])
    torch.testing.assert_close(z, (box[:2].clamp(0, 1) + 0.1).clamp(-0.3, 0.3))


GRADIENT_MAPS = ["grad_cam", "grad_cam_plus_plus", "input_gradient", "gradient_x_input"]


class Smooth(nn.Module):
    """Small and smooth: its input gradients depend on x."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 6, 3, 2), nn.Softplus(3), nn.Conv2d(6, 8, 3))
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(self.pool(F.softplus(self.body(x), 3)).flatten(1))


@pytest.fixture
def smooth():
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(4, 1, 12, 12, generator=generator, dtype=torch.float64)
    return Smooth().double(), x, torch.tensor([0, 4, 2, 2])


def plain_maps(net, z, name):
    """Maps of every class, one backward pass each, as a graph."""
    z = z if z.requires_grad else z.detach().requires_grad_()
    if name == "integrated_gradients":
        points = [z * (k / 4) for k in range(1, 5)]
        total = sum(plain_maps(net, p, "input_gradient") for p in points)
        return z[:, None] * total / 4
    features = F.softplus(net.body(z), 3)
    logits = net.fc(net.pool(features).flatten(1))
    of = features if name.startswith("grad_cam") else z
    grads = [torch.autograd.grad(logits[:, c].sum(), of, create_graph=True)[0] for c in range(5)]
    grads = torch.stack(grads, 1)
    if name == "grad_cam":
        return (grads.mean((3, 4), keepdim=True) * features[:, None]).sum(2)
    return z[:, None] * grads if name == "gradient_x_input" else grads


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize(
    "name", ["grad_cam", "input_gradient", "gradient_x_input", "integrated_gradients"]
)
def test_other_maps(smooth, name, classes):
    """Value and parameter gradients at the x' that was found, against double backprop."""
    net, x, y = smooth
    options = dict(steps=4) if name == "integrated_gradients" else None
    reg = InterpretationRegularizer(name, classes=classes, map_options=options, **ATTACK)
    value, aux = reg(net, x, y, return_aux=True)
    a, b = plain_maps(net, x, name), plain_maps(net, aux.x_adv, name)
    logits = net(aux.x_adv)
    expected = (class_weights(classes, logits, y) * map_distance(a, b)).sum(1).mean()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(aux.logits, net(x))
    parameters = list(net.parameters())
    got = torch.autograd.grad(value, parameters, allow_unused=True)
    wanted = torch.autograd.grad(expected, parameters, allow_unused=True)
    for g, w in zip(got, wanted, strict=True):
        if w is None:
            assert g is None or not g.any()
        else:
            torch.testing.assert_close(g, w)


@pytest.mark.parametrize("name", [*GRADIENT_MAPS, "integrated_gradients"])
def test_the_maximisation_raises_other_discrepancies(smooth, name):
    net, x, y = smooth
    start = random_start(x, 0.1)
    options = dict(steps=4) if name == "integrated_gradients" else None
    values = [
        InterpretationRegularizer(
            name, classes="one", eps=0.1, step_size=0.02, steps=steps, map_options=options
        )(net, x, y, start=start).item()
        for steps in (1, 8)
    ]
    assert values[1] > 1.1 * values[0]


def test_a_surrogate_shows_the_way_in_a_relu_network(small_net, batch):
    """The input gradient of a logit of a ReLU net has no gradient of its own."""
    x, y = batch
    how = dict(classes="one", eps=0.1, step_size=0.03, steps=5, norm="Linf")
    start = random_start(x, 0.1)
    values = {
        beta: InterpretationRegularizer("input_gradient", softplus_beta=beta, **how)(
            small_net, x, y, start=start, return_aux=True
        )
        for beta in (None, 10.0)
    }
    assert values[10.0][0] > values[None][0]
    still = (x + start).clamp(0, 1)
    torch.testing.assert_close(values[None][1].x_adv, still, atol=1e-6, rtol=0)


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["cam", "input_gradient"])
@pytest.mark.parametrize("wrap", ["compile", "data parallel", "distributed", "all", "around"])
def test_wrapped_models(smooth, one_process, name, wrap):
    """A compiled graph has no second derivative, the model inside has; a word is said once."""
    net, x, y = smooth
    reg = InterpretationRegularizer(name, classes="two", **ATTACK)
    start = random_start(x, 0.1)
    expected = reg(net, x, y, start=start)
    parameters = list(net.parameters())
    wanted = torch.autograd.grad(expected, parameters, allow_unused=True)
    model = net
    if wrap in ("compile", "all"):
        model = torch.compile(model, backend="aot_eager")
    if wrap == "data parallel":
        model = nn.DataParallel(model)
    if wrap in ("distributed", "all"):
        model = DistributedDataParallel(model)
    if wrap == "around":
        model = torch.compile(DistributedDataParallel(model), backend="aot_eager")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(2):
            value = reg(model, x, y, start=start)
    told = " ".join(str(each.message) for each in seen if each.category is RuntimeWarning)
    assert told.count("cannot be differentiated again") == (wrap in ("compile", "all", "around"))
    assert told.count("wrap a module whose forward") == (wrap in ("distributed", "all", "around"))
    torch.testing.assert_close(value, expected)
    for got, want in zip(
        torch.autograd.grad(value, parameters, allow_unused=True), wanted, strict=True
    ):
        torch.testing.assert_close(got, want)


def test_any_function_is_a_map(smooth):
    net, x, y = smooth

    def squared(model, z, target, power=1):
        value, logits = maps.input_gradient(model, z, target, return_logits=True)
        return value.square() ** power, logits

    reg = InterpretationRegularizer(squared, map_options=dict(power=2), classes="two", **ATTACK)
    value = reg(net, x, y)
    assert value > 0 and value.requires_grad
