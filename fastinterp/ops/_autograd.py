"""What the registered derivative formulas share: which gradients are wanted, and where they end."""

from __future__ import annotations

import torch


def remember_edges(ctx, inputs) -> None:
    """Called by an op's setup_context so that ``wanted`` can find each argument's next node."""
    ctx.set_materialize_grads(False)
    ctx.edge_of, edges = {}, 0
    for i, value in enumerate(inputs):
        if isinstance(value, torch.Tensor):
            ctx.edge_of[i] = edges
            edges += 1


def wanted(ctx, i: int) -> bool:
    """Whether the running backward pass will use the gradient of argument ``i``.

    ``ctx.needs_input_grad`` is True for a weight even where ``torch.autograd.grad`` was asked for
    the input alone; the engine knows better.
    """
    if not ctx.needs_input_grad[i]:
        return False
    node = ctx.next_functions[ctx.edge_of[i]][0]
    try:
        return node is None or torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf that is itself among autograd.grad's inputs
        return True


def no_third_order(name: str):
    """A derivative formula for ``fastinterp::name_backward_backward`` that refuses."""

    def refuse(ctx, *grads):
        raise NotImplementedError(
            f"third-order gradients of {name} are not supported; write it with plain torch "
            "operations where you need them (fastinterp.unfuse restores a fused model)"
        )

    return refuse
