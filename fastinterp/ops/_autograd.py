"""Registration of derivative formulas, and what they share: which gradients are wanted."""

from __future__ import annotations

import torch


def register_autograd(name: str, backward, setup_context=None, vmap=None) -> None:
    """torch.library.register_autograd for ``fastinterp::name``, without its look at the schema.

    That look, for default values our schemas do not have, takes 45 us of every call, more than a
    small layer. As there, the dispatcher's autograd kernel runs the op below autograd and hangs the
    formula on its outputs, so tracers see the op.

    The op also gets a rule for torch.vmap, which runs one backward pass for many classes.

    Args:
        name: an op whose schema has neither defaults nor keyword-only arguments nor tensor lists.
        backward: formula(ctx, *grads) -> one gradient or None for every argument.
        setup_context: function(ctx, inputs, output), or None when the formula only refuses.
        vmap: function(op, size, batched, *args) -> output with the batch first, where that can do
            better than one call after the other; it may return None. ``batched`` tells which
            arguments have a batch, of ``size``, which is their first dimension.
    """
    op = getattr(torch.ops.fastinterp, name).default

    def run(keyset, args):
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    def forward(ctx, keyset, *args):
        output = run(keyset, args)
        if setup_context is not None:
            setup_context(ctx, args, output)
        return output

    def formula(ctx, *grads):
        return None, *backward(ctx, *grads)

    function = type(
        f"{name}_formula",
        (torch.autograd.Function,),
        {"forward": staticmethod(forward), "backward": staticmethod(formula)},
    )

    def kernel(keyset, *args):
        if torch.is_grad_enabled() and any(
            isinstance(a, torch.Tensor) and a.requires_grad for a in args
        ):
            return function.apply(keyset, *args)
        return run(keyset, args)

    def batching_rule(info, in_dims, *args):
        batched = [isinstance(dim, int) for dim in in_dims]
        args = [a.movedim(d, 0) if b else a for a, d, b in zip(args, in_dims, batched, strict=True)]
        output = None if vmap is None else vmap(op, info.batch_size, batched, *args)
        if output is None:
            output = _one_after_the_other(op, info.batch_size, batched, args)
        return output, tuple(0 for _ in output) if isinstance(output, tuple) else 0

    _library.impl(name, kernel, "Autograd", with_keyset=True)
    torch.library.register_vmap(f"fastinterp::{name}", batching_rule, lib=_library)


def _one_after_the_other(op, size, batched, args):
    # unbind, as the derivative of a select is a tensor of zeros as large as the whole batch.
    columns = [a.unbind(0) if b else (a,) * size for a, b in zip(args, batched, strict=True)]
    outputs = [op(*row) for row in zip(*columns, strict=True)]
    if isinstance(outputs[0], torch.Tensor):
        return torch.stack(outputs)
    return tuple(torch.stack(column) for column in zip(*outputs, strict=True))


def fold_examples(op, size, batched, x, *args):
    """``vmap`` of an op of examples x (N, ...) that knows nothing of N elsewhere."""
    if not batched[0] or any(batched[1:]):
        return None
    output = op(x.flatten(0, 1), *args)
    return output.unflatten(0, (size, x.shape[1]))


_library = torch.library.Library("fastinterp", "FRAGMENT")


def remember_edges(ctx, inputs) -> None:
    """Called by an op's setup_context so that ``wanted`` can find each argument's next node."""
    ctx.set_materialize_grads(False)
    tensors = [i for i, value in enumerate(inputs) if isinstance(value, torch.Tensor)]
    ctx.edge_of = {i: edge for edge, i in enumerate(tensors)}


def needs_grad(ctx, i: int) -> bool:
    """Whether argument ``i`` of the op was a tensor with gradients."""
    return ctx.needs_input_grad[i + 1]


def wanted(ctx, i: int) -> bool:
    """Whether the running backward pass will use the gradient of argument ``i``.

    ``needs_grad`` is True for a weight even where ``torch.autograd.grad`` was asked for the input
    alone; the engine knows better.
    """
    if not needs_grad(ctx, i):
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
