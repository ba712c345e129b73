import math

import pytest
import torch
import torch.nn.functional as F
from accuracy_rule import assert_as_accurate
from torch.autograd import gradcheck, gradgradcheck

from fastinterp import _native
from fastinterp.ops import cross_entropy

SIZES = [(1, 1), (1, 2), (7, 10), (33, 257), (130, 1000)]
REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
SMOOTHING = pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])


def inputs(size, dtype=torch.float64):
    """Logits, targets of which some are ignored, an upstream gradient per example, a cotangent."""
    n, k = size
    target = torch.randint(0, k, (n,))
    target[2::5] = -100
    logits, v = 3 * torch.randn(size, dtype=torch.float64), torch.randn(size, dtype=torch.float64)
    return logits.to(dtype), target, torch.rand(n, dtype=torch.float64) + 0.5, v.to(dtype)


def run(function, logits, target, grad, v, reduction, smoothing):
    """Loss, gz, gc2 and gz2 without history."""
    leaf = logits.detach().requires_grad_()
    loss = function(leaf, target, reduction=reduction, label_smoothing=smoothing)
    grad = (grad if reduction == "none" else grad[0]).to(loss.dtype).requires_grad_()
    (gz,) = torch.autograd.grad(loss, leaf, grad, create_graph=True)
    gc2, gz2 = torch.autograd.grad(gz, (grad, leaf), v)
    return loss.detach(), gz.detach(), gc2, gz2


@REDUCTIONS
@SMOOTHING
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_as_torch(backend, size, dtype, smoothing, reduction):
    logits, target, grad, v = inputs(size, dtype)
    got = run(cross_entropy, logits, target, grad, v, reduction, smoothing)
    plain = run(F.cross_entropy, logits, target, grad, v, reduction, smoothing)
    exact = run(
        F.cross_entropy, logits.double(), target, grad.double(), v.double(), reduction, smoothing
    )
    if reduction != "none":
        # The one number gc2 is a sum over all logits that nearly cancels.
        value, wanted, terms = got[2], exact[2], exact[1] * v.double() / grad[0]
        error = (value.double() - wanted).abs()
        assert error <= 4 * torch.finfo(value.dtype).eps * (1 + terms.abs().sum())
        got, plain, exact = ((*t[:2], t[3]) for t in (got, plain, exact))
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    dtypes = (acc, dtype, acc, dtype) if reduction == "none" else (acc, dtype, dtype)
    for value, a, b, factor, kind in zip(got, plain, exact, (2, 3, 4, 4), dtypes, strict=False):
        assert value.dtype == kind
        if size[1] == 1:  # zero but for roundings
            torch.testing.assert_close(value.double(), b, atol=1e-6, rtol=0)
        elif dtype == torch.float64:  # where plain torch is the exact value, roundings and all
            torch.testing.assert_close(value, a, atol=1e-13, rtol=1e-11)
        else:
            assert_as_accurate(value, a, b, factor)


def test_hand_written_values(backend):
    logits = torch.tensor([[0.0, math.log(3.0)], [5.0, 5.0]])
    losses = cross_entropy(logits, torch.tensor([1, 0]), "none")
    torch.testing.assert_close(losses, torch.tensor([math.log(4 / 3), math.log(2)]))
    logits, target, v = logits[:1], torch.tensor([1]), torch.tensor([[4.0, 0.0]])
    _, gz, gc2, gz2 = run(cross_entropy, logits, target, torch.tensor([2.0]), v, "mean", 0.0)
    # p = [1/4, 3/4], c = 2
    torch.testing.assert_close(gz, torch.tensor([[0.5, -0.5]]))
    torch.testing.assert_close(gc2, torch.tensor(1.0))
    torch.testing.assert_close(gz2, torch.tensor([[1.5, -1.5]]))


@REDUCTIONS
@SMOOTHING
def test_gradcheck(backend, smoothing, reduction):
    logits, target, _, _ = inputs((6, 5))
    logits.requires_grad_()

    def function(z):
        return cross_entropy(z, target, reduction, smoothing)

    assert gradcheck(function, logits)
    assert gradgradcheck(function, logits)


@REDUCTIONS
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_large_logits(backend, offset, reduction):
    logits, target, grad, v = inputs((9, 10), torch.float32)
    logits = logits * 30 + offset
    got = run(cross_entropy, logits, target, grad, v, reduction, 0.0)
    exact = run(F.cross_entropy, logits.double(), target, grad, v.double(), reduction, 0.0)
    for value, wanted in zip(got, exact, strict=True):
        torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-6)


def test_infinite_and_nan_logits(backend):
    target = torch.tensor([0, 0, 1, 1])
    logits = torch.tensor([[1.0, -math.inf], [math.nan, 0.0], [0.0, -math.inf], [0.0, 1.0]])
    got = cross_entropy(logits, target, "none")
    wanted = F.cross_entropy(logits, target, reduction="none")
    torch.testing.assert_close(got, wanted, equal_nan=True)


@REDUCTIONS
def test_no_example_counts(backend, reduction):
    target = torch.full((3,), 7)
    logits = torch.randn(3, 4, requires_grad=True)
    for z, y in ((logits, target), (logits[:0], target[:0])):
        got = cross_entropy(z, y, reduction, ignore_index=7)
        wanted = F.cross_entropy(z, y, reduction=reduction, ignore_index=7)
        torch.testing.assert_close(got, wanted, equal_nan=True)
    (gz,) = torch.autograd.grad(cross_entropy(logits, target, "sum", ignore_index=7), logits)
    assert not gz.any()


@REDUCTIONS
def test_views(backend, reduction):
    logits, target, grad, v = inputs((7, 10), torch.float32)
    expected = run(cross_entropy, logits, target, grad, v, reduction, 0.1)
    wide, pairs = torch.randn(14, 30), torch.stack([target, target - 5], 1)
    wide[::2, 5:25:2] = logits
    for view in (wide[::2, 5:25:2], logits.T.contiguous().T):
        cotangent = v.T.contiguous().T
        got = run(cross_entropy, view, pairs[:, 0], grad, cotangent, reduction, 0.1)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)
    row = logits[:1].expand_as(logits)
    for a, b in zip(
        run(cross_entropy, row, target, grad[:1].expand_as(grad), v, reduction, 0.1),
        run(cross_entropy, row.clone(), target, grad[:1].repeat(7), v, reduction, 0.1),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_small_batches_by_either_way(monkeypatch):
    for size in ((16, 10), (200, 500)):
        arguments = (*inputs(size, torch.bfloat16), "mean", 0.1)
        results = []
        for name in ("auto", "cpu"):
            monkeypatch.setenv("FASTINTERP_BACKEND", name)
            results.append(run(cross_entropy, *arguments))
        for a, b in zip(*results, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["auto", "cpu"])
def test_float32_under_autocast(monkeypatch, name):
    monkeypatch.setenv("FASTINTERP_BACKEND", name)
    logits, target, _, _ = inputs((5, 4), torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert cross_entropy(logits, target).dtype == torch.float32
        assert cross_entropy(logits.float(), target).dtype == torch.float32


def test_each_second_order_gradient_alone(backend):
    logits, target, grad, v = inputs((7, 10))
    _, _, gc2, gz2 = run(cross_entropy, logits, target, grad, v, "none", 0.1)
    leaf = logits.clone().requires_grad_()
    loss = cross_entropy(leaf, target, "none", 0.1)
    (gz,) = torch.autograd.grad(loss, leaf, grad, create_graph=True)
    assert torch.equal(torch.autograd.grad(gz, leaf, v)[0], gz2)
    upstream = grad.clone().requires_grad_()
    (gz,) = torch.autograd.grad(loss, leaf, upstream, create_graph=True)
    assert torch.equal(torch.autograd.grad(gz, upstream, v)[0], gc2)


def test_third_order_is_refused(backend):
    logits, target, _, _ = inputs((7, 10))
    leaf = logits.requires_grad_()
    (gz,) = torch.autograd.grad(cross_entropy(leaf, target), leaf, create_graph=True)
    (gz2,) = torch.autograd.grad(gz.square().sum(), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="third-order gradients of cross_entropy"):
        gz2.sum().backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(backend, reduction):
    logits, target, grad, v = inputs((7, 10), torch.float32)
    grad = grad.float() if reduction == "none" else grad[0].float()
    how = (reduction, 0.1, -100)
    ops = torch.ops.fastinterp
    torch.library.opcheck(
        ops.cross_entropy.default, (logits.clone().requires_grad_(), target, *how)
    )
    _, shift, scale = ops.cross_entropy(logits, target, *how)
    saved = (logits.clone().requires_grad_(), target, shift, scale)
    torch.library.opcheck(
        ops.cross_entropy_backward.default, (grad.clone().requires_grad_(), *saved, *how)
    )
    saved = (logits, target, shift, scale)
    for need in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(
            ops.cross_entropy_backward_backward.default, (v, grad, *saved, *how, *need)
        )


def test_same_bits_with_any_number_of_threads(monkeypatch):
    monkeypatch.setenv("FASTINTERP_BACKEND", "cpu")
    arguments = (*inputs((311, 100), torch.float32), "mean", 0.1)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(cross_entropy, *arguments))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_every_output_element_is_written():
    """The kernels are handed NaN and must overwrite all of it."""
    n, k = 6, 37
    logits, target, grad, v = inputs((n, k), torch.float32)
    grad = grad.float()
    shift, scale = torch.full((n, 2), torch.nan), torch.full((), torch.nan)
    losses, total = torch.full((n,), torch.nan), torch.full((), torch.nan)
    common = (0, 2, n, k, 0.1, -100)
    common += (*(t.data_ptr() for t in (logits, target, shift, scale)), 2)
    core = _native.core
    assert core.cpu_cross_entropy(*common, losses.data_ptr(), total.data_ptr()) == -1
    gz, gz2 = torch.full((2, n, k), torch.nan)
    gc2 = torch.full((n,), torch.nan)
    upstream = (grad.data_ptr(), 1)
    core.cpu_cross_entropy_backward(*common, *upstream, 0, 0, gz.data_ptr())
    core.cpu_cross_entropy_backward_backward(
        *common, *upstream, v.data_ptr(), gc2.data_ptr(), gz2.data_ptr()
    )
    for t in (shift, scale, losses, total, gz, gc2, gz2):
        assert torch.isfinite(t).all()


@pytest.mark.parametrize("name", ["auto", "cpu", "reference"])
@pytest.mark.parametrize("wrong", [-1, 4])
def test_targets_out_of_range(monkeypatch, name, wrong):
    monkeypatch.setenv("FASTINTERP_BACKEND", name)
    target = torch.tensor([0, wrong, 1])
    with pytest.raises(IndexError, match=f"arget {wrong} "):
        cross_entropy(torch.randn(3, 4), target)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (dict(logits=torch.rand(4)), ValueError, r"logits must be \(N, K\)"),
        (dict(logits=torch.rand(4, 0)), ValueError, "K >= 1"),
        (dict(logits=torch.ones(4, 3, dtype=torch.int64)), TypeError, "logits must be a floating"),
        (dict(target=torch.zeros(3, dtype=torch.int64)), ValueError, r"target must be \(4,\)"),
        (dict(target=torch.zeros(4)), TypeError, "target must be an int64"),
        (dict(reduction="max"), ValueError, "reduction must be one of none, sum, mean"),
        (dict(label_smoothing=1.5), ValueError, r"label_smoothing must be in \[0, 1\]"),
    ],
)
def test_bad_input(change, error, match):
    arguments = dict(logits=torch.rand(4, 3), target=torch.zeros(4, dtype=torch.int64))
    with pytest.raises(error, match=match):
        cross_entropy(**(arguments | change))
