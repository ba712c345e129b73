import math

import pytest
import torch
from accuracy_rule import assert_as_accurate
from torch.autograd import gradcheck

from fastinterp.ops import attack_step

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
SHAPES = [(1, 1), (3, 7), (5, 3, 7, 9), (2, 1, 28, 28), (3, 2, 65, 67)]


def plain(x, grad, origin, eps, step, norm, clip=(0.0, 1.0)):
    """As a user would write it."""
    if norm == "Linf":
        y = x + step * grad.sign()
        y = torch.min(torch.max(y, origin - eps), origin + eps)
    else:
        shape = (-1,) + (1,) * (x.dim() - 1)
        y = x + step * grad / grad.flatten(1).norm(dim=1).view(shape)
        offset = y - origin
        length = offset.flatten(1).norm(dim=1).view(shape)
        y = origin + offset * (eps / length).clamp(max=1)
    return y if clip is None else y.clamp(*clip)


def inputs(shape, dtype):
    origin = torch.rand(shape, dtype=torch.float64)
    x = (origin + 0.1 * torch.randn(shape, dtype=torch.float64)).clamp(0, 1)
    grad = torch.randn(shape, dtype=torch.float64)
    return [t.to(dtype) for t in (x, grad, origin)]


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(backend, shape, dtype, norm):
    x, grad, origin = inputs(shape, dtype)
    eps, step = (0.15, 0.05) if norm == "Linf" else (0.8, 0.5)
    value = attack_step(x, grad, origin, eps=eps, step_size=step, norm=norm)
    exact = plain(*(t.double() for t in (x, grad, origin)), eps, step, norm)
    assert_as_accurate(value, plain(x, grad, origin, eps, step, norm), exact, factor=2)


def test_linf_is_bitwise_the_plain_formula_in_float32(backend):
    x, grad, origin = inputs((4, 3, 17, 5), torch.float32)
    grad[0] = 0
    value = attack_step(x, grad, origin, eps=0.1, step_size=0.03)
    assert torch.equal(value, plain(x, grad, origin, 0.1, 0.03, "Linf"))


def test_hand_written_values(backend):
    x = torch.tensor([[0.5, 0.5, 0.5, 0.95, 0.05]])
    grad = torch.tensor([[2.0, -1e-30, 0.0, 1.0, -1.0]])
    origin = torch.tensor([[0.5, 0.3, 0.5, 0.95, 0.05]])
    value = attack_step(x, grad, origin, eps=0.15, step_size=0.1)
    torch.testing.assert_close(value, torch.tensor([[0.6, 0.4, 0.5, 1.0, 0.0]]))
    grad = torch.tensor([[3.0, 4.0]])
    x = origin = torch.tensor([[0.2, 0.2]])
    value = attack_step(x, grad, origin, eps=0.25, step_size=0.5, norm="L2")
    torch.testing.assert_close(value, torch.tensor([[0.35, 0.4]]))


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_eps_and_step_per_example(backend, norm):
    x, grad, origin = inputs((4, 3, 5, 5), torch.float64)
    eps = torch.tensor([0.0, 0.05, 0.1, 9.0], dtype=torch.float64)
    step = torch.tensor([0.1, 0.0, 0.3, 0.2], dtype=torch.float64)
    together = attack_step(x, grad, origin, eps=eps, step_size=step, norm=norm)
    for i in range(4):
        alone = attack_step(
            x[i : i + 1],
            grad[i : i + 1],
            origin[i : i + 1],
            eps=eps[i].item(),
            step_size=step[i].item(),
            norm=norm,
        )
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_layouts_views_and_in_place(backend, norm):
    x, grad, origin = inputs((4, 3, 6, 5), torch.float64)
    arguments = dict(eps=0.1, step_size=0.05, norm=norm)
    expected = attack_step(x, grad, origin, **arguments)
    channels_last = [t.to(memory_format=torch.channels_last) for t in (x, grad, origin)]
    torch.testing.assert_close(attack_step(*channels_last, **arguments), expected)
    mixed = attack_step(channels_last[0], grad, channels_last[2], **arguments)
    torch.testing.assert_close(mixed, expected)
    assert mixed.is_contiguous(memory_format=torch.channels_last)

    parent = torch.full((8, 4, 6, 7), 7.0, dtype=torch.float64)
    view = parent[::2, :3, :, 1:6]
    view.copy_(x)
    torch.testing.assert_close(attack_step(view, grad, origin, **arguments), expected)
    out = attack_step(view, grad, origin, inplace=True, **arguments)
    assert out is view
    torch.testing.assert_close(view, expected)
    untouched = torch.ones_like(parent, dtype=torch.bool)
    untouched[::2, :3, :, 1:6] = False
    assert (parent[untouched] == 7).all()

    expanded = origin[:1].expand_as(x)
    torch.testing.assert_close(
        attack_step(x, grad, expanded, **arguments),
        attack_step(x, grad, expanded.contiguous(), **arguments),
    )


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_empty_batch(backend, norm):
    x = torch.rand(0, 3, 4, 4)
    assert attack_step(x, x, x, eps=0.1, step_size=0.1, norm=norm).shape == x.shape


def test_tiny_zero_and_nan_gradients(backend):
    x = torch.full((3, 4), 0.5)
    grad = torch.tensor([[1e-30] * 4, [0.0] * 4, [1.0, math.nan, 1.0, 1.0]])
    value = attack_step(x, grad, x, eps=1.0, step_size=0.2, norm="L2")
    torch.testing.assert_close(value[0], torch.full((4,), 0.6))
    assert torch.equal(value[1], x[1])
    assert value[2].isnan().all()


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("eps", [0.2, 5.0])
def test_gradcheck(backend, norm, eps):
    x, grad, origin = (t.requires_grad_() for t in inputs((3, 2, 3), torch.float64))
    assert gradcheck(
        lambda *t: attack_step(*t, eps=eps, step_size=0.3, norm=norm), (x, grad, origin)
    )


@pytest.mark.parametrize("op", ["attack_step", "attack_step_"])
@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_opcheck(op, norm):
    x, grad, origin = inputs((3, 2, 4, 4), torch.float32)
    scalars = torch.tensor(0.1), torch.tensor([0.1, 0.2, 0.3])
    torch.library.opcheck(
        getattr(torch.ops.fastinterp, op).default, (x, grad, origin, *scalars, norm, 0.0, 1.0)
    )


def test_opcheck_of_a_permuted_view():
    x, grad, origin = (t.transpose(1, 2) for t in inputs((3, 2, 4), torch.float32))
    scalars = torch.tensor(0.1), torch.tensor(0.2)
    torch.library.opcheck(
        torch.ops.fastinterp.attack_step.default, (x, grad, origin, *scalars, "Linf", 0.0, 1.0)
    )


def test_opcheck_with_gradients():
    x, grad, origin = (t.requires_grad_() for t in inputs((3, 2, 4, 4), torch.float32))
    scalars = torch.tensor(0.1), torch.tensor(0.2)
    torch.library.opcheck(
        torch.ops.fastinterp.attack_step.default, (x, grad, origin, *scalars, "L2", 0.0, 1.0)
    )


def test_same_bits_with_any_number_of_threads(monkeypatch):
    monkeypatch.setenv("FASTINTERP_BACKEND", "cpu")
    x, grad, origin = inputs((7, 3, 101, 103), torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(attack_step(x, grad, origin, eps=2.0, step_size=0.7, norm="L2"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_in_place_is_seen_by_autograd(backend):
    w, x = torch.rand(2, 4, requires_grad=True), torch.rand(2, 4)
    product = (w * x).sum()
    attack_step(x, x.clone(), x.clone(), eps=0.1, step_size=0.1, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    with pytest.raises(ValueError, match="x requires grad and inplace=True"):
        attack_step(w, x, x, eps=0.1, step_size=0.1, inplace=True)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (dict(norm="L1"), ValueError, "norm must be one of Linf, L2"),
        (dict(eps=-0.1), ValueError, "eps must be a finite number >= 0, got -0.1"),
        (dict(eps=math.nan), ValueError, "eps must be a finite number"),
        (dict(step_size=math.inf), ValueError, "step_size must be a finite number"),
        (dict(eps=torch.tensor([0.1, -0.2])), ValueError, "eps must be >= 0, got -0.2"),
        (dict(eps=torch.zeros(3)), ValueError, r"eps must be .* \(2,\), got \(3,\)"),
        (dict(clip=(1.0, 0.0)), ValueError, "clip must be"),
        (dict(grad=torch.rand(2, 3)), ValueError, "grad must have the shape of x"),
        (dict(origin=torch.rand(2, 4).double()), TypeError, "origin must be torch.float32"),
        (dict(eps=torch.tensor(0.1, requires_grad=True)), ValueError, "no derivative"),
    ],
)
def test_bad_input(change, error, match):
    arguments = dict(
        x=torch.rand(2, 4), grad=torch.rand(2, 4), origin=torch.rand(2, 4), eps=0.1, step_size=0.1
    )
    with pytest.raises(error, match=match):
        attack_step(**(arguments | change))


def test_integer_images_are_refused():
    x = torch.zeros(2, 4, dtype=torch.uint8)
    with pytest.raises(TypeError, match=r"floating point tensor, got torch.uint8"):
        attack_step(x, x, x, eps=0.1, step_size=0.1)
