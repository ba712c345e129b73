"""Each neighbour of the interpretation regularizer beside its formula in plain torch."""

import copy
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastinterp as fi
from fastinterp import regularizers as R

N, C, SIZE, K = 4, 3, 9, 5
MASK = torch.rand(N, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(5)) > 0.5


def batch(dtype=torch.float64):
    source = torch.Generator().manual_seed(3)
    x = torch.rand(N, C, SIZE, SIZE, dtype=torch.float64, generator=source)
    return x.to(dtype), torch.tensor([0, 4, 2, 2])


def neighbour(x):
    noise = torch.rand(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    return (x + 0.1 * (noise - 0.5)).clamp(0, 1).to(x)


def baselines(x):
    return torch.rand(7, *x.shape[1:], dtype=x.dtype, generator=torch.Generator().manual_seed(6))


def seeded():
    return torch.Generator().manual_seed(11)


def make_net(act=nn.SiLU):
    """Batch norm, a residual and strides; in training mode, with running statistics of its own."""
    torch.manual_seed(1)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.act = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), act()

        def forward(self, x):
            return self.act(self.bn(self.conv(x)) + x)

    stem = nn.Sequential(nn.Conv2d(C, 6, 3, 2), nn.BatchNorm2d(6), act())
    net = nn.Sequential(stem, Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, K))
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return net.double()


# ---- the formulas, written plainly


def plain_gradient(net, x, y, of="loss"):
    x = x.clone().requires_grad_()
    logits = net(x)
    rows = torch.arange(len(y))
    score = {
        "loss": lambda: -logits.log_softmax(1)[rows, y],
        "logit": lambda: logits[rows, y],
        "log_prob": lambda: logits.log_softmax(1)[rows, y],
    }[of]()
    return torch.autograd.grad(score.sum(), x, create_graph=True)[0].flatten(1), logits


def plain_norm(norm, of):
    def value(net, x, y):
        g, _ = plain_gradient(net, x, y, of)
        sizes = {"l1": g.abs().sum(1), "l2": (g * g).sum(1) ** 0.5, "squared": (g * g).sum(1)}
        return sizes[norm].mean()

    return value


def plain_jacobian(net, x, y):
    x = x.clone().requires_grad_()
    logits = net(x)
    rows = [torch.autograd.grad(logits[:, c].sum(), x, create_graph=True)[0] for c in range(K)]
    return sum((row**2).sum() for row in rows) / N


def plain_projected_jacobian(net, x, y):
    v = torch.randn(3, N, K, dtype=x.dtype, generator=seeded())
    v = v / (v * v).sum(2, keepdim=True) ** 0.5
    x = x.clone().requires_grad_()
    logits = net(x)
    parts = [torch.autograd.grad((logits * u).sum(), x, create_graph=True)[0] for u in v]
    return sum(K * (part**2).sum() for part in parts) / (3 * N)


def plain_right_reasons(net, x, y):
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(net(x).log_softmax(1).sum(), x, create_graph=True)
    return ((MASK.to(x.dtype) * g) ** 2).sum() / N


def one_minus_cosine(a, b):
    return 1 - (a * b).sum(1) / ((a * a).sum(1) ** 0.5 * (b * b).sum(1) ** 0.5)


def plain_grad_align(net, x, y):
    eta = torch.empty_like(x).uniform_(-0.2, 0.2, generator=seeded())
    g, moved = plain_gradient(net, x, y)[0], plain_gradient(net, x + eta, y)[0]
    return one_minus_cosine(g, moved).mean()


def plain_local_alignment(net, x, y):
    g, moved = (plain_gradient(net, z, y, "logit")[0] for z in (x, neighbour(x)))
    return (0.7 * ((g - moved) ** 2).sum(1) + 0.3 * one_minus_cosine(g, moved) / 2).mean()


def plain_cure(net, x, y):
    g, _ = plain_gradient(net, x, y)
    z = g.detach().sign()
    z = (z / (z * z).sum(1, keepdim=True) ** 0.5).view_as(x)
    return ((plain_gradient(net, x + 0.8 * z, y)[0] - g) ** 2).sum(1).mean()


def plain_gap(net, x, y, z, g):
    loss = [F.cross_entropy(net(point), y, reduction="none") for point in (z, x)]
    rise = (g * (z - x).flatten(1)).sum(1)
    return (loss[0] - loss[1] - rise).abs(), rise


LLR = dict(eps=0.1, step_size=0.03, steps=4)


def plain_local_linearity(net, x, y):
    still = copy.deepcopy(net).eval()
    g = plain_gradient(still, x, y)[0].detach()
    z = (x + torch.empty_like(x).uniform_(-0.1, 0.1, generator=seeded())).clamp(0, 1)
    for _ in range(4):
        z.requires_grad_()
        (step,) = torch.autograd.grad(plain_gap(still, x, y, z, g)[0].sum(), z)
        z = (z.detach() + 0.03 * step.sign()).clamp(x - 0.1, x + 0.1).clamp(0, 1)
    g, _ = plain_gradient(net, x, y)
    gap, rise = plain_gap(net, x, y, z, g)
    return (2 * gap + 3 * rise.abs()).mean()


def plain_ig(net, x, y):
    """Eight points of a right Riemann sum from 0, in evaluation mode."""
    net = copy_of_parameters_in_eval(net)
    points = (plain_gradient(net, x * k / 8, y, "logit")[0] for k in range(1, 9))
    return x.flatten(1) * sum(points) / 8


def copy_of_parameters_in_eval(net):
    """The same parameters, evaluation mode."""
    still = copy.deepcopy(net).eval()
    return lambda z: torch.func.functional_call(still, dict(net.named_parameters()), z)


def plain_ig_alignment(net, x, y):
    return one_minus_cosine(plain_ig(net, x, y), plain_ig(net, neighbour(x), y)).mean()


def plain_saliency_guided(net, x, y):
    g, logits = plain_gradient(net, x, y, "logit")
    order = g.view_as(x).mean(1).flatten(1).argsort(1)
    means, masked = x.mean((2, 3)), x.clone().flatten(2)
    for n in range(N):
        for pixel in order[n, : int(0.3 * SIZE * SIZE)]:
            masked[n, :, pixel] = means[n]
    p, q = logits.softmax(1), net(masked.view_as(x)).softmax(1)
    return (p * (p / q).log()).sum(1).mean()


def plain_finite_difference(net, x, y):
    u = plain_gradient(net, x, y)[0].detach().sign().view_as(x)
    up, down = (F.cross_entropy(net(x + s * 0.01 * u), y, reduction="none") for s in (1, -1))
    return ((up - down) / 0.02).mean()


class Case(NamedTuple):
    function: object
    options: dict
    plain: object
    mode: str = "own"  # of the passes that make the value

    def __call__(self, net, x, y, **more):
        options = {k: v(x) if v in (neighbour, baselines) else v for k, v in self.options.items()}
        options = {k: v() if v is seeded else v for k, v in options.items()}
        return self.function(net, x, y, **options, **more)


CASES = {
    **{
        f"norm-{norm}-{of}": Case(
            R.input_gradient_norm, dict(norm=norm, of=of), plain_norm(norm, of)
        )
        for norm, of in (("l1", "logit"), ("l2", "log_prob"), ("squared", "loss"))
    },
    "jacobian": Case(R.jacobian_norm, dict(exact=True), plain_jacobian),
    "projected": Case(R.jacobian_norm, dict(n_proj=3, generator=seeded), plain_projected_jacobian),
    "rrr": Case(R.right_for_right_reasons, dict(mask=MASK), plain_right_reasons),
    "grad_align": Case(R.grad_align, dict(eps=0.2, generator=seeded), plain_grad_align),
    "lga": Case(
        R.local_gradient_alignment,
        dict(x_adv=neighbour, l2_weight=0.7, cosine_weight=0.3),
        plain_local_alignment,
    ),
    "igr": Case(
        R.integrated_gradients_alignment,
        dict(x_adv=neighbour, steps=8),
        plain_ig_alignment,
        "eval",
    ),
    "cure": Case(R.cure, dict(h=0.8), plain_cure),
    "llr": Case(
        R.local_linearity, dict(**LLR, lambda_=2.0, mu=3.0, generator=seeded), plain_local_linearity
    ),
    "saliency_guided": Case(
        R.saliency_guided, dict(fraction=0.3, fill="mean"), plain_saliency_guided
    ),
    "finite_difference": Case(
        R.finite_difference_gradient_norm, dict(norm="l1"), plain_finite_difference
    ),
}
UNSHARED = ("igr", "expected_gradients")  # evaluation mode: no logits on the way
every_case = pytest.mark.parametrize("name", CASES)


def gradients(value, net):
    """Of the parameters that are not frozen; the graph is kept."""
    parameters = [p for p in net.parameters() if p.requires_grad]
    found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]


@every_case
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("fused", [False, True], ids=["stock", "fused"])
def test_value_and_parameter_gradients_are_those_of_the_plain_formula(name, training, fused):
    net, (x, y) = make_net().train(training), batch()
    ours = fi.fuse(copy.deepcopy(net)) if fused else copy.deepcopy(net)
    value, expected = CASES[name](ours, x, y), CASES[name].plain(net, x, y)
    assert value.shape == () and expected > 1e-6
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=0)
    for got, wanted in zip(gradients(value, ours), gradients(expected, net), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-7, atol=1e-10 * expected.item())


@every_case
@pytest.mark.parametrize("fused", [False, True], ids=["stock", "fused"])
def test_parameter_gradients_are_those_of_finite_differences(name, fused):
    net, (x, y) = make_net(), batch()
    net = fi.fuse(net) if fused else net
    direction = [torch.randn_like(p) for p in net.parameters()]
    found = gradients(CASES[name](net, x, y), net)
    slope = sum((g * d).sum() for g, d in zip(found, direction, strict=True))

    def moved(t):
        other = copy.deepcopy(net)
        with torch.no_grad():
            for p, d in zip(other.parameters(), direction, strict=True):
                p.add_(d, alpha=t)
        return CASES[name](other, x, y)

    h = 1e-6
    torch.testing.assert_close((moved(h) - moved(-h)) / (2 * h), slope, rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in CASES if name not in UNSHARED])
def test_the_logits_of_x_are_shared(name):
    net, (x, y) = make_net(), batch()
    value, logits = CASES[name](net, x, y, return_logits=True)
    torch.testing.assert_close(value, CASES[name](net, x, y))
    expected = copy.deepcopy(net)(x)
    torch.testing.assert_close(logits, expected)
    got = gradients(F.cross_entropy(logits, y), net)
    again = copy.deepcopy(net)
    torch.testing.assert_close(got, gradients(F.cross_entropy(again(x), y), again))


# ---- nothing of the user's changes


def snapshot(net, x):
    return dict(
        modes=[m.training for m in net.modules()],
        flags=[p.requires_grad for p in net.parameters()],
        buffers=[(id(b), b.clone()) for b in net.buffers()],
        parameters=[(id(p), p.detach().clone()) for p in net.parameters()],
        grads=[(id(p.grad), p.grad.clone()) for p in net.parameters() if p.grad is not None],
        hooks=[(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in net.modules()],
        random=torch.get_rng_state(),
        x=(x.requires_grad, x.grad, x.clone()),
        attention=torch.backends.cuda.flash_sdp_enabled(),
    )


class Failing(nn.Module):
    """Raises at its n-th call."""

    def __init__(self, net, calls):
        super().__init__()
        self.net, self.left = net, calls

    def forward(self, x):
        self.left -= 1
        if self.left < 0:
            raise ArithmeticError("in the middle")
        return self.net(x)


@every_case
@pytest.mark.parametrize("fails_at", [None, 0, 1])
def test_leaves_nothing_changed(name, fails_at):
    net, (x, y) = make_net(), batch()
    net[1].eval()
    net[0][0].weight.requires_grad_(False)
    net[-1].weight.grad = torch.ones_like(net[-1].weight)
    if fails_at is not None:
        net = Failing(net, fails_at)
    before = snapshot(net, x)
    try:
        CASES[name](net, x, y)
        assert fails_at is None or net.left >= 0
    except ArithmeticError:
        assert net.left < 0
    torch.testing.assert_close(snapshot(net, x), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    "function",
    [
        lambda net, x, y: R.jacobian_norm(net, x),
        lambda net, x, y: R.grad_align(net, x, y, eps=0.1),
        lambda net, x, y: R.local_gradient_alignment(net, x, y, eps=0.1),
        lambda net, x, y: R.local_linearity(net, x, y, **LLR),
        lambda net, x, y: R.saliency_guided(net, x, y),
    ],
)
def test_noise_comes_from_the_global_generator_unless_one_is_given(function):
    net, (x, y) = make_net(), batch()
    first = function(net, x, y)
    assert function(net, x, y) != first
    torch.manual_seed(9)
    second = function(net, x, y)
    torch.manual_seed(9)
    assert function(net, x, y) == second


# ---- networks and settings of all kinds


@every_case
@pytest.mark.parametrize("fused", [False, True], ids=["stock", "fused"])
def test_autocast_channels_last_and_frozen_parameters(name, fused):
    net, (x, y) = make_net().float(), batch(torch.float32)
    if name == "saliency_guided":  # its ranking is a step function
        net.eval()
    net[0][0].weight.requires_grad_(False)
    reference = copy.deepcopy(net).double()
    exact = CASES[name](reference, x.double(), y)
    net = fi.fuse(net) if fused else net
    net, x = net.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    single = CASES[name](net, x, y)
    assert single.dtype == torch.float32
    if "generator" not in CASES[name].options:  # whose noise differs with dtype and layout
        torch.testing.assert_close(single.double(), exact, rtol=2e-3, atol=1e-6)
        scale = max(g.abs().max() for g in gradients(exact, reference))
        for got, wanted in zip(gradients(single, net), gradients(exact, reference), strict=True):
            torch.testing.assert_close(got.double(), wanted, rtol=0, atol=0.01 * scale.item())
    with torch.autocast("cpu", torch.bfloat16):
        low = CASES[name](net, x, y)
    assert low.dtype == torch.float32 and torch.isfinite(low)
    if name.startswith(("norm", "jacobian", "rrr")):  # the others are differences
        torch.testing.assert_close(low, single, rtol=0.1, atol=0)
    assert all(torch.isfinite(g).all() for g in gradients(low, net))
    assert net[0][0].weight.grad is None


@pytest.fixture(scope="module")
def vit():
    timm = pytest.importorskip("timm")
    torch.manual_seed(2)
    net = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=K
    )
    nn.init.normal_(net.head.weight, std=0.1)
    return net.double()


@pytest.mark.parametrize("name", ["norm-squared-loss", "jacobian", "lga", "cure", "llr"])
def test_attention(vit, name):
    """The fused backends of scaled dot product attention have no second derivative."""
    x, y = torch.rand(N, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 4, 2, 2])
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = CASES[name].plain(vit, x, y)
        wanted = gradients(expected, vit)
    value = CASES[name](vit, x, y)
    torch.testing.assert_close(value, expected)
    for got, reference in zip(gradients(value, vit), wanted, strict=True):
        torch.testing.assert_close(got, reference, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("name", ["norm-squared-loss", "jacobian", "rrr", "grad_align", "llr"])
def test_the_gradient_reaches_an_x_that_wants_it(name):
    net, (x, y) = make_net().eval(), batch()
    x, direction = x.requires_grad_(), torch.randn_like(x)
    (found,) = torch.autograd.grad(CASES[name](net, x, y), x)
    h = 1e-6
    up, down = (CASES[name](net, (x + s * h * direction).detach(), y) for s in (1, -1))
    if name == "llr":  # the worst point moves with x; both sides hold the offset
        assert found.abs().sum() > 0
    else:
        slope = (found * direction).sum()
        torch.testing.assert_close((up - down) / (2 * h), slope, rtol=1e-5, atol=1e-9)
    assert x.grad is None


# ---- what each is for


def test_random_projections_estimate_the_jacobian():
    net, (x, y) = make_net().eval(), batch()
    exact = R.jacobian_norm(net, x, exact=True)
    torch.testing.assert_close(
        R.jacobian_norm(net, x, y, n_proj=800, generator=seeded()), exact, rtol=0.1, atol=0
    )


def test_right_for_right_reasons_looks_only_where_the_mask_is():
    net, (x, y) = make_net(), batch()
    everywhere, channelwise = torch.ones(N, 1, SIZE, SIZE), torch.zeros(N, C, SIZE, SIZE)
    parts = [R.right_for_right_reasons(net, x, mask=m) for m in (MASK, ~MASK, everywhere)]
    torch.testing.assert_close(parts[0] + parts[1], parts[2])
    assert R.right_for_right_reasons(net, x, y, mask=channelwise) == 0
    channelwise[:, 1] = 1
    assert 0 < R.right_for_right_reasons(net, x, mask=channelwise) < parts[2]


class Scaled(nn.Module):
    """Logits times a number, so that the gradients are any size."""

    def __init__(self, net, scale):
        super().__init__()
        self.net, self.scale = net, scale

    def forward(self, x):
        return self.net(x) * self.scale


def test_a_cosine_does_not_see_the_scale_of_gradients():
    """Squares of 1e-25 are 0 in float32."""
    net, (x, y) = make_net().float().eval(), batch(torch.float32)
    x_adv = neighbour(x)
    directions = dict(x_adv=x_adv, l2_weight=0.0)
    full = R.local_gradient_alignment(net, x, y, **directions)
    tiny = R.local_gradient_alignment(Scaled(net, 1e-25), x, y, **directions)
    assert full > 1e-5
    torch.testing.assert_close(tiny, full, rtol=1e-3, atol=0)


class Dead(nn.Module):
    """Some examples have no gradient at all."""

    def __init__(self, net, examples):
        super().__init__()
        self.net, self.examples = net, examples

    def forward(self, x):
        alive = torch.ones(len(x), 1, 1, 1, dtype=x.dtype)
        alive[self.examples] = 0
        return self.net(x * alive)


@pytest.mark.parametrize("name", ["norm-l2-log_prob", "grad_align", "lga", "cure", "llr"])
def test_examples_without_a_gradient(name):
    net, (x, y) = make_net().eval(), batch()
    some = CASES[name](Dead(net, [0, 1]), x, y)
    none = CASES[name](Dead(net, [0, 1, 2, 3]), x, y)
    assert some > 0 and none == 0
    assert all(torch.isfinite(g).all() for g in gradients(some, net) + gradients(none, net))


def test_cosines_leave_out_examples_without_a_gradient():
    net, (x, y) = make_net().eval(), batch()
    weights = dict(l2_weight=0.0)
    rest = R.local_gradient_alignment(net, x[2:], y[2:], x_adv=neighbour(x)[2:], **weights)
    some = R.local_gradient_alignment(Dead(net, [0, 1]), x, y, x_adv=neighbour(x), **weights)
    torch.testing.assert_close(some, rest)


def test_linear_losses_are_linear():
    """Two logits a and 0: their loss is softplus(-a), which is nearly linear far out."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(C * SIZE * SIZE, 2)).double()
    nn.init.zeros_(net[1].weight[1:])
    with torch.no_grad():
        net[1].weight[1:].zero_()
        net[1].bias.copy_(torch.tensor([0.0, 60.0]))
    x, _ = batch()
    y = torch.zeros(N, dtype=torch.int64)
    assert R.local_linearity(net, x, y, **LLR, mu=0.0) < 1e-12
    assert R.cure(net, x, y) < 1e-12
    assert R.grad_align(net, x, y, eps=0.1) < 1e-12
    rise = R.local_linearity(net, x, y, **LLR, lambda_=0.0, mu=1.0)
    assert rise > 0


def test_the_ascent_finds_less_linear_points():
    net, (x, y) = make_net(), batch()
    gaps = [
        R.local_linearity(
            net.eval(), x, y, eps=0.1, step_size=0.02, steps=n, mu=0.0, generator=seeded()
        )
        for n in (1, 4, 20)
    ]
    assert gaps == sorted(gaps) and gaps[2] > 1.2 * gaps[0]


def test_total_variation_and_gini_of_known_maps():
    maps = torch.zeros(2, 1, 3, 3)
    maps[0, 0, 1, 1] = -2.0
    assert R.total_variation(maps) == 4  # four edges of height 2, over two examples
    assert R.total_variation(maps[:, 0]) == 4
    maps = torch.tensor([[[1.0, -2.0], [0.0, 3.0]], [[1.0, 0.0], [0.0, -3.0]]])
    size = [1.0, 1.0, 0.0, 3.0]
    pairs = sum(abs(a - b) for a in size for b in size)
    torch.testing.assert_close(R.gini(maps), torch.tensor(pairs / (2 * 4 * 5)))
    assert R.gini(torch.ones(3, 4, 4)) == 0
    one = torch.zeros(3, 4, 4)
    one[:, 2, 1] = 1
    torch.testing.assert_close(R.gini(one), torch.tensor(15 / 16))
    zero = torch.zeros(3, 4, 4, requires_grad=True)
    R.gini(zero).backward()
    assert R.gini(zero) == 0 and torch.isfinite(zero.grad).all()
    maps = torch.randn(3, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(R.gini, maps)
    assert torch.autograd.gradcheck(R.total_variation, maps)
    assert R.gini(maps.to(torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize("fill", ["uniform", "mean"])
def test_saliency_guided_replaces_the_lowest_pixels(fill):
    net, (x, y) = make_net(), batch()
    seen = []
    handle = net.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    for absolute in (False, True):
        R.saliency_guided(net, x, y, fraction=0.25, fill=fill, absolute=absolute)
    handle.remove()
    score = plain_gradient(net, x, y, "logit")[0].view_as(x).mean(1).detach()
    for masked, ranked in ((seen[1], score), (seen[3], score.abs())):
        changed = (masked != x).any(1)
        assert (changed.sum((1, 2)) == int(0.25 * SIZE * SIZE)).all()
        for n in range(N):
            assert ranked[n][changed[n]].max() < ranked[n][~changed[n]].min()
        low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
        assert ((masked >= low) & (masked <= high)).all()
    torch.testing.assert_close(seen[0], x)


# ---- finite differences


def wide_net(act):
    """Units enough that any segment crosses some kinks."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(C if i == 0 else 32, 32, 3, padding=1) for i in range(3)]
    for conv in layers:
        nn.init.kaiming_normal_(conv.weight)
    layers = [module for conv in layers for module in (conv, act())]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, K)).double()


def cosine_with_double_backprop(net, norm, step):
    """Of the parameter gradients."""
    x, y = batch()
    values = (
        R.finite_difference_gradient_norm(net, x, y, norm=norm, step=step, kinks="ignore"),
        R.input_gradient_norm(net, x, y, norm=norm),
    )
    flat = (torch.cat([g.flatten() for g in gradients(value, net)]) for value in values)
    return F.cosine_similarity(*flat, dim=0).item()


@pytest.mark.parametrize("norm", ["l1", "l2", "squared"])
def test_finite_differences_are_for_smooth_networks(norm):
    """There they converge with the step; across ReLUs they are another regularizer."""
    for smooth in (make_net(), make_net().eval(), wide_net(nn.SiLU)):
        assert cosine_with_double_backprop(smooth, norm, 1e-3) > 0.99999
    for step in (1e-2, 1e-3):
        assert cosine_with_double_backprop(wide_net(nn.ReLU), norm, step) < 0.9


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("norm", ["l1", "l2", "squared"])
def test_finite_differences_have_an_error_of_second_order(norm, training):
    net, (x, y) = make_net().train(training), batch()
    exact = R.input_gradient_norm(net, x, y, norm=norm)
    found = gradients(exact, net)
    errors = []
    for h in (4e-3, 1e-3):
        value = R.finite_difference_gradient_norm(net, x, y, step=h, norm=norm)
        off = [(a - b).norm() for a, b in zip(gradients(value, net), found, strict=True)]
        errors.append(((value - exact).abs() / exact, sum(off) / sum(g.norm() for g in found)))
    for i in range(2):
        assert errors[1][i] < errors[0][i] / 12 and errors[1][i] < 1e-3


class Functional(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.conv, self.function = nn.Conv2d(C, K, 3).double(), function

    def forward(self, x):
        return self.function(self.conv(x)).mean((2, 3))


@pytest.mark.parametrize(
    "function",
    [
        *(F.relu, F.relu6, F.leaky_relu, F.hardswish, lambda z: z.clamp(min=0), torch.relu_),
        *(
            nn.PReLU().double(),
            nn.Threshold(0.1, 0),
            nn.MaxPool2d(2),
            lambda z: fi.ops.activation(z, "relu"),
        ),
    ],
)
def test_kinks_are_found(function):
    net, (x, y) = Functional(function), batch()
    with pytest.raises(ValueError, match="has kinks .*use input_gradient_norm, or smooth"):
        R.finite_difference_gradient_norm(net, x, y)
    with pytest.warns(UserWarning, match="has kinks"):
        value = R.finite_difference_gradient_norm(net, x, y, kinks="warn")
    assert value == R.finite_difference_gradient_norm(net, x, y, kinks="ignore")


@pytest.mark.parametrize("act", [nn.ReLU, nn.LeakyReLU, nn.SiLU])
def test_kinks_are_found_in_fused_models(act):
    net, (x, y) = fi.fuse(make_net(act)), batch()
    if act is nn.SiLU:
        assert R.finite_difference_gradient_norm(net, x, y) > 0
    else:
        with pytest.raises(ValueError, match=r"has kinks \((leaky_)?relu\)"):
            R.finite_difference_gradient_norm(net, x, y)


# ---- errors


@every_case
def test_errors_name_the_remedy(name):
    net, (x, y) = make_net(), batch()
    case = CASES[name]
    for context in (torch.no_grad, torch.inference_mode):
        with context(), pytest.raises(RuntimeError, match=r"outside torch.no_grad\(\)"):
            case(net, x, y)
    with pytest.raises(ValueError, match=r"x must lie in \[0, 1\]"):
        case(net, x * 255, y)
    with pytest.raises(ValueError, match=r"x must be images \(N, C, H, W\)"):
        case(net, x[0], y)
    with pytest.raises(ValueError, match=r"\(4, K\)|\(N, K\)"):
        case(net[:2], x, y)
    with pytest.raises(RuntimeError, match="has no graph|does not depend|differentiab"):
        case(Functional(lambda z: z.detach()), x, y)
    if name not in ("jacobian", "projected", "rrr"):
        with pytest.raises(ValueError, match=r"y must lie in \[0, 4\], got 1 to 5|class"):
            case(net, x, y + 1)


@pytest.mark.parametrize(
    ("function", "options", "error", "match"),
    [
        (R.input_gradient_norm, dict(norm="l3"), ValueError, "norm must be one of l1, l2, squared"),
        (R.input_gradient_norm, dict(of="prob"), ValueError, "of must be one of loss, logit, log"),
        (R.jacobian_norm, dict(n_proj=0), ValueError, "n_proj must be at least 1, got 0; exact"),
        (
            R.right_for_right_reasons,
            dict(mask=MASK[:, 0]),
            ValueError,
            r"mask must be \(4, 1, 9, 9",
        ),
        (R.right_for_right_reasons, dict(mask=MASK[:1]), ValueError, r"got \(1, 1, 9, 9\)"),
        (R.grad_align, dict(eps=0.0), ValueError, "eps must be a finite number > 0"),
        (R.local_gradient_alignment, dict(), ValueError, "either eps, .* or x_adv"),
        (
            R.local_gradient_alignment,
            dict(x_adv=MASK.double()),
            ValueError,
            r"x_adv must be \(4, 3",
        ),
        (R.cure, dict(h=-1.0), ValueError, "h must be a finite number > 0, got -1"),
        (R.local_linearity, LLR | dict(steps=0), ValueError, "steps must be at least 1"),
        (R.local_linearity, LLR | dict(mu=-1.0), ValueError, "mu must be a finite number >= 0"),
        (R.saliency_guided, dict(fraction=0.0), ValueError, r"fraction must lie in \(0, 1\]"),
        (R.saliency_guided, dict(fill="zero"), ValueError, "fill must be one of uniform, mean"),
        (R.finite_difference_gradient_norm, dict(kinks="no"), ValueError, "kinks must be one of"),
        (R.finite_difference_gradient_norm, dict(step=0.0), ValueError, "step must be a finite"),
    ],
)
def test_bad_options(function, options, error, match):
    with pytest.raises(error, match=match):
        function(make_net(), *batch(), **options)


def test_bad_attributions():
    for bad in (torch.zeros(3), torch.zeros(3, 4, 4, dtype=torch.int64), [[1.0]]):
        for prior in (R.total_variation, R.gini):
            with pytest.raises(ValueError, match=r"must be a floating point tensor \(N, ..."):
                prior(bad)
    with pytest.raises(ValueError, match=r"\(N, ..., H, W\), got \(3, 4\), torch.float32"):
        R.total_variation(torch.zeros(3, 4))


def test_one_step_of_training_with_each():
    """README's loop: the value goes down along its gradient."""
    for name, case in CASES.items():
        net, (x, y) = make_net().eval(), batch()
        before = case(net, x, y)
        with torch.no_grad():
            found = gradients(before, net)
            length = sum(g.square().sum() for g in found) ** 0.5
            for p, g in zip(net.parameters(), found, strict=True):
                p.sub_(g, alpha=1e-4 / length.item())
        assert case(net, x, y) < before, name
