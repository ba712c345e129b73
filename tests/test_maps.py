import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastinterp.discrepancy import class_weights, discrepancy
from fastinterp.maps import CamNetwork, UnsupportedModelError, cam
from fastinterp.models import create_model


class BatchNormNet(nn.Module):
    """Not ours, with batch norm and dropout before the last feature maps, and a head bias."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.3), nn.Conv2d(6, 8, 3)
        )
        self.pool, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(torch.flatten(self.pool(self.body(x)), 1))


@pytest.mark.parametrize("name", ["small", "pool", "wresnet"])
def test_a_map_sums_to_its_logit(name):
    net = create_model(name, 1, 10)
    x = torch.rand(3, 1, 28, 28)
    maps = cam(net, x)
    torch.testing.assert_close(maps.mean((2, 3)), net(x))
    target = torch.tensor([1, 9, 0])
    torch.testing.assert_close(cam(net, x, target)[:, 0], maps[torch.arange(3), target])
    torch.testing.assert_close(cam(net, x, 4), maps[:, 4:5])


def test_map_is_differentiable_to_input_and_parameters():
    net, x = create_model("small", 1, 10), torch.rand(2, 1, 28, 28, requires_grad=True)
    cam(net, x, 3).square().sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad.abs().sum() > 0 for p in (net.conv0.weight, net.head.weight))


@pytest.mark.parametrize("target", [10, -1, torch.tensor([0, 10])])
def test_target_out_of_range(target):
    with pytest.raises(ValueError, match="target must be None, a class below 10"):
        cam(create_model("small", 1, 10), torch.rand(2, 1, 28, 28), target)


@pytest.mark.parametrize("make", [lambda: create_model("small", 1, 5), BatchNormNet])
def test_attacked_form_folds_the_head_and_gives_everything_back(make, batch):
    net, (x, _) = make(), batch
    net.train()
    if isinstance(net, BatchNormNet):
        net.body[1].running_mean.normal_()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    identity = {name: id(p) for name, p in net.named_parameters()}
    network = CamNetwork(net, x)
    assert network.form.tails == (("conv2",) if hasattr(net, "conv2") else ("body.4",))
    with network.attacked() as run:
        features, head, logits = run(x)
        assert head is None
        assert not logits.requires_grad
    assert all(module.training for module in net.modules())
    assert {name: id(p) for name, p in net.named_parameters()} == identity
    assert all(torch.equal(before[name], t) for name, t in net.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())
    net.eval()
    plain_features, plain_logits = network(x)
    torch.testing.assert_close(logits, plain_logits)
    bias = network.attacked_features(plain_features).mean((2, 3)) - logits
    torch.testing.assert_close(bias, bias[:1].expand_as(bias))
    difference = network.attacked_features(plain_features) - features
    torch.testing.assert_close(difference, difference.mean((0, 2, 3), True).expand_as(difference))


def test_nothing_stays_changed_after_an_error(batch):
    net = create_model("small", 1, 10)
    weight = net.conv2.weight
    network = CamNetwork(net, batch[0])
    with pytest.raises(KeyError), network.attacked():
        raise KeyError
    assert net.conv2.weight is weight and net.training
    with pytest.raises(RuntimeError):
        network(torch.rand(1, 2, 28, 28))
    assert not any(module._forward_hooks for module in net.modules())


def test_hooked_or_grouped_last_convolution_is_not_folded(batch):
    net = create_model("small", 1, 10)
    net.conv2.register_forward_hook(lambda *_: None)
    assert CamNetwork(net, batch[0]).form is None
    assert CamNetwork(create_model("pool", 1, 10), batch[0]).form.tails == ()


class InPlace(nn.Module):
    """Its last activation is in place: the pooled object is the convolution's own output."""

    def __init__(self, inplace=True):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.ReLU(inplace), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(self.net(x))


class Twice(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 10, 3), nn.Conv2d(10, 10, 3, padding=1)
        self.third = nn.Conv2d(10, 10, 3, padding=1)
        if tied:
            self.third.weight = self.second.weight
        else:
            self.third = self.second
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(10, 10)

    def forward(self, x):
        return self.fc(self.pool(self.third(self.second(self.first(x)).relu())).flatten(1))


@pytest.mark.parametrize("net", [InPlace(), Twice(tied=True), Twice(tied=False)])
def test_a_head_is_not_folded_where_that_would_change_the_model(net, batch):
    network = CamNetwork(net, batch[0])
    assert network.form.tails == ()
    with network.attacked() as run:
        torch.testing.assert_close(run(batch[0])[2], net(batch[0]))


def test_maps_leave_batch_norm_statistics_alone(batch):
    net = BatchNormNet()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    cam(net, batch[0])
    assert all(torch.equal(before[name], t) for name, t in net.state_dict().items())


class InPlaceHead(BatchNormNet):
    def forward(self, x):
        return self.fc(F.relu(self.pool(self.body(x)).flatten(1).sub_(0.1), inplace=True))


class Bypassed(BatchNormNet):
    def forward(self, x):
        return self.fc(self.body(x).mean((2, 3)))


def normed():
    net = BatchNormNet()
    torch.nn.utils.parametrizations.weight_norm(net.fc)
    return net


class Activated(BatchNormNet):
    def forward(self, x):
        return self.fc(self.pool(self.body(x)).flatten(1)).softmax(1)


class Squashed(BatchNormNet):
    def forward(self, x):
        return self.fc(self.pool(self.body(x)).flatten(1).tanh())


@pytest.mark.parametrize(
    ("net", "match"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), "has no nn.AdaptiveAvgPool2d"),
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1)), "has no nn.Linear"),
        (Activated(), "something else stands between"),
        (Squashed(), "something else stands between"),
        (InPlaceHead(), "something else stands between"),
        (Bypassed(), "something else stands between"),
        (normed(), "a weight of its own"),
    ],
)
def test_models_without_gap_and_linear_head(net, match, batch):
    with pytest.raises(UnsupportedModelError, match=match):
        cam(net, batch[0])


def test_class_weights_against_the_written_formula():
    logits = torch.randn(4, 6, dtype=torch.float64)
    y = torch.tensor([0, 5, 2, 2])
    p, rows = logits.softmax(1), torch.arange(4)
    expected = p / (1 - p[rows, y])[:, None]
    expected[rows, y] = 1
    torch.testing.assert_close(class_weights("weighted", logits, y), expected)
    assert class_weights("one", logits, y).sum() == 4
    two = class_weights("two", logits, y)
    assert (two[rows, y] >= 0.5).all() and (two[rows, logits.argmax(1)] >= 0.5).all()
    torch.testing.assert_close(two.sum(1), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(class_weights("all", logits, y), torch.full_like(logits, 1 / 6))
    # No overflow and no 0/0 where the true class has all the probability.
    extreme = torch.zeros(1, 3).index_fill(1, torch.tensor([1]), 1e4)
    sure = class_weights("weighted", extreme, torch.tensor([1]))
    torch.testing.assert_close(sure, torch.tensor([[0.5, 1.0, 0.5]]))
    with pytest.raises(ValueError, match="classes must be one of one, two, all, weighted"):
        class_weights("both", logits, y)


def test_gradient_flows_through_the_class_weights():
    features, features_adv = torch.randn(2, 3, 4, 5, 5, dtype=torch.float64).unbind()
    head = torch.randn(6, 4, dtype=torch.float64)
    logits = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0, 1, 2])

    def value(f):
        return discrepancy(features, features_adv, head, f, y)

    assert torch.autograd.gradcheck(value, logits)
    (grad,) = torch.autograd.grad(value(logits).sum(), logits)
    # Every class but the true one, which is left out of the softmax.
    assert torch.equal(grad == 0, F.one_hot(y, 6).bool())


def test_proposition_1_holds_with_maps_that_sum_to_logits():
    """1/2 (d_t + d_t') >= 1/2 (f_t(x) - f_t'(x)) when x' is classified t'."""
    torch.manual_seed(1)
    checked = 0
    for _ in range(50):
        features, features_adv = torch.randn(2, 8, 4, 3, 3).unbind()
        head = torch.randn(5, 4)
        f, f_adv = (a.mean((2, 3)) @ head.T for a in (features, features_adv))
        t, t_adv = f.argmax(1), f_adv.argmax(1)
        d = discrepancy(features, features_adv, head, f_adv, t, classes="two", normalize="pixels")
        margin = (f.gather(1, t[:, None]) - f.gather(1, t_adv[:, None]))[:, 0] / 2
        flipped = t != t_adv
        checked += flipped.sum()
        assert (d >= margin - 1e-5)[flipped].all()
    assert checked > 100


def test_released_network_discrepancy_is_that_of_the_written_formula(released, data_dir):
    from fastinterp.data import load_dataset
    from fastinterp.models import load_weights

    net = create_model("small", 1, 10)
    load_weights(net, released / "mnist_smallgap_int_100.npz")
    x, y = load_dataset("mnist", data_dir).test.batch(slice(0, 20))
    x_adv = (x + 0.2 * torch.rand_like(x)).clamp(0, 1)
    maps, maps_adv = cam(net, x).double(), cam(net, x_adv).double()
    p = net(x_adv).double().softmax(1)
    d = (maps - maps_adv).abs().sum((2, 3))
    expected = [
        d[n, t] + sum(p[n, i] / (1 - p[n, t]) * d[n, i] for i in range(10) if i != t)
        for n, t in enumerate(y.tolist())
    ]
    network = CamNetwork(net, x)
    (features, _), (features_adv, logits_adv) = network(x), network(x_adv)
    value = discrepancy(features, features_adv, net.head.weight, logits_adv, y)
    torch.testing.assert_close(value.double(), torch.stack(expected), rtol=1e-4, atol=1e-4)
    assert F.cross_entropy(net(x), y) < 1
