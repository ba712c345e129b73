"""compile_step: torch.compile for a training step that differentiates twice.

The one file that touches a private switch of torch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

_SWITCH = "trace_autograd_ops"
_ALTERNATIVES = (
    "Alternatives: run the step eagerly on fastinterp.fuse(model), or trace it with "
    "torch.fx.experimental.proxy_tensor.make_fx and give the graph to torch._inductor.compile"
)


def compile_step(fn: Callable, **compile_kwargs) -> Callable:
    """torch.compile of a whole training step that calls torch.autograd.grad inside, in one graph.

    Compiling the model alone does not do: the backward pass of a compiled model cannot be
    differentiated again. So ``fn`` is everything from the images to the parameters' gradients:

        def step(x, y):
            x = x.detach().requires_grad_()
            logits = model(x)
            (saliency,) = torch.autograd.grad(
                logits.gather(1, y[:, None]).sum(), x, create_graph=True
            )
            loss = F.cross_entropy(logits, y) + 0.01 * saliency.abs().sum((1, 2, 3)).mean()
            return loss.detach(), torch.autograd.grad(loss, list(model.parameters()))

        step = fastinterp.compile_step(step)

    torch 2.11 cannot trace requires_grad_(): there x must come in requiring gradients.

    Args:
        fn: the step. Models of fastinterp.fuse and plain ones both work. Tensors that it returns
            must be detached from the graph that it differentiated; ``loss.backward()`` in place of
            the last call is fine too.
        compile_kwargs: to torch.compile, such as ``backend`` or ``mode``; ``fullgraph`` is True.

    Returns:
        A function with the arguments of ``fn``, compiled at its first call.

    Raises:
        RuntimeError: this torch cannot trace torch.autograd.grad, or, at a call, fn cannot be
            traced in one graph. The message says what else to do.
    """
    # Not with the package, which should import fast: dynamo takes seconds and brings triton.
    from torch._dynamo import config
    from torch._dynamo.exc import TorchDynamoException

    if not hasattr(config, _SWITCH):
        raise RuntimeError(
            f"torch {torch.__version__} cannot compile a step that calls torch.autograd.grad "
            f"(torch._dynamo.config.{_SWITCH} is missing). {_ALTERNATIVES}; or upgrade torch."
        )
    compiled = torch.compile(fn, fullgraph=True, **compile_kwargs)

    @functools.wraps(fn)
    def step(*args, **kwargs):
        try:
            with config.patch(**{_SWITCH: True}):
                return compiled(*args, **kwargs)
        except TorchDynamoException as error:
            name = getattr(fn, "__name__", type(fn).__name__)
            raise RuntimeError(
                f"{name} cannot be compiled in one graph: {_reason(error)}. {_ALTERNATIVES}."
            ) from error

    return step


def _reason(error: Exception) -> str:
    """What dynamo could not trace, and the object that it names."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
    context = [line for line in lines[1:] if line.startswith("Developer debug context:")]
    return "; ".join([lines[0], *(line.split(":", 1)[1].strip() for line in context)])
