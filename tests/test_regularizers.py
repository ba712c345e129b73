"""What holds for every neighbour of the interpretation regularizer."""

import copy

import pytest
import torch
from regularizer_formulas import (
    CASES,
    LLR,
    MASK,
    UNSHARED,
    Dead,
    Functional,
    K,
    N,
    batch,
    gradients,
    make_net,
)
from torch import nn
from torch.nn import functional as F

import fastinterp as fi
from fastinterp import regularizers as R

every_case = pytest.mark.parametrize("name", CASES)


@every_case
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("fused", [False, True], ids=["stock", "fused"])
def test_value_and_parameter_gradients_are_those_of_the_plain_formula(name, training, fused):
    net, (x, y) = make_net().train(training), batch()
    ours = fi.fuse(copy.deepcopy(net)) if fused else copy.deepcopy(net)
    value, expected = CASES[name](ours, x, y), CASES[name].plain(net, x, y)
    assert value.shape == () and expected.abs() > 1e-6
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=0)
    for got, wanted in zip(gradients(value, ours), gradients(expected, net), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-7, atol=1e-10 * expected.abs().item())


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
    alone = CASES[name](net, x, y)
    value, logits = CASES[name](net, x, y, return_logits=True)
    torch.testing.assert_close(value, alone)
    expected = copy.deepcopy(net)(x)
    torch.testing.assert_close(logits, expected)
    got = gradients(F.cross_entropy(logits, y), net)
    again = copy.deepcopy(net)
    torch.testing.assert_close(got, gradients(F.cross_entropy(again(x), y), again))


@pytest.mark.parametrize("name", [name for name in CASES if name not in UNSHARED])
@pytest.mark.parametrize("fused", [False, True], ids=["stock", "fused"])
def test_the_pass_whose_logits_are_returned_counts(name, fused):
    """Running statistics and dropout masks are those of a step with model(x)."""
    net, (x, y) = nn.Sequential(nn.Dropout(0.2), *make_net()), batch()
    plain = copy.deepcopy(net)
    net = fi.fuse(net) if fused else net
    for seed in range(2):
        torch.manual_seed(seed)
        _, logits = CASES[name](net, x, y, return_logits=True)
        torch.manual_seed(seed)
        torch.testing.assert_close(logits, plain(x))
        torch.testing.assert_close(dict(net.named_buffers()), dict(plain.named_buffers()))


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


@every_case
def test_sums_of_low_precision_networks_are_in_float32(name):
    net, (x, y) = make_net().bfloat16(), batch(torch.bfloat16)
    value = CASES[name](net, x, y)
    assert value.dtype == torch.float32 and torch.isfinite(value)
    if name not in UNSHARED:
        assert CASES[name](net, x, y, return_logits=True)[1].dtype == torch.float32
    if name.startswith(("norm", "jacobian", "rrr")):  # the others are differences
        exact = CASES[name](make_net().bfloat16().double(), x.double(), y)
        torch.testing.assert_close(value.double(), exact, rtol=0.1, atol=0)


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


@pytest.mark.parametrize("name", ["norm-l2-log_prob", "grad_align", "lga", "cure", "llr"])
def test_examples_without_a_gradient(name):
    net, (x, y) = make_net().eval(), batch()
    some = CASES[name](Dead(net, [0, 1]), x, y)
    none = CASES[name](Dead(net, [0, 1, 2, 3]), x, y)
    assert some > 0 and none == 0
    assert all(torch.isfinite(g).all() for g in gradients(some, net) + gradients(none, net))


def test_a_loop_draws_new_dropout_masks():
    """Nothing else may draw random numbers between two steps."""
    net, (x, y) = nn.Sequential(nn.Dropout(0.5), *make_net()), batch()
    values = [R.input_gradient_norm(net, x, y).item() for _ in range(3)]
    assert len(set(values)) == 3


@pytest.mark.parametrize("name", ["norm-squared-loss", "llr", "cure"])
def test_wrapped_models(name):
    """The second derivative of a compiled graph raises; uncompiled it is there."""
    net, (x, y) = make_net(), batch()
    expected = CASES[name](net, x, y)
    torch.testing.assert_close(CASES[name](nn.DataParallel(net), x, y), expected)
    compiled = torch.compile(net, backend="aot_eager")
    with pytest.warns(RuntimeWarning, match="cannot be differentiated again"):
        value = CASES[name](compiled, x, y)
    torch.testing.assert_close(gradients(value, net), gradients(expected, net))


@every_case
def test_errors_name_the_remedy(name):
    net, (x, y) = make_net(), batch()
    case = CASES[name]
    for context in (torch.no_grad, torch.inference_mode):
        with context(), pytest.raises(RuntimeError, match=r"outside"):
            case(net, x, y)
    with pytest.raises(ValueError, match=r"x must lie in \[0, 1\]"):
        case(net, x * 255, y)
    with pytest.raises(ValueError, match=r"must be images \(N, C, H, W\)"):
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
        (
            R.input_gradient_norm,
            dict(of="prob"),
            ValueError,
            "of must be one of logit, log_prob, loss",
        ),
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
