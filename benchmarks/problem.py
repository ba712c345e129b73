"""What all sides of the whole-step benchmark are given alike: weights, images, loss, dtype."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable

import torch
from torch import nn

from benchmarks import networks
from benchmarks.objectives import OBJECTIVES

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
SHIFT = 8 / 255  # of the second image


@dataclasses.dataclass(frozen=True)
class Problem:
    """One training step: a network of NETWORKS, a loss of OBJECTIVES, and how they are computed.

    ``dtype`` "bf16" is autocast around the forward pass with float32 parameters.
    """

    net: str = "wrn16-4"
    objective: str = "gradient"
    format: str = "nchw"
    dtype: str = "fp32"
    batch: int = 32
    size: int = 32
    weight: float = 1.0  # of the penalty
    device: str = "cpu"
    seed: int = 0

    def but(self, **changes) -> Problem:
        return dataclasses.replace(self, **changes)

    @property
    def parameter_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == "fp64" else torch.float32

    def network(self) -> nn.Module:
        """In train mode; weights drawn in float32, so all dtypes start alike."""
        net = networks.build(self.net, self.seed).to(self.device, self.parameter_dtype)
        return net.to(memory_format=FORMATS[self.format])

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x in [0,1], labels, and x moved by a fixed random shift."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = self.batch, networks.NETWORKS[self.net].channels, self.size, self.size
        x = torch.rand(shape, generator=generator)
        other = x + SHIFT * (2 * torch.rand(shape, generator=generator) - 1)
        y = torch.randint(0, 10, (self.batch,), generator=generator)
        x, other = (
            t.to(self.device, self.parameter_dtype, memory_format=FORMATS[self.format])
            for t in (x, other)
        )
        return x, y.to(self.device), other

    def loss(self, net: Callable, x, y, other) -> torch.Tensor:
        """Autocast covers the forward passes only, as torch's documentation asks."""

        def forward(images):
            with torch.autocast(self.device, torch.bfloat16, enabled=self.dtype == "bf16"):
                logits = net(images)
            return logits.to(self.parameter_dtype)

        return OBJECTIVES[self.objective](forward, x, y, other, self.weight)

    def __str__(self) -> str:
        return (
            f"{self.net} {self.objective} N={self.batch} {self.size}x{self.size} "
            f"{self.dtype} {self.format}"
        )


def balanced_weight(problem: Problem) -> float:
    """The weight, to one digit, at which the penalty moves the parameters as much as CE does.

    From a few images in float64. A smaller weight would hide a wrong second derivative behind CE.
    """
    if problem.objective in ("plain", "penalty"):
        return 1.0
    gradients = []
    for weight in (0.0, 1.0):  # CE; CE + penalty
        # NCHW, in which float64 convolutions are twice as fast.
        few = problem.but(dtype="fp64", format="nchw", batch=min(problem.batch, 8), weight=weight)
        net = few.network()
        parts = torch.autograd.grad(few.loss(net, *few.tensors()), list(net.parameters()))
        gradients.append(torch.cat([g.flatten() for g in parts]))
    ce, both = gradients
    return float(f"{(ce.norm() / (both - ce).norm()).item():.0e}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--net", choices=networks.NETWORKS, default="wrn16-4")
    parser.add_argument("--objective", choices=OBJECTIVES, default="gradient")
    parser.add_argument("--format", choices=FORMATS, default="channels_last")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--batch", type=int, help="default: as the network is trained")
    parser.add_argument("--size", type=int, help="of the images; default: as the network's")
    parser.add_argument("--weight", type=float, help="of the penalty; default: balanced")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default_device)
    parser.add_argument("--seed", type=int, default=0)


def from_arguments(arguments: argparse.Namespace) -> Problem:
    network = networks.NETWORKS[arguments.net]
    names = (field.name for field in dataclasses.fields(Problem))
    values = {name: getattr(arguments, name) for name in names}
    values["batch"] = arguments.batch or network.batch
    values["size"] = arguments.size or network.size
    if arguments.weight is None:
        values["weight"] = balanced_weight(Problem(**values | {"weight": 1.0}))
    return Problem(**values)
