"""The CUDA and Triton kernels on a CUDA device: values, gradients, streams and graphs."""

import math

import pytest
import torch
from accuracy_rule import assert_as_accurate
from network_checks import (
    LAST,
    LOSS_SIZES,
    NCHW,
    NORM_CASES,
    NORM_SHAPES,
    check_activation,
    check_batch_norm_act,
    check_cross_entropy,
    check_max_pool2d,
)
from test_activation import SMOOTH
from test_attack_step import inputs as step_inputs
from test_attack_step import plain as plain_step
from test_cam_discrepancy import gradients as cam_gradients
from test_cam_discrepancy import inputs as cam_inputs
from test_cam_discrepancy import plain as plain_cam
from test_kendall_tau import SIZES as ROWS
from test_kendall_tau import assert_same, scipy_tau
from test_kendall_tau import inputs as rows_inputs
from test_max_pool2d import CASES as POOL_CASES

from fastinterp.ops import (
    activation,
    attack_step,
    batch_norm_act,
    cam_discrepancy,
    cross_entropy,
    kendall_tau,
    max_pool2d,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Multiples of a vector and not, one block and many, more than one block per example
STEP_SHAPES = [(1, 1), (3, 7), (4, 1, 28, 28), (5, 3, 37, 41), (64, 3, 224, 224)]
NORM_LARGE = [
    ((32, 64, 32, 32), NCHW, True, True),
    ((32, 64, 32, 32), LAST, True, True),
    ((16, 100, 7, 7), NCHW, False, True),
    ((8, 320, 9, 9), LAST, True, True),
]
CAM_SIZES = [(1, 1, 1, 1, 1), (50, 100, 10, 7, 7), (2, 5, 70, 9, 13), (8, 2048, 1000, 7, 7)]


@pytest.fixture(params=["cuda", "triton"])
def twin_backend(request, monkeypatch):
    """Ops that have kernels of both kinds."""
    monkeypatch.setenv("FASTINTERP_BACKEND", request.param)


@pytest.fixture
def triton_backend(monkeypatch):
    monkeypatch.setenv("FASTINTERP_BACKEND", "triton")


def on_device(tensors):
    return [None if t is None else t.cuda() for t in tensors]


def doubles(tensors):
    return [None if t is None else t.double() for t in tensors]


@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", STEP_SHAPES, ids=str)
def test_attack_step_values(twin_backend, shape, dtype, norm, per_example):
    tensors = on_device(step_inputs(shape, dtype))
    eps, step = (0.15, 0.05) if norm == "Linf" else (0.8, 0.5)
    if per_example:
        eps = eps * (torch.arange(shape[0], device="cuda", dtype=torch.float64) + 0.5)
    value = attack_step(*tensors, eps=eps, step_size=step, norm=norm, clip=(0.1, 0.9))
    column = (-1,) + (1,) * (len(shape) - 1)
    eps = torch.as_tensor(eps, dtype=torch.float64, device="cuda").reshape(column)
    exact = plain_step(*doubles(tensors), eps, step, norm, (0.1, 0.9))
    same = plain_step(*tensors, eps.to(dtype), step, norm, (0.1, 0.9))
    assert_as_accurate(value, same, exact, factor=2)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attack_step_unaligned_in_place_without_clip(twin_backend, dtype, norm):
    tensors = x, grad, origin = on_device(step_inputs((3, 1024), dtype))
    guarded = torch.full((3 * 1024 + 2,), math.nan, dtype=dtype, device="cuda")
    view = guarded[1:-1].view(3, 1024).copy_(x)  # off any 16-byte boundary
    attack_step(view, grad, origin, eps=0.3, step_size=0.5, norm=norm, clip=None, inplace=True)
    exact = plain_step(*doubles(tensors), 0.3, 0.5, norm, None)
    assert_as_accurate(view, plain_step(*tensors, 0.3, 0.5, norm, None), exact, factor=2)
    assert guarded[[0, -1]].isnan().all()


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("with_head", [True, False])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", CAM_SIZES, ids=str)
def test_cam_values_and_gradients(triton_backend, size, dtype, channels_last, with_head, norm):
    tensors = on_device(cam_inputs(size, with_head, dtype))
    if channels_last:
        tensors[:2] = [t.to(memory_format=torch.channels_last) for t in tensors[:2]]
    for value, same, exact in zip(
        cam_discrepancy(*tensors, norm),
        plain_cam(*tensors, norm),
        plain_cam(*doubles(tensors), norm),
        strict=True,
    ):
        assert_as_accurate(value, same, exact, factor=2)
    for value, same, exact in zip(
        cam_gradients(cam_discrepancy, tensors, norm),
        cam_gradients(plain_cam, tensors, norm),
        cam_gradients(plain_cam, doubles(tensors), norm),
        strict=True,
    ):
        assert_as_accurate(value, same, exact, factor=3)


@pytest.mark.parametrize("levels", [None, 2, 9], ids=["distinct", "two levels", "nine levels"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kendall_tau(twin_backend, dtype, levels):
    for size in (*ROWS, (200, 49), (3, 256), (3, 257), (9, 1024), (2, 5000)):
        a, b = rows_inputs(size, dtype, levels)
        assert_same(kendall_tau(a.cuda(), b.cuda()).cpu(), scipy_tau(a, b))


def test_cam_repeats_bit_for_bit(triton_backend):
    tensors = on_device(cam_inputs((50, 100, 10, 7, 7), True, torch.float32))
    first, second = (cam_gradients(cam_discrepancy, tensors, "l1") for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("chosen", ["auto", "triton"])
def test_layers_repeat_bit_for_bit(monkeypatch, chosen):
    monkeypatch.setenv("FASTINTERP_BACKEND", chosen)
    function, tensors = list(cases())[3]
    first, second = (function(*tensors) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("kind", ["identity", "relu", "leaky_relu", "softplus", "silu", "gelu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_norm_act(twin_backend, dtype, kind, training):
    for case in NORM_CASES + NORM_SHAPES + NORM_LARGE:
        check_batch_norm_act(case, dtype, kind, training, device="cuda")


@pytest.mark.parametrize("layout", [NCHW, LAST], ids=["nchw", "channels_last"])
def test_batch_norm_act_with_a_mean_of_a_thousand_standard_deviations(twin_backend, layout):
    case = (8, 16, 9, 7), layout, True, True
    check_batch_norm_act(case, torch.float32, "relu", True, shift=2e3, device="cuda")


@pytest.mark.parametrize("kind", SMOOTH, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(37, 5), (32, 64, 32, 32)], ids=str)
def test_activation(triton_backend, size, dtype, kind):
    check_activation(size, dtype, kind, device="cuda")


@pytest.mark.parametrize("layout", [NCHW, LAST], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_max_pool2d(triton_backend, dtype, layout):
    large = (16, 64, 56, 56), (3, 2, 1, 1, False)
    for size, window in (*POOL_CASES, large):
        check_max_pool2d(size, window, dtype, layout, device="cuda")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [*LOSS_SIZES, (256, 1000)], ids=str)
def test_cross_entropy(triton_backend, size, dtype, smoothing, reduction):
    check_cross_entropy(size, dtype, smoothing, reduction, device="cuda")


def steps(x, grad):
    """Two dependent steps, so that a wrong stream or a missing wait shows."""
    arguments = dict(eps=0.2, step_size=0.1)
    moved = attack_step(x, grad, x, **arguments)
    return attack_step(moved, grad, x, norm="L2", **arguments)


def cam(features, features_adv, head, weights):
    leaves = [t.detach().requires_grad_() for t in (features_adv, head)]
    total, distances = cam_discrepancy(features, *leaves, weights)
    return total, distances, *torch.autograd.grad(total.sum(), leaves)


def layers(x, v, weight):
    """Loss, input gradient and a double backprop through every network op."""
    leaves = x, weight = [t.detach().requires_grad_() for t in (x, weight)]
    y = batch_norm_act(x, weight, residual=x, training=True, activation="relu")
    y = activation(max_pool2d(y, 3, 2, 1), "silu")
    target = torch.arange(len(x), device=x.device) % y.shape[1]
    loss = cross_entropy(y.mean((2, 3)), target)
    (gx,) = torch.autograd.grad(loss, x, create_graph=True)
    return loss.detach(), gx.detach(), *torch.autograd.grad(gx, leaves, v)


def cases():
    tensors = [t.cuda() for t in step_inputs((64, 3, 32, 32), torch.float32)]
    yield steps, tensors[:2]
    yield cam, on_device(cam_inputs((50, 100, 10, 7, 7), True, torch.float32))
    yield kendall_tau, [t.cuda() for t in rows_inputs((60, 700))]
    yield layers, [*torch.randn(2, 32, 64, 15, 15, device="cuda"), torch.rand(64, device="cuda")]


def flat(result):
    return [result] if isinstance(result, torch.Tensor) else list(result)


@pytest.mark.parametrize("case", range(4), ids=["steps", "cam", "ranks", "layers"])
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_runs_on_the_current_stream(monkeypatch, backend, case):
    monkeypatch.setenv("FASTINTERP_BACKEND", backend)
    function, tensors = list(cases())[case]
    expected = flat(function(*tensors))
    late = [torch.zeros_like(t) for t in tensors]
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # inputs arrive tens of milliseconds late on this stream
        for empty, filled in zip(late, tensors, strict=True):
            empty.copy_(filled)
        got = flat(function(*late))
    side.synchronize()
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", range(4), ids=["steps", "cam", "ranks", "layers"])
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_replays_in_a_cuda_graph(monkeypatch, backend, case):
    monkeypatch.setenv("FASTINTERP_BACKEND", backend)
    function, tensors = list(cases())[case]
    static = [torch.rand_like(t) for t in tensors]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function(*static)  # compiles outside the capture
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = flat(function(*static))
    for into, value in zip(static, tensors, strict=True):
        into.copy_(value)
    graph.replay()
    for a, b in zip(results, flat(function(*tensors)), strict=True):
        assert torch.equal(a, b)
