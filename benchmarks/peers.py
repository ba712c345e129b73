"""The sides of the whole-step benchmark: ours, and what else can take the same step.

A side is built from a Problem. Its ``step`` goes from the images to the parameters' gradients, BN
statistics updated on the way, and returns something that keeps the gradients;
``gradients(step())`` are torch tensors in the order of the network's parameters.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

import fastinterp
from benchmarks.problem import Problem
from fastinterp.graphs import GraphedStep


class Unavailable(RuntimeError):
    """A side that this installation or this problem does not have; the message says why."""


class Side(NamedTuple):
    step: Callable[[], Any]
    gradients: Callable[[Any], Sequence[torch.Tensor]] = tuple
    net: torch.nn.Module | None = None  # of a side whose convolutions can be counted


def _eager(net, problem: Problem) -> Side:
    x, y, other = problem.tensors()
    parameters = list(net.parameters())

    def step():
        for parameter in parameters:
            parameter.grad = None
        problem.loss(net, x, y, other).backward(inputs=parameters)
        return [parameter.grad for parameter in parameters]

    def gradients(result):  # None where the loss does not depend on a parameter
        pairs = zip(result, parameters, strict=True)
        return [torch.zeros_like(p) if g is None else g for g, p in pairs]

    return Side(step, gradients, net)


def ours(problem: Problem) -> Side:
    return _eager(fastinterp.fuse(problem.network()), problem)


def ours_recomputing(problem: Problem) -> Side:
    side = ours(problem)
    return side._replace(step=fastinterp.recompute()(side.step))


def ours_compiled(problem: Problem) -> Side:
    return _compiled(fastinterp.fuse(problem.network()), problem)


def eager(problem: Problem) -> Side:
    return eager_in_our_format(problem.but(format="nchw"))


def eager_in_our_format(problem: Problem) -> Side:
    return _eager(problem.network(), problem)


def _graphed(side: Side, problem: Problem) -> Side:
    """The side's step in a CUDA graph; on a CPU, where there are none, launched as it is."""
    mode = "on" if problem.device == "cuda" else "auto"
    images = problem.tensors()[0]
    step = GraphedStep(lambda _: side.step(), mode=mode)
    for _ in range(step.warmup):  # so that what the gate sees is the graph's
        step(images)
    return Side(lambda: step(images), side.gradients)


def ours_graphed(problem: Problem) -> Side:
    return _graphed(ours(problem), problem)


def eager_graphed(problem: Problem) -> Side:
    return _graphed(eager(problem), problem)


def _compiled(net, problem: Problem) -> Side:
    x, y, other = problem.tensors()
    for images in (x, other):  # outside: the tracer of torch 2.11 does not know requires_grad_
        images.requires_grad_()
    parameters = list(net.parameters())

    def step(x, y, other):
        return torch.autograd.grad(
            problem.loss(net, x, y, other), parameters, materialize_grads=True
        )

    step = fastinterp.compile_step(step)
    return Side(lambda: step(x, y, other))


def torch_compile(problem: Problem) -> Side:
    """torch.compile of the whole step: the one route of torch.compile that differentiates twice."""
    return _compiled(problem.network(), problem)


def make_fx_inductor(problem: Problem) -> Side:
    """Forward, double backward and parameter gradients traced to one graph, given to inductor."""
    from torch.fx.experimental.proxy_tensor import make_fx

    net = problem.network()
    names = [name for name, _ in net.named_parameters()]
    parameters = [p.detach() for p in net.parameters()]
    buffers = dict(net.named_buffers())

    def step(parameters, buffers, x, y, other):
        leaves = [p.detach().requires_grad_() for p in parameters]
        state = dict(zip(names, leaves, strict=True)) | buffers

        def forward(images):
            return torch.func.functional_call(net, state, (images,))

        return torch.autograd.grad(
            problem.loss(forward, x, y, other), leaves, materialize_grads=True
        )

    inputs = parameters, buffers, *problem.tensors()
    # Traced on copies: tracing runs the step, which updates the BN statistics.
    graph = make_fx(step)(parameters, {k: v.clone() for k, v in buffers.items()}, *inputs[2:])
    flat = [*parameters, *buffers.values(), *inputs[2:]]
    with torch.no_grad():
        compiled = torch._inductor.compile(_flat(graph), flat)

    def run():
        with torch.no_grad():
            return compiled(*flat)

    return Side(run)


def _flat(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """``graph`` with a plain list of tensors as its arguments."""
    graph.graph.set_codegen(torch.fx.graph.CodeGen())
    graph.recompile()
    return graph


def jax(problem: Problem) -> Side:
    """jit of reverse over reverse, for the networks that benchmarks.jax_wrn writes in JAX."""
    if importlib.util.find_spec("jax") is None:
        raise Unavailable("not installed")
    from benchmarks import jax_wrn

    if problem.net not in jax_wrn.DEPTH_AND_WIDTH:
        raise Unavailable(f"no JAX version of {problem.net}")
    return Side(*jax_wrn.build(problem))


class Entry(NamedTuple):
    label: str  # in the CSV; {format} is the problem's
    build: Callable[[Problem], Side]


SIDES = {
    "ours": Entry("fastinterp", ours),
    "ours-recompute": Entry("fastinterp, recompute", ours_recomputing),
    "ours-graph": Entry("fastinterp, CUDA graph", ours_graphed),
    "eager": Entry("eager", eager),
    "eager-format": Entry("eager {format}", eager_in_our_format),
    "eager-graph": Entry("eager, CUDA graph", eager_graphed),
    "compile": Entry("torch.compile", torch_compile),
    "make_fx": Entry("make_fx + inductor", make_fx_inductor),
    "jax": Entry("JAX", jax),
    "ours-compile": Entry("fastinterp, compile_step", ours_compiled),
}
