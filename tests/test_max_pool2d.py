import pytest
import torch
import torch.nn.functional as F
from accuracy_rule import assert_as_accurate
from torch.autograd import gradcheck, gradgradcheck

from fastinterp import _native
from fastinterp.ops import max_pool2d

# (N, C, H, W), then (kernel_size, stride, padding, dilation, ceil_mode)
CASES = [
    ((2, 3, 8, 8), (2, None, 0, 1, False)),
    ((2, 70, 9, 7), (3, 2, 1, 1, False)),
    ((3, 5, 11, 6), (3, 1, 1, 1, False)),
    ((1, 300, 7, 5), ((2, 3), (3, 2), (1, 0), 1, True)),
    ((2, 4, 13, 17), ((3, 2), 3, 1, (2, 3), True)),
    ((1, 2, 3, 600), ((1, 5), (1, 2), (0, 2), 1, False)),
    ((2, 3, 5, 5), (5, 5, 2, 1, False)),
    ((3, 1, 4, 4), (1, 2, 0, 1, False)),
    ((2, 3, 2, 4), (2, 1, 1, 3, False)),  # the only row of windows has no element in the map
]


def run(function, x, window, v=None):
    """y, gx, ggy of a function of gx, as float tensors without history."""
    leaf = x.detach().requires_grad_()
    y = function(leaf, *window)
    gy = torch.linspace(-2, 3, y.numel()).reshape(y.shape).to(y).requires_grad_()
    (gx,) = torch.autograd.grad(y, leaf, gy, create_graph=True)
    v = torch.randn_like(x) if v is None else v
    (ggy,) = torch.autograd.grad(gx, gy, v)
    return y.detach(), gx.detach(), ggy


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("size", "window"), CASES, ids=str)
def test_as_torch(backend, size, window, dtype, layout):
    # Few different values, so that there are ties everywhere.
    x = torch.randint(-3, 4, size).to(dtype).contiguous(memory_format=layout)
    v = torch.randn_like(x)
    y, gx, ggy = run(max_pool2d, x, window, v)
    if window[3] == 3:
        assert (y == -torch.inf).all() and not gx.any() and not ggy.any()
        return
    plain_y, plain_gx, plain_ggy = run(F.max_pool2d, x, window, v)
    assert torch.equal(y, plain_y) and torch.equal(ggy, plain_ggy)
    exact_gx = run(F.max_pool2d, x.double(), window, v.double())[1]
    exact_gy = torch.linspace(-2, 3, y.numel()).reshape(y.shape)
    if dtype == torch.bfloat16:  # what gy was rounded to
        leaf = x.double().requires_grad_()
        (exact_gx,) = torch.autograd.grad(
            F.max_pool2d(leaf, *window), leaf, exact_gy.bfloat16().double()
        )
    assert_as_accurate(gx, plain_gx, exact_gx, factor=3)
    assert gx.dtype == dtype
    for t in (y, gx, ggy):
        assert t.is_contiguous(memory_format=layout)


def test_hand_written_values(backend):
    x = torch.tensor([[[[1.0, 5.0, 2.0], [5.0, 0.0, 3.0]]]])
    y, gx, ggy = run(max_pool2d, x, (2, 1), torch.arange(6.0).reshape(1, 1, 2, 3))
    assert y.tolist() == [[[[5.0, 5.0]]]]
    # gy = [-2, 3], both from the 5 of the first row: the first of two equal elements
    assert gx.tolist() == [[[[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]]]
    assert ggy.tolist() == [[[[1.0, 1.0]]]]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_nan_and_infinity_as_torch(backend, layout):
    x = torch.randn(2, 19, 12, 12)
    x[torch.rand_like(x) < 0.2] = torch.nan
    x[torch.rand_like(x) < 0.2] = -torch.inf
    x[0, :9] = -torch.inf
    x = x.contiguous(memory_format=layout)
    v = torch.randn_like(x)
    for window in ((2, 2), (3, 1, 1)):
        for got, wanted in zip(
            run(max_pool2d, x, window, v), run(F.max_pool2d, x, window, v), strict=True
        ):
            torch.testing.assert_close(got, wanted, equal_nan=True)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_gradients_of_any_order(backend, layout):
    x = torch.randperm(2 * 3 * 5 * 6).double().reshape(2, 3, 5, 6).contiguous(memory_format=layout)
    x.requires_grad_()

    def cubed(x):
        return max_pool2d(x, 3, 2, 1).square()

    assert gradcheck(cubed, x, eps=1e-4)
    assert gradgradcheck(cubed, x, eps=1e-4)

    def third(function):
        g = function(x, 3, 2, 1).pow(4).sum()
        for _ in range(3):
            (g,) = torch.autograd.grad(g.sum(), x, create_graph=True)
        return g

    torch.testing.assert_close(third(max_pool2d), third(F.max_pool2d))


def test_views(backend):
    x = torch.randn(4, 6, 9, 8)
    parent = torch.randn(8, 7, 10, 9)
    parent[::2, 1:, 1:, :8] = x
    last = torch.randn(4, 12, 9, 8).contiguous(memory_format=torch.channels_last)
    last[:, ::2] = x
    v = torch.randn_like(x)
    expected = run(max_pool2d, x, (3, 2, 1), v)
    for view in (
        parent[::2, 1:, 1:, :8],
        last[:, ::2],
        x.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        for a, b in zip(run(max_pool2d, view, (3, 2, 1), v), expected, strict=True):
            torch.testing.assert_close(a, b)
    assert max_pool2d(last[:, ::2], 2).is_contiguous(memory_format=torch.channels_last)
    expanded = x[:1, :1].expand_as(x)
    assert torch.equal(max_pool2d(expanded, 2), F.max_pool2d(expanded, 2))
    # a gradient that is expanded, as after .sum()
    leaf = x.clone().requires_grad_()
    (gx,) = torch.autograd.grad(max_pool2d(leaf, 2).sum(), leaf)
    (wanted,) = torch.autograd.grad(F.max_pool2d(leaf, 2).sum(), leaf)
    assert torch.equal(gx, wanted)


def test_empty_batch(backend):
    y, gx, ggy = run(max_pool2d, torch.randn(0, 3, 8, 8), (2,))
    assert y.shape == ggy.shape == (0, 3, 4, 4) and gx.shape == (0, 3, 8, 8)


def test_only_offsets_are_saved(backend):
    saved = []
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = max_pool2d(x, 2)
        (gx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        gx.square().sum().backward()
    bytes_ = [t for t in saved if t.dtype == torch.uint8]
    assert len(bytes_) == 2 and all(t.shape == y.shape for t in bytes_)
    assert not any(t is x or t.data_ptr() == x.data_ptr() for t in saved)


def test_offsets_carry_no_gradient(backend):
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    y, offsets = torch.ops.fastinterp.max_pool2d(x, [2, 2], [2, 2], [0, 0], [1, 1], False)
    assert y.requires_grad and not offsets.requires_grad


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_opcheck(backend, layout):
    x = torch.randn(2, 3, 8, 8).contiguous(memory_format=layout)
    window = ([3, 2], [2, 2], [1, 1], [1, 1])
    last = layout == torch.channels_last
    ops = torch.ops.fastinterp
    torch.library.opcheck(ops.max_pool2d.default, (x.clone().requires_grad_(), *window, True))
    y, offsets = ops.max_pool2d(x, *window, True)
    torch.library.opcheck(
        ops.max_pool2d_backward.default,
        (torch.randn_like(y).requires_grad_(), offsets, 8, 8, *window, last),
    )
    torch.library.opcheck(
        ops.max_pool2d_backward_backward.default,
        (torch.randn_like(x).requires_grad_(), offsets, *window, last),
    )


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_with_any_number_of_threads(monkeypatch, dtype, layout):
    monkeypatch.setenv("FASTINTERP_BACKEND", "cpu")
    x = torch.randn(5, 20, 33, 31).to(dtype).contiguous(memory_format=layout)
    v = torch.randn_like(x)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(max_pool2d, x, (3, 1, 1), v))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_output_element_is_written(dtype, last):
    """The kernels are handed NaN and must overwrite all of it."""
    size, pooled_size = (2, 5, 9, 7), (2, 5, 5, 4)
    format_ = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(size).to(dtype).contiguous(memory_format=format_)
    y = torch.full(pooled_size, torch.nan, dtype=dtype).contiguous(memory_format=format_)
    offsets = torch.full_like(y, 254, dtype=torch.uint8)
    geometry = (size, pooled_size[2:], (3, 3), (2, 2), (1, 1), (1, 1))
    code = {torch.float32: 0, torch.bfloat16: 2}[dtype]

    def call(kernel, map_, pooled):
        kernel(code, last, *geometry, *(t.data_ptr() for t in (map_, pooled, offsets)), 2)

    call(_native.core.cpu_max_pool2d, x, y)
    assert torch.isfinite(y).all() and (offsets < 9).all()
    gx, ggy = torch.full_like(x, torch.nan), torch.full_like(y, torch.nan)
    call(_native.core.cpu_max_pool2d_backward, gx, y)
    call(_native.core.cpu_max_pool2d_backward_backward, x, ggy)
    assert torch.isfinite(gx).all() and torch.equal(ggy, y)


@pytest.mark.parametrize(
    ("size", "window", "error", "match"),
    [
        ((3, 4, 4), dict(kernel_size=2), ValueError, r"x must be \(N, C, H, W\)"),
        ((1, 3, 4, 4), dict(kernel_size=0), ValueError, "kernel_size must be an integer >= 1"),
        ((1, 3, 4, 4), dict(kernel_size=2, stride=0), ValueError, "stride must be"),
        ((1, 3, 4, 4), dict(kernel_size=2, dilation=(1, 0)), ValueError, "dilation must be"),
        ((1, 3, 4, 4), dict(kernel_size=2, padding=-1), ValueError, "padding must be"),
        ((1, 3, 4, 4), dict(kernel_size=2, padding=2), ValueError, "at most half of kernel_size"),
        ((1, 3, 4, 4), dict(kernel_size=5), ValueError, "do not fit"),
        ((1, 3, 32, 32), dict(kernel_size=16), ValueError, "functional.max_pool2d"),
    ],
)
def test_bad_input(size, window, error, match):
    with pytest.raises(error, match=match):
        max_pool2d(torch.rand(size), **window)


def test_integers_are_refused():
    with pytest.raises(TypeError, match="floating point"):
        max_pool2d(torch.zeros(1, 1, 2, 2, dtype=torch.int64), 2)
