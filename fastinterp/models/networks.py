"""The paper's networks.

No batch norm; biases on the convolutions; ReLU at the input of every convolution but the first, so
the last feature map has no ReLU; global average pooling and a linear head without bias. Parameters
are named as in the released weights: conv{i}.weight, conv{i}.bias, head.weight.

Source: Boopathy et al. (ICML 2020), released code.
"""

from __future__ import annotations

from torch import nn
from torch.nn import functional as F

from fastinterp.models._layers import SameConv2d


class _PaperNetwork(nn.Module):
    def __init__(self, convolutions: list[SameConv2d], num_classes: int):
        super().__init__()
        self.convolutions = len(convolutions)
        for i, convolution in enumerate(convolutions):
            self.add_module(f"conv{i}", convolution)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(convolutions[-1].out_channels, num_classes, bias=False)

    def conv(self, i: int) -> SameConv2d:
        return getattr(self, f"conv{i}")

    def features(self, x):
        """Last feature maps, (N, C, h, w), of images (N, channels, H, W) in [0,1]."""
        raise NotImplementedError

    def forward(self, x):
        """Logits, (N, K)."""
        return self.head(self.pool(self.features(x)).flatten(1))


class Small(_PaperNetwork):
    """conv 4x4/16 s2, conv 4x4/32 s2, conv 7x7/100; maps of a quarter of the input size."""

    def __init__(self, in_channels: int = 1, num_classes: int = 10):
        super().__init__(
            [
                SameConv2d(in_channels, 16, 4, 2),
                SameConv2d(16, 32, 4, 2),
                SameConv2d(32, 100, 7),
            ],
            num_classes,
        )

    def features(self, x):
        return self.conv(2)(F.relu(self.conv(1)(F.relu(self.conv(0)(x)))))


class Pool(_PaperNetwork):
    """conv 5x5/32, max-pool 2, conv 5x5/64, max-pool 2; ReLU after the first pooling."""

    def __init__(self, in_channels: int = 1, num_classes: int = 10):
        super().__init__([SameConv2d(in_channels, 32, 5), SameConv2d(32, 64, 5)], num_classes)

    def features(self, x):
        x = F.relu(F.max_pool2d(self.conv(0)(x), 2))
        return F.max_pool2d(self.conv(1)(x), 2)


class WResnet(_PaperNetwork):
    """conv 3x3/16, then 15 blocks x + conv(relu(conv(relu(x)))), five each of width 16, 32, 64.

    The first block of widths 32 and 64 has stride 2; its skip is an average pooling and zero
    channels, half before and half after.
    """

    WIDTHS = (16,) * 5 + (32,) * 5 + (64,) * 5

    def __init__(self, in_channels: int = 3, num_classes: int = 10):
        convolutions = [SameConv2d(in_channels, 16, 3)]
        width = 16
        for next_width in self.WIDTHS:
            stride = 1 if next_width == width else 2
            convolutions += [
                SameConv2d(width, next_width, 3, stride),
                SameConv2d(next_width, next_width, 3),
            ]
            width = next_width
        super().__init__(convolutions, num_classes)

    def features(self, x):
        x = self.conv(0)(x)
        previous = self.WIDTHS[0]
        for block, width in enumerate(self.WIDTHS):
            first, second = self.conv(2 * block + 1), self.conv(2 * block + 2)
            branch = second(F.relu(first(F.relu(x))))
            if missing := width - previous:
                x = F.pad(F.avg_pool2d(x, 2), (0, 0, 0, 0, missing // 2, missing // 2))
            x, previous = x + branch, width
        return x
