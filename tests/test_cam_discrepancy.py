import pytest
import torch
from accuracy_rule import assert_as_accurate
from torch.autograd import gradcheck

from fastinterp import _native
from fastinterp.ops import cam_discrepancy

# (N, C, K, h, w): odd sizes, more than one tile of pixels, more classes than channels
SIZES = [(1, 1, 1, 1, 1), (3, 5, 7, 3, 5), (4, 100, 10, 7, 7), (2, 6, 3, 13, 11), (5, 3, 4, 1, 9)]


def plain(features, features_adv, head, class_weights, norm):
    maps = features - features_adv
    if head is not None:
        maps = torch.einsum("kc,nchw->nkhw", head, maps)
    distances = maps.flatten(2).norm(p=1 if norm == "l1" else 2, dim=2)
    return (class_weights * distances).sum(1), distances


def inputs(size, with_head, dtype=torch.float64):
    n, c, k, h, w = size
    features, features_adv = torch.randn(2, n, c, h, w, dtype=torch.float64).unbind()
    head = torch.randn(k, c, dtype=torch.float64) if with_head else None
    weights = torch.rand(n, k if with_head else c, dtype=torch.float64)
    return [None if t is None else t.to(dtype) for t in (features, features_adv, head, weights)]


def gradients(function, tensors, norm):
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    total, _ = function(*leaves, norm)
    total.backward(torch.linspace(0.5, 2, len(total)).to(total.dtype))
    return [t.grad for t in leaves if t is not None]


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("with_head", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values_and_gradients(backend, size, dtype, with_head, norm):
    tensors = inputs(size, with_head, dtype)
    exact_in = [None if t is None else t.double() for t in tensors]
    for value, same, exact in zip(
        cam_discrepancy(*tensors, norm), plain(*tensors, norm), plain(*exact_in, norm), strict=True
    ):
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_as_accurate(value, same, exact, factor=2)
    for value, same, exact in zip(
        gradients(cam_discrepancy, tensors, norm),
        gradients(plain, tensors, norm),
        gradients(plain, exact_in, norm),
        strict=True,
    ):
        assert value.dtype == dtype
        assert_as_accurate(value, same, exact, factor=3)


def test_hand_written_values(backend):
    features = torch.tensor([[[[1.0, 2.0]], [[0.0, 1.0]]]])
    features_adv = torch.tensor([[[[0.0, 4.0]], [[1.0, 1.0]]]])
    head = torch.tensor([[1.0, 0.0], [1.0, 2.0], [0.0, 0.0]])
    # maps of the difference: [1, -2], [-1, -2], [0, 0]
    weights = torch.tensor([[1.0, 0.5, 3.0]])
    value, distances = cam_discrepancy(features, features_adv, head, weights)
    assert distances.tolist() == [[3.0, 3.0, 0.0]]
    assert value.tolist() == [4.5]
    _, distances = cam_discrepancy(features, features_adv, head, weights, "l2")
    torch.testing.assert_close(distances, torch.tensor([[5.0**0.5, 5.0**0.5, 0.0]]))


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("with_head", [True, False])
def test_gradcheck(backend, with_head, norm):
    tensors = inputs((3, 4, 5, 3, 2), with_head)
    leaves = [t.requires_grad_() for t in tensors if t is not None]

    def function(*t):
        return cam_discrepancy(t[0], t[1], t[2] if with_head else None, t[-1], norm)

    assert gradcheck(function, leaves)


def test_small_maps_by_either_way(monkeypatch):
    tensors = inputs((3, 4, 4, 3, 2), False, torch.float32)
    results = []
    for name in ("auto", "cpu"):
        monkeypatch.setenv("FASTINTERP_BACKEND", name)
        results.append([*cam_discrepancy(*tensors), *gradients(cam_discrepancy, tensors, "l1")])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_per_class_distances_carry_gradients(backend):
    tensors = inputs((3, 4, 5, 3, 2), True)
    leaf = tensors[1].requires_grad_()
    _, distances = cam_discrepancy(*tensors)
    (got,) = torch.autograd.grad(distances[:, 1].sum(), leaf)
    (wanted,) = torch.autograd.grad(plain(*tensors, "l1")[1][:, 1].sum(), leaf)
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("with_head", [True, False])
def test_layouts_and_views(backend, with_head):
    tensors = inputs((4, 6, 5, 5, 3), with_head)
    features, features_adv, *rest = tensors
    expected = gradients(cam_discrepancy, tensors, "l1")
    parent = torch.randn(8, 7, 6, 4, dtype=torch.float64)
    parent[::2, 1:, 1:, :3] = features
    for one, other in (
        (features.to(memory_format=torch.channels_last), features_adv),
        (features, features_adv.to(memory_format=torch.channels_last)),
        (parent[::2, 1:, 1:, :3], features_adv),
        (features.transpose(2, 3).contiguous().transpose(2, 3), features_adv),
    ):
        got = gradients(cam_discrepancy, (one, other, *rest), "l1")
        # A gradient in another layout than its tensor's makes the convolution below it copy.
        assert got[1].stride() == other.stride()
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)
    expanded = features[:1].expand_as(features)
    torch.testing.assert_close(
        cam_discrepancy(expanded, features_adv, *rest),
        cam_discrepancy(expanded.contiguous(), features_adv, *rest),
    )


def test_equal_maps_have_zero_gradient(backend):
    features, _, head, weights = inputs((3, 4, 5, 3, 2), True)
    for norm in ("l1", "l2"):
        leaf = features.clone().requires_grad_()
        value, _ = cam_discrepancy(features, leaf, head, weights, norm)
        assert not value.any()
        (grad,) = torch.autograd.grad(value.sum(), leaf)
        assert not grad.any()


@pytest.mark.parametrize("size", [(0, 3, 2, 4, 4), (2, 3, 2, 0, 4)], ids=str)
def test_empty(backend, size):
    tensors = inputs(size, True)
    value, distances = cam_discrepancy(*tensors)
    assert value.shape == (size[0],) and distances.shape == (size[0], size[2])
    grads = gradients(cam_discrepancy, tensors, "l1")
    assert not grads[2].any() and grads[2].shape == tensors[2].shape


def test_mixed_dtypes_as_under_autocast(backend):
    features, features_adv, head, weights = inputs((3, 4, 5, 3, 2), True, torch.float32)
    low = features.bfloat16(), features_adv.bfloat16()
    value, _ = cam_discrepancy(*low, head, weights)
    wanted, _ = plain(*(t.float() for t in low), head, weights, "l1")
    torch.testing.assert_close(value, wanted)


def test_second_order_is_refused(backend):
    features, features_adv, head, weights = inputs((2, 3, 4, 2, 2), True)
    leaf = features_adv.requires_grad_()
    value, _ = cam_discrepancy(features, leaf, head, weights, "l2")
    (grad,) = torch.autograd.grad(value.sum(), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="second-order gradients of cam_discrepancy"):
        grad.square().sum().backward()


@pytest.mark.parametrize("with_head", [True, False])
def test_opcheck(backend, with_head):
    tensors = inputs((3, 4, 5, 3, 2), with_head, torch.float32)
    leaves = [None if t is None else t.requires_grad_() for t in tensors]
    torch.library.opcheck(torch.ops.fastinterp.cam_discrepancy.default, (*leaves, "l1"))
    _, distances = cam_discrepancy(*tensors)
    detached = [None if t is None else t.detach() for t in tensors]
    torch.library.opcheck(
        torch.ops.fastinterp.cam_discrepancy_backward.default,
        (detached[3], *detached[:3], distances.detach(), "l1", True, with_head),
    )


def test_same_bits_with_any_number_of_threads(monkeypatch):
    monkeypatch.setenv("FASTINTERP_BACKEND", "cpu")
    tensors = inputs((37, 50, 10, 9, 9), True, torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(gradients(cam_discrepancy, tensors, "l1"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_every_output_element_is_written():
    """The kernels are handed NaN and must overwrite all of it."""
    n, c, k, h, w = 3, 5, 4, 3, 7
    features, features_adv, head, weights = inputs((n, c, k, h, w), True, torch.float32)
    total, distances = torch.full((n,), torch.nan), torch.full((n, k), torch.nan)
    grad, grad_head = torch.full((n, c, h, w), torch.nan), torch.full((k, c), torch.nan)
    strides = (c * h * w, h * w, 1)
    common = (0, 0, n, c, k, h * w, features.data_ptr(), strides)
    common += (features_adv.data_ptr(), strides, head.data_ptr(), 1)
    _native.core.cpu_cam_discrepancy_forward(
        *common, weights.data_ptr(), total.data_ptr(), distances.data_ptr()
    )
    _native.core.cpu_cam_discrepancy_backward(
        *common,
        weights.data_ptr(),
        distances.data_ptr(),
        grad.data_ptr(),
        strides,
        grad_head.data_ptr(),
    )
    for t in (total, distances, grad, grad_head):
        assert torch.isfinite(t).all()


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (dict(norm="linf"), ValueError, "norm must be one of l1, l2"),
        (dict(features=torch.rand(2, 3, 4)), ValueError, r"must both be \(N, C, h, w\)"),
        (dict(head=torch.rand(5, 2)), ValueError, r"head must be \(K, 3\)"),
        (dict(class_weights=torch.rand(2, 3)), ValueError, r"class_weights must be \(2, 5\)"),
    ],
)
def test_bad_input(change, error, match):
    arguments = dict(
        features=torch.rand(2, 3, 4, 4),
        features_adv=torch.rand(2, 3, 4, 4),
        head=torch.rand(5, 3),
        class_weights=torch.rand(2, 5),
    )
    with pytest.raises(error, match=match):
        cam_discrepancy(**(arguments | change))
