import pytest
import torch
import torch.nn.functional as F
from accuracy_rule import assert_as_accurate, relative_error
from torch.autograd import gradcheck, gradgradcheck

from fastinterp.ops import adaptive_avg_pool2d, avg_pool2d

# (N, C, H, W), then (kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
CASES = [
    ((2, 3, 8, 8), (2,)),
    ((2, 70, 9, 7), (3, 2, 1, True, False)),
    ((3, 5, 11, 6), (3, 1, 1)),
    ((1, 33, 7, 5), ((2, 3), (3, 2), (1, 0), True, True, 5)),
    ((2, 64, 6, 6), (6,)),
    ((3, 1, 4, 4), (1, 2)),
]
LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)


def run(function, x, gy, v):
    """y, gx and ggy, without history."""
    leaf, gy = x.detach().requires_grad_(), gy.detach().requires_grad_()
    y = function(leaf)
    (gx,) = torch.autograd.grad(y, leaf, gy, create_graph=True)
    (ggy,) = torch.autograd.grad(gx, gy, v)
    return y.detach(), gx.detach(), ggy


def check(function, plain, x, layout):
    gy, v = torch.randn_like(plain(x)), torch.randn_like(x)
    got, same = run(function, x, gy, v), run(plain, x, gy, v)
    exact = run(plain, x.double(), gy.double(), v.double())
    for value, a, b, factor in zip(got, same, exact, (2, 3, 4), strict=True):
        assert value.dtype == x.dtype
        assert value.is_contiguous(memory_format=layout)
        assert_as_accurate(value, a, b, factor)


@LAYOUTS
@DTYPES
@pytest.mark.parametrize(("size", "window"), CASES, ids=str)
def test_as_torch(size, window, dtype, layout):
    x = torch.randn(size).to(dtype).contiguous(memory_format=layout)
    check(lambda x: avg_pool2d(x, *window), lambda x: F.avg_pool2d(x, *window), x, layout)


@LAYOUTS
@DTYPES
@pytest.mark.parametrize("size", [(2, 3, 8, 8), (3, 65, 7, 5), (1, 1, 1, 1)], ids=str)
def test_adaptive_as_torch(size, dtype, layout):
    x = torch.randn(size).to(dtype).contiguous(memory_format=layout)
    for output_size in (1, (1, 1)):
        check(
            lambda x, to=output_size: adaptive_avg_pool2d(x, to),
            lambda x: F.adaptive_avg_pool2d(x, 1),
            x,
            layout,
        )


@LAYOUTS
def test_overlapping_bfloat16_sums_are_in_float32(layout):
    """Plain torch rounds after every window here; we round once."""
    x = torch.randn(2, 16, 14, 14).bfloat16().contiguous(memory_format=layout)
    gy, v = torch.randn_like(x), torch.randn_like(x)
    _, gx, _ = run(lambda x: avg_pool2d(x, 3, 1, 1), x, gy, v)
    _, exact, _ = run(lambda x: F.avg_pool2d(x, 3, 1, 1), x.double(), gy.double(), v.double())
    assert relative_error(gx, exact) <= 1.01 * relative_error(exact.bfloat16(), exact)


def test_hand_written_values():
    x = torch.tensor([[[[1.0, 3.0, 2.0], [5.0, 7.0, 0.0]]]])
    gy = torch.tensor([[[[4.0, 8.0]]]])
    y, gx, ggy = run(lambda x: avg_pool2d(x, 2, 1), x, gy, torch.ones_like(x))
    assert y.tolist() == [[[[4.0, 3.0]]]]
    assert gx.tolist() == [[[[1.0, 3.0, 2.0], [1.0, 3.0, 2.0]]]]
    assert ggy.tolist() == [[[[1.0, 1.0]]]]
    assert adaptive_avg_pool2d(x, 1).tolist() == [[[[3.0]]]]


@LAYOUTS
@pytest.mark.parametrize(
    "function", [lambda x: avg_pool2d(x, 3, 2, 1), lambda x: adaptive_avg_pool2d(x, 1)]
)
def test_gradients_of_any_order(function, layout):
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64).contiguous(memory_format=layout)
    x.requires_grad_()
    assert gradcheck(lambda x: function(x).pow(3), x)
    assert gradgradcheck(lambda x: function(x).pow(3), x)
    g = function(x).pow(4).sum()
    for _ in range(4):
        (g,) = torch.autograd.grad(g.sum(), x, create_graph=True)
    plain = (
        (lambda x: F.avg_pool2d(x, 3, 2, 1))
        if function(x).shape[2] > 1
        else (lambda x: F.adaptive_avg_pool2d(x, 1))
    )
    h = plain(x).pow(4).sum()
    for _ in range(4):
        (h,) = torch.autograd.grad(h.sum(), x, create_graph=True)
    torch.testing.assert_close(g, h)


@LAYOUTS
def test_nothing_is_kept_and_x_gets_no_zeros(layout):
    kept = []
    x = torch.randn(2, 3, 8, 8).contiguous(memory_format=layout).requires_grad_()
    for function, size in (
        (lambda x: avg_pool2d(x, 2), 4),
        (lambda x: adaptive_avg_pool2d(x, 1), 1),
    ):
        gy = torch.randn(2, 3, size, size, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t), lambda t: t):
            (gx,) = torch.autograd.grad(function(x), x, gy, create_graph=True)
        assert not kept and gx.is_contiguous(memory_format=layout)
        ggy, gx2 = torch.autograd.grad(gx, (gy, x), torch.ones_like(x), allow_unused=True)
        assert gx2 is None and ggy.shape == gy.shape


def test_views_and_expanded_gradients():
    x = torch.randn(4, 6, 9, 8)
    parent = torch.randn(8, 7, 10, 9)
    parent[::2, 1:, 1:, :8] = x
    last = torch.randn(4, 12, 9, 8).contiguous(memory_format=torch.channels_last)
    last[:, ::2] = x
    for function in (lambda x: avg_pool2d(x, 3, 2, 1), lambda x: adaptive_avg_pool2d(x, 1)):
        gy = torch.ones(()).expand_as(function(x))
        v = torch.ones(()).expand_as(x)
        expected = run(function, x, gy.contiguous(), v.contiguous())
        for view in (parent[::2, 1:, 1:, :8], last[:, ::2], x.transpose(2, 3).mT, x):
            for a, b in zip(run(function, view, gy, v), expected, strict=True):
                torch.testing.assert_close(a, b)


def test_empty_batch():
    x = torch.randn(0, 3, 8, 8)
    y, gx, ggy = run(lambda x: avg_pool2d(x, 2), x, x[:, :, :4, :4], x)
    assert y.shape == ggy.shape == (0, 3, 4, 4) and gx.shape == x.shape
    y, gx, _ = run(lambda x: adaptive_avg_pool2d(x, 1), x, x[:, :, :1, :1], x)
    assert y.shape == (0, 3, 1, 1) and gx.shape == x.shape


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "window",
    [([3, 2], [2, 2], [1, 1], True, False, None), ([8, 8], [8, 8], [0, 0], False, True, None)],
)
def test_opcheck(window, dtype, layout):
    x = torch.randn(2, 3, 8, 8).to(dtype).contiguous(memory_format=layout)
    ops = torch.ops.fastinterp
    last = layout == torch.channels_last
    # The comparison of gradients under compilation is of the last bits in bfloat16.
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    checks += ["test_aot_dispatch_dynamic"] if dtype == torch.float32 else []
    y = ops.avg_pool2d(x, *window)
    torch.library.opcheck(ops.avg_pool2d.default, (x.requires_grad_(), *window), test_utils=checks)
    torch.library.opcheck(
        ops.avg_pool2d_backward.default,
        (torch.randn_like(y).requires_grad_(), 8, 8, *window, last),
        test_utils=checks,
    )


@pytest.mark.parametrize(
    ("function", "size", "arguments", "match"),
    [
        (avg_pool2d, (3, 4, 4), (2,), r"x must be \(N, C, H, W\)"),
        (avg_pool2d, (1, 3, 4, 4), (0,), "kernel_size must be an integer >= 1"),
        (avg_pool2d, (1, 3, 4, 4), (2, 0), "stride must be"),
        (avg_pool2d, (1, 3, 4, 4), (2, 2, 2), "at most half of kernel_size"),
        (avg_pool2d, (1, 3, 4, 4), (5,), "do not fit"),
        (avg_pool2d, (1, 3, 4, 4), (2, 2, 0, False, True, 0), "divisor_override"),
        (adaptive_avg_pool2d, (3, 4, 4), (1,), r"x must be \(N, C, H, W\)"),
        (adaptive_avg_pool2d, (1, 3, 4, 4), (2,), "output_size must be 1"),
        (adaptive_avg_pool2d, (1, 3, 0, 4), (1,), "no pixels"),
    ],
)
def test_bad_input(function, size, arguments, match):
    with pytest.raises(ValueError, match=match):
        function(torch.rand(size), *arguments)


@pytest.mark.parametrize("function", [avg_pool2d, adaptive_avg_pool2d])
def test_integers_are_refused(function):
    with pytest.raises(TypeError, match="floating point"):
        function(torch.zeros(1, 1, 2, 2, dtype=torch.int64), 1)
