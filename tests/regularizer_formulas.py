"""The neighbours of the interpretation regularizer once more, in plain torch."""

import copy
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

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
    source = torch.Generator().manual_seed(6)
    return torch.rand(7, *x.shape[1:], dtype=torch.float64, generator=source).to(x)


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


def plain_expected_gradients(net, x, y):
    """Two draws of a baseline and of a point on the way to x, in evaluation mode."""
    net, source = copy_of_parameters_in_eval(net), seeded()
    drawn = torch.randint(7, (2, N), generator=source)
    t = torch.rand(2, N, 1, 1, 1, generator=source)
    total = 0
    for i in range(2):
        b = baselines(x)[drawn[i]]
        g, _ = plain_gradient(net, b + t[i].to(x) * (x - b), y, "logit")
        total = total + (x - b) * g.view_as(x) / 2
    return total


def plain_total_variation(net, x, y):
    m = plain_expected_gradients(net, x, y)
    down, right = m[:, :, 1:] - m[:, :, :-1], m[..., 1:] - m[..., :-1]
    return (down.abs().sum() + right.abs().sum()) / N


def plain_gini(net, x, y):
    a = plain_expected_gradients(net, x, y).abs().mean(0).flatten()
    return -(a[:, None] - a).abs().sum() / (len(a) * a.sum())


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
    ),
    "eg-total-variation": Case(
        R.expected_gradients_prior,
        dict(baselines=baselines, samples=2, generator=seeded),
        plain_total_variation,
    ),
    "eg-gini": Case(
        R.expected_gradients_prior,
        dict(baselines=baselines, samples=2, generator=seeded, prior="gini"),
        plain_gini,
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
UNSHARED = ("igr", "eg-total-variation", "eg-gini")  # evaluation mode: no logits on the way


def gradients(value, net):
    """Of the parameters that are not frozen; the graph is kept."""
    parameters = [p for p in net.parameters() if p.requires_grad]
    found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]


# ---- networks


class Functional(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.conv, self.function = nn.Conv2d(C, K, 3).double(), function

    def forward(self, x):
        return self.function(self.conv(x)).mean((2, 3))


class Dead(nn.Module):
    """Some examples have no gradient at all."""

    def __init__(self, net, examples):
        super().__init__()
        self.net, self.examples = net, examples

    def forward(self, x):
        alive = torch.ones(len(x), 1, 1, 1, dtype=x.dtype)
        alive[self.examples] = 0
        return self.net(x * alive)
