"""Networks that the tests of maps share."""

import torch
from torch import nn
from torch.nn import functional as F


class SmoothNet(nn.Module):
    """Twice differentiable, with batch norm, spatial layers and a head bias."""

    def __init__(self, channels=2, classes=4):
        super().__init__()
        self.first = nn.Conv2d(channels, 5, 3, padding=1)
        self.norm = nn.BatchNorm2d(5)
        self.second = nn.Conv2d(5, 6, 3, stride=2)
        self.head = nn.Linear(6, classes)

    def forward(self, x):
        x = F.silu(self.norm(self.first(x)))
        return self.head(F.softplus(self.second(x)).mean((2, 3)))


class ReluNet(nn.Module):
    """What fuse knows: batch norm, ReLU, pooling."""

    def __init__(self, channels=2, classes=4):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(channels, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
        )
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(8, classes)

    def forward(self, x):
        return self.head(self.pool(self.features(x)).flatten(1))


def images(n=3, channels=2, size=9, dtype=torch.float64):
    return torch.rand(n, channels, size, size, dtype=dtype)


def parameter_gradients(value, net):
    return torch.autograd.grad(value, list(net.parameters()), allow_unused=True)


def assert_gradients_close(got, wanted, **tolerance):
    """None counts as zero: a gradient that is identically zero need not be computed."""
    for a, b in zip(got, wanted, strict=True):
        if a is None and b is None:
            continue
        a, b = (torch.zeros_like(b if a is None else a) if t is None else t for t in (a, b))
        torch.testing.assert_close(a, b, **tolerance)
