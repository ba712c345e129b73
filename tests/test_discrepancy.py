import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from fastinterp.discrepancy import CLASSES, NORMS, class_weights, discrepancy, map_distance
from fastinterp.models import create_model


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 1, 3, 2, 2)])
def test_distance_is_differentiable_twice(norm, shape):
    a, b = torch.randn(2, *shape, dtype=torch.float64)
    leaves = (a.requires_grad_(), b.requires_grad_())
    assert gradcheck(lambda a, b: map_distance(a, b, norm), leaves)
    assert gradgradcheck(lambda a, b: map_distance(a, b, norm), leaves)
    pixels = a[0, 0].numel()
    torch.testing.assert_close(
        map_distance(a, b, norm, "pixels"), map_distance(a, b, norm) / pixels
    )


@pytest.mark.parametrize("norm", NORMS)
def test_equal_and_constant_maps(norm):
    """At x' = x the gradient is zero and finite, whatever the norm."""
    a = torch.randn(2, 3, 4, 4, requires_grad=True)
    for b in (a.detach(), torch.zeros_like(a)):
        (grad,) = torch.autograd.grad(map_distance(a, b, norm).sum(), a)
        assert torch.isfinite(grad).all()
    (grad,) = torch.autograd.grad(map_distance(a, a.detach(), norm).sum(), a)
    torch.testing.assert_close(grad, torch.zeros_like(grad), atol=1e-5, rtol=0)
    constant = torch.full((2, 3, 4, 4), 7.0, requires_grad=True)
    value = map_distance(constant, a.detach(), "pearson")
    torch.testing.assert_close(value, torch.ones_like(value), atol=1e-4, rtol=0)


def test_low_precision_maps_are_compared_in_float32():
    a, b = torch.randn(2, 2, 3, 4, 4).bfloat16()
    for norm in NORMS:
        value = map_distance(a, b, norm)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, map_distance(a.float(), b.float(), norm))


def test_class_weights():
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 1.0]])
    y = torch.tensor([1, 1])
    assert class_weights("one", logits, y).tolist() == [[0, 1, 0], [0, 1, 0]]
    assert class_weights("two", logits, y).tolist() == [[0.5, 0.5, 0], [0, 1, 0]]
    torch.testing.assert_close(class_weights("all", logits, y), torch.full((2, 3), 1 / 3))
    weighted = class_weights("weighted", logits, y)
    p = logits.softmax(1)
    q = p[:, [0, 2]] / p[:, [0, 2]].sum(1, keepdim=True)
    torch.testing.assert_close(weighted[:, [0, 2]], q)
    assert weighted[:, 1].tolist() == [1, 1]
    with pytest.raises(ValueError, match="classes must be one of one, two, all, weighted"):
        class_weights("three", logits, y)


@pytest.mark.parametrize("name", ["small", "pool", "wresnet"])
@pytest.mark.parametrize("seed", range(5))
def test_proposition_1(name, seed):
    """d_2class(x, x') >= (f_t(x) - f_t'(x)) / 2 for every x' that is classified t'."""
    torch.manual_seed(seed)
    net = create_model(name, 1, 10).double()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1 + 2 * torch.rand(()))
        x, x_adv = torch.rand(2, 40, 1, 28, 28, dtype=torch.float64)
        logits, logits_adv = net(x), net(x_adv)
        y = torch.randint(0, 10, (40,))
        predicted = logits_adv.argmax(1)
        y = torch.where(y == predicted, (y + 1) % 10, y)  # x' is misclassified
        bound = (logits.gather(1, y[:, None]) - logits.gather(1, predicted[:, None]))[:, 0] / 2
        features = net.features(x), net.features(x_adv)
        proper, one = (
            discrepancy(
                *features, net.head.weight, logits_adv, y, classes=classes, normalize="pixels"
            )
            for classes in ("two", "one")
        )
    assert (proper >= bound - 1e-12).all()
    assert (proper < one).any()  # the one-class distance is another number


def test_one_class_has_no_such_bound():
    """Two classes whose maps differ while that of the true class does not move at all."""
    features = torch.tensor([[[[1.0]], [[0.0]]]])
    moved = torch.tensor([[[[1.0]], [[3.0]]]])
    head = torch.eye(2)
    logits_adv, y = moved.mean((2, 3)), torch.tensor([0])
    one = discrepancy(features, moved, head, logits_adv, y, classes="one", normalize="pixels")
    two = discrepancy(features, moved, head, logits_adv, y, classes="two", normalize="pixels")
    assert one.item() == 0 and two.item() >= (1.0 - 0.0) / 2


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (dict(norm="l3"), "norm must be one of l1, l2, squared_l2, cosine, pearson, got 'l3'"),
        (dict(normalize="area"), "normalize must be one of none, pixels, got 'area'"),
        (dict(maps_adv=torch.zeros(2, 3, 4)), r"must both be \(N, k, ...\)"),
    ],
)
def test_bad_input(change, match):
    given = dict(maps=torch.zeros(2, 3, 4, 4), maps_adv=torch.zeros(2, 3, 4, 4))
    with pytest.raises(ValueError, match=match):
        map_distance(**(given | change))


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_the_fused_distances_are_those_of_the_maps(backend, classes, norm):
    features, features_adv = torch.randn(2, 3, 6, 4, 5, dtype=torch.float64)
    head, logits = torch.randn(7, 6, dtype=torch.float64), torch.randn(3, 7, dtype=torch.float64)
    y = torch.tensor([0, 3, 6])
    maps = [torch.einsum("kc,nchw->nkhw", head, f) for f in (features, features_adv)]
    expected = (class_weights(classes, logits, y) * map_distance(*maps, norm)).sum(1)
    got = discrepancy(features, features_adv, head, logits, y, classes=classes, norm=norm)
    torch.testing.assert_close(got, expected)
