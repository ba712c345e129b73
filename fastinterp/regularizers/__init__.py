"""Drop-in losses for anybody's training loop.

    interpretation.py   the paper's: worst-case discrepancy between class activation maps
    gradient.py         sizes of input gradients and Jacobians, where gradients may lie
    linearity.py        curvature and local linearity of the loss
    alignment.py        explanations of x and of a neighbour of x
    priors.py           smooth, sparse or sufficient explanations

The functions are called name(model, x, y, *, ...), two priors name(attribution), and give a scalar,
the mean over the batch, which differentiates through the gradients inside it to every parameter.
The model computes in its own mode, where a docstring does not say otherwise, and nothing of the
user's is left changed: flags, buffers, gradients, hooks; random numbers are drawn from
``generator`` or the global one, and only where there is noise. With train-mode batch norm the
examples of a batch depend on one another, and x and its neighbour are two batches.

Running statistics do not move, with one exception: where the caller gets logits (``return_logits``,
``return_aux``) the pass that made them counts as ``model(x)``, whose place they take in the loss,
and the statistics move once as they would there. So they do once a step either way, with
``F.cross_entropy(model(x), y) + regularizer(model, x, y)`` as with the returned logits.

A model wrapped in DistributedDataParallel is called without its wrapper, so its gradients are
reduced between processes only if the wrapper's own forward runs in the same step; safest is to wrap
a module that holds the model and computes the whole loss.

Where a network is differentiated twice, ``fastinterp.fuse`` makes it cheaper. They raise
RuntimeError under torch.no_grad() or for a model that cannot be differentiated, TypeError or
ValueError for images, labels or options out of range.
"""

from fastinterp.regularizers._explained import MAPS
from fastinterp.regularizers.alignment import (
    grad_align,
    integrated_gradients_alignment,
    local_gradient_alignment,
)
from fastinterp.regularizers.gradient import (
    finite_difference_gradient_norm,
    input_gradient_norm,
    jacobian_norm,
    right_for_right_reasons,
)
from fastinterp.regularizers.interpretation import Aux, InterpretationRegularizer
from fastinterp.regularizers.linearity import cure, local_linearity
from fastinterp.regularizers.priors import (
    expected_gradients_prior,
    gini,
    saliency_guided,
    total_variation,
)

__all__ = [
    "MAPS",
    "Aux",
    "InterpretationRegularizer",
    "cure",
    "expected_gradients_prior",
    "finite_difference_gradient_norm",
    "gini",
    "grad_align",
    "input_gradient_norm",
    "integrated_gradients_alignment",
    "jacobian_norm",
    "local_gradient_alignment",
    "local_linearity",
    "right_for_right_reasons",
    "saliency_guided",
    "total_variation",
]
