"""The network ops against plain torch in three orders, on any device and with any backend."""

import math

import test_activation
import test_batch_norm_act
import test_cross_entropy
import test_max_pool2d
import test_norm_act
import torch
import torch.nn.functional as F
from accuracy_rule import assert_as_accurate
from test_batch_norm_act import zeros_for_none

from fastinterp.ops import batch_norm_act, cross_entropy, max_pool2d

NCHW, LAST = torch.contiguous_format, torch.channels_last
# size, layout, residual, affine
NORM_CASES = [
    ((4, 3, 5, 7), NCHW, True, True),  # rows of 35: nothing is aligned
    ((3, 16, 4, 5), LAST, True, True),  # four pixels a row
]
NORM_SHAPES = [
    ((5, 3), NCHW, True, True),
    ((6, 5, 12), NCHW, False, False),
    ((2, 2, 16, 9), NCHW, True, True),  # 18 whole octets a plane
    ((3, 1, 40, 70), NCHW, False, True),  # several chunks
    ((2, 10, 3, 5), LAST, True, False),
    ((2, 70, 9, 13), LAST, True, True),  # two blocks of lanes, several chunks
]
# size, groups or None for a layer norm of the last dimension, layout, residual, affine
GROUP_CASES = [
    ((4, 6, 5, 7), 2, NCHW, True, True),  # rows of 35: nothing is aligned
    ((3, 16, 4, 5), 4, LAST, True, True),  # several groups in a tile
]
GROUP_SHAPES = [
    ((5, 12), 3, NCHW, True, True),
    ((3, 4, 33), 1, NCHW, True, False),
    ((3, 24, 5, 3), 1, LAST, True, True),
    ((35, 24), None, NCHW, True, True),  # several tiles a program
    ((2, 3, 40), None, NCHW, False, False),
]
LOSS_SIZES = [(7, 10), (70, 24), (3, 5001)]


def on(device, *nested):
    """Tensors of nested lists on a device; anything else as it is."""
    return [
        t.to(device)
        if isinstance(t, torch.Tensor)
        else on(device, *t)
        if isinstance(t, list | tuple)
        else t
        for t in nested
    ]


def in_double(*nested):
    return [
        t.double()
        if isinstance(t, torch.Tensor) and t.is_floating_point()
        else in_double(*t)
        if isinstance(t, list | tuple)
        else t
        for t in nested
    ]


def compare(value, same, exact, factor, dtype, **tolerance):
    """The accuracy rule; in float64, where plain torch is as far from exact, ``tolerance``."""
    assert value.dtype == dtype
    if dtype == torch.float64:
        torch.testing.assert_close(value, same, **tolerance)
    else:
        assert_as_accurate(value, same, exact, factor)


def check_batch_norm_act(case, dtype, activation, training, shift=0, device="cpu"):
    given = on(device, *test_batch_norm_act.inputs(*case, dtype=dtype))
    given[0][0] += shift
    options = dict(training=training, activation=activation)
    got = test_batch_norm_act.run(batch_norm_act, *given, **options)
    plain, exact = (
        test_batch_norm_act.run(test_batch_norm_act.plain, *inputs, **options)
        for inputs in (given, in_double(*given))
    )
    x = given[0][0]
    assert got[0].stride() == x.stride() and got[1][0].stride() == x.stride()
    like = [x, *(t for t in given[0] if t is not None)]
    seconds = [zeros_for_none(r[2], like) for r in (got, plain, exact)]
    triples = [
        (got[0], plain[0], exact[0], 2),
        *((*t, 3) for t in zip(got[1], plain[1], exact[1], strict=True)),
        *((*t, 4) for t in zip(*seconds, strict=True)),
        *((*t, 2) for t in zip(got[3], plain[3], exact[3], strict=True)),
    ]
    for triple in triples:
        compare(*triple, dtype, rtol=1e-10, atol=1e-10)


def check_activation(size, dtype, kind, device="cpu"):
    x, gy, v = (s * torch.randn(size, dtype=torch.float64) for s in (3, 1, 1))
    x, gy, v = (t.to(device, dtype) for t in (x, gy, v))
    plain = test_activation.PLAIN[kind]
    got = test_activation.run(test_activation.own(kind), x, gy, v)
    same = test_activation.run(plain, x, gy, v)
    exact = test_activation.run(plain, x.double(), gy.double(), v.double())
    for *triple, factor in zip(got, same, exact, (2, 3, 4, 4), strict=True):
        compare(*triple, factor, dtype, rtol=1e-8, atol=1e-8)  # torch's softplus: linear beyond 20


def check_max_pool2d(size, window, dtype, layout, device="cpu"):
    x = torch.randint(-3, 4, size).to(device, dtype).contiguous(memory_format=layout)  # with ties
    v = torch.randn_like(x)
    got = test_max_pool2d.run(max_pool2d, x, window, v)
    for t in got:
        assert t.is_contiguous(memory_format=layout) and t.dtype == dtype
    if window[3] == 3:  # windows without any element of the map
        assert (got[0] == -math.inf).all() and not got[1].any() and not got[2].any()
        return
    plain = test_max_pool2d.run(F.max_pool2d, x, window, v)
    assert torch.equal(got[0], plain[0]) and torch.equal(got[2], plain[2])
    leaf = x.double().requires_grad_()
    y = F.max_pool2d(leaf, *window)
    gy = torch.linspace(-2, 3, y.numel()).reshape(y.shape).to(device, dtype).double()
    assert_as_accurate(got[1], plain[1], torch.autograd.grad(y, leaf, gy)[0], factor=3)


def check_cross_entropy(size, dtype, smoothing, reduction, device="cpu"):
    tensors, how = on(device, *test_cross_entropy.inputs(size, dtype)), (reduction, smoothing)
    got = test_cross_entropy.run(cross_entropy, *tensors, *how)
    plain = test_cross_entropy.run(F.cross_entropy, *tensors, *how)
    exact = test_cross_entropy.run(F.cross_entropy, *in_double(*tensors), *how)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    orders = [*zip(got, plain, exact, (2, 3, 4, 4), (acc, dtype, acc, dtype), strict=True)]
    if reduction != "none":  # the one number gc2 is a sum over all logits that nearly cancels
        value, _, wanted, _, _ = orders.pop(2)
        terms = (exact[1] * tensors[3].double() / tensors[2][0]).abs().sum()
        assert (value - wanted).abs() <= 4 * torch.finfo(acc).eps * (1 + terms)
        assert value.dtype == acc
    for order in orders:
        compare(*order, atol=1e-12, rtol=1e-10)


def check_norm_act(case, dtype, activation, device="cpu"):
    given = on(device, *test_norm_act.inputs(*case, dtype=dtype))
    value = test_norm_act.assert_all_accurate(case[1], given, activation=activation)
    if case[1] is not None:
        assert value[0].stride() == given[0][0].stride()
