"""The wide ResNet of benchmarks.networks and its training steps, written by hand in JAX."""

from __future__ import annotations

import os

# On a GPU jax would otherwise take most of the memory that the other sides need.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks.objectives import IG_POINTS
from benchmarks.problem import Problem

DEPTH_AND_WIDTH = {"wrn16-4": (16, 4), "wrn28-10": (28, 10)}
BN_EPS, BN_MOMENTUM = 1e-5, 0.1  # torch's defaults


class _Network:
    """One forward pass: reads the weights by their torch names, collects new BN statistics."""

    def __init__(self, weights, statistics, problem: Problem):
        self.weights, self.statistics, self.problem = weights, dict(statistics), problem
        self.last = problem.format == "channels_last"
        self.layout = ("NHWC", "OIHW", "NHWC") if self.last else ("NCHW", "OIHW", "NCHW")
        self.axes = (0, 1, 2) if self.last else (0, 2, 3)

    def conv(self, name, x, stride=1):
        weight = self.weights[f"{name}.weight"]
        if self.problem.dtype == "bf16":  # as torch's autocast does
            x, weight = x.astype(jnp.bfloat16), weight.astype(jnp.bfloat16)
        pad = weight.shape[2] // 2
        return jax.lax.conv_general_dilated(
            x, weight, (stride, stride), [(pad, pad)] * 2, dimension_numbers=self.layout
        )

    def bn_relu(self, name, x):
        """Train mode; statistics in float32 at least, the result in the dtype of x."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean, var = wide.mean(self.axes), wide.var(self.axes)
        count = x.size // mean.size
        for kind, value in (("mean", mean), ("var", var * count / (count - 1))):
            key = f"{name}.running_{kind}"
            old = self.statistics[key]
            self.statistics[key] = old + BN_MOMENTUM * (jax.lax.stop_gradient(value) - old)
        scale = self.weights[f"{name}.weight"] * jax.lax.rsqrt(var + BN_EPS)
        shape = (1, 1, 1, -1) if self.last else (1, -1, 1, 1)
        shift = self.weights[f"{name}.bias"] - mean * scale
        y = wide * scale.reshape(shape) + shift.reshape(shape)
        return jax.nn.relu(y).astype(x.dtype)

    def block(self, name, x, stride):
        out = self.bn_relu(f"{name}.bn1", x)
        short = f"{name}.shortcut"
        skip = self.conv(short, out, stride) if f"{short}.weight" in self.weights else x
        out = self.conv(f"{name}.conv1", out, stride)
        return skip + self.conv(f"{name}.conv2", self.bn_relu(f"{name}.bn2", out))

    def __call__(self, x):
        depth, _ = DEPTH_AND_WIDTH[self.problem.net]
        per_group = (depth - 4) // 6
        x = self.conv("conv", x)
        for i in range(3 * per_group):
            x = self.block(f"blocks.{i}", x, 2 if i and i % per_group == 0 else 1)
        x = self.bn_relu("bn", x).mean(self.axes[1:])
        weight = self.weights["head.weight"].T.astype(x.dtype)
        logits = x @ weight + self.weights["head.bias"].astype(x.dtype)
        return logits.astype(self.weights["head.weight"].dtype)


def _cross_entropy(logits, y):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1).mean()


def _l1(maps):
    return jnp.abs(maps).sum((1, 2, 3)).mean()


def _loss(weights, statistics, x, y, other, problem):
    """The objectives of benchmarks.objectives; returns the new BN statistics too."""

    def forward(images, statistics):
        net = _Network(weights, statistics, problem)
        return net(images), net.statistics

    def saliency(images, y, statistics):
        def true(images):
            logits, new = forward(images, statistics)
            return jnp.take_along_axis(logits, y[:, None], 1).sum(), (logits, new)

        gradient, (logits, new) = jax.grad(true, has_aux=True)(images)
        return gradient, logits, new

    if problem.objective == "plain":
        logits, statistics = forward(x, statistics)
        return _cross_entropy(logits, y), statistics
    if problem.objective == "ig":
        points = jnp.concatenate([x * (k / IG_POINTS) for k in range(1, IG_POINTS + 1)])
        gradient, _, statistics = saliency(points, jnp.tile(y, IG_POINTS), statistics)
        logits, statistics = forward(x, statistics)
        gradient = x * gradient.reshape(IG_POINTS, *x.shape).mean(0)
    else:
        gradient, logits, statistics = saliency(x, y, statistics)
        if problem.objective == "discrepancy":
            moved, _, statistics = saliency(other, y, statistics)
            gradient = gradient - moved
    loss = problem.weight * _l1(gradient)
    if problem.objective != "penalty":
        loss = loss + _cross_entropy(logits, y)
    return loss, statistics


def build(problem: Problem):
    """(step, gradients) of a benchmarks.peers.Side."""
    if problem.dtype == "fp64":
        jax.config.update("jax_enable_x64", True)
    net = problem.network()
    names = [name for name, _ in net.named_parameters()]

    def array(tensor):
        return jnp.asarray(tensor.detach().cpu().contiguous().numpy())

    weights = {name: array(p) for name, p in net.named_parameters()}
    statistics = {name: array(b) for name, b in net.named_buffers() if b.dim()}
    x, y, other = problem.tensors()
    if problem.format == "channels_last":
        x, other = x.permute(0, 2, 3, 1), other.permute(0, 2, 3, 1)
    x, other, labels = array(x), array(other), array(y.int())
    compiled = jax.jit(lambda *inputs: jax.grad(_loss, has_aux=True)(*inputs, problem=problem))

    def step():
        nonlocal statistics
        gradients, statistics = compiled(weights, statistics, x, labels, other)
        return jax.block_until_ready(gradients)

    def gradients(result):
        return [torch.from_numpy(np.array(result[name])) for name in names]

    return step, gradients
