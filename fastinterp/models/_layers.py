"""Layers the paper's networks share."""

from __future__ import annotations

from torch import nn
from torch.nn import functional as F


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Padding (before, after) of TensorFlow's "SAME": output ceil(size / stride), odd one after."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


class SameConv2d(nn.Conv2d):
    """nn.Conv2d with "SAME" padding worked out from the input size; square kernel and stride."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1):
        super().__init__(in_channels, out_channels, kernel_size, stride)

    def forward(self, x):
        kernel, stride = self.kernel_size[0], self.stride[0]
        top, bottom = same_padding(x.shape[2], kernel, stride)
        left, right = same_padding(x.shape[3], kernel, stride)
        if (top, left) == (bottom, right):
            return self._convolution(x, stride, (top, left))
        return self._convolution(F.pad(x, (left, right, top, bottom)), stride, 0)

    def _convolution(self, x, stride, padding):
        return F.conv2d(x, self.weight, self.bias, stride, padding)
