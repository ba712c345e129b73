"""Total variation, Gini, saliency-guided training."""

import pytest
import torch
from regularizer_formulas import SIZE, N, batch, make_net, plain_gradient

from fastinterp import regularizers as R


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


def test_bad_attributions():
    for bad in (torch.zeros(3), torch.zeros(3, 4, 4, dtype=torch.int64), [[1.0]]):
        for prior in (R.total_variation, R.gini):
            with pytest.raises(ValueError, match=r"must be a floating point tensor \(N, ..."):
                prior(bad)
    with pytest.raises(ValueError, match=r"\(N, ..., H, W\), got \(3, 4\), torch.float32"):
        R.total_variation(torch.zeros(3, 4))


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


def test_a_prior_of_ones_own():
    net, (x, y) = make_net(), batch()
    options = dict(baselines=x[:1], generator=torch.Generator().manual_seed(1))
    value = R.expected_gradients_prior(net, x, y, prior=lambda maps: maps[0].abs().sum(), **options)
    assert value == 0  # from x to itself
    with pytest.raises(ValueError, match="prior must be one of total_variation, gini, got 'l1'"):
        R.expected_gradients_prior(net, x, y, prior="l1", **options)
