"""Metrics of accuracies and maps against scipy, scikit-learn and arithmetic."""

import math

import pytest
import torch
from scipy import stats
from torch.nn import functional as F

from fastinterp import maps as fi_maps
from fastinterp import metrics

SHAPES = [(5, 7, 7), (3, 1, 4), (4, 2, 3, 3), (2, 33)]


def pair(shape, ties, dtype=torch.float32):
    a, b = torch.randn(2, *shape, dtype=dtype).unbind()
    return ((a * 2).round(), (b * 2).round()) if ties else (a, b)


@pytest.mark.parametrize(("correct", "examples"), [(0, 10), (10, 10), (158, 200), (1, 10_000)])
@pytest.mark.parametrize("confidence", [0.95, 0.5])
def test_wilson_interval(correct, examples, confidence):
    test = stats.binomtest(correct, examples)
    expected = test.proportion_ci(confidence, method="wilson")
    low, high = metrics.wilson_interval(correct, examples, confidence)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert 0 <= low <= correct / examples <= high <= 1


@pytest.mark.parametrize("bad", [(3, 2), (-1, 2), (0, 0), (1, 2, 0.0), (1, 2, 1.0)])
def test_wilson_interval_refuses(bad):
    with pytest.raises(ValueError, match="between 0 and"):
        metrics.wilson_interval(*bad)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    ("ours", "oracle"),
    [(metrics.kendall_tau, stats.kendalltau), (metrics.spearman, stats.spearmanr)],
)
def test_rank_correlations_are_scipys(ours, oracle, shape, ties):
    a, b = pair(shape, ties)
    expected = [
        oracle(row.numpy(), other.numpy()).statistic  # as exact as its input, in scipy 1.18
        for row, other in zip(a.double().flatten(1), b.double().flatten(1), strict=True)
    ]
    result = ours(a, b)
    assert result.dtype == torch.float64 and result.shape == shape[:1]
    torch.testing.assert_close(
        result, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12, equal_nan=True
    )


@pytest.mark.parametrize("metric", [metrics.kendall_tau, metrics.spearman])
def test_rank_correlations_of_what_has_no_order(metric):
    constant, rising = torch.ones(1, 3, 3), torch.arange(9.0).view(1, 3, 3)
    assert metric(constant, rising).isnan().all()
    assert metric(rising, rising).item() == pytest.approx(1)
    assert metric(rising, -rising).item() == pytest.approx(-1)
    assert metric(rising[:0], rising[:0]).shape == (0,)


@pytest.mark.parametrize("metric", [metrics.kendall_tau, metrics.spearman])
def test_rank_correlations_of_views(metric):
    a, b = torch.randn(2, 6, 4, 5).unbind()
    expected = metric(a.transpose(1, 2)[::2].contiguous(), b.transpose(1, 2)[::2].contiguous())
    assert torch.equal(metric(a.transpose(1, 2)[::2], b.transpose(1, 2)[::2]), expected)


def test_top_k_intersection():
    a = torch.tensor([[5.0, 4, 3, 2, 1], [0, 0, 0, 0, 0]])
    b = torch.tensor([[5.0, 1, 4, 2, 3], [0, 0, 0, 0, 1]])
    torch.testing.assert_close(
        metrics.top_k_intersection(a, b, 2), torch.tensor([0.5, 0.5], dtype=torch.float64)
    )
    torch.testing.assert_close(
        metrics.top_k_intersection(a, b, 3), torch.tensor([2 / 3, 2 / 3], dtype=torch.float64)
    )
    assert metrics.top_k_intersection(a, b, 5).eq(1).all()
    for k in (0, 6):
        with pytest.raises(ValueError, match=f"between 1 and the 5 cells of a map, got {k}"):
            metrics.top_k_intersection(a, b, k)


def test_cosine_similarity():
    a, b = pair((4, 3, 5), ties=False)
    expected = F.cosine_similarity(a.double().flatten(1), b.double().flatten(1))
    torch.testing.assert_close(metrics.cosine_similarity(a, b), expected)
    assert metrics.cosine_similarity(a, 0 * b).eq(0).all()


@pytest.mark.parametrize(("norm", "order"), [("l1", 1), ("l2", 2)])
def test_normalised_discrepancy(norm, order):
    clean, moved = torch.randn(2, 3, 4, 5, 6).unbind()
    weights = torch.rand(3, 4)
    for used in (None, weights):
        value = metrics.normalised_discrepancy(clean, moved, used, norm)
        for n in range(3):
            each = weights[n] if used is not None else torch.ones(4)
            sizes = [
                sum(w * m[n, c].flatten().norm(order) for c, w in enumerate(each))
                for m in (moved - clean, clean)
            ]
            assert value[n].item() == pytest.approx((sizes[0] / sizes[1]).item(), rel=1e-5)
    # The scale of a network's maps does not matter, and a map twice as large is 1 away.
    assert metrics.normalised_discrepancy(100 * clean, 100 * moved) == pytest.approx(
        metrics.normalised_discrepancy(clean, moved)
    )
    torch.testing.assert_close(
        metrics.normalised_discrepancy(clean, 2 * clean), torch.ones(3, dtype=torch.float64)
    )


def test_slope():
    x = torch.tensor([1.0, 1.2, 1.4, 2.0]).expand(2, 4)
    y = torch.stack([3 * x[0] - 1, torch.tensor([0.3, 0.1, 0.4, 0.2])])
    expected = stats.linregress(x[1].numpy(), y[1].numpy()).slope
    torch.testing.assert_close(
        metrics.slope(x, y),
        torch.tensor([3.0, expected], dtype=torch.float64),
        rtol=1e-6,
        atol=1e-6,
    )
    gaps = y.clone()
    gaps[0, 2] = torch.nan
    assert metrics.slope(x, gaps)[0].item() == pytest.approx(3, rel=1e-5)
    assert metrics.slope(x, torch.full_like(y, torch.nan)).isnan().all()
    assert metrics.slope(torch.ones(2, 4), y).isnan().all()


def test_completeness_gap(small_net, batch):
    # Without biases the network is homogeneous and two points are as good as any.
    torch.nn.init.normal_(small_net.conv(0).bias)
    x, _ = batch
    cam, logits = fi_maps.cam(small_net, x, detach=True, return_logits=True)
    assert metrics.completeness_gap(cam, logits, "mean").max() < 1e-5
    off = metrics.completeness_gap(cam, logits + 0.5, "mean")
    assert off.shape == (8, 10) and (off - 0.5).abs().max() < 1e-5
    fine, coarse = (
        metrics.completeness_gap(
            fi_maps.integrated_gradients(small_net, x, 3, steps=steps, detach=True)[:, None],
            (logits - small_net(torch.zeros_like(x)))[:, 3:4],
        ).mean()
        for steps in (64, 2)
    )
    assert fine < coarse / 2


def test_local_lipschitz_of_a_linear_map():
    """The largest singular value bounds it and ascent comes near."""
    matrix = torch.randn(6, 9, dtype=torch.float64)
    x = torch.rand(4, 1, 3, 3, dtype=torch.float64)

    def explain(z):
        return (z.flatten(1) @ matrix.T).view(-1, 1, 2, 3)

    bound = torch.linalg.matrix_norm(matrix, 2).item()
    sampled = metrics.local_lipschitz(
        explain, x, eps=0.1, steps=0, generator=torch.Generator().manual_seed(1)
    )
    climbed = metrics.local_lipschitz(
        explain, x, eps=0.1, steps=20, generator=torch.Generator().manual_seed(1)
    )
    assert (climbed <= bound * (1 + 1e-9)).all() and (climbed >= sampled).all()
    assert climbed.mean() > sampled.mean()
    more = metrics.local_lipschitz(
        explain, x, eps=0.1, steps=20, restarts=3, generator=torch.Generator().manual_seed(1)
    )
    assert (more >= climbed).all()


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda a: metrics.kendall_tau(a, a[:1]), ValueError, "a and b must both be maps"),
        (lambda a: metrics.spearman(a.int(), a), TypeError, "a must be a floating point tensor"),
        (lambda a: metrics.spearman(a, 3), TypeError, "b must be a floating point tensor .* int"),
        (lambda a: metrics.cosine_similarity(a[0, 0], a[0, 0]), ValueError, "must both be maps"),
        (lambda a: metrics.normalised_discrepancy(a, a, norm="l3"), ValueError, "l1 or l2"),
        (lambda a: metrics.normalised_discrepancy(a, a[:1]), ValueError, "maps and maps_adv"),
        (lambda a: metrics.slope(a, a[:1]), ValueError, "same shape"),
        (lambda a: metrics.completeness_gap(a, a[:, 0]), ValueError, "scores \\(N, k\\)"),
        (lambda a: metrics.completeness_gap(a, a[..., 0], "max"), ValueError, "sum or mean"),
    ],
)
def test_bad_input(call, kind, message):
    with pytest.raises(kind, match=message):
        call(torch.rand(2, 3, 4))


def test_local_lipschitz_refuses():
    x = torch.rand(1, 1, 3, 3)
    for bad in (dict(eps=-1.0), dict(eps=math.inf), dict(eps=0.1, restarts=0)):
        with pytest.raises(ValueError, match="eps|restarts|step_size"):
            metrics.local_lipschitz(lambda z: z, x, **bad)
