"""Single ops against the same thing in plain PyTorch: pytest benchmarks [--csv FILE]

Nothing is timed before both sides agree. On a machine with a GPU the tensors are on it.
"""

import pytest
import torch

from fastinterp.ops import attack_step, cam_discrepancy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# N, C, H, W of images: MNIST, CIFAR-10, Restricted ImageNet batches
IMAGES = [(50, 1, 28, 28), (128, 3, 32, 32), (64, 3, 224, 224)]
# N, C, K, h, w of features: MNIST Small, CIFAR WResnet, ResNet-50 on nine classes
FEATURES = [(50, 100, 10, 7, 7), (128, 64, 10, 8, 8), (64, 2048, 9, 7, 7)]
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


def plain_step(x, grad, origin, eps, step):
    y = x + step * grad.sign()
    return torch.min(torch.max(y, origin - eps), origin + eps).clamp(0, 1)


def plain_discrepancy(features, features_adv, head, weights):
    maps = features - features_adv
    if head is not None:
        maps = torch.einsum("kc,nchw->nkhw", head, maps)
    return (weights * maps.abs().sum((2, 3))).sum(1)


@pytest.mark.parametrize("shape", IMAGES, ids=str)
def test_attack_step(compare, shape):
    x, grad, origin = torch.rand(3, *shape, device=DEVICE).unbind()
    grad = grad - 0.5

    def ours():
        return attack_step(x, grad, origin, eps=0.1, step_size=0.01)

    def eager():
        return plain_step(x, grad, origin, 0.1, 0.01)

    assert torch.equal(ours(), eager())
    compare(str(shape), ours, eager, check=0.0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", ["attack", "training", "maps"])
@pytest.mark.parametrize("size", FEATURES, ids=str)
def test_cam_discrepancy(compare, size, form, layout):
    """Forward and first derivatives: of x' alone as in an attack, or of everything; or on maps."""
    n, c, k, h, w = size
    channels = k if form == "maps" else c
    features, features_adv = (
        t.to(memory_format=LAYOUTS[layout]) for t in torch.randn(2, n, channels, h, w)
    )
    head, weights = torch.randn(k, c), torch.rand(n, k)
    tensors = [t.to(DEVICE) for t in (features, features_adv, head, weights)]
    leaves = tensors if form == "training" else tensors[1:2]
    for leaf in leaves:
        leaf.requires_grad_()
    if form == "maps":
        tensors[2] = None

    def ours():
        return torch.autograd.grad(cam_discrepancy(*tensors)[0].sum(), leaves)

    def eager():
        return torch.autograd.grad(plain_discrepancy(*tensors).sum(), leaves)

    # Over everything at once: a single map value at zero may take either sign.
    pairs = list(zip(ours(), eager(), strict=True))
    difference = sum((a - b).square().sum() for a, b in pairs).sqrt()
    check = (difference / sum(b.square().sum() for _, b in pairs).sqrt()).item()
    assert check < 1e-2
    compare(f"{size} {form} {layout}", ours, eager, check)
