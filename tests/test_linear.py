import itertools

import pytest
import torch
import torch.nn.functional as F
from accuracy_rule import assert_as_accurate
from torch.autograd import gradcheck, gradgradcheck

from fastinterp.ops import linear

SIZES = [((5, 7), 3), ((2, 3, 4), 6), ((6,), 1), ((2, 1, 3, 5), 4), ((0, 4), 3), ((3, 0), 2)]


def inputs(size, out, dtype=torch.float64):
    x, v = (torch.randn(size, dtype=torch.float64).to(dtype) for _ in range(2))
    weight, bias = torch.randn(out, size[-1]).to(dtype), torch.randn(out).to(dtype)
    return [x, weight, bias], torch.randn(*size[:-1], out).to(dtype), v


def leaves(tensors):
    return [None if t is None else t.detach().requires_grad_() for t in tensors]


def run(function, tensors, gy, v):
    """y, the first order, and the derivatives of <v, d<gy, y>/dx> and of <weight, d<gy, y>/dw>."""
    given = leaves(tensors)
    (gy,) = leaves([gy])
    y = function(*given)
    wanted = [t for t in given if t is not None]
    first = torch.autograd.grad(y, wanted, gy, create_graph=True)
    penalty = (first[0] * v).sum() + (first[1] * first[1]).sum()
    return y.detach(), first, torch.autograd.grad(penalty, [gy, *wanted[:2]])


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_as_torch(dtype, with_bias):
    for size, out in SIZES:
        tensors, gy, v = inputs(size, out, dtype)
        tensors[2] = tensors[2] if with_bias else None
        exact_in = [None if t is None else t.double() for t in tensors]
        exact = run(F.linear, exact_in, gy.double(), v.double())
        value, plain = (run(f, tensors, gy, v) for f in (linear, F.linear))
        assert_as_accurate(value[0], plain[0], exact[0], 2)
        for order, factor in ((1, 3), (2, 4)):
            for a, b, c in zip(value[order], plain[order], exact[order], strict=True):
                assert a.dtype == dtype
                assert_as_accurate(a, b, c, factor)


def test_gradcheck():
    tensors, _, _ = inputs((2, 3, 4), 3)
    assert gradcheck(linear, leaves(tensors))
    assert gradgradcheck(linear, leaves(tensors))


def test_third_order():
    results = []
    torch.manual_seed(1)
    tensors, _, _ = inputs((3, 4), 2)
    for function in (linear, F.linear):
        x, weight, bias = leaves(tensors)
        value = function(x, weight, bias).pow(4).sum()
        for _ in range(3):
            (gx, gweight) = torch.autograd.grad(value, [x, weight], create_graph=True)
            value = gx.square().sum() + gweight.square().sum()
        results.append(gx)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("asked", [(0,), (1,), (2,), (0, 1), (1, 2)], ids=str)
def test_only_some_inputs_need_gradients(asked):
    tensors, gy, _ = inputs((2, 3, 4), 5)
    results = []
    for function in (linear, F.linear):
        given = [t.detach().requires_grad_() if i in asked else t for i, t in enumerate(tensors)]
        (upstream,) = leaves([gy])
        ends = [given[i] for i in asked]
        first = torch.autograd.grad(function(*given), ends, upstream, create_graph=True)
        penalty = sum(g.pow(3).sum() for g in first)
        results.append([*first, *torch.autograd.grad(penalty, [upstream])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_views():
    (x, weight, bias), gy, v = inputs((4, 6), 3)
    wide, tall = torch.randn(8, 12, dtype=x.dtype), torch.randn(6, 3, dtype=x.dtype)
    wide[::2, ::2], tall[:] = x, weight.t()
    expected = run(linear, [x, weight, bias], gy, v)
    got = run(linear, [wide[::2, ::2], tall.t(), bias], gy, v)
    for a, b in zip(itertools.chain(*got), itertools.chain(*expected), strict=True):
        torch.testing.assert_close(a, b)
    ones = gy[:1, :1].expand_as(gy)
    for a, b in zip(
        itertools.chain(*run(linear, [x, weight, bias], ones, v)),
        itertools.chain(*run(F.linear, [x, weight, bias], ones, v)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def calls(function):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return {e.key: e.count for e in profile.key_averages() if e.key.startswith("fastinterp::")}


def test_no_weight_gradient_that_nobody_asked_for():
    (x, weight, bias), gy, v = inputs((5, 7), 3)
    x, weight, bias = leaves([x, weight, bias])
    y = linear(x, weight, bias)
    seen = calls(lambda: torch.autograd.grad(y, x, gy, retain_graph=True))
    assert seen == {"fastinterp::linear_input_grad": 1}
    (gx,) = torch.autograd.grad(y, x, gy, create_graph=True)
    assert calls(lambda: (gx * v).sum().backward()) == {"fastinterp::linear_weight_grad": 1}
    assert x.grad is None


def kept(x, weight):
    pointers = []

    def pack(t):
        pointers.append(t.data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        linear(x, weight)
    return sorted(pointers)


def test_what_is_kept():
    (x, weight, _), _, _ = inputs((5, 7), 3)
    assert kept(x, weight.requires_grad_()) == [x.data_ptr()]
    weight, x = weight.detach(), x.requires_grad_()
    assert kept(x, weight) == [weight.data_ptr()]


def test_opcheck():
    (x, weight, bias), gy, _ = inputs((5, 7), 3, torch.float32)
    x, weight, bias, gy = leaves([x, weight, bias, gy])
    ops = torch.ops.fastinterp
    torch.library.opcheck(ops.linear.default, (x, weight, bias))
    torch.library.opcheck(ops.linear.default, (x, weight, None))
    torch.library.opcheck(ops.linear_input_grad.default, (gy, weight))
    torch.library.opcheck(ops.linear_weight_grad.default, (gy, x))


def test_autocast():
    tensors, gy, v = inputs((2, 3, 8), 4, torch.float32)
    low = [t.bfloat16() for t in tensors]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear(*tensors), F.linear(*low))
        assert linear(*(t.double() for t in tensors)).dtype == torch.float64
        got = run(linear, tensors, gy.bfloat16(), v)  # the double backward inside the region too
        with torch.autocast("cpu", enabled=False):
            assert linear(*tensors).dtype == torch.float32
    assert all(g.dtype == torch.float32 for g in got[1])
    plain = run(F.linear, low, gy.bfloat16(), v.bfloat16())
    exact = run(F.linear, [t.double() for t in low], gy.bfloat16().double(), v.double())
    for order, factor in ((1, 3), (2, 4)):
        for a, b, c in zip(got[order], plain[order], exact[order], strict=True):
            assert_as_accurate(a.bfloat16(), b, c, factor)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (dict(x=torch.zeros(2, 3)), ValueError, "must agree"),
        (dict(x=torch.tensor(1.0)), ValueError, "must agree"),
        (dict(weight=torch.zeros(4)), ValueError, "must agree"),
        (dict(bias=torch.zeros(3)), ValueError, r"bias must be \(5,\)"),
        (dict(weight=torch.zeros(5, 4).double()), RuntimeError, "type"),
    ],
)
def test_bad_input(change, error, match):
    arguments = dict(x=torch.zeros(2, 4), weight=torch.zeros(5, 4), bias=None)
    with pytest.raises(error, match=match):
        linear(**(arguments | change))
