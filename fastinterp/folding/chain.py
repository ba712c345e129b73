"""What an attack runs of a network that is a chain of convolutions and ReLUs, on a CPU.

The images lie side by side in memory, (H, W, C, N), where csrc/cpu/conv2d.cpp loses nothing to the
shapes of small networks, to padding or to the ReLUs. A pass is as many calls of the core as there
are convolutions. Those of MNIST Small take a third of a millisecond each, of which autograd and the
dispatcher would take a third again, so a whole maximisation of what the paper raises does without.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import fx, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from fastinterp import _native
from fastinterp._checks import check_labels
from fastinterp.fusion import stock_type
from fastinterp.models._layers import SameConv2d, same_padding
from fastinterp.ops._backend import DTYPE_CODES, addresses
from fastinterp.ops.attack_step import NORMS, per_example

_LEAST_EXAMPLES = {torch.float32: 16, torch.float64: 8}  # what the kernel takes
_RELUS = {F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"}


class Link(NamedTuple):
    """A convolution, and whether a ReLU follows it."""

    convolution: fx.Node
    relu: bool


def find_chain(features: fx.Node, module: Callable[[fx.Node], nn.Module | None]) -> list[Link]:
    """The links from the images to ``features``, a convolution; empty where it is no chain.

    Args:
        features: what comes after it may use it as often as it likes.
        module: the module that a node calls, None for any other node.
    """
    links, node, relu = [], features, False
    while node.op != "placeholder":
        if not (node is features or len(node.users) == 1) or len(node.args) < 1:
            return []
        called = module(node)
        if called is not None and _is_link(called):
            links.append(Link(node, relu))
            relu = False
        elif (stock_type(called) is nn.ReLU or node.target in _RELUS) and not relu:
            relu = True
        else:
            return []
        node = node.args[0]
    return [] if relu or len(node.users) != 1 else links[::-1]


def _is_link(module: nn.Module) -> bool:
    if stock_type(module) not in (nn.Conv2d, SameConv2d) or module.groups != 1:
        return False
    return module.padding_mode == "zeros" and not isinstance(module.padding, str)


class _Step(NamedTuple):
    """One convolution of images of one size, as the core wants it."""

    forward: tuple  # what the core takes before the tensors
    adjoint: tuple
    weight: torch.Tensor
    bias: torch.Tensor | None
    stride: tuple[int, int]
    relu: bool
    in_size: tuple[int, ...]  # (H, W, C, N)
    out_size: tuple[int, ...]


def _step(conv: nn.Conv2d, relu: bool, in_size: tuple[int, ...]) -> _Step:
    height, width, channels, examples = in_size
    weight, stride, padding, dilation = conv.weight, conv.stride, conv.padding, conv.dilation
    kernel = tuple(weight.shape[2:])
    if stock_type(conv) is SameConv2d:
        around = [same_padding(n, conv.kernel_size[0], stride[0]) for n in (height, width)]
        padding = tuple(before for before, _ in around)
    else:
        around = [(p, p) for p in padding]
    out_size = tuple(
        (n + sum(p) - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip((height, width), around, dilation, kernel, stride, strict=True)
    )
    options = kernel, stride, padding, dilation
    out_stride, in_stride, *tap_stride = weight.stride()
    code, out_channels = DTYPE_CODES[weight.dtype], len(weight)
    forward = code, False, examples, channels, out_channels, (height, width), out_size, *options
    adjoint = code, True, examples, out_channels, channels, out_size, (height, width), *options
    return _Step(
        (*forward, out_stride, in_stride, tuple(tap_stride)),
        (*adjoint, in_stride, out_stride, tuple(tap_stride)),
        weight,
        None if conv.bias is None else conv.bias.contiguous(),
        stride,
        relu,
        in_size,
        (*out_size, out_channels, examples),
    )


class Chain(nn.Module):
    """z -> (class maps, logits), as ``network`` computes them.

    Args:
        network: the same as a graph of torch's own operations; takes what the kernel does not.
        convolutions: of the chain; nobody changes their parameters.
        relus: whether a ReLU follows each of them.
        bias: (K,) or None, what is added to the means of the maps to make logits of them.
    """

    def __init__(
        self,
        network: nn.Module,
        convolutions: list[nn.Conv2d],
        relus: list[bool],
        bias: torch.Tensor | None,
    ):
        super().__init__()
        self.network = network
        self._bias = None if bias is None else bias.contiguous()
        self._links = list(zip(convolutions, relus, strict=True))
        self._steps: dict[tuple, list[_Step]] = {}

    def forward(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not self._takes(z):
            return self.network(z)
        maps = _Pass.apply(z, self).permute(3, 2, 0, 1)
        return maps, mean_logits(maps, self._bias)

    def ascend(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        clean: torch.Tensor | None = None,
        *,
        ce_weight: float = 1.0,
        discrepancy_weight: float = 0.0,
        eps: float | torch.Tensor,
        step_size: float | torch.Tensor,
        steps: int,
        clip: tuple[float, float] | None,
        start: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """Projected ascent, in the Linf ball, on a CE + b D, D the weighted l1 discrepancy.

        Args:
            x, eps, step_size, steps, clip, start: of attacks.maximise, whose last iterate it gives.
            y: classes, int64 (N,).
            clean: the maps of x, (N, K, h, w); None where D has no weight.
            ce_weight, discrepancy_weight: a and b.

        Returns:
            (N, C, H, W), detached, or None where the kernels do not do it.

        Raises:
            ValueError: y, eps or step_size is out of range.
        """
        if not self._takes(x) or (y.dtype, y.device.type) != (torch.int64, "cpu"):
            return None
        eps, step_size = per_example("eps", eps, x), per_example("step_size", step_size, x)
        if eps.dim() > 0 or step_size.dim() > 0:
            return None
        height, width, classes, examples = self.steps(x)[-1].out_size
        if clean is not None and not _alike(clean, x, (examples, classes, height, width)):
            return None
        if start is not None and not _alike(start, x, x.shape):
            return None
        check_labels(y, examples, classes)
        start = None if start is None else start.detach()
        weights = float(ce_weight), float(discrepancy_weight)
        return self._ascend(x, y, clean, weights, eps, step_size, steps, clip, start)

    def _ascend(self, x, y, clean, weights, eps, step_size, steps, clip, start) -> torch.Tensor:
        passes, code, threads = self.steps(x), DTYPE_CODES[x.dtype], torch.get_num_threads()
        centre = beside(x.detach())
        z = centre.clone() if start is None else centre + beside(start)
        if start is not None and clip is not None:
            z.clamp_(*clip)
        values = [z, *(z.new_empty(step.out_size) for step in passes)]
        slopes = [torch.empty_like(each) for each in values]
        # Named, as the core sees no more than where they are.
        clean, y = None if clean is None else beside(clean.detach()), y.contiguous()

        calls = [
            _call(passes[i], False, values[i], values[i + 1], threads) for i in range(len(passes))
        ]
        height, width, classes, examples = values[-1].shape
        tensors = addresses(clean, values[-1], self._bias, y, slopes[-1])
        sizes = code, *weights, examples, classes, height * width
        calls.append((_native.core.cpu_map_objective, (*sizes, *tensors)))
        for i in reversed(range(len(passes))):
            gate = values[i] if i > 0 and passes[i - 1].relu else None
            calls.append(_call(passes[i], True, slopes[i + 1], slopes[i], threads, gate))
        low, high = (-math.inf, math.inf) if clip is None else map(float, clip)
        tensors = *addresses(z, slopes[0], centre, z, eps), 0, *addresses(step_size), 0
        move = code, NORMS["Linf"], 1, z.numel(), *tensors, low, high, threads
        calls.append((_native.core.cpu_attack_step, move))
        for _ in range(steps):
            for kernel, arguments in calls:
                kernel(*arguments)
        return torch.empty_like(x).copy_(z.permute(3, 2, 0, 1))

    def steps(self, z: torch.Tensor) -> list[_Step]:
        """What a pass over such images takes; empty where it is not the kernel's."""
        key = z.shape, z.dtype
        steps = self._steps.get(key)
        if steps is None:
            steps = self._steps[key] = self._find_steps(z)
        return steps

    def _find_steps(self, z: torch.Tensor) -> list[_Step]:
        tensors = [self._bias, *(t for conv, _ in self._links for t in (conv.weight, conv.bias))]
        if {(t.dtype, t.device.type) for t in tensors if t is not None} != {(z.dtype, "cpu")}:
            return []
        if z.dim() != 4 or len(z) < _LEAST_EXAMPLES.get(z.dtype, len(z) + 1):
            return []
        steps, size = [], (*z.shape[2:], z.shape[1], len(z))
        for conv, relu in self._links:
            if conv.weight.shape[1] != size[2]:
                return []
            steps.append(_step(conv, relu, size))
            size = steps[-1].out_size
            if min(size) < 1:
                return []
        return steps if _pays(steps) else []

    def _takes(self, z: torch.Tensor) -> bool:
        return (
            z.device.type == "cpu"
            and _native.core is not None
            and os.environ.get("FASTINTERP_BACKEND", "auto") in ("auto", "cpu")
            and not torch.is_autocast_enabled("cpu")
            and not _traced(z)
            and bool(self.steps(z))
        )


def _pays(steps: list[_Step]) -> bool:
    """Whether the kernel is faster: half of the products or more are where the vendor's is slow.

    Measured on 2 cores with AVX2 at N = 16, 50 and 128, the vendor's time over the kernel's, both
    directions together: strided 4x4 kernels and those with fewer than 16 channels in or out 0.9 to
    2.8; others with 16 to 64 channels 0.6 to 0.9 and with 256 0.5 to 0.8, except for N = 16, 1.0 to
    1.5.
    """
    products = [math.prod(step.out_size[:2]) * step.weight.numel() for step in steps]
    slow = [max(step.stride) > 1 or min(step.weight.shape[:2]) < 16 for step in steps]
    return 2 * sum(p for p, is_slow in zip(products, slow, strict=True) if is_slow) >= sum(products)


def _traced(t: torch.Tensor) -> bool:
    """Whether somebody looks for torch's own operations, or t has no values to read."""
    return (
        type(t) not in (torch.Tensor, nn.Parameter)
        or is_in_torch_dispatch_mode()
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch._C._functorch.is_functorch_wrapped_tensor(t)
        or torch._C._functorch.is_legacy_batchedtensor(t)  # of is_grads_batched
        or forward_ad._current_level >= 0
    )


def _alike(t: torch.Tensor, x: torch.Tensor, shape: tuple[int, ...]) -> bool:
    """Whether t has such a shape and the numbers of x, as the core takes for granted."""
    return (tuple(t.shape), t.dtype, t.device) == (tuple(shape), x.dtype, x.device)


def beside(t: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) as (H, W, C, N), contiguous."""
    return t.permute(2, 3, 1, 0).contiguous().resolve_neg()


class _Pass(torch.autograd.Function):
    """Images (N, C, H, W) -> class maps (h, w, K, N); the second derivative is torch's."""

    @staticmethod
    def forward(ctx, z, chain):
        steps, threads = chain.steps(z), torch.get_num_threads()
        values = [beside(z)]
        for step in steps:
            values.append(values[0].new_empty(step.out_size))
            kernel, arguments = _call(step, False, *values[-2:], threads)
            kernel(*arguments)
        ctx.save_for_backward(z, *values[1:-1])
        ctx.chain, ctx.steps = chain, steps
        return values[-1]

    @staticmethod
    def backward(ctx, grad):
        z, *values = ctx.saved_tensors
        if torch.is_grad_enabled() or _traced(grad):
            with torch.enable_grad():
                z = z.view_as(z)  # hooks of z itself are not to run twice
                maps = ctx.chain.network(z)[0].permute(2, 3, 1, 0)
            create_graph = torch.is_grad_enabled()
            return *torch.autograd.grad(maps, z, grad, create_graph=create_graph), None
        steps, threads = ctx.steps, torch.get_num_threads()
        g = grad.contiguous().resolve_neg()
        # What was saved may have been somewhere else meanwhile, or come back as a view.
        values = [None, *(v.to(g.dtype).contiguous() for v in values)]
        for i in reversed(range(len(steps))):
            out = g.new_empty(steps[i].in_size)
            gate = values[i] if i > 0 and steps[i - 1].relu else None
            kernel, arguments = _call(steps[i], True, g, out, threads, gate)
            kernel(*arguments)
            g = out
        return g.permute(3, 2, 0, 1), None


def _call(step, adjoint, t, out, threads, gate=None) -> tuple[Callable, tuple]:
    """The kernel of a convolution of t, or of its input gradient, and its arguments."""
    bias, relu = (None, False) if adjoint else (step.bias, step.relu)
    tensors = *addresses(t, step.weight, bias, gate), relu, *addresses(out)
    sizes = step.adjoint if adjoint else step.forward
    return _native.core.cpu_conv2d, (*sizes, *tensors, threads)


def mean_logits(maps: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Logits (N, K) of class maps (N, K, h, w)."""
    logits = maps.mean((2, 3))
    return logits if bias is None else logits + bias
