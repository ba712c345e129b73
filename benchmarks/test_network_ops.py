"""Layers in three orders against plain PyTorch: pytest benchmarks/test_network_ops.py [--csv FILE]

One case runs forward, the input gradient with a graph, and the derivatives of <v, input gradient>,
which is what a layer does in a step of double backprop. Nothing is timed before the last agree with
float64 as well as plain torch's do.
"""

import pytest
import torch
from torch.nn import functional as F

from fastinterp import ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# N, C, H, W: WRN-16-4 and ResNet-18 on CIFAR-10, ResNet-50 on ImageNet
MAPS = [
    *((32, 16, 32, 32), (32, 64, 32, 32), (32, 128, 16, 16), (32, 256, 8, 8), (32, 512, 4, 4)),
    *((128, 64, 32, 32), (16, 256, 56, 56)),
]
# input maps, output channels, kernel, stride
CONVOLUTIONS = [
    ((32, 64, 32, 32), 64, 3, 1),
    ((32, 128, 16, 16), 256, 3, 2),
    ((32, 256, 8, 8), 256, 3, 1),
    ((32, 512, 4, 4), 512, 3, 1),
    ((32, 64, 32, 32), 128, 1, 2),
]
# N, C, H, W and groups; rows and features: CIFAR-sized networks with group norm, ViT-S and ViT-Ti
GROUPED_MAPS = [((32, 64, 28, 28), 32), ((32, 256, 14, 14), 32), ((8, 32, 8, 8), 8)]
ROWS = [(32 * 196, 384), (16 * 197, 192), (32, 64)]


def three_orders(function, x, others, c, v):
    """Gradients of <v, d<y, c>/dx> with respect to c, x and the others."""
    leaves = [t.requires_grad_() for t in (x, *others)]
    (gx,) = torch.autograd.grad(function(*leaves), x, c.requires_grad_(), create_graph=True)
    return torch.autograd.grad(gx, [c, *leaves], v, allow_unused=True)


def error(grads, exact):
    """Relative l2 error over everything; None is zero."""
    pairs = [(a, b) for a, b in zip(grads, exact, strict=True) if b is not None]
    off = sum((b if a is None else a.double() - b).square().sum() for a, b in pairs)
    return (off / sum(b.square().sum() for _, b in pairs)).sqrt().item()


def run(compare, case, ours, eager, shape, others, dtype, layout):
    """``others``: further differentiable arguments, already of their dtype."""
    x, v = torch.randn(2, *shape, device=DEVICE).to(DTYPES[dtype]).unbind()
    x, v = (t.contiguous(memory_format=LAYOUTS[layout]) for t in (x, v))
    others = [t.to(DEVICE) for t in others]
    c = torch.randn_like(eager(x, *others))
    exact_x, *exact_others, exact_c, exact_v = (t.double() for t in (x, *others, c, v))
    exact = three_orders(eager, exact_x, exact_others, exact_c, exact_v)
    check, plain = (error(three_orders(f, x, others, c, v), exact) for f in (ours, eager))
    assert check <= 4 * plain + 1e-6
    compare(
        f"{case} {dtype} {layout}",
        lambda: three_orders(ours, x, others, c, v),
        lambda: three_orders(eager, x, others, c, v),
        check,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", MAPS, ids=str)
def test_batch_norm_relu(compare, shape, dtype, layout):
    channels = shape[1]
    mean, var = torch.zeros(channels, device=DEVICE), torch.ones(channels, device=DEVICE)

    def ours(x, weight, bias):
        statistics = mean.to(weight.dtype), var.to(weight.dtype)
        return ops.batch_norm_act(x, weight, bias, *statistics, training=True, activation="relu")

    def eager(x, weight, bias):
        statistics = mean.to(weight.dtype), var.to(weight.dtype)
        return F.relu(F.batch_norm(x, *statistics, weight, bias, True))

    others = [torch.rand(channels) + 0.5, torch.randn(channels)]
    run(compare, str(shape), ours, eager, shape, others, dtype, layout)


def with_activation(y, activation):
    return y if activation == "identity" else getattr(F, activation)(y)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["identity", "relu"])
@pytest.mark.parametrize(("shape", "groups"), GROUPED_MAPS, ids=str)
def test_group_norm(compare, shape, groups, activation, dtype, layout):
    def ours(x, weight, bias):
        return ops.group_norm_act(x, groups, weight, bias, activation=activation)

    def eager(x, weight, bias):
        return with_activation(F.group_norm(x, groups, weight, bias), activation)

    others = [t.to(DTYPES[dtype]) for t in (torch.rand(shape[1]) + 0.5, torch.randn(shape[1]))]
    case = f"{activation} {shape} / {groups}"
    run(compare, case, ours, eager, shape, others, dtype, layout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["identity", "gelu"])
@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_layer_norm(compare, shape, activation, dtype):
    def ours(x, weight, bias):
        return ops.layer_norm_act(x, shape[1], weight, bias, activation=activation)

    def eager(x, weight, bias):
        return with_activation(F.layer_norm(x, shape[1:], weight, bias), activation)

    others = [t.to(DTYPES[dtype]) for t in (torch.rand(shape[1]) + 0.5, torch.randn(shape[1]))]
    run(compare, f"{activation} {shape}", ours, eager, shape, others, dtype, "NCHW")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", CONVOLUTIONS, ids=str)
def test_conv2d(compare, size, dtype, layout):
    shape, out_channels, kernel, stride = size
    weight = torch.randn(out_channels, shape[1], kernel, kernel) / (kernel * shape[1] ** 0.5)
    weight = weight.to(DTYPES[dtype]).contiguous(memory_format=LAYOUTS[layout])

    def ours(x, w):
        return ops.conv2d(x, w, None, stride, kernel // 2)

    def eager(x, w):
        return F.conv2d(x, w, None, stride, kernel // 2)

    case = f"{shape} -> {out_channels}, {kernel}x{kernel} s{stride}"
    run(compare, case, ours, eager, shape, [weight], dtype, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pool", [(2, 2, 0), (3, 2, 1)], ids=["2x2", "3x3s2"])
@pytest.mark.parametrize("shape", [(50, 32, 28, 28), (16, 64, 112, 112)], ids=str)
def test_max_pool2d(compare, shape, pool, dtype, layout):
    case = f"{shape} {pool[0]}x{pool[0]} s{pool[1]}"
    run(
        compare,
        case,
        lambda x: ops.max_pool2d(x, *pool),
        lambda x: F.max_pool2d(x, *pool),
        shape,
        [],
        dtype,
        layout,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["relu", "silu", "gelu", "softplus"])
@pytest.mark.parametrize("shape", [(50, 16, 14, 14), (32, 64, 32, 32)], ids=str)
def test_activation(compare, shape, kind, dtype):
    run(
        compare,
        f"{kind} {shape}",
        lambda x: ops.activation(x, kind),
        getattr(F, kind),
        shape,
        [],
        dtype,
        "NCHW",
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(50, 10), (256, 1000)], ids=str)
def test_cross_entropy(compare, shape, dtype):
    target = torch.randint(0, shape[1], shape[:1], device=DEVICE)
    run(
        compare,
        str(shape),
        lambda z: ops.cross_entropy(z, target),
        lambda z: F.cross_entropy(z.float() if z.dtype == torch.bfloat16 else z, target),
        shape,
        [],
        dtype,
        "NCHW",
    )
