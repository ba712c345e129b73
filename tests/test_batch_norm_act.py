import importlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from accuracy_rule import assert_as_accurate
from torch.autograd import gradcheck, gradgradcheck

from fastinterp.ops import batch_norm_act

module = importlib.import_module("fastinterp.ops.batch_norm_act")

ACTIVATIONS = ["identity", "relu", "leaky_relu", "softplus", "silu", "gelu"]
SMOOTH = ACTIVATIONS[3:]
LAST, NCHW = torch.channels_last, torch.contiguous_format
# size, layout, residual, affine: narrow rows folded or not, widths of and beside 64 channels and
# pixels, planes longer than the ones whose examples share a strip
CASES = [
    ((37, 3), NCHW, True, True),
    ((5, 130), NCHW, False, True),
    ((6, 16, 9), NCHW, True, True),
    ((5, 1, 5, 3), NCHW, True, False),
    ((5, 1, 5, 3), LAST, False, True),
    ((3, 64, 7, 7), NCHW, True, True),
    ((3, 64, 7, 7), LAST, True, True),
    ((7, 100, 1, 1), NCHW, True, True),
    ((4, 130, 5, 3), LAST, True, False),
    ((4, 16, 5, 4), LAST, True, True),  # four pixels a row
    ((3, 16, 5, 3), LAST, True, True),  # 45 pixels: rows stay narrow
    ((2, 3, 23, 24), NCHW, True, True),  # 552 pixels
    ((2, 2, 16, 40), NCHW, False, False),  # 640 = 10 whole strips
    ((5, 100, 9, 9), LAST, False, True),  # several blocks of rows
]


@pytest.fixture(autouse=True)
def _one_thread():
    """The tensors are tiny: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def plain(x, weight, bias, mean, var, *, residual, training, activation):
    y = F.batch_norm(x, mean, var, weight, bias, training)
    y = y if residual is None else y + residual
    return y if activation == "identity" else getattr(F, activation)(y)


def inputs(size, layout=NCHW, residual=True, affine=True, dtype=torch.float64):
    """x, residual, weight, bias, running mean and variance, and cotangents: gy, then four."""

    def image():
        t = torch.randn(size, dtype=torch.float64).to(dtype)
        return t.contiguous(memory_format=layout) if len(size) == 4 else t

    def vector(low):
        return (low + torch.rand(size[1], dtype=torch.float64)).to(dtype)

    tensors = [
        image() * 2 + 0.5,
        image() if residual else None,
        vector(0.5) if affine else None,
        vector(-0.5) if affine else None,
    ]
    return tensors, (vector(0), vector(3)), image(), [image(), image(), vector(-1), vector(-1)]


def as_dtype(dtype, *nested):
    return [
        None if t is None else t.to(dtype) if isinstance(t, torch.Tensor) else as_dtype(dtype, *t)
        for t in nested
    ]


def leaves(tensors):
    return [None if t is None else t.detach().requires_grad_() for t in tensors]


def run(function, tensors, running, gy, cotangents, **options):
    """y, the first and the second order, without history; None where a tensor or gradient is."""
    x, residual, weight, bias = given = leaves(tensors)
    (gy,) = leaves([gy])
    mean, var = (t.clone() for t in running)
    y = function(x, weight, bias, mean, var, residual=residual, **options)
    wanted = [t for t in given if t is not None]
    first = torch.autograd.grad(y, wanted, gy, create_graph=True)
    weights = [c for c, t in zip(cotangents, given, strict=True) if t is not None]
    penalty = sum((g * c).sum() for g, c in zip(first, weights, strict=True))
    second = torch.autograd.grad(penalty, [gy, *wanted], allow_unused=True)
    first = [g.detach() for g in first]
    return y.detach(), first, second, (mean, var)


def zeros_for_none(values, like):
    return [torch.zeros_like(t) if v is None else v for v, t in zip(values, like, strict=True)]


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_as_torch(backend, dtype, activation, training):
    options = dict(training=training, activation=activation)
    for case in CASES:
        given = inputs(*case, dtype=dtype)
        exact_in = as_dtype(torch.float64, *given)
        y, first, second, running = run(batch_norm_act, *given, **options)
        y_plain, first_plain, second_plain, running_plain = run(plain, *given, **options)
        y_exact, first_exact, second_exact, running_exact = run(plain, *exact_in, **options)
        like = [y, *(t for t in given[0] if t is not None)]
        second, second_plain, second_exact = (
            zeros_for_none(s, like) for s in (second, second_plain, second_exact)
        )
        assert y.dtype == dtype and y.stride() == given[0][0].stride()
        assert first[0].stride() == given[0][0].stride()
        triples = [
            *zip([y], [y_plain], [y_exact], [2], strict=True),
            *zip(first, first_plain, first_exact, [3] * 9, strict=False),
            *zip(second, second_plain, second_exact, [4] * 9, strict=False),
        ]
        for value, same, exact, factor in triples:
            assert value.dtype == dtype
            if dtype == torch.float64:  # plain torch is not exact itself
                torch.testing.assert_close(value, same, rtol=1e-10, atol=1e-10)
            else:
                assert_as_accurate(value, same, exact, factor)
        for triple in zip(running, running_plain, running_exact, strict=True):
            assert_as_accurate(*triple, 2)


@pytest.mark.parametrize("layout", [NCHW, LAST], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_mean_of_a_thousand_standard_deviations(backend, activation, layout):
    (x, *rest), running, gy, cotangents = inputs((8, 16, 9, 7), layout, dtype=torch.float32)
    x = x + 2e3
    options = dict(training=True, activation=activation)
    given = ([x, *rest], running, gy, cotangents)
    exact = run(plain, *as_dtype(torch.float64, *given), **options)
    same = run(plain, *given, **options)
    value = run(batch_norm_act, *given, **options)
    assert_as_accurate(value[0], same[0], exact[0], 2)
    for a, b, c in zip(value[1], same[1], exact[1], strict=True):
        assert_as_accurate(a, b, c, 3)
    like = [gy, x, *rest]
    for a, b, c in zip(*(zeros_for_none(r[2], like) for r in (value, same, exact)), strict=True):
        assert_as_accurate(a, b, c, 4)
    # The mean takes 2000 of the 2^24 steps of a float32; naive sums of squares would lose it all.
    torch.testing.assert_close(value[0].double(), exact[0], rtol=0, atol=5e-4)


@pytest.mark.parametrize("activation", ["relu", "softplus"])
def test_upstream_gradients_with_large_means(backend, activation):
    """Where g and v are nearly constant, what batch statistics leave of them is a difference."""
    tensors, running, gy, cotangents = inputs((8, 16, 9, 7), LAST, dtype=torch.float32)
    cotangents = [cotangents[0] + 100, *cotangents[1:]]
    given, options = (tensors, running, gy + 100, cotangents), dict(training=True)
    options["activation"] = activation
    exact = run(plain, *as_dtype(torch.float64, *given), **options)
    same = run(plain, *given, **options)
    value = run(batch_norm_act, *given, **options)
    for order, factor in ((1, 3), (2, 4)):
        like = tensors if order == 1 else [gy, *tensors]
        triples = (zeros_for_none(r[order], like) for r in (value, same, exact))
        for a, b, c in zip(*triples, strict=True):
            assert_as_accurate(a, b, c, factor)


@pytest.mark.parametrize("layout", [NCHW, LAST], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(backend, activation, training, layout):
    tensors, running, _, _ = inputs((3, 2, 2, 1), layout)

    def function(x, residual, weight, bias):
        statistics = (None, None) if training else running
        return batch_norm_act(
            x,
            weight,
            bias,
            *statistics,
            residual=residual,
            training=training,
            activation=activation,
            alpha=0.7 if activation in ("leaky_relu", "softplus") else None,
        )

    assert gradcheck(function, leaves(tensors))
    assert gradgradcheck(function, leaves(tensors))


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_pattern_of_cotangents(backend, activation, training):
    """The second order with some first gradients left out, by not using them or not asking."""
    for with_residual in (True, False):
        tensors, running, gy, cotangents = inputs((4, 3, 3, 2), residual=with_residual)
        names = [i for i, t in enumerate(tensors) if t is not None]
        patterns = [p for n in range(1, len(names) + 1) for p in itertools.combinations(names, n)]
        for pattern, ask_all in itertools.product(patterns, (True, False)):
            results = []
            for function in (batch_norm_act, plain):
                x, residual, weight, bias = given = leaves(tensors)
                (upstream,) = leaves([gy])
                y = function(
                    x,
                    weight,
                    bias,
                    *(t.clone() for t in running),
                    residual=residual,
                    training=training,
                    activation=activation,
                )
                asked = names if ask_all else pattern
                first = torch.autograd.grad(
                    y, [given[i] for i in asked], upstream, create_graph=True
                )
                penalty = sum(
                    (g * cotangents[i]).sum()
                    for i, g in zip(asked, first, strict=True)
                    if i in pattern
                )
                ends = [upstream, *(given[i] for i in names)]
                second = torch.autograd.grad(penalty, ends, allow_unused=True)
                results.append(zeros_for_none(second, ends))
            for value, exact in zip(*results, strict=True):
                torch.testing.assert_close(value, exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_gradient_of_x_along_both_ways(backend, activation, training):
    """x is used elsewhere too, is no leaf, and the loss is both a value and a penalty."""
    tensors, running, gy, cotangents = inputs((4, 3, 3, 2))
    results = []
    for function in (batch_norm_act, plain):
        x, residual, weight, bias = given = leaves(tensors)
        hidden = x * x
        y = function(
            hidden,
            weight,
            bias,
            *(t.clone() for t in running),
            residual=residual,
            training=training,
            activation=activation,
        )
        (g_hidden,) = torch.autograd.grad((y * gy).sum(), hidden, create_graph=True)
        (g_x,) = torch.autograd.grad((y * gy).sum(), x, create_graph=True)
        loss = (g_hidden * cotangents[0]).sum() + g_x.square().sum() + (y * y).sum() + hidden.sum()
        ends = (hidden, *given)
        results.append(
            [
                *torch.autograd.grad(loss, ends, retain_graph=True, allow_unused=True),
                *torch.autograd.grad(
                    g_hidden.square().sum(),
                    [hidden, x],
                    retain_graph=True,
                    allow_unused=True,
                    materialize_grads=True,
                ),
                *torch.autograd.grad(loss, x),
            ]
        )
    for value, exact in zip(*results, strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("asked", [(0,), (1,), (2,), (3,), (0, 2), (1, 3)], ids=str)
def test_only_some_inputs_need_gradients(backend, asked):
    tensors, running, gy, cotangents = inputs((4, 3, 3, 2))
    for training, activation in itertools.product((True, False), ("relu", "silu")):
        results = []
        for function in (batch_norm_act, plain):
            given = [
                t.detach().requires_grad_() if i in asked else t for i, t in enumerate(tensors)
            ]
            x, residual, weight, bias = given
            (upstream,) = leaves([gy])
            y = function(
                x,
                weight,
                bias,
                *(t.clone() for t in running),
                residual=residual,
                training=training,
                activation=activation,
            )
            ends = [given[i] for i in asked]
            first = torch.autograd.grad(y, ends, upstream, create_graph=True)
            penalty = sum((g * cotangents[i]).sum() for i, g in zip(asked, first, strict=True))
            second = torch.autograd.grad(penalty, [upstream, *ends], allow_unused=True)
            results.append([*first, *zeros_for_none(second, [upstream, *ends])])
        for value, exact in zip(*results, strict=True):
            torch.testing.assert_close(value, exact, rtol=1e-9, atol=1e-9)


# which second-order gradients (gy, x, residual, weight, bias) there are for a penalty on one
# first-order gradient (x, residual, weight, bias), with a piecewise linear activation
THERE = {
    (0, True): "1 1 0 1 0",
    (0, False): "1 0 0 1 0",
    (1, True): "1 0 0 0 0",
    (1, False): "1 0 0 0 0",
    (2, True): "1 1 0 0 0",
    (2, False): "1 1 0 0 0",
    (3, True): "1 0 0 0 0",
    (3, False): "1 0 0 0 0",
}


@pytest.mark.parametrize(("penalised", "training"), THERE, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_zero_is_none(backend, activation, penalised, training):
    tensors, running, gy, cotangents = inputs((4, 3, 3, 2))
    x, residual, weight, bias = given = leaves(tensors)
    (gy,) = leaves([gy])
    y = batch_norm_act(
        x,
        weight,
        bias,
        *running,
        residual=residual,
        training=training,
        activation=activation,
    )
    first = torch.autograd.grad(y, given, gy, create_graph=True)
    second = torch.autograd.grad(
        first[penalised], [gy, *given], cotangents[penalised], allow_unused=True
    )
    there = "1 1 1 1 1" if activation in SMOOTH else THERE[penalised, training]
    assert " ".join(str(int(g is not None)) for g in second) == there


def views_of(x, residual, gy):
    parent = torch.randn(2 * x.shape[0], *(n + 2 for n in x.shape[1:]), dtype=x.dtype)
    last_parent = parent.to(memory_format=LAST)
    window = (slice(None, None, 2), slice(1, -1), slice(1, -1), slice(0, -2))
    parent[window], last_parent[window] = x, x
    last = x.to(memory_format=LAST)
    return {
        "sliced": (parent[window], residual, gy),
        "channels_last slice": (last_parent[window], residual, gy),
        "transposed": (x.transpose(2, 3).contiguous().transpose(2, 3), residual, gy),
        "channels_last": (last, residual, gy),
        "residual channels_last": (x, residual.to(memory_format=LAST), gy),
        "gy transposed": (last, residual, gy.transpose(1, 3).contiguous().transpose(1, 3)),
        "all sliced": (parent[window], parent[1::2, 1:-1, 1:-1, 2:], gy),
    }


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_views(backend, activation, training):
    (x, residual, *affine), running, gy, cotangents = inputs((4, 6, 5, 3))
    options = dict(training=training, activation=activation)
    for name, (x_view, residual_view, gy_view) in views_of(x, residual, gy).items():
        viewed = [x_view, residual_view, *affine]
        got = run(batch_norm_act, viewed, running, gy_view, cotangents, **options)
        contiguous = [x_view.contiguous(), residual_view.contiguous(), *affine]
        expected = run(batch_norm_act, contiguous, running, gy_view, cotangents, **options)
        for order in (1, 2):
            for a, b in zip(got[order], expected[order], strict=True):
                assert (a is None) == (b is None), name
                if a is not None:
                    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=name)
        torch.testing.assert_close(got[0], expected[0])


@pytest.mark.parametrize("layout", [NCHW, LAST], ids=["nchw", "channels_last"])
def test_expanded_gradients_and_inputs(backend, layout):
    tensors, running, gy, cotangents = inputs((4, 6, 5, 3), layout)
    options = dict(training=True, activation="gelu")
    x = tensors[0][:, :, :1, :1].expand_as(gy)
    gy, v = gy[:1, :, :1, :1].expand_as(gy), cotangents[0][0, 0, 0, 0].expand_as(gy)
    weight = tensors[2][:1].expand_as(tensors[2])
    given = [x, tensors[1], weight, tensors[3]]
    got = run(batch_norm_act, given, running, gy, [v, *cotangents[1:]], **options)
    expected = run(plain, given, running, gy, [v, *cotangents[1:]], **options)
    for order in (1, 2):
        for a, b in zip(got[order], expected[order], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("size", [(0, 3), (0, 64, 4, 4), (0, 100, 4, 4), (2, 3, 0, 4)], ids=str)
def test_empty_batches(backend, size, activation):
    for training, layout in itertools.product((False, True), (NCHW, LAST)):
        tensors, running, gy, cotangents = inputs(size, layout)
        y, first, second, after = run(
            batch_norm_act,
            tensors,
            running,
            gy,
            cotangents,
            training=training,
            activation=activation,
        )
        assert y.shape == size and first[0].shape == size
        assert all(not g.any() and g.shape == (size[1],) for g in first[2:])
        assert all(g is None or not g.any() for g in second[3:])
        assert all(torch.equal(a, b) for a, b in zip(running, after, strict=True))


def test_no_channels(backend):
    for size in ((3, 0), (3, 0, 2, 2), (0, 0)):
        tensors, running, _, _ = inputs(size)
        x, residual, weight, bias = leaves(tensors)
        for training in (False, True):
            y = batch_norm_act(
                x, weight, bias, *running, residual=residual, training=training, activation="relu"
            )
            y.sum().backward()
            assert y.shape == size and x.grad.shape == size and weight.grad.shape == (0,)


@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_running_statistics(backend, dtype, momentum):
    (x, *_), running, _, _ = inputs((5, 7, 3, 3), dtype=torch.float32)
    x = x.to(dtype)
    ours, torchs = ([t.clone() for t in running] for _ in range(2))
    batch_norm_act(x, None, None, *ours, training=True, momentum=momentum)
    F.batch_norm(x, *torchs, training=True, momentum=momentum)
    for a, b, before in zip(ours, torchs, running, strict=True):
        torch.testing.assert_close(a, b)
        assert torch.equal(a, before) == (momentum == 0)
    # each on its own, and none
    for i in (0, 1):
        alone = [t.clone() if i == j else None for j, t in enumerate(running)]
        batch_norm_act(x, None, None, *alone, training=True, momentum=momentum)
        assert torch.equal(alone[i], ours[i])
    batch_norm_act(x, training=True)
    # not touched when not training
    before = [t.clone() for t in ours]
    batch_norm_act(x, None, None, *ours)
    assert all(torch.equal(a, b) for a, b in zip(ours, before, strict=True))


def test_unbiased_variance_by_hand(backend):
    x = torch.tensor([[1.0], [2.0], [6.0]])
    mean, var = torch.tensor([10.0]), torch.tensor([20.0])
    y = batch_norm_act(x, None, None, mean, var, training=True, momentum=0.25, eps=1e-12)
    assert mean.item() == 8.25 and var.item() == pytest.approx(16.75)  # batch: 3 and 14 / 2
    expected = (x - 3) / (14 / 3) ** 0.5
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_third_order_is_refused(backend, activation):
    tensors, running, _, _ = inputs((3, 2, 2, 2))
    x, residual, weight, bias = leaves(tensors)
    y = batch_norm_act(
        x,
        weight,
        bias,
        *running,
        residual=residual,
        training=True,
        activation=activation,
    )
    (gx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gx.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="third-order gradients of batch_norm_act"):
        second.sum().backward()


@pytest.mark.parametrize("layout", [NCHW, LAST], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_opcheck(backend, activation, training, layout):
    tensors, running, gy, cotangents = inputs((4, 3, 5, 4), layout, dtype=torch.float32)
    x, residual, weight, bias = given = leaves(tensors)
    kind = (training, 1e-5, activation, 0.0)
    ops = torch.ops.fastinterp
    running = (None, None) if training else running
    torch.library.opcheck(ops.batch_norm_act.default, (*given, *running, *kind))
    _, mean, rstd, _, mask, proxy = ops.batch_norm_act(*tensors, *running, *kind)
    smooth = activation in SMOOTH
    (gy,) = leaves([gy])
    saved = (gy, x, residual if smooth else None, None if smooth else mask, weight, bias)
    saved += (mean, rstd)
    # proxy and addend: the gradient of x by way of the forward op, see the module
    for stand_in in ((None, None), leaves([proxy.clone(), cotangents[0]])):
        arguments = (*saved, *stand_in, *kind, True, True, True)
        torch.library.opcheck(ops.batch_norm_act_backward.default, arguments)
    saved = tuple(None if t is None else t.detach() for t in saved)
    _, _, sum_gx, sum_g = ops.batch_norm_act_backward(*saved, None, None, *kind, True, True, True)
    torch.library.opcheck(
        ops.batch_norm_act_backward_backward.default,
        (*cotangents, *saved, sum_gx, sum_g, *kind, True, True, smooth, True),
    )


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_every_output_element_is_written(monkeypatch, dtype, activation, training):
    """The kernels are handed NaN, and masks of ones and of zeros, and must overwrite all of it."""
    monkeypatch.setenv("FASTINTERP_BACKEND", "cpu")
    results, forward_results = module._results, module._forward_results
    acc = torch.promote_types(dtype, torch.float32)
    byte = 0

    def fill(tensors):
        for t in tensors:
            t.fill_(torch.nan) if t.is_floating_point() else t.fill_(byte)
        return tensors

    monkeypatch.setattr(module, "_results", lambda *a: fill(results(*a)))
    monkeypatch.setattr(
        module,
        "_forward_results",
        lambda *a: (*fill(forward_results(*a)[:-1]), forward_results(*a)[-1]),
    )
    for case in CASES:
        given = inputs(*case, dtype=dtype)
        masks, values = [], []
        for byte in (0, 255):  # noqa: B007, as fill reads it
            values.append(run(batch_norm_act, *given, training=training, activation=activation))
            (x, residual, *affine), running = given[:2]
            masks.append(
                torch.ops.fastinterp.batch_norm_act(
                    x, residual, *as_dtype(acc, *affine, *running), training, 1e-5, activation, 0.01
                )[4]
            )
        assert torch.equal(*masks)
        for one, other in zip(*([v[0], *v[1], *v[2], *v[3]] for v in values), strict=True):
            if one is not None:
                assert torch.isfinite(one).all() and torch.equal(one, other)


@pytest.mark.parametrize("layout", [NCHW, LAST], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_with_any_number_of_threads(monkeypatch, dtype, activation, layout):
    monkeypatch.setenv("FASTINTERP_BACKEND", "cpu")
    given = inputs((17, 33, 19, 13), layout, dtype=dtype)
    results = []
    for count in (1, 2, 3, 2):
        torch.set_num_threads(count)
        y, first, second, running = run(
            batch_norm_act, *given, training=True, activation=activation
        )
        results.append([y, *first, *(t for t in second if t is not None), *running])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def kept(tensors, running, activation):
    """What a forward pass keeps that is as large as the input: [(dtype, elements)]."""
    saved = {}
    x, residual, weight, bias = leaves(tensors)

    def pack(t):
        storage = t.untyped_storage()
        saved[storage.data_ptr()] = (t.dtype, storage.nbytes() // t.element_size())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        batch_norm_act(
            x,
            weight,
            bias,
            *running,
            residual=residual,
            training=True,
            activation=activation,
        )
    return sorted((str(d), n) for d, n in saved.values() if n > x.shape[1])


@pytest.mark.parametrize("layout", [NCHW, LAST], ids=["nchw", "channels_last"])
def test_what_is_kept(backend, layout):
    tensors, running, _, _ = inputs((4, 64, 8, 8), layout, dtype=torch.bfloat16)
    elements = tensors[0].numel()
    x, mask = ("torch.bfloat16", elements), ("torch.uint8", elements // 8)
    without = [tensors[0], None, *tensors[2:]]
    for activation in ACTIVATIONS:
        assert kept(without, running, activation) == [x]
    assert kept(tensors, running, "identity") == [x]
    assert kept(tensors, running, "relu") == kept(tensors, running, "leaky_relu") == [x, mask]
    for activation in SMOOTH:
        assert kept(tensors, running, activation) == [x, x]


@pytest.mark.parametrize(("size", "layout"), [c[:2] for c in CASES], ids=str)
def test_the_mask_is_the_sign_of_the_pre_activation(backend, size, layout):
    tensors, running, _, _ = inputs(size, layout)
    y, *_, mask, _ = torch.ops.fastinterp.batch_norm_act(
        *tensors, *running, False, 1e-5, "relu", 0.0
    )
    assert torch.equal(module._unpack(mask, tensors[0]), y > 0)
    assert torch.equal(mask, module._pack(y > 0, tensors[0]))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_special_values(backend, activation):
    # more than a vector and a rest that is none, in either layout
    x = torch.randn(2, 37, 5, 7)
    infinities = (torch.inf, -torch.inf) if activation not in SMOOTH else ()  # NaN there in torch
    for at, value in enumerate((torch.nan, 1e30, -1e30, *infinities)):
        x[:, at::8, 0] = value
    zero, one = torch.zeros(37), torch.ones(37)
    options = dict(activation=activation, training=False)
    expected = plain(x, one, zero, zero, one, residual=None, **options)
    for layout in (NCHW, LAST):
        view = x.contiguous(memory_format=layout)
        got = batch_norm_act(view, one, zero, zero, one, **options)
        torch.testing.assert_close(got, expected, equal_nan=True)
    x = torch.randn(4, 37)
    x[2, ::3] = torch.nan
    y = batch_norm_act(x, training=True, activation=activation)
    assert y[:, ::3].isnan().all() and y[:, 1::3].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(backend, dtype):
    """batch_norm is not among the operations that autocast casts."""
    tensors, running, gy, cotangents = inputs((4, 6, 5, 3), dtype=torch.float32)
    (x, residual), affine = as_dtype(dtype, *tensors[:2]), tensors[2:]
    given = ([x, residual, *affine], running, gy.to(dtype), cotangents)
    expected = run(batch_norm_act, *given, training=True, activation="silu")
    with torch.autocast("cpu", torch.bfloat16):
        got = run(batch_norm_act, *given, training=True, activation="silu")
    assert got[0].dtype == dtype and got[1][2].dtype == torch.float32
    for order in (1, 2):
        for a, b in zip(got[order], expected[order], strict=True):
            assert torch.equal(a, b)


def test_float16_falls_back_to_plain_torch(monkeypatch):
    monkeypatch.setenv("FASTINTERP_BACKEND", "reference")
    given = inputs((4, 6, 5, 3), dtype=torch.float16)
    got = run(batch_norm_act, *given, training=True, activation="relu")
    exact = run(plain, *as_dtype(torch.float64, *given), training=True, activation="relu")
    torch.testing.assert_close(got[0].double(), exact[0], rtol=2e-3, atol=2e-3)
    monkeypatch.setenv("FASTINTERP_BACKEND", "cpu")
    with pytest.raises(RuntimeError, match=r"no torch.float16 kernel"):
        run(batch_norm_act, *given, training=True, activation="relu")


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (dict(x=torch.zeros(3, dtype=torch.int64)), TypeError, "floating point"),
        (dict(x=torch.zeros(3)), ValueError, r"x must be \(N, C\)"),
        (dict(weight=torch.zeros(4)), ValueError, r"weight must be \(3,\) or None"),
        (dict(bias=torch.zeros(3, 1)), ValueError, r"bias must be \(3,\) or None"),
        (dict(running_mean=torch.zeros(2)), ValueError, r"running_mean must be \(3,\)"),
        (dict(running_var=torch.zeros(2)), ValueError, r"running_var must be \(3,\)"),
        (dict(residual=torch.zeros(1, 3, 2, 2)), ValueError, "residual must have the shape of x"),
        (dict(residual=torch.zeros(2, 3, 2, 2).double()), TypeError, "residual must be"),
        (dict(activation="tanh"), ValueError, "activation must be one of identity, relu"),
        (dict(activation="leaky_relu", alpha=-0.1), ValueError, "slope of leaky_relu"),
        (dict(activation="softplus", alpha=0.0), ValueError, "alpha of softplus"),
        (dict(activation="relu", alpha=0.1), ValueError, "relu has no alpha"),
        (dict(running_mean=None), ValueError, "running_mean and running_var are needed"),
        (dict(eps=-1e-5), ValueError, "eps must be"),
        (dict(eps=0.0, training=True), ValueError, "eps must be > 0 when training"),
        (dict(x=torch.zeros(1, 3, 1, 1), training=True), ValueError, "more than one value per"),
        (dict(x=torch.zeros(1, 3), training=True), ValueError, "more than one value per"),
    ],
)
def test_bad_input(change, error, match):
    arguments = dict(
        x=torch.zeros(2, 3, 2, 2),
        weight=torch.ones(3),
        bias=torch.zeros(3),
        running_mean=torch.zeros(3),
        running_var=torch.ones(3),
    )
    with pytest.raises(error, match=match):
        batch_norm_act(**(arguments | change))
