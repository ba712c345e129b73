import pytest
import torch
import torch.nn.functional as F
from accuracy_rule import assert_as_accurate
from torch.autograd import gradcheck, gradgradcheck

from fastinterp import _native
from fastinterp.ops import activation

PLAIN = {
    ("relu", None): F.relu,
    ("leaky_relu", None): F.leaky_relu,
    ("leaky_relu", -0.5): lambda x: F.leaky_relu(x, -0.5),
    ("softplus", None): F.softplus,
    ("softplus", 3.0): lambda x: F.softplus(x, beta=3.0),
    ("silu", None): F.silu,
    ("gelu", None): F.gelu,
}
KINDS = list(PLAIN)
SMOOTH = [k for k in KINDS if k[0] in ("softplus", "silu", "gelu")]


def own(kind):
    return lambda x: activation(x, *kind)


def run(function, x, gy, v):
    """y, gx, ggy, gx2 without history."""
    leaf, gy = x.detach().requires_grad_(), gy.detach().requires_grad_()
    y = function(leaf)
    (gx,) = torch.autograd.grad(y, leaf, gy, create_graph=True)
    ggy, gx2 = torch.autograd.grad(gx, (gy, leaf), v, allow_unused=True)
    return y.detach(), gx.detach(), ggy, torch.zeros_like(x) if gx2 is None else gx2


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(1,), (37, 5), (2, 3, 5, 7), (3, 4096)], ids=str)
def test_as_torch(backend, size, dtype, kind):
    x, gy, v = (scale * torch.randn(size, dtype=torch.float64) for scale in (3, 1, 1))
    x, gy, v = (t.to(dtype) for t in (x, gy, v))
    got = run(own(kind), x, gy, v)
    plain = run(PLAIN[kind], x, gy, v)
    exact = run(PLAIN[kind], x.double(), gy.double(), v.double())
    for value, same, true, factor in zip(got, plain, exact, (2, 3, 4, 4), strict=True):
        assert value.dtype == dtype
        if dtype == torch.float64:
            # Plain torch is not exact itself: 1 - s cancels, softplus is linear beyond 20.
            torch.testing.assert_close(value, same, rtol=1e-8, atol=1e-8)
        else:
            assert_as_accurate(value, same, true, factor)


@pytest.mark.parametrize("kind", SMOOTH, ids=str)
def test_float_formulas_over_the_whole_range(monkeypatch, kind):
    """Against float64, in units of what float32 resolves at the size of each result."""
    monkeypatch.setenv("FASTINTERP_BACKEND", "cpu")
    x = torch.cat([torch.linspace(-110, 110, 50_001), torch.linspace(-3, 3, 50_001)])
    one = torch.ones_like(x)
    got = run(own(kind), x, one, one)
    monkeypatch.setenv("FASTINTERP_BACKEND", "reference")
    exact = run(own(kind), *(t.double() for t in (x, one, one)))
    for value, true in zip(got, exact, strict=True):
        # relative where the result is large, absolute (in units of 1) where it passes zero
        error = (value.double() - true).abs() / true.abs().clamp_min(1)
        assert error.max() < 6e-7


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_gradcheck(backend, kind):
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    assert gradcheck(own(kind), x)
    assert gradgradcheck(own(kind), x)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_special_values(backend, kind):
    x = torch.tensor([torch.nan, 0.0, 1e30, 300.0, -300.0])
    y, gx, _, _ = run(own(kind), x, torch.ones_like(x), torch.ones_like(x))
    wanted_y, wanted_gx, _, _ = run(PLAIN[kind], x, torch.ones_like(x), torch.ones_like(x))
    torch.testing.assert_close(y, wanted_y, equal_nan=True)
    torch.testing.assert_close(gx, wanted_gx, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_layouts_and_views(backend, kind):
    x, gy, v = torch.randn(3, 4, 6, 5, 7).unbind()
    expected = run(own(kind), x, gy, v)
    last = x.contiguous(memory_format=torch.channels_last)
    parent = torch.randn(8, 7, 6, 9)
    parent[::2, 1:, 1:, :7] = x
    views = (last, parent[::2, 1:, 1:, :7], x.transpose(1, 3).contiguous().transpose(1, 3))
    for view in views:
        for a, b in zip(run(own(kind), view, gy, v), expected, strict=True):
            torch.testing.assert_close(a, b)
    for out in run(own(kind), last, gy, v)[:2]:
        assert out.is_contiguous(memory_format=torch.channels_last)
    expanded = x[:1, :1].expand_as(x)
    for a, b in zip(
        run(own(kind), expanded, gy[:1].expand_as(x), v),
        run(own(kind), expanded.clone(), gy[:1].expand_as(x).clone(), v),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", SMOOTH, ids=str)
@pytest.mark.parametrize("size", [1000, 40_000])
def test_small_tensors_by_either_way(monkeypatch, size, kind):
    x, gy, v = torch.randn(3, size)
    results = []
    for name in ("auto", "cpu"):
        monkeypatch.setenv("FASTINTERP_BACKEND", name)
        results.append(run(own(kind), x, gy, v))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_empty(backend, kind):
    x = torch.randn(0, 3)
    assert all(t.shape == (0, 3) for t in run(own(kind), x, x, x))


@pytest.mark.parametrize("kind", SMOOTH, ids=str)
def test_each_second_order_gradient_alone(backend, kind):
    x, gy, v = torch.randn(3, 5, 7)
    _, _, ggy, gx2 = run(own(kind), x, gy, v)
    leaf = x.clone().requires_grad_()
    (gx,) = torch.autograd.grad(activation(leaf, *kind), leaf, gy, create_graph=True)
    assert torch.equal(torch.autograd.grad(gx, leaf, v)[0], gx2)
    leaf, upstream = x.clone().requires_grad_(), gy.clone().requires_grad_()
    (gx,) = torch.autograd.grad(activation(leaf, *kind), leaf, upstream, create_graph=True)
    assert torch.equal(torch.autograd.grad(gx, upstream, v)[0], ggy)


@pytest.mark.parametrize("kind", ["relu", "leaky_relu"])
def test_zero_second_order_is_none_and_output_is_kept(backend, kind):
    x = torch.randn(3, 5, requires_grad=True)
    gy = torch.randn(3, 5, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = activation(x, kind)
    assert [t.data_ptr() for t in kept] == [y.data_ptr()]
    (gx,) = torch.autograd.grad(y, x, gy, create_graph=True)
    ggy, gx2 = torch.autograd.grad(gx, (gy, x), torch.ones_like(x), True, True, allow_unused=True)
    assert gx2 is None
    slope = 0.0 if kind == "relu" else 0.01
    torch.testing.assert_close(ggy.detach(), torch.where(x > 0, 1.0, slope))


@pytest.mark.parametrize("kind", SMOOTH, ids=str)
def test_third_order_is_refused(backend, kind):
    x = torch.randn(5, requires_grad=True)
    (gx,) = torch.autograd.grad(activation(x, *kind).sum(), x, create_graph=True)
    (gx2,) = torch.autograd.grad(gx.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="third-order gradients"):
        gx2.sum().backward()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_opcheck(backend, kind):
    name, alpha = kind
    alpha = {"leaky_relu": 0.01, "softplus": 1.0}.get(name, 0.0) if alpha is None else alpha
    x, grad, v = (torch.randn(2, 3, 5, 4, requires_grad=True) for _ in range(3))
    ops = torch.ops.fastinterp
    torch.library.opcheck(ops.activation.default, (x, name, alpha))
    torch.library.opcheck(ops.activation_backward.default, (grad, x, name, alpha))
    if kind in SMOOTH:
        inputs = [t.detach() for t in (v, grad, x)]
        for need in ((True, True), (True, False), (False, True)):
            torch.library.opcheck(
                ops.activation_backward_backward.default, (*inputs, name, alpha, *need)
            )


def test_same_bits_with_any_number_of_threads(monkeypatch):
    monkeypatch.setenv("FASTINTERP_BACKEND", "cpu")
    x, gy, v = torch.randn(3, 100_003)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(own(("gelu",)), x, gy, v))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("code", [3, 4, 5])
def test_every_output_element_is_written(code):
    """The kernels are handed NaN and must overwrite all of it."""
    z, gy, v = torch.randn(3, 9001)

    def call(kernel, *outputs):
        addresses = [t.data_ptr() for t in (z, gy, v)]
        kernel(0, code, 1.0, z.numel(), *addresses, *outputs, 2)

    def check(kernel, *present):
        outputs = [torch.full_like(z, torch.nan) if p else None for p in present]
        call(kernel, *(0 if o is None else o.data_ptr() for o in outputs))
        assert all(torch.isfinite(o).all() for o in outputs if o is not None)

    check(_native.core.cpu_activation, True, False)
    check(_native.core.cpu_activation_backward, True, False)
    for present in ((True, True), (True, False), (False, True)):
        check(_native.core.cpu_activation_backward_backward, *present)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("tanh",), "kind must be one of relu"),
        (("relu", 0.1), "relu has no alpha"),
        (("softplus", 0.0), "must be > 0"),
        (("leaky_relu", float("nan")), "must be finite"),
    ],
)
def test_bad_input(arguments, match):
    with pytest.raises(ValueError, match=match):
        activation(torch.rand(3), *arguments)


def test_integers_are_refused():
    with pytest.raises(TypeError, match="floating point"):
        activation(torch.zeros(3, dtype=torch.int64), "relu")
