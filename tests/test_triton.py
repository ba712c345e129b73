"""The Triton kernels on CPU tensors, run by Triton's interpreter (TRITON_INTERPRET=1)."""

import importlib.util
import math
import os

import pytest
import torch
from accuracy_rule import assert_as_accurate
from test_attack_step import inputs as step_inputs
from test_attack_step import plain as plain_step
from test_cam_discrepancy import gradients as cam_gradients
from test_cam_discrepancy import inputs as cam_inputs
from test_cam_discrepancy import plain as plain_cam

from fastinterp.ops import attack_step, cam_discrepancy

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1; on a GPU run tests/test_gpu.py", allow_module_level=True)

from fastinterp.triton import attack_step as step_kernels
from fastinterp.triton import cam_discrepancy as cam_kernels

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# (N, C, K, h, w): odd sizes, several tiles of pixels, of classes and of channels
CAM_SIZES = [(1, 1, 1, 1, 1), (3, 100, 10, 7, 7), (2, 5, 70, 9, 13), (2, 261, 3, 1, 9)]


@pytest.fixture(autouse=True)
def _triton(monkeypatch):
    monkeypatch.setenv("FASTINTERP_BACKEND", "triton")


@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (4, 1, 28, 28), (3, 3, 37, 41)], ids=str)
def test_attack_step_values(shape, dtype, norm, per_example):
    tensors = step_inputs(shape, dtype)
    eps, step = (0.15, 0.05) if norm == "Linf" else (0.8, 0.5)
    if per_example:
        eps = eps * (torch.arange(shape[0], dtype=torch.float64) + 0.5)
        step = step * (1 + torch.rand(shape[0], dtype=torch.float64))
    clip = (0.1, 0.9)
    value = attack_step(*tensors, eps=eps, step_size=step, norm=norm, clip=clip)
    assert value.dtype == dtype
    column = (-1,) + (1,) * (len(shape) - 1)
    eps, step = (torch.as_tensor(t, dtype=torch.float64).reshape(column) for t in (eps, step))
    exact = plain_step(*(t.double() for t in tensors), eps, step, norm, clip)
    same = plain_step(*tensors, eps.to(dtype), step.to(dtype), norm, clip)
    assert_as_accurate(value, same, exact, factor=2)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_attack_step_layouts_in_place_and_no_clip(norm):
    tensors = step_inputs((4, 3, 6, 5), torch.float64)
    arguments = dict(eps=0.3, step_size=0.5, norm=norm, clip=None)
    expected = plain_step(*tensors, 0.3, 0.5, norm, None)
    last = [t.to(memory_format=torch.channels_last) for t in tensors]
    torch.testing.assert_close(attack_step(*last, **arguments), expected)
    torch.testing.assert_close(attack_step(last[0], *tensors[1:], **arguments), expected)
    x = tensors[0].clone()
    assert attack_step(x, *tensors[1:], inplace=True, **arguments) is x
    torch.testing.assert_close(x, expected)


def test_attack_step_linf_is_bitwise_the_plain_formula_in_float32():
    x, grad, origin = step_inputs((4, 3, 17, 5), torch.float32)
    grad[0] = 0
    value = attack_step(x, grad, origin, eps=0.1, step_size=0.03)
    assert torch.equal(value, plain_step(x, grad, origin, 0.1, 0.03, "Linf", (0, 1)))


def test_attack_step_l2_of_tiny_zero_and_subnormal_gradients():
    x = torch.full((3, 4), 0.5)
    grad = torch.tensor([[3e-25, 4e-25, 0, 0], [0, 0, 0, 0], [1e-42, 0, 0, 0]])
    value = attack_step(x, grad, x, eps=1.0, step_size=0.5, norm="L2", clip=None)
    expected = torch.tensor([[0.8, 0.9, 0.5, 0.5], [0.5] * 4, [0.5] * 4])
    torch.testing.assert_close(value, expected)


def test_attack_step_passes_nan_through():
    x = torch.tensor([[math.nan, 0.5]])
    value = attack_step(x, torch.ones(1, 2), torch.full((1, 2), 0.5), eps=0.1, step_size=0.05)
    assert value[0, 0].isnan()
    assert value[0, 1] == pytest.approx(0.55)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_attack_step_writes_all_of_out_and_nothing_else(norm):
    x, grad, origin = step_inputs((3, 1029), torch.float32)
    guarded = torch.full((5, 1029), math.nan)
    out = guarded[1:4]
    eps, step = torch.tensor([0.1, 0.2, 0.3]), torch.tensor(0.1)
    step_kernels.attack_step(x, grad, origin, eps, step, norm, 0.0, 1.0, out)
    assert out.isfinite().all()
    assert guarded[[0, 4]].isnan().all()


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_attack_step_gradients(norm):
    leaves = [t.requires_grad_() for t in step_inputs((3, 2, 5), torch.float64)]
    weight = torch.randn(3, 2, 5, dtype=torch.float64)
    value = attack_step(*leaves, eps=0.4, step_size=0.3, norm=norm, clip=(0, 1))
    got = torch.autograd.grad((weight * value).sum(), leaves, materialize_grads=True)
    value = plain_step(*leaves, 0.4, 0.3, norm, (0, 1))
    wanted = torch.autograd.grad((weight * value).sum(), leaves)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("with_head", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", CAM_SIZES, ids=str)
def test_cam_values_and_gradients(size, dtype, with_head, norm):
    tensors = cam_inputs(size, with_head, dtype)
    exact_in = [None if t is None else t.double() for t in tensors]
    for value, same, exact in zip(
        cam_discrepancy(*tensors, norm),
        plain_cam(*tensors, norm),
        plain_cam(*exact_in, norm),
        strict=True,
    ):
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_as_accurate(value, same, exact, factor=2)
    for value, same, exact in zip(
        cam_gradients(cam_discrepancy, tensors, norm),
        cam_gradients(plain_cam, tensors, norm),
        cam_gradients(plain_cam, exact_in, norm),
        strict=True,
    ):
        assert value.dtype == dtype
        assert_as_accurate(value, same, exact, factor=3)


@pytest.mark.parametrize("with_head", [True, False])
def test_cam_layouts_and_views(with_head):
    features, features_adv, *rest = cam_inputs((3, 6, 5, 5, 3), with_head)
    expected = cam_gradients(plain_cam, (features, features_adv, *rest), "l1")
    parent = torch.randn(6, 7, 6, 4, dtype=torch.float64)
    parent[::2, 1:, 1:, :3] = features
    last = dict(memory_format=torch.channels_last)
    for one, other in (
        (features.to(**last), features_adv),
        (features, features_adv.to(**last)),
        (parent[::2, 1:, 1:, :3], features_adv.to(**last)),
        (parent[::2, 1:, 1:, :3], parent[::2, 1:, 1:, :3] - features + features_adv),
    ):
        got = cam_gradients(cam_discrepancy, (one, other, *rest), "l1")
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("with_head", [True, False])
def test_cam_launchers_write_all_of_their_outputs(with_head, norm):
    features, features_adv, head, weights = cam_inputs((3, 40, 20, 5, 7), with_head, torch.float32)
    discrepancy, distances = torch.full((3,), math.nan), torch.full_like(weights, math.nan)
    cam_kernels.cam_discrepancy_forward(
        features, features_adv, head, weights, norm, discrepancy, distances
    )
    total, wanted = plain_cam(features, features_adv, head, weights, norm)
    torch.testing.assert_close(distances, wanted)
    torch.testing.assert_close(discrepancy, total)
    class_grad = torch.randn_like(weights)
    class_grad[0] = 0  # classes without a gradient are skipped
    # Pixels strided by two, channels last: what a view into a larger tensor looks like.
    guarded = torch.full((3, 5, 14, 40), math.nan).permute(0, 3, 1, 2)
    grad_features = guarded[..., ::2]
    grad_head = None if head is None else torch.full_like(head, math.nan)
    cam_kernels.cam_discrepancy_backward(
        class_grad, features, features_adv, head, distances, norm, grad_features, grad_head
    )
    leaves = [features_adv.requires_grad_(), *([head.requires_grad_()] if with_head else [])]
    _, distances = plain_cam(features, features_adv, head, weights, norm)
    wanted = torch.autograd.grad(distances, leaves, class_grad)
    torch.testing.assert_close(grad_features, wanted[0], rtol=1e-4, atol=1e-4)
    assert guarded[..., 1::2].isnan().all()
    if with_head:
        torch.testing.assert_close(grad_head, wanted[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("programs", [1, 7])
def test_cam_head_gradient_however_the_work_is_split(monkeypatch, programs):
    monkeypatch.setattr(cam_kernels, "_HEAD_PROGRAMS", programs)
    tensors = cam_inputs((5, 3, 20, 5, 7), True)
    for norm in ("l1", "l2"):
        got = cam_gradients(cam_discrepancy, tensors, norm)
        for a, b in zip(got, cam_gradients(plain_cam, tensors, norm), strict=True):
            torch.testing.assert_close(a, b)


def test_cam_equal_maps_have_zero_gradient():
    features, _, head, weights = cam_inputs((2, 4, 5, 3, 2), True)
    for norm in ("l1", "l2"):
        tensors = (features, features, head, weights)
        assert not any(g.any() for g in cam_gradients(cam_discrepancy, tensors, norm))


@pytest.mark.parametrize("size", [(0, 4, 5, 3, 2), (2, 4, 5, 0, 2)], ids=["batch", "pixels"])
def test_cam_of_nothing_is_zero(size):
    features, features_adv, head, weights = cam_inputs(size, True, torch.float32)
    discrepancy = torch.full((len(features),), math.nan)
    distances, grad_head = torch.full_like(weights, math.nan), torch.full_like(head, math.nan)
    cam_kernels.cam_discrepancy_forward(
        features, features_adv, head, weights, "l1", discrepancy, distances
    )
    assert not discrepancy.any()
    assert not distances.any()
    cam_kernels.cam_discrepancy_backward(
        weights, features, features_adv, head, distances, "l1", None, grad_head
    )
    assert not grad_head.any()
