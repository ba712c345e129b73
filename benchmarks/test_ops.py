"""Single ops against the same thing in plain PyTorch: pytest benchmarks

Each pair of rows is a group; a group is timed only after both sides agree.
"""

import pytest
import torch

from fastinterp.ops import attack_step, cam_discrepancy

# N, C, H, W of images: MNIST, CIFAR-10, Restricted ImageNet batches
IMAGES = [(50, 1, 28, 28), (128, 3, 32, 32), (64, 3, 224, 224)]
# N, C, K, h, w of features: MNIST Small, CIFAR WResnet, ResNet-50 on nine classes
FEATURES = [(50, 100, 10, 7, 7), (128, 64, 10, 8, 8), (64, 2048, 9, 7, 7)]


def plain_step(x, grad, origin, eps, step):
    y = x + step * grad.sign()
    return torch.min(torch.max(y, origin - eps), origin + eps).clamp(0, 1)


def plain_discrepancy(features, features_adv, head, weights):
    maps = torch.einsum("kc,nchw->nkhw", head, features - features_adv)
    return (weights * maps.abs().sum((2, 3))).sum(1)


@pytest.mark.parametrize("side", ["fastinterp", "eager"])
@pytest.mark.parametrize("shape", IMAGES, ids=str)
def test_attack_step(benchmark, shape, side):
    benchmark.group = f"attack_step {shape}"
    x, grad, origin = torch.rand(shape), torch.randn(shape), torch.rand(shape)
    assert torch.equal(
        attack_step(x, grad, origin, eps=0.1, step_size=0.01),
        plain_step(x, grad, origin, 0.1, 0.01),
    )
    if side == "eager":
        benchmark(plain_step, x, grad, origin, 0.1, 0.01)
    else:
        benchmark(attack_step, x, grad, origin, eps=0.1, step_size=0.01)


@pytest.mark.parametrize("side", ["fastinterp", "eager"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("wanted", ["features", "all"])
@pytest.mark.parametrize("size", FEATURES, ids=str)
def test_cam_discrepancy(benchmark, size, wanted, layout, side):
    """Forward and first derivatives: of x' alone as in an attack, or of everything."""
    n, c, k, h, w = size
    benchmark.group = f"cam_discrepancy {size} {wanted} {layout}"
    features, features_adv = (t.to(memory_format=layout) for t in torch.randn(2, n, c, h, w))
    head, weights = torch.randn(k, c), torch.rand(n, k)
    leaves = [features_adv] if wanted == "features" else [features, features_adv, head, weights]
    for leaf in leaves:
        leaf.requires_grad_()

    def ours():
        value, _ = cam_discrepancy(features, features_adv, head, weights)
        return torch.autograd.grad(value.sum(), leaves)

    def eager():
        value = plain_discrepancy(features, features_adv, head, weights)
        return torch.autograd.grad(value.sum(), leaves)

    for a, b in zip(ours(), eager(), strict=True):
        assert ((a - b).norm() / b.norm()) < 1e-2  # signs of near-zero map values may differ
    benchmark(ours if side == "fastinterp" else eager)
