"""group_norm_act and layer_norm_act, which share their ops: fastinterp::norm_act."""

import importlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from accuracy_rule import assert_as_accurate
from torch.autograd import gradcheck, gradgradcheck

from fastinterp.ops import group_norm_act, layer_norm_act

module = importlib.import_module("fastinterp.ops.norm_act")

ACTIVATIONS = ["identity", "relu", "leaky_relu", "softplus", "silu", "gelu"]
SMOOTH = ACTIVATIONS[3:]
LAST, NCHW = torch.channels_last, torch.contiguous_format
# size, groups or None for a layer norm of the last dimensions, layout, residual, affine: groups of
# one channel and of all, one group or several side by side in a row, rows folded or not, planes and
# rows longer than one piece of additions, more examples than parts
CASES = [
    ((37, 6), 3, NCHW, True, True),
    ((5, 130), 13, NCHW, False, True),
    ((6, 16, 9), 4, NCHW, True, True),
    ((5, 3, 5, 3), 3, NCHW, True, False),
    ((5, 3, 5, 3), 1, LAST, False, True),
    ((3, 64, 7, 7), 32, NCHW, True, True),
    ((3, 64, 7, 7), 32, LAST, True, True),
    ((4, 130, 5, 3), 10, LAST, True, False),
    ((4, 16, 5, 4), 4, LAST, True, True),  # four pixels a row
    ((4, 16, 5, 4), 1, LAST, True, True),
    ((3, 192, 3, 5), 2, LAST, False, True),  # blocks of one group
    ((2, 2, 72, 70), 2, NCHW, True, True),  # 5040 pixels
    ((70, 8, 12, 12), 4, LAST, False, True),
    ((3, 5, 37), 1, NCHW, True, True),
    ((37, 3), None, NCHW, True, True),
    ((3, 5, 64), None, NCHW, True, True),
    ((2, 3, 4, 100), None, NCHW, False, False),
    ((2, 4300), None, NCHW, True, True),
    ((90, 130), None, NCHW, False, True),
]


@pytest.fixture(autouse=True)
def _one_thread():
    """The tensors are tiny: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def affine_size(size, groups):
    return size[-1] if groups is None else size[1]


def ours(x, weight, bias, groups, *, residual=None, **options):
    if groups is None:
        return layer_norm_act(x, x.shape[-1], weight, bias, residual=residual, **options)
    return group_norm_act(x, groups, weight, bias, residual=residual, **options)


def plain(x, weight, bias, groups, *, residual=None, activation="identity"):
    if groups is None:
        y = F.layer_norm(x, x.shape[-1:], weight, bias)
    else:
        y = torch.group_norm(x, groups, weight, bias)
    y = y if residual is None else y + residual
    return y if activation == "identity" else getattr(F, activation)(y)


def inputs(size, groups=2, layout=NCHW, residual=True, affine=True, dtype=torch.float64):
    """x, residual, weight and bias, then gy, and cotangents of the four's gradients."""

    def image():
        t = torch.randn(size, dtype=torch.float64).to(dtype)
        return t.contiguous(memory_format=layout) if len(size) == 4 else t

    def vector(low):
        return (low + torch.rand(affine_size(size, groups), dtype=torch.float64)).to(dtype)

    tensors = [
        image() * 2 + 0.5,
        image() if residual else None,
        vector(0.5) if affine else None,
        vector(-0.5) if affine else None,
    ]
    return tensors, image(), [image(), image(), vector(-1), vector(-1)]


def as_dtype(dtype, *nested):
    return [
        None if t is None else t.to(dtype) if isinstance(t, torch.Tensor) else as_dtype(dtype, *t)
        for t in nested
    ]


def leaves(tensors):
    return [None if t is None else t.detach().requires_grad_() for t in tensors]


def run(function, groups, tensors, gy, cotangents, **options):
    """y, the first and the second order, without history; None where a tensor or gradient is."""
    x, residual, weight, bias = given = leaves(tensors)
    (gy,) = leaves([gy])
    y = function(x, weight, bias, groups, residual=residual, **options)
    wanted = [t for t in given if t is not None]
    first = torch.autograd.grad(y, wanted, gy, create_graph=True)
    weights = [c for c, t in zip(cotangents, given, strict=True) if t is not None]
    penalty = sum((g * c).sum() for g, c in zip(first, weights, strict=True))
    second = torch.autograd.grad(penalty, [gy, *wanted], allow_unused=True)
    return y.detach(), [g.detach() for g in first], second


def zeros_for_none(values, like):
    return [torch.zeros_like(t) if v is None else v for v, t in zip(values, like, strict=True)]


def assert_all_accurate(groups, given, **options):
    """Every result of ``ours`` against plain torch and float64, by the rule of its order."""
    value = run(ours, groups, *given, **options)
    same = run(plain, groups, *given, **options)
    exact = run(plain, groups, *as_dtype(torch.float64, *given), **options)
    like = [given[1], *(t for t in given[0] if t is not None)]
    triples = [(value[0], same[0], exact[0], 2)]
    triples += zip(value[1], same[1], exact[1], [3] * len(exact[1]), strict=True)
    seconds = (zeros_for_none(r[2], like) for r in (value, same, exact))
    triples += zip(*seconds, [4] * len(like), strict=True)
    for ours_, theirs, true, factor in triples:
        assert ours_.dtype == given[0][0].dtype
        if ours_.dtype == torch.float64:  # plain torch is not exact itself
            torch.testing.assert_close(ours_, theirs, rtol=1e-10, atol=1e-10)
        else:
            assert_as_accurate(ours_, theirs, true, factor)
    return value


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_as_torch(backend, dtype, activation):
    for size, groups, *rest in CASES:
        given = inputs(size, groups, *rest, dtype=dtype)
        y, first, _ = assert_all_accurate(groups, given, activation=activation)
        assert y.stride() == first[0].stride() == given[0][0].stride()


@pytest.mark.parametrize("groups", [4, None])
@pytest.mark.parametrize("activation", ["identity", "gelu"])  # a turned relu is no rounding
def test_mean_of_a_thousand_standard_deviations(backend, activation, groups):
    for layout in (NCHW, LAST) if groups else (NCHW,):
        given = inputs((8, 16, 9, 64), groups, layout, dtype=torch.float32)
        given[0][0] += 2e3
        y = assert_all_accurate(groups, given, activation=activation)[0]
        exact = run(plain, groups, *as_dtype(torch.float64, *given), activation=activation)[0]
        # The mean takes 2000 of the 2^24 steps of a float32.
        torch.testing.assert_close(y.double(), exact, rtol=0, atol=5e-4)


@pytest.mark.parametrize("groups", [4, None])
@pytest.mark.parametrize("activation", ["relu", "softplus"])
def test_upstream_gradients_with_large_means(backend, activation, groups):
    """Where g and v are nearly constant, what the projection leaves of them is a difference."""
    tensors, gy, (v, *rest) = inputs((8, 16, 9, 7), groups, dtype=torch.float32)
    tensors[2] = torch.ones_like(tensors[2])
    assert_all_accurate(groups, (tensors, gy + 100, [v + 100, *rest]), activation=activation)


@pytest.mark.parametrize("case", [((2, 4, 2, 1), 2, NCHW), ((2, 4, 2, 1), 2, LAST)], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_group_norm(backend, activation, case):
    tensors, _, _ = inputs(*case)

    def function(x, residual, weight, bias):
        options = dict(residual=residual, activation=activation, eps=1e-3)
        if activation in ("softplus", "leaky_relu"):
            options["alpha"] = 0.7
        return group_norm_act(x, case[1], weight, bias, **options)

    assert gradcheck(function, leaves(tensors))
    assert gradgradcheck(function, leaves(tensors))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_layer_norm(backend, activation):
    (x, residual, *_), _, _ = inputs((2, 2, 3), None)
    weight, bias = torch.rand(2, 3, dtype=x.dtype) + 0.5, torch.randn(2, 3, dtype=x.dtype)

    def function(x, residual, weight, bias):
        options = dict(residual=residual, activation=activation, eps=1e-3)
        return layer_norm_act(x, (2, 3), weight, bias, **options)

    given = leaves([x, residual, weight, bias])
    expected = F.layer_norm(x, (2, 3), weight, bias, 1e-3) + residual
    expected = expected if activation == "identity" else getattr(F, activation)(expected)
    torch.testing.assert_close(function(*given), expected)
    assert gradcheck(function, given)
    assert gradgradcheck(function, given)


def partial_orders(function, groups, tensors, gy, asked, pattern, cotangents, activation):
    """Both orders when only the first gradients in ``asked`` are formed and ``pattern`` used."""
    x, residual, weight, bias = given = leaves(tensors)
    (gy,) = leaves([gy])
    y = function(x, weight, bias, groups, residual=residual, activation=activation)
    first = torch.autograd.grad(y, [given[i] for i in asked], gy, create_graph=True)
    used = [(i, g) for i, g in zip(asked, first, strict=True) if i in pattern]
    penalty = sum((g * cotangents[i]).sum() for i, g in used)
    ends = [gy, *(t for t in given if t is not None)]
    second = torch.autograd.grad(penalty, ends, allow_unused=True)
    return [*first, *zeros_for_none(second, ends)]


@pytest.mark.parametrize("groups", [2, None])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_pattern_of_cotangents(backend, activation, groups):
    """The second order with some first gradients left out, by not using them or not asking."""
    for with_residual in (True, False):
        tensors, gy, cotangents = inputs((3, 4, 3, 2), groups, residual=with_residual)
        names = [i for i, t in enumerate(tensors) if t is not None]
        patterns = [p for n in range(1, len(names) + 1) for p in itertools.combinations(names, n)]
        for pattern, ask_all in itertools.product(patterns, (True, False)):
            arguments = (groups, tensors, gy, names if ask_all else pattern, pattern, cotangents)
            value = partial_orders(ours, *arguments, activation)
            exact = partial_orders(plain, *arguments, activation)
            for a, b in zip(value, exact, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("asked", [(0,), (1,), (2,), (3,), (0, 2), (1, 3)], ids=str)
def test_only_some_inputs_need_gradients(backend, asked):
    for groups, activation in itertools.product((2, None), ("relu", "silu")):
        tensors, gy, cotangents = inputs((3, 4, 3, 2), groups)
        results = []
        for function in (ours, plain):
            given = [
                t.detach().requires_grad_() if i in asked else t for i, t in enumerate(tensors)
            ]
            x, residual, weight, bias = given
            (upstream,) = leaves([gy])
            y = function(x, weight, bias, groups, residual=residual, activation=activation)
            ends = [given[i] for i in asked]
            first = torch.autograd.grad(y, ends, upstream, create_graph=True)
            penalty = sum((g * cotangents[i]).sum() for i, g in zip(asked, first, strict=True))
            second = torch.autograd.grad(penalty, [upstream, *ends], allow_unused=True)
            results.append([*first, *zeros_for_none(second, [upstream, *ends])])
        for value, exact in zip(*results, strict=True):
            torch.testing.assert_close(value, exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("groups", [2, None])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_gradient_of_x_along_both_ways(backend, activation, groups):
    """x is used elsewhere too, is no leaf, and the loss is both a value and a penalty."""
    tensors, gy, cotangents = inputs((4, 4, 3, 2), groups)
    results = []
    for function in (ours, plain):
        x, residual, weight, bias = given = leaves(tensors)
        hidden = x * x
        y = function(hidden, weight, bias, groups, residual=residual, activation=activation)
        (g_hidden,) = torch.autograd.grad((y * gy).sum(), hidden, create_graph=True)
        (g_x,) = torch.autograd.grad((y * gy).sum(), x, create_graph=True)
        loss = (g_hidden * cotangents[0]).sum() + g_x.square().sum() + (y * y).sum() + hidden.sum()
        ends = (hidden, *given)
        results.append(
            [
                *torch.autograd.grad(loss, ends, retain_graph=True),
                *torch.autograd.grad(g_hidden.square().sum(), [hidden, x], retain_graph=True),
                *torch.autograd.grad(loss, x),
            ]
        )
    for value, exact in zip(*results, strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-9, atol=1e-9)


# which second-order gradients (gy, x, residual, weight, bias) there are for a penalty on one
# first-order gradient (x, residual, weight, bias), with a piecewise linear activation
THERE = {0: "1 1 0 1 0", 1: "1 0 0 0 0", 2: "1 1 0 0 0", 3: "1 0 0 0 0"}


@pytest.mark.parametrize("penalised", THERE)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_zero_is_none(backend, activation, penalised):
    tensors, gy, cotangents = inputs((4, 4, 3, 2))
    x, residual, weight, bias = given = leaves(tensors)
    (gy,) = leaves([gy])
    y = group_norm_act(x, 2, weight, bias, residual=residual, activation=activation)
    first = torch.autograd.grad(y, given, gy, create_graph=True)
    second = torch.autograd.grad(
        first[penalised], [gy, *given], cotangents[penalised], allow_unused=True
    )
    there = "1 1 1 1 1" if activation in SMOOTH else THERE[penalised]
    assert " ".join(str(int(g is not None)) for g in second) == there


def views_of(x):
    parent = torch.randn(2 * x.shape[0], *(n + 2 for n in x.shape[1:]), dtype=x.dtype)
    last_parent = parent.to(memory_format=LAST)
    window = (slice(None, None, 2), slice(1, -1), slice(1, -1), slice(0, -2))
    parent[window], last_parent[window] = x, x
    return {
        "sliced": parent[window],
        "channels_last slice": last_parent[window],
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
        "channels_last": x.to(memory_format=LAST),
        "contiguous": x,
    }


@pytest.mark.parametrize("groups", [3, None])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_views(backend, activation, groups):
    (x, residual, *affine), gy, cotangents = inputs((4, 6, 5, 3), groups)
    expected = run(ours, groups, [x, residual, *affine], gy, cotangents, activation=activation)
    names = list(views_of(x))
    for shift in range(len(names)):
        a, b, c = (
            views_of(t)[names[(i + shift) % len(names)]] for i, t in enumerate((x, residual, gy))
        )
        got = run(ours, groups, [a, b, *affine], c, cotangents, activation=activation)
        torch.testing.assert_close(got[0], expected[0])
        for order in (1, 2):
            for p, q in zip(got[order], expected[order], strict=True):
                assert (p is None) == (q is None)
                if p is not None:
                    torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("groups", [3, None])
def test_expanded_gradients_and_inputs(backend, groups):
    tensors, gy, cotangents = inputs((4, 6, 5, 3), groups)
    x = tensors[0][:, :1].expand_as(gy)
    gy, v = gy[:1, :, :1, :1].expand_as(gy), cotangents[0][0, 0, 0].expand_as(gy)
    weight = tensors[2][:1].expand_as(tensors[2])
    given = [x, tensors[1], weight, tensors[3]]
    got = run(ours, groups, given, gy, [v, *cotangents[1:]], activation="gelu")
    expected = run(plain, groups, given, gy, [v, *cotangents[1:]], activation="gelu")
    for order in (1, 2):
        for a, b in zip(got[order], expected[order], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("size", [(0, 4), (0, 64, 4, 4), (2, 4, 0, 4), (3, 0), (2, 4, 0)], ids=str)
def test_empty(backend, size, activation):
    for groups, layout in itertools.product((2, None), (NCHW, LAST)):
        given = inputs(size, groups, layout)
        y, first, second = run(ours, groups, *given, activation=activation)
        assert y.shape == size and first[0].shape == size
        assert all(not g.any() and g.shape == (affine_size(size, groups),) for g in first[2:])
        assert all(g is None or not g.any() for g in second)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_third_order_is_refused(backend, activation):
    tensors, _, _ = inputs((3, 4, 2, 2))
    x, residual, weight, bias = leaves(tensors)
    y = group_norm_act(x, 2, weight, bias, residual=residual, activation=activation)
    (gx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gx.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="third-order gradients of norm_act"):
        second.sum().backward()


@pytest.mark.parametrize("layout", [NCHW, LAST], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_opcheck(backend, activation, layout):
    tensors, gy, cotangents = inputs((4, 6, 5, 4), 3, layout, dtype=torch.float32)
    given = leaves(tensors)
    kind = (3, 1e-5, activation, 0.0)
    ops = torch.ops.fastinterp
    torch.library.opcheck(ops.norm_act.default, (*given, *kind))
    _, mean, rstd, proxy = ops.norm_act(*tensors, *kind)
    (gy,) = leaves([gy])
    saved = (gy, *given, mean, rstd)
    # proxy and addend: the gradient of x by way of the forward op, see the module
    for stand_in in ((None, None), leaves([proxy.clone(), cotangents[0]])):
        arguments = (*saved, *stand_in, *kind, True, True, True)
        torch.library.opcheck(ops.norm_act_backward.default, arguments)
    saved = tuple(t.detach() for t in saved)
    means = ops.norm_act_backward(*saved, None, None, *kind, True, True, True)[4:]
    torch.library.opcheck(
        ops.norm_act_backward_backward.default,
        (*cotangents, *saved, *means, *kind, True, True, activation in SMOOTH, True),
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_every_output_element_is_written(monkeypatch, dtype, activation):
    """The kernels are handed NaN and must overwrite all of it."""
    monkeypatch.setenv("FASTINTERP_BACKEND", "cpu")
    results = module._results
    filled = []

    def filled_with_nan(*arguments):
        filled.append(results(*arguments))
        return [t.fill_(torch.nan) for t in filled[-1]]

    monkeypatch.setattr(module, "_results", filled_with_nan)
    for size, groups, *rest in CASES:
        given = inputs(size, groups, *rest, dtype=dtype)
        y, first, second = run(ours, groups, *given, activation=activation)
        for t in (y, *first, *(s for s in second if s is not None)):
            assert torch.isfinite(t).all()
        assert len(filled) == 3
        assert all(torch.isfinite(t).all() for ts in filled for t in ts)
        filled.clear()


@pytest.mark.parametrize("case", [CASES[5], CASES[6], CASES[14]], ids=str)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_with_any_number_of_threads(monkeypatch, dtype, activation, case):
    monkeypatch.setenv("FASTINTERP_BACKEND", "cpu")
    size = (990, 33) if case[1] is None else (17, 64, 9, 7)
    given = inputs(size, *case[1:], dtype=dtype)
    results = []
    for count in (1, 2, 3, 2):
        torch.set_num_threads(count)
        y, first, second = run(ours, case[1], *given, activation=activation)
        results.append([y, *first, *(t for t in second if t is not None)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def kept(tensors, activation):
    """What a forward pass keeps that is as large as the input: [(dtype, elements)]."""
    saved = {}
    x, residual, weight, bias = leaves(tensors)

    def pack(t):
        storage = t.untyped_storage()
        saved[storage.data_ptr()] = (t.dtype, storage.nbytes() // t.element_size())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        group_norm_act(x, 32, weight, bias, residual=residual, activation=activation)
    return [(d, n) for d, n in saved.values() if n > x.shape[0] * 64]


def test_what_is_kept(backend):
    tensors, _, _ = inputs((4, 64, 8, 8), 32, dtype=torch.bfloat16)
    x = (torch.bfloat16, tensors[0].numel())
    for activation in ACTIVATIONS:
        assert kept([tensors[0], None, *tensors[2:]], activation) == [x]
        assert kept(tensors, activation) == ([x] if activation == "identity" else [x, x])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("groups", [3, None])
def test_nan_stays_in_its_group(backend, groups, activation):
    x = torch.randn(4, 6, 5, 7)
    x[1, 2, 3, 4] = torch.nan
    for layout in (NCHW, LAST):
        y = ours(x.contiguous(memory_format=layout), None, None, groups, activation=activation)
        bad = torch.zeros_like(x, dtype=torch.bool)
        bad[(1, slice(2, 4)) if groups else (1, 2, 3)] = True
        assert torch.equal(y.isnan(), bad)


@pytest.mark.parametrize("groups", [3, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_on_a_cpu_changes_nothing(backend, dtype, groups):
    """layer_norm and group_norm are not among the operations that it casts."""
    tensors, gy, cotangents = inputs((4, 6, 5, 3), groups, dtype=torch.float32)
    (x, residual), affine = as_dtype(dtype, *tensors[:2]), tensors[2:]
    given = ([x, residual, *affine], gy.to(dtype), cotangents)
    expected = run(ours, groups, *given, activation="silu")
    with torch.autocast("cpu", torch.bfloat16):
        got = run(ours, groups, *given, activation="silu")
        assert plain(x, *affine, groups).dtype == dtype
    assert got[0].dtype == dtype and got[1][2].dtype == torch.float32
    for order in (1, 2):
        for a, b in zip(got[order], expected[order], strict=True):
            assert torch.equal(a, b)


def test_small_tensors_take_plain_torch(monkeypatch):
    monkeypatch.delenv("FASTINTERP_BACKEND", raising=False)
    calls, forward = [], module._forward_results
    monkeypatch.setattr(module, "_forward_results", lambda *a: calls.append(a) or forward(*a))
    x, weight = torch.randn(4, 6, 5, 3), torch.rand(6)
    group_norm_act(x, 3, weight, activation="relu")
    group_norm_act(x.to(memory_format=LAST), 3)
    layer_norm_act(x, 3, residual=x)
    layer_norm_act(x.bfloat16(), 3, weight[:3])
    assert not calls
    group_norm_act(x, 3, weight.double())  # torch takes no such mixture
    group_norm_act(torch.randn(32, 16, 64), 4, activation="gelu")
    group_norm_act(torch.randn(8, 16, 8, 8).to(memory_format=LAST), 4)
    layer_norm_act(torch.randn(64, 1024), 1024)
    assert len(calls) == 4


@pytest.mark.parametrize("groups", [3, None])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_plain_torch_for_small_tensors_agrees(monkeypatch, groups, activation):
    given = inputs((4, 6, 5, 3), groups)
    results = []
    for backend in ("auto", "cpu"):
        monkeypatch.setenv("FASTINTERP_BACKEND", backend)
        y, first, second = run(ours, groups, *given, activation=activation)
        like = [given[1], *given[0]]
        results.append([y, *first, *zeros_for_none(second, like)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_float16_falls_back_to_plain_torch(monkeypatch):
    monkeypatch.setenv("FASTINTERP_BACKEND", "reference")
    given = inputs((4, 6, 5, 3), 3, dtype=torch.float16)
    got = run(ours, 3, *given, activation="relu")
    exact = run(plain, 3, *as_dtype(torch.float64, *given), activation="relu")
    torch.testing.assert_close(got[0].double(), exact[0], rtol=2e-3, atol=2e-3)
    monkeypatch.setenv("FASTINTERP_BACKEND", "cpu")
    with pytest.raises(RuntimeError, match=r"no torch.float16 kernel"):
        run(ours, 3, *given, activation="relu")


X = torch.zeros(2, 6, 2, 2)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (dict(x=torch.zeros(2, 6, dtype=torch.int64)), TypeError, "floating point"),
        (dict(x=torch.zeros(6)), ValueError, r"x must be \(N, C\)"),
        (dict(num_groups=4), ValueError, "num_groups must divide the 6 channels"),
        (dict(num_groups=0), ValueError, "num_groups must divide"),
        (dict(weight=torch.zeros(4)), ValueError, r"weight must be \(6,\) or None"),
        (dict(bias=torch.zeros(6, 1)), ValueError, r"bias must be \(6,\) or None"),
        (dict(residual=X[:1]), ValueError, "residual must have the shape of x"),
        (dict(residual=X.double()), TypeError, "residual must be"),
        (dict(activation="tanh"), ValueError, "activation must be one of identity, relu"),
        (dict(activation="relu", alpha=0.1), ValueError, "relu has no alpha"),
        (dict(activation="softplus", alpha=0.0), ValueError, "alpha of softplus"),
        (dict(eps=-1e-5), ValueError, "eps must be >= 0"),
    ],
)
def test_bad_input_of_group_norm(change, error, match):
    with pytest.raises(error, match=match):
        group_norm_act(**(dict(x=X, num_groups=3) | change))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (dict(x=torch.zeros(3, 2, dtype=torch.int64)), TypeError, "floating point"),
        (dict(normalized_shape=3), ValueError, r"last sizes of x must be \(3,\)"),
        (dict(normalized_shape=()), ValueError, "last sizes of x"),
        (dict(weight=torch.zeros(3)), ValueError, r"weight must be \(2,\) or None"),
        (dict(bias=torch.zeros(1, 2)), ValueError, r"bias must be \(2,\) or None"),
        (dict(residual=X[:1]), ValueError, "residual must have the shape of x"),
        (dict(residual=X.double()), TypeError, "residual must be"),
        (dict(eps=float("nan")), ValueError, "eps must be >= 0"),
    ],
)
def test_bad_input_of_layer_norm(change, error, match):
    with pytest.raises(error, match=match):
        layer_norm_act(**(dict(x=X, normalized_shape=2) | change))
