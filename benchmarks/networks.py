"""The networks of the whole-step benchmark: plain PyTorch, unaware of fastinterp's ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from fastinterp import create_model


class _Block(nn.Module):
    """BN, ReLU, conv 3x3, BN, ReLU, conv 3x3, added to the input or to its 1x1 convolution."""

    def __init__(self, width_in: int, width: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width_in)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.shortcut = None
        if width_in != width or stride != 1:
            self.shortcut = nn.Conv2d(width_in, width, 1, stride, bias=False)

    def forward(self, x):
        out = self.relu1(self.bn1(x))
        skip = x if self.shortcut is None else self.shortcut(out)
        return skip + self.conv2(self.relu2(self.bn2(self.conv1(out))))


class WideResNet(nn.Module):
    """WRN-depth-k for 32x32 images, pre-activation. Source: Zagoruyko & Komodakis (2016)."""

    def __init__(self, depth: int = 16, widen: int = 4, num_classes: int = 10):
        super().__init__()
        blocks, remainder = divmod(depth - 4, 6)
        if remainder:
            raise ValueError(f"the depth of a wide ResNet is 6 n + 4, got {depth}")
        width = 16
        self.conv = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        layers = []
        for group in range(3):
            for i in range(blocks):
                next_width = 16 * widen * 2**group
                layers.append(_Block(width, next_width, 2 if group and not i else 1))
                width = next_width
        self.blocks = nn.Sequential(*layers)
        self.bn = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def features(self, x):
        return self.relu(self.bn(self.blocks(self.conv(x))))

    def forward(self, x):
        return self.head(self.pool(self.features(x)).flatten(1))


def resnet18() -> nn.Module:
    import torchvision

    return torchvision.models.resnet18(num_classes=10)


def resnet50() -> nn.Module:
    import torchvision

    return torchvision.models.resnet50(num_classes=10)


def resnet18_cifar() -> nn.Module:
    """ResNet-18 with a 3x3 stem of stride 1 and no max-pooling."""
    net = resnet18()
    net.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    net.maxpool = nn.Identity()
    return net


class Network(NamedTuple):
    build: Callable[[], nn.Module]
    channels: int
    size: int  # of the images
    batch: int  # as trained


NETWORKS = {
    "wrn16-4": Network(WideResNet, 3, 32, 32),
    "wrn28-10": Network(lambda: WideResNet(28, 10), 3, 32, 64),
    "resnet18-cifar": Network(resnet18_cifar, 3, 32, 32),
    "resnet18": Network(resnet18, 3, 224, 32),
    "resnet50": Network(resnet50, 3, 224, 64),
    "small": Network(lambda: create_model("small", 1, 10), 1, 28, 50),
    "pool": Network(lambda: create_model("pool", 1, 10), 1, 28, 50),
    "wresnet": Network(lambda: create_model("wresnet", 3, 10), 3, 32, 32),
}


def convolutions(net: nn.Module) -> int:
    """Number of convolution layers."""
    return sum(isinstance(module, nn.Conv2d) for module in net.modules())


def batch_statistics(net: nn.Module) -> bool:
    """Whether a step in train mode normalises by the batch."""
    return any(isinstance(module, nn.BatchNorm2d) for module in net.modules())


def build(name: str, seed: int = 0) -> nn.Module:
    """A network of NETWORKS in train mode, the same weights for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return NETWORKS[name].build().train()
