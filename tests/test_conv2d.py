import importlib

import pytest
import torch
import torch.nn.functional as F
from accuracy_rule import assert_as_accurate
from torch._subclasses import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

import fastinterp
from fastinterp.ops import conv2d

module = importlib.import_module("fastinterp.ops.conv2d")

LAST, NCHW = torch.channels_last, torch.contiguous_format
OURS = ("conv2d", "conv2d_input_grad", "conv2d_weight_grad")
# input, weight, options
CASES = [
    ((3, 4, 7, 9), (5, 4, 3, 3), dict(padding=1)),
    ((2, 3, 11, 8), (7, 3, 5, 3), dict(stride=2, padding=(2, 1))),
    ((2, 4, 9, 9), (6, 4, 1, 1), dict(stride=2)),
    ((2, 4, 8, 7), (6, 2, 3, 3), dict(stride=(2, 1), groups=2)),
    ((2, 6, 7, 7), (6, 1, 3, 3), dict(padding=1, groups=6)),  # depthwise
    ((2, 6, 7, 7), (12, 1, 3, 3), dict(padding="same", groups=6)),
    ((2, 3, 9, 10), (4, 3, 3, 2), dict(dilation=2, padding=2)),
    ((2, 3, 9, 10), (4, 3, 3, 3), dict(stride=3, dilation=(1, 2), padding=(3, 0))),
    ((2, 3, 6, 5), (4, 3, 4, 2), dict(padding="same")),  # uneven on both sides
    ((2, 3, 6, 5), (4, 3, 2, 3), dict(padding="same", dilation=3)),
    ((2, 3, 6, 5), (4, 3, 3, 3), dict(padding="valid", stride=2)),
    # few pixels, many channels, where the weight gradient may be a product
    ((2, 4, 6, 7), (40, 4, 3, 2), dict(stride=(2, 1), dilation=(1, 2), padding=(2, 1))),
    ((2, 16, 3, 4), (40, 16, 3, 3), dict(padding=1)),
    ((2, 16, 5, 4), (40, 16, 1, 1), dict(stride=2)),
    ((1, 17, 1, 1), (19, 17, 1, 1), {}),
    ((3, 5, 7), (4, 3, 3, 3), dict(padding=1)),  # unbatched
]
IDS = [f"{w}-{o}" for _, w, o in CASES]


@pytest.fixture(autouse=True)
def _one_thread():
    """The tensors are tiny: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def inputs(size, weight_size, options, dtype=torch.float64, layout=NCHW):
    def randn(*shape):
        t = torch.randn(shape, dtype=torch.float64).to(dtype)
        return t.contiguous(memory_format=layout) if len(shape) == 4 else t

    tensors = [randn(*size), randn(*weight_size), randn(weight_size[0])]
    gy = randn(*F.conv2d(*tensors, **options).shape)
    return tensors, gy, [randn(*t.shape) for t in tensors]


def leaves(tensors):
    return [None if t is None else t.detach().requires_grad_() for t in tensors]


def run(function, tensors, gy, cotangents, **options):
    """y, the first and the second order, without history; None where there is no gradient."""
    given, (gy,) = leaves(tensors), leaves([gy])
    wanted = [t for t in given if t is not None]
    y = function(*given, **options)
    first = torch.autograd.grad(y, wanted, gy, create_graph=True)
    penalty = sum((g * c).sum() for g, c in zip(first, cotangents, strict=False))
    second = torch.autograd.grad(penalty, [gy, *wanted], allow_unused=True)
    return y.detach(), [g.detach() for g in first], second


@pytest.mark.parametrize("layout", [NCHW, LAST], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_as_torch(case, dtype, layout):
    tensors, gy, cotangents = inputs(*case, dtype, layout)
    for with_bias in (True, False):
        given = [*tensors[:2], tensors[2] if with_bias else None]
        doubles = [None if t is None else t.double() for t in given]
        got = run(conv2d, given, gy, cotangents, **case[2])
        plain = run(F.conv2d, given, gy, cotangents, **case[2])
        exact = run(F.conv2d, doubles, gy.double(), [c.double() for c in cotangents], **case[2])
        assert got[0].dtype == dtype and got[0].shape == plain[0].shape
        assert_as_accurate(got[0], plain[0], exact[0], 2)
        for value, same, true in zip(got[1], plain[1], exact[1], strict=True):
            assert value.dtype == dtype
            assert_as_accurate(value, same, true, 3)
        for value, same, true in zip(got[2], plain[2], exact[2], strict=True):
            if value is None:  # of the bias, which no first gradient depends on
                assert true is None or not true.any()
            else:
                assert_as_accurate(value, same, true, 4)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_weight_gradient_as_a_product(monkeypatch, case):
    """Where it is faster the weight gradient is one matrix product; here, wherever it is right."""
    taken = []

    def eligible(gy, weight_size, groups):
        taken.append(groups == 1)
        return taken[-1]

    monkeypatch.setattr(module, "_product_is_faster", eligible)
    size, _, options = case
    given = inputs(*case, torch.float64, LAST)
    if len(size) == 4:  # a view into larger memory
        parent = torch.randn(size[0] + 1, *size[1:], dtype=torch.float64).to(memory_format=LAST)
        parent[1:] = given[0][0]
        given[0][0] = parent[1:]
    got, exact = run(conv2d, *given, **options), run(F.conv2d, *given, **options)
    for order in (1, 2):
        for value, true in zip(got[order], exact[order], strict=True):
            if value is not None:
                torch.testing.assert_close(value, true, rtol=1e-10, atol=1e-10)
    assert any(taken) == (options.get("groups", 1) == 1)


needs_tiles = pytest.mark.skipif(
    not getattr(fastinterp._native.core, "amx_bf16", False), reason="no AMX tiles on this machine"
)
TILE_CASES = [  # N, C, O, H, W, kernel, stride, padding, dilation
    (2, 16, 16, 8, 8, (3, 3), (1, 1), (1, 1), (1, 1)),
    (2, 3, 20, 9, 9, (3, 3), (2, 2), (1, 1), (1, 1)),
    (3, 40, 24, 7, 5, (1, 1), (2, 2), (0, 0), (1, 1)),
    (2, 17, 33, 11, 14, (5, 3), (2, 1), (2, 0), (1, 1)),
    (2, 16, 16, 12, 9, (3, 3), (1, 1), (2, 3), (2, 3)),
    (2, 16, 48, 9, 9, (3, 3), (3, 3), (0, 0), (1, 1)),
    (1, 48, 80, 30, 17, (3, 3), (1, 1), (1, 1), (1, 1)),
    (2, 64, 64, 64, 64, (3, 3), (1, 1), (1, 1), (1, 1)),  # several parts
    (3, 8, 8, 6, 6, (4, 4), (2, 2), (1, 1), (1, 1)),
    (1, 8, 8, 3, 3, (3, 3), (1, 1), (2, 2), (1, 1)),
    (4, 16, 16, 1, 1, (1, 1), (1, 1), (0, 0), (1, 1)),
    (2, 5, 5, 10, 10, (7, 7), (1, 1), (3, 3), (1, 1)),
    (2, 16, 32, 5, 5, (1, 1), (4, 4), (2, 2), (1, 1)),  # taps that see padding alone
]


@pytest.mark.skipif(
    not getattr(fastinterp._native.core, "amx_bf16", False), reason="no AMX tiles on this machine"
)
@pytest.mark.parametrize("case", TILE_CASES, ids=str)
def test_weight_gradient_on_tiles(monkeypatch, case):
    """As accurate as oneDNN's, the same bits for any number of threads, every element written."""
    n, channels, out_channels, height, width, kernel, *options = case
    x = torch.randn(n, channels, height, width).bfloat16().to(memory_format=LAST)
    size = (out_channels, channels, *kernel)
    y = F.conv2d(x, torch.zeros(size).bfloat16(), None, *options)
    gy = torch.randn(y.shape).bfloat16().to(memory_format=LAST)
    unfilled = module.unfilled
    monkeypatch.setattr(module, "unfilled", lambda *a: unfilled(*a).fill_(torch.nan))
    plain = module._weight_grad_by_torch(gy, x, size, *options, 1)
    exact = torch.nn.grad.conv2d_weight(x.double(), size, gy.double(), *options)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(module._weight_grad_tiles(gy, x, size, *options))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)
    assert_as_accurate(results[0], plain, exact, 3)
    # oneDNN sets the tiles up for itself; neither may disturb the other.
    assert torch.equal(module._weight_grad_by_torch(gy, x, size, *options, 1), plain)


@pytest.mark.skipif(
    not getattr(fastinterp._native.core, "amx_bf16", False), reason="no AMX tiles on this machine"
)
def test_tiles_are_used_where_they_are_faster(monkeypatch):
    calls = []
    tiles = module._weight_grad_tiles
    monkeypatch.setattr(module, "_weight_grad_tiles", lambda *a: calls.append(1) or tiles(*a))
    for backend, dtype, layout, expected in (
        ("auto", torch.bfloat16, LAST, 1),
        ("cpu", torch.bfloat16, LAST, 1),
        ("reference", torch.bfloat16, LAST, 0),
        ("auto", torch.float32, LAST, 0),
        ("auto", torch.bfloat16, NCHW, 1),
    ):
        monkeypatch.setenv("FASTINTERP_BACKEND", backend)
        x, weight = torch.randn(2, 64, 8, 8), torch.randn(64, 64, 3, 3, requires_grad=True)
        calls.clear()
        conv2d(x.to(dtype, memory_format=layout), weight.to(dtype), padding=1).sum().backward()
        assert len(calls) == expected, (backend, dtype, layout)


@pytest.mark.parametrize("case", CASES[:-2], ids=IDS[:-2])
def test_channels_last_is_kept(case):
    """In the output and in every gradient: a change of layout is a copy."""
    tensors, gy, cotangents = inputs(*case, torch.float32, LAST)
    y, first, second = run(conv2d, tensors, gy, cotangents, **case[2])
    for t in (y, first[0], second[0], second[1]):
        assert t.is_contiguous(memory_format=LAST)
    tensors, gy, cotangents = inputs(*case, torch.float32, NCHW)
    y, first, second = run(conv2d, tensors, gy, cotangents, **case[2])
    for t in (y, *first, *second[:-1]):
        assert t.is_contiguous()


def test_views():
    tensors, gy, cotangents = inputs((4, 6, 7, 9), (5, 6, 3, 3), dict(padding=1))
    x, weight, bias = tensors
    parent = torch.randn(8, 8, 9, 11, dtype=x.dtype)
    window = (slice(None, None, 2), slice(1, -1), slice(1, -1), slice(0, -2))
    parent[window] = x
    expected = run(conv2d, tensors, gy, cotangents, padding=1)
    for x_view, weight_view in (
        (parent[window], weight),
        (x.transpose(2, 3).contiguous().transpose(2, 3), weight),
        (x.to(memory_format=LAST), weight),
        (x, weight.transpose(0, 1).contiguous().transpose(0, 1)),
    ):
        got = run(conv2d, [x_view, weight_view, bias], gy, cotangents, padding=1)
        for order in (1, 2):
            for a, b in zip(got[order], expected[order], strict=True):
                torch.testing.assert_close(a, b)
    ones = gy[:1, :1, :1, :1].expand_as(gy)
    for a, b in zip(
        run(conv2d, tensors, ones, cotangents, padding=1)[2],
        run(F.conv2d, tensors, ones, cotangents, padding=1)[2],
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_placeholders_are_never_read(monkeypatch, case):
    """convolution_backward gets memory of the right shape where it should not look: here, NaN."""
    unfilled = module.unfilled
    monkeypatch.setattr(module, "unfilled", lambda *a: unfilled(*a).fill_(torch.nan))
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for layout in (NCHW, LAST):
            given = inputs(*case, dtype, layout)
            _, first, second = run(conv2d, *given, **case[2])
            assert all(g is None or torch.isfinite(g).all() for g in (*first, *second))


@pytest.mark.parametrize(
    ("size", "weight_size", "options"),
    [
        ((2, 2, 4, 3), (2, 2, 3, 2), dict(padding=1, stride=2)),
        ((1, 4, 4, 3), (4, 2, 2, 2), dict(groups=2, dilation=2, padding="same")),
        ((2, 3, 3, 2), (3, 1, 2, 2), dict(groups=3)),
    ],
    ids=str,
)
def test_gradcheck(size, weight_size, options):
    given = leaves(inputs(size, weight_size, options)[0])
    assert gradcheck(lambda *t: conv2d(*t, **options), given)
    assert gradgradcheck(lambda *t: conv2d(*t, **options), given)


@pytest.mark.parametrize("function", ["input_grad", "weight_grad"])
def test_the_family_is_closed(function):
    """Each member's own derivatives, to the second order."""
    (x, weight, _), gy, _ = inputs((2, 2, 4, 3), (2, 2, 3, 2), dict(stride=2))
    options = ((2, 2), (0, 0), (1, 1), 1)
    if function == "input_grad":
        pair, size = (gy, weight), x.shape
        op = torch.ops.fastinterp.conv2d_input_grad
    else:
        pair, size = (gy, x), weight.shape
        op = torch.ops.fastinterp.conv2d_weight_grad
    assert gradcheck(lambda a, b: op(a, b, size, *options), leaves(pair))
    assert gradgradcheck(lambda a, b: op(a, b, size, *options), leaves(pair))


def test_third_and_fourth_order():
    tensors, _, _ = inputs((2, 3, 6, 5), (4, 3, 3, 3), dict(padding=1, stride=2))
    results = []
    for function in (conv2d, F.conv2d):
        given = leaves(tensors)
        value = function(*given, padding=1, stride=2).pow(5).mean()
        for _ in range(3):
            grads = torch.autograd.grad(value, given, create_graph=True)
            value = sum((g * torch.linspace(-1, 1, g.numel()).view_as(g)).sum() for g in grads)
        results.append([value, *torch.autograd.grad(value, given)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


class Count(TorchDispatchMode):
    """Calls of the three ops, and of torch's own convolutions outside of them."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "conv" in func._schema.name:
            self.calls.append(func._schema.name.split("::")[1])
        return func(*args, **(kwargs or {}))


def counted(step):
    with Count() as count:
        step()
    return sorted(count.calls)


def test_nothing_is_computed_that_nobody_asked_for():
    tensors, gy, _ = inputs((2, 3, 6, 5), (4, 3, 3, 3), dict(padding=1))
    x, weight, bias = leaves(tensors)
    y = conv2d(x, weight, bias, padding=1)
    forward, input_grad, weight_grad = OURS

    def grad(outputs, *ends):
        return counted(lambda: torch.autograd.grad(outputs, ends, gy, retain_graph=True))

    assert grad(y, x) == [input_grad]
    assert grad(y, weight) == [weight_grad]
    assert grad(y, bias) == []
    assert grad(y, x, weight) == [input_grad, weight_grad]
    hidden = conv2d(x.relu(), weight * 2, bias, padding=1)  # neither is a leaf
    assert grad(hidden, x) == [input_grad]
    assert grad(hidden, weight) == [weight_grad]
    assert counted(lambda: y.sum().backward(inputs=[x], retain_graph=True)) == [input_grad]
    assert counted(lambda: y.sum().backward(retain_graph=True)) == [input_grad, weight_grad]
    # the second order of the input gradient: F for gy, W for the weight
    upstream = gy.clone().requires_grad_()
    (gx,) = torch.autograd.grad(y, x, upstream, create_graph=True)
    second = lambda *ends: counted(  # noqa: E731
        lambda: torch.autograd.grad(gx.sum(), ends, retain_graph=True)
    )
    assert second(upstream) == [forward]
    assert second(weight) == [weight_grad]
    assert second(upstream, weight) == [forward, weight_grad]


def test_attack_and_training_without_gradients_of_the_input():
    """x without gradients has none computed, in the first convolution of a network."""
    (x, weight, bias), _, _ = inputs((2, 3, 6, 5), (4, 3, 3, 3), {})
    _, weight, bias = leaves([x, weight, bias])
    y = conv2d(x, weight, bias)
    assert counted(lambda: y.sum().backward()) == ["conv2d_weight_grad"]


def kept(x, weight):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = conv2d(x, weight, padding=1)
        first = len(saved)
        if x.requires_grad:
            gx = torch.autograd.grad(y.sum(), x, create_graph=True)[0]
            del gx
    return [t.data_ptr() for t in saved[:first]]


def test_frozen_weights_keep_no_activation():
    (x, weight, _), _, _ = inputs((2, 3, 6, 5), (4, 3, 3, 3), {})
    free_x, free_weight = leaves([x, weight])
    assert kept(free_x, weight) == [weight.data_ptr()]
    assert kept(x, free_weight) == [x.data_ptr()]
    assert sorted(kept(free_x, free_weight)) == sorted([x.data_ptr(), weight.data_ptr()])
    assert kept(x, weight) == []


@pytest.mark.parametrize("layout", [NCHW, LAST], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("case", [CASES[1], CASES[3]], ids=[IDS[1], IDS[3]])
def test_opcheck(case, layout):
    tensors, gy, _ = inputs(*case, torch.float32, layout)
    x, weight, bias = leaves(tensors)
    (gy,) = leaves([gy])
    pairs = (case[2].get(name, default) for name, default in (("stride", 1), ("padding", 0)))
    options = (*map(module._pair, pairs), (1, 1), case[2].get("groups", 1))
    ops = torch.ops.fastinterp
    torch.library.opcheck(ops.conv2d.default, (x, weight, bias, *options))
    torch.library.opcheck(ops.conv2d_input_grad.default, (gy, weight, list(x.shape), *options))
    torch.library.opcheck(ops.conv2d_weight_grad.default, (gy, x, list(weight.shape), *options))


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("weight_layout", [NCHW, LAST], ids=["", "weight channels_last"])
@pytest.mark.parametrize("layout", [NCHW, LAST], ids=["", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_tracers_are_told_the_layouts(dtype, layout, weight_layout, kernel):
    """Compiled code relies on the strides that the fake kernels promise."""
    x = torch.randn(2, 4, 8, 8).to(dtype).contiguous(memory_format=layout)
    weight = torch.randn(6, 4, kernel, kernel).to(dtype).contiguous(memory_format=weight_layout)
    gy = torch.randn(2, 6, 8, 8).to(dtype).contiguous(memory_format=layout)
    options, ops = ((1, 1), (kernel // 2,) * 2, (1, 1), 1), torch.ops.fastinterp

    def results(x, weight, gy):
        return (
            ops.conv2d(x, weight, None, *options),
            ops.conv2d_input_grad(gy, weight, x.shape, *options),
            ops.conv2d_weight_grad(gy, x, weight.shape, *options),
        )

    mode = FakeTensorMode()
    with mode:
        promised = results(*map(mode.from_tensor, (x, weight, gy)))
    for fake, real in zip(promised, results(x, weight, gy), strict=True):
        assert (fake.shape, fake.stride()) == (real.shape, real.stride())


def test_empty_batch():
    (_, weight, bias), _, _ = inputs((1, 3, 6, 5), (4, 3, 3, 3), {})
    x = torch.empty(0, 3, 6, 5, dtype=weight.dtype)
    gy, cotangents = torch.empty(0, 4, 4, 3, dtype=x.dtype), [x, weight, bias]
    got = run(conv2d, [x, weight, bias], gy, cotangents)
    assert got[0].shape == (0, 4, 4, 3)
    assert got[1][0].shape == x.shape and got[2][0].shape == gy.shape
    assert not any(g.any() for g in (*got[1], *(g for g in got[2] if g is not None)))


def test_autocast():
    tensors, gy, cotangents = inputs((2, 8, 7, 7), (8, 8, 3, 3), {}, torch.float32)
    low = [t.bfloat16() for t in tensors]
    with torch.autocast("cpu", torch.bfloat16):
        y = conv2d(*tensors)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, F.conv2d(*low))
        assert conv2d(*(t.double() for t in tensors)).dtype == torch.float64
        # a double backward inside the region, as in a training step
        gy, cotangents = gy.bfloat16(), cotangents
        got = run(conv2d, tensors, gy, cotangents)
        with torch.autocast("cpu", enabled=False):
            assert conv2d(*tensors).dtype == torch.float32
    assert all(g.dtype == torch.float32 for g in got[1])
    plain = run(F.conv2d, low, gy, cotangents)
    exact = run(F.conv2d, [t.double() for t in low], gy.double(), [c.double() for c in cotangents])
    for value, same, true in zip(got[1], plain[1], exact[1], strict=True):
        assert_as_accurate(value.bfloat16(), same, true, 3)
    for value, same, true in zip(got[2][:3], plain[2], exact[2], strict=False):
        assert_as_accurate(value.bfloat16(), same, true, 4)


def test_meta_tensors():
    """Shapes without arithmetic, for those who count what a network costs."""
    x, weight = torch.empty(2, 3, 9, 9, device="meta"), torch.empty(4, 3, 3, 3, device="meta")
    assert conv2d(x, weight, stride=2).shape == (2, 4, 4, 4)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (dict(padding="full"), ValueError, 'must be numbers, "valid" or "same"'),
        (dict(padding="same", stride=2), ValueError, "needs stride 1"),
        (dict(weight=torch.zeros(4, 2, 3, 3)), RuntimeError, "channels"),
        (dict(weight=torch.zeros(4, 3, 9, 9)), RuntimeError, "[Kk]ernel size"),
        (dict(bias=torch.zeros(5)), RuntimeError, "bias"),
        (dict(groups=2), RuntimeError, "groups"),
        (dict(x=torch.zeros(2, 3)), RuntimeError, "dimension"),
        (dict(weight=torch.zeros(4, 3, 3, 3).double()), RuntimeError, "type"),
    ],
)
def test_bad_input(change, error, match):
    arguments = dict(x=torch.zeros(2, 3, 6, 5), weight=torch.zeros(4, 3, 3, 3))
    with pytest.raises(error, match=match):
        conv2d(**(arguments | change))
