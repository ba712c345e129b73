"""Many gradients of one graph side by side: torch.vmap and is_grads_batched over every op."""

import pytest
import torch
from map_networks import assert_gradients_close

from fastinterp import ops


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def leaves(*shapes):
    return [randn(*shape).requires_grad_() for shape in shapes]


Y = torch.tensor([1, 0, 3])


def batch_norm(training, **options):
    def function(x, weight, bias, *residual):
        mean, var = torch.zeros(4).double(), torch.ones(4).double()
        return ops.batch_norm_act(
            *(x, weight, bias, mean, var),
            residual=residual[0] if residual else None,
            training=training,
            **options,
        )

    return function


MAP, VECTOR = (3, 4, 6, 5), (4,)
CASES = {
    "conv2d": (lambda x, w, b: ops.conv2d(x, w, b, padding=1), [MAP, (5, 4, 3, 3), (5,)]),
    "conv2d strided": (
        lambda x, w: ops.conv2d(x, w, None, 2, (1, 0), groups=2),
        [MAP, (6, 2, 3, 2)],
    ),
    **{
        f"activation {kind}": (lambda x, kind=kind: ops.activation(x, kind), [MAP])
        for kind in ("relu", "leaky_relu", "softplus", "silu", "gelu")
    },
    "max_pool2d": (lambda x: ops.max_pool2d(x, 3, 2, 1), [MAP]),
    "avg_pool2d": (lambda x: ops.avg_pool2d(x, 2), [MAP]),
    "avg_pool2d overlapping": (lambda x: ops.avg_pool2d(x, 3, 1, 1), [MAP]),
    "adaptive_avg_pool2d": (lambda x: ops.adaptive_avg_pool2d(x, 1), [MAP]),
    **{
        f"batch_norm_act {kind}, {'training' if training else 'evaluation'}": (
            batch_norm(training, activation=kind),
            [MAP, VECTOR, VECTOR],
        )
        for training in (True, False)
        for kind in ("identity", "relu", "silu")
    },
    "batch_norm_act residual": (
        batch_norm(True, activation="relu"),
        [MAP, VECTOR, VECTOR, MAP],
    ),
    "batch_norm_act smooth residual": (
        batch_norm(False, activation="gelu"),
        [MAP, VECTOR, VECTOR, MAP],
    ),
    **{
        f"group_norm_act {kind}": (
            lambda x, w, b, kind=kind: ops.group_norm_act(x, 2, w, b, activation=kind),
            [MAP, VECTOR, VECTOR],
        )
        for kind in ("identity", "relu", "silu")
    },
    "linear": (ops.linear, [(3, 4), (5, 4), (5,)]),
    "cross_entropy": (lambda x: ops.cross_entropy(x, Y, reduction="none"), [(3, 4)]),
}
FIRST_ORDER = {
    "cam_discrepancy": (
        lambda a, b, head, weights: ops.cam_discrepancy(a, b, head, weights, "l2")[0],
        [MAP, MAP, (6, 4), (3, 6)],
    ),
}


def loop(y, x, cotangents):
    """One backward pass after the other."""
    columns = [
        torch.autograd.grad(y, x, v, create_graph=True, allow_unused=True) for v in cotangents
    ]
    return [None if c[0] is None else torch.stack(c) for c in zip(*columns, strict=True)]


def vmap(y, x, cotangents):
    return torch.vmap(lambda v: torch.autograd.grad(y, x, v, create_graph=True))(cotangents)


def is_grads_batched(y, x, cotangents):
    return torch.autograd.grad(y, x, cotangents, is_grads_batched=True, create_graph=True)


def nonlinear(gradients):
    return sum((g.sin() * (1 + g)).sum() for g in gradients)


@pytest.mark.parametrize("batched", [vmap, is_grads_batched])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize(("function", "shapes"), CASES.values(), ids=CASES.keys())
def test_gradients_of_two_orders(backend, function, shapes, layout, batched):
    inputs = leaves(*shapes)
    if layout == "channels_last":
        inputs = [
            t.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
            if t.dim() == 4
            else t
            for t in inputs
        ]
    y = function(*inputs)
    (cotangents,) = leaves((7, *y.shape))
    for count in {1, len(inputs)}:  # of x alone, which is what maps ask for, and of everything
        some = inputs[:count]
        expected = loop(y, some, cotangents)
        got = batched(y, some, cotangents)
        assert_gradients_close(got, expected)
        first, second = (
            torch.autograd.grad(
                nonlinear(g), [cotangents, *inputs], retain_graph=True, allow_unused=True
            )
            for g in (got, expected)
        )
        assert_gradients_close(first, second)


@pytest.mark.parametrize("batched", [vmap, is_grads_batched])
@pytest.mark.parametrize(("function", "shapes"), FIRST_ORDER.values(), ids=FIRST_ORDER.keys())
def test_gradients_of_one_order(backend, function, shapes, batched):
    inputs = leaves(*shapes)
    y = function(*inputs)
    cotangents = randn(7, *y.shape)
    expected = loop(y, inputs, cotangents)
    assert_gradients_close(batched(y, inputs, cotangents), expected)


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        CASES[k]
        for k in (
            "conv2d",
            "linear",
            "avg_pool2d",
            "activation relu",
            "activation gelu",
            "max_pool2d",
        )
    ],
)
def test_any_argument_may_have_the_batch(backend, function, shapes):
    inputs = [randn(*shape) for shape in shapes]
    for which in {0, len(shapes) - 1}:
        for dim in (0, 2):
            if dim > len(shapes[which]):
                continue
            many = randn(*shapes[which][:dim], 5, *shapes[which][dim:])
            in_dims = tuple(dim if i == which else None for i in range(len(shapes)))
            arguments = [many if i == which else t for i, t in enumerate(inputs)]
            expected = torch.stack(
                [
                    function(*(one if i == which else t for i, t in enumerate(inputs)))
                    for one in many.unbind(dim)
                ]
            )
            torch.testing.assert_close(torch.vmap(function, in_dims)(*arguments), expected)


def test_one_convolution_for_all_classes():
    """The batch is folded into the examples, and the mask of a ReLU is not copied for each."""
    x, w = leaves(MAP, (5, 4, 3, 3))
    y = ops.activation(ops.conv2d(x, w), "relu")
    with torch.profiler.profile(record_shapes=True) as profile:
        vmap(y, [x], randn(7, *y.shape))
    names = [event.name for event in profile.events()]
    assert names.count("aten::convolution_backward") == 1
    assert names.count("aten::threshold_backward") == 1


@pytest.mark.parametrize("kind", ["relu", "leaky_relu"])
def test_what_is_identically_zero_is_none(kind):
    (x,) = leaves(MAP)
    (cotangents,) = leaves((7, *MAP))
    (gradient,) = vmap(ops.activation(x, kind), [x], cotangents)
    of_x, _ = torch.autograd.grad(gradient.sum(), [x, cotangents], allow_unused=True)
    assert of_x is None
