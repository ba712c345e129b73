"""The Triton kernels of the network ops on CPU tensors, run by Triton's interpreter.

A few small sizes: one program takes milliseconds there. Its bfloat16 results are cut off instead of
rounded, which the accuracy rule allows for tensors of more than a few elements.
"""

import importlib
import importlib.util
import math
import os

import pytest
import test_activation
import test_batch_norm_act
import test_cross_entropy
import test_max_pool2d
import test_norm_act
import torch
import torch.nn.functional as F
from network_checks import (
    GROUP_CASES,
    GROUP_SHAPES,
    LAST,
    LOSS_SIZES,
    NCHW,
    NORM_CASES,
    NORM_SHAPES,
    check_activation,
    check_batch_norm_act,
    check_cross_entropy,
    check_max_pool2d,
    check_norm_act,
)

from fastinterp.ops import (
    activation,
    batch_norm_act,
    cross_entropy,
    group_norm_act,
    max_pool2d,
)

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1; on a GPU run tests/test_gpu.py", allow_module_level=True)

from fastinterp.triton import _channel_tiles
from fastinterp.triton import norm_act as _group_tiles

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
norm_ops = importlib.import_module("fastinterp.ops.batch_norm_act")
group_ops = importlib.import_module("fastinterp.ops.norm_act")
norm_run, norm_plain = test_batch_norm_act.run, test_batch_norm_act.plain


@pytest.fixture(autouse=True)
def _triton(monkeypatch):
    monkeypatch.setenv("FASTINTERP_BACKEND", "triton")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("activation", test_batch_norm_act.ACTIVATIONS)
@pytest.mark.parametrize("case", NORM_CASES, ids=str)
def test_batch_norm_act_activations(case, activation, training):
    check_batch_norm_act(case, torch.float32, activation, training)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_batch_norm_act_dtypes(dtype, activation):
    for case in NORM_CASES:
        check_batch_norm_act(case, dtype, activation, True)


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("case", NORM_SHAPES, ids=str)
def test_batch_norm_act_sizes(case, activation):
    check_batch_norm_act(case, torch.float32, activation, True)


@pytest.mark.parametrize("case", NORM_SHAPES[3:], ids=str)
def test_batch_norm_act_however_the_work_is_split(monkeypatch, case):
    """One program goes over several tiles, or every tile has its own."""
    for programs in (1, 1 << 20):
        monkeypatch.setattr(_channel_tiles, "_PROGRAMS", programs)
        monkeypatch.setattr(_channel_tiles, "_LEAST_STEPS", 1)
        check_batch_norm_act(case, torch.float32, "relu", True)


@pytest.mark.parametrize("layout", [NCHW, LAST], ids=["nchw", "channels_last"])
def test_batch_norm_act_with_a_mean_of_a_thousand_standard_deviations(layout):
    check_batch_norm_act(
        ((8, 16, 9, 7), layout, True, True), torch.float32, "relu", True, shift=2e3
    )


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("asked", [(0,), (1,), (2,), (1, 3)], ids=str)
def test_batch_norm_act_with_some_gradients_only(asked, activation):
    tensors, running, gy, cotangents = test_batch_norm_act.inputs((4, 3, 3, 2))
    for training in (True, False):
        results = []
        for function in (batch_norm_act, norm_plain):
            given = [t.detach().requires_grad_(i in asked) for i, t in enumerate(tensors)]
            (upstream,) = test_batch_norm_act.leaves([gy])
            x, residual, weight, bias = given
            y = function(
                *(x, weight, bias, *(t.clone() for t in running)),
                residual=residual,
                training=training,
                activation=activation,
            )
            ends = [given[i] for i in asked]
            first = torch.autograd.grad(y, ends, upstream, create_graph=True)
            penalty = sum((g * cotangents[i]).sum() for i, g in zip(asked, first, strict=True))
            second = torch.autograd.grad(penalty, [upstream, *ends], allow_unused=True)
            zeros = test_batch_norm_act.zeros_for_none(second, [upstream, *ends])
            results.append([*first, *zeros])
        for value, exact in zip(*results, strict=True):
            torch.testing.assert_close(value, exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("size", "layout"), [c[:2] for c in NORM_CASES + NORM_SHAPES], ids=str)
def test_batch_norm_act_mask_is_the_sign_of_the_pre_activation(size, layout):
    tensors, running, _, _ = test_batch_norm_act.inputs(size, layout)
    y, *_, mask, _ = torch.ops.fastinterp.batch_norm_act(
        *tensors, *running, False, 1e-5, "relu", 0.0
    )
    assert torch.equal(mask, norm_ops._pack(y > 0, tensors[0]))


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("activation", ["identity", "relu", "gelu"])
def test_batch_norm_act_writes_all_of_its_outputs(monkeypatch, activation, training):
    results, forward_results = norm_ops._results, norm_ops._forward_results
    byte = 0

    def fill(tensors):
        for t in tensors:
            t.fill_(math.nan) if t.is_floating_point() else t.fill_(byte)
        return tensors

    monkeypatch.setattr(norm_ops, "_results", lambda *a: fill(results(*a)))
    monkeypatch.setattr(
        norm_ops,
        "_forward_results",
        lambda *a: (*fill(forward_results(*a)[:-1]), forward_results(*a)[-1]),
    )
    for case in NORM_CASES:
        given = test_batch_norm_act.inputs(*case, dtype=torch.float32)
        values = []
        for byte in (0, 255):  # noqa: B007, as fill reads it
            value = norm_run(batch_norm_act, *given, training=training, activation=activation)
            values.append([value[0], *value[1], *value[2], *value[3]])
        for one, other in zip(*values, strict=True):
            if one is not None:
                assert torch.isfinite(one).all() and torch.equal(one, other)


@pytest.mark.parametrize("size", [(0, 3), (0, 5, 4, 4), (2, 3, 0, 4), (3, 0, 2, 2)], ids=str)
def test_batch_norm_act_of_nothing(size):
    for training, layout in ((False, LAST), (True, NCHW)):
        given = test_batch_norm_act.inputs(size, layout)
        y, first, second, after = norm_run(
            batch_norm_act, *given, training=training, activation="silu"
        )
        assert y.shape == size and first[0].shape == size
        assert all(not g.any() for g in (*first[2:], *second[3:]) if g is not None)
        assert all(torch.equal(a, b) for a, b in zip(given[1], after, strict=True))


@pytest.mark.parametrize("activation", test_norm_act.ACTIVATIONS)
@pytest.mark.parametrize("case", GROUP_CASES, ids=str)
def test_norm_act_activations(case, activation):
    check_norm_act(case, torch.float32, activation)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_norm_act_dtypes(dtype, activation):
    for case in GROUP_CASES:
        check_norm_act(case, dtype, activation)


@pytest.mark.parametrize("case", GROUP_SHAPES, ids=str)
def test_norm_act_sizes(case):
    check_norm_act(case, torch.float32, "silu")


@pytest.mark.parametrize("case", [*GROUP_CASES, GROUP_SHAPES[3]], ids=str)
@pytest.mark.parametrize("programs", [1, 1 << 20])
def test_norm_act_however_many_programs(monkeypatch, case, programs):
    """One goes over all examples, or every tile has its own."""
    monkeypatch.setattr(_group_tiles, "_PROGRAMS", programs)
    monkeypatch.setattr(_group_tiles, "_LEAST_ROWS", 1)
    check_norm_act(case, torch.float32, "silu")


@pytest.mark.parametrize(
    ("case", "room"),
    [
        (((1, 2, 5, 7), 1, NCHW, True, True), 32),  # a plane is more than a tile
        (((1, 5, 2, 3), 1, NCHW, True, True), 16),  # some planes
        (((1, 6, 3, 3), 2, LAST, True, True), 16),  # some pixels of every channel
        (((1, 6, 2, 2), 2, LAST, True, True), 2),  # some channels of a pixel
        (((2, 13), None, NCHW, True, True), 8),
    ],
    ids=str,
)
def test_norm_act_of_groups_larger_than_a_tile(monkeypatch, case, room):
    monkeypatch.setattr(_group_tiles, "_ROOM", room)
    check_norm_act(case, torch.float32, "silu")


@pytest.mark.parametrize("layout", [NCHW, LAST], ids=["nchw", "channels_last"])
def test_norm_act_with_a_mean_of_a_thousand_standard_deviations(layout):
    given = test_norm_act.inputs((3, 8, 5, 7), 2, layout, dtype=torch.float32)
    given[0][0] += 2e3
    test_norm_act.assert_all_accurate(2, given, activation="relu")


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("asked", [(0,), (1,), (2,), (1, 3)], ids=str)
def test_norm_act_with_some_gradients_only(asked, activation):
    tensors, gy, cotangents = test_norm_act.inputs((4, 6, 3, 2))
    results = []
    for function in (test_norm_act.ours, test_norm_act.plain):
        given = [t.detach().requires_grad_(i in asked) for i, t in enumerate(tensors)]
        (upstream,) = test_norm_act.leaves([gy])
        x, residual, weight, bias = given
        y = function(x, weight, bias, 2, residual=residual, activation=activation)
        ends = [given[i] for i in asked]
        first = torch.autograd.grad(y, ends, upstream, create_graph=True)
        penalty = sum((g * cotangents[i]).sum() for i, g in zip(asked, first, strict=True))
        second = torch.autograd.grad(penalty, [upstream, *ends], allow_unused=True)
        results.append([*first, *test_norm_act.zeros_for_none(second, [upstream, *ends])])
    for value, exact in zip(*results, strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_norm_act_writes_all_of_its_outputs(monkeypatch, activation):
    make = group_ops._results
    monkeypatch.setattr(group_ops, "_results", lambda *a: [t.fill_(math.nan) for t in make(*a)])
    for case in GROUP_CASES:
        check_norm_act(case, torch.float32, activation)  # which looks for NaN


@pytest.mark.parametrize("kind", test_activation.SMOOTH, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(37, 5), (2, 3, 19, 23)], ids=str)
def test_activation_values(size, dtype, kind):
    check_activation(size, dtype, kind)


@pytest.mark.parametrize("kind", test_activation.SMOOTH, ids=str)
def test_activation_formulas_over_the_whole_range(monkeypatch, kind):
    x = torch.cat([torch.linspace(-110, 110, 5001), torch.linspace(-3, 3, 5001)])
    one = torch.ones_like(x)
    got = test_activation.run(test_activation.own(kind), x, one, one)
    monkeypatch.setenv("FASTINTERP_BACKEND", "reference")
    doubles = (t.double() for t in (x, one, one))
    exact = test_activation.run(test_activation.own(kind), *doubles)
    for value, true in zip(got, exact, strict=True):
        assert ((value.double() - true).abs() / true.abs().clamp_min(1)).max() < 6e-7


@pytest.mark.parametrize("layout", [NCHW, LAST], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("size", "window"), test_max_pool2d.CASES, ids=str)
def test_max_pool2d_values(size, window, dtype, layout):
    check_max_pool2d(size, window, dtype, layout)


@pytest.mark.parametrize("layout", [NCHW, LAST], ids=["nchw", "channels_last"])
def test_max_pool2d_nan_and_infinity(layout):
    x = torch.randn(2, 9, 6, 6)
    x[torch.rand_like(x) < 0.2] = math.nan
    x[torch.rand_like(x) < 0.2] = -math.inf
    x, v = x.contiguous(memory_format=layout), torch.randn_like(x)
    for window in ((2, 2), (3, 1, 1)):
        got = test_max_pool2d.run(max_pool2d, x, window, v)
        for a, b in zip(got, test_max_pool2d.run(F.max_pool2d, x, window, v), strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", LOSS_SIZES, ids=str)
def test_cross_entropy_values(size, dtype, smoothing, reduction):
    check_cross_entropy(size, dtype, smoothing, reduction)


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_cross_entropy_of_large_logits(offset):
    logits, target, grad, v = test_cross_entropy.inputs((9, 10), torch.float32)
    arguments = logits * 30 + offset, target, grad, v
    got = test_cross_entropy.run(cross_entropy, *arguments, "mean", 0.0)
    doubles = (t.double() if t.is_floating_point() else t for t in arguments)
    exact = test_cross_entropy.run(F.cross_entropy, *doubles, "mean", 0.0)
    for value, wanted in zip(got, exact, strict=True):
        torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-6)


def test_cross_entropy_of_wrong_targets_is_nan():
    logits, target = torch.randn(4, 3, requires_grad=True), torch.tensor([0, 3, -1, -100])
    losses = cross_entropy(logits, target, "none")
    assert losses.isnan().tolist() == [False, True, True, False]
    (gz,) = torch.autograd.grad(losses.sum(), logits)
    assert gz.isnan().all(1).tolist() == [False, True, True, False] and not gz[3].any()


def test_cross_entropy_when_no_example_counts():
    target = torch.full((3,), 7)
    for logits, y in ((torch.randn(3, 4), target), (torch.randn(0, 4), target[:0])):
        for reduction in ("mean", "sum", "none"):
            got = cross_entropy(logits, y, reduction, ignore_index=7)
            wanted = F.cross_entropy(logits, y, reduction=reduction, ignore_index=7)
            torch.testing.assert_close(got, wanted, equal_nan=True)


def launchers():
    """Module and function, a call of the op that should end there."""
    x = torch.randn(2, 3, 4, 4)

    def three_orders(function, *arguments, **options):
        leaf, gy = x.clone().requires_grad_(), torch.ones((), requires_grad=True)
        y = function(leaf, *arguments, **options)
        (gx,) = torch.autograd.grad(y, leaf, gy.expand_as(y), create_graph=True)
        torch.autograd.grad(gx.square().sum(), (leaf, gy), allow_unused=True)

    def norm():
        three_orders(batch_norm_act, training=True, activation="silu")

    def group_norm():
        three_orders(group_norm_act, 3, activation="silu")

    def pool():
        three_orders(max_pool2d, 2)

    def phi():
        three_orders(activation, "gelu")

    def loss():
        three_orders(lambda z: cross_entropy(z.reshape(12, 8), torch.arange(12) % 8))

    return [
        ("batch_norm_act", "batch_norm_act_forward", norm),
        ("batch_norm_act", "batch_norm_act_backward", norm),
        ("_batch_norm_act_second", "batch_norm_act_backward_backward", norm),
        ("norm_act", "norm_act_forward", group_norm),
        ("norm_act", "norm_act_backward", group_norm),
        ("norm_act", "norm_act_backward_backward", group_norm),
        ("activation", "activation_forward", phi),
        ("activation", "activation_backward", phi),
        ("activation", "activation_backward_backward", phi),
        ("max_pool2d", "max_pool2d_forward", pool),
        ("max_pool2d", "max_pool2d_scatter", pool),
        ("max_pool2d", "max_pool2d_gather", pool),
        ("cross_entropy", "cross_entropy_forward", loss),
        ("cross_entropy", "cross_entropy_backward", loss),
        ("cross_entropy", "cross_entropy_backward_backward", loss),
    ]


@pytest.mark.parametrize("chosen", ["triton", "cpu", "reference"])
@pytest.mark.parametrize(
    ("module", "name", "call"), launchers(), ids=[n for _, n, _ in launchers()]
)
def test_the_kernel_that_was_asked_for_runs(monkeypatch, module, name, call, chosen):
    monkeypatch.setenv("FASTINTERP_BACKEND", chosen)
    module = importlib.import_module(f"fastinterp.triton.{module}")
    launch, calls = getattr(module, name), []
    monkeypatch.setattr(module, name, lambda *a: calls.append(name) or launch(*a))
    call()
    assert len(calls) == (chosen == "triton")
