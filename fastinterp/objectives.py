"""Training objectives, by the paper's names.

    method         minimised                 maximised over x'
    normal         CE(x)                     -
    adv            CE(x')                    CE(x')
    trades         CE(x) + beta KL           KL(p(x) || p(x'))
    int            CE(x) + gamma D           D, the weighted all-class discrepancy of CAMs
    int-one-class  CE(x) + gamma d_t         d_t, that of the true class alone
    int-adv        CE(x') + gamma D          CE(x') + gamma D
    int2           CE(x) + gamma D           CE(x')
    int2-adv       CE(x') + gamma D          CE(x')
    ig-norm        CE(x) + lambda ||IG||_1   ||IG||_1, IG of the loss along the path x -> x'
    ig-norm-sum    CE(x') + lambda ||IG||_1  the same sum

The maximisation, and IG, whose points would change one another's gradients in a batch of their
own, run the model in evaluation mode with running statistics as they were before the batch; the
maximisation wants no gradients of parameters. Everything else runs in the model's own mode, x and
x' as two batches. Running statistics move exactly once a step, with the pass whose cross-entropy
is minimised: as in model(x), or as in model(x') for adv, int-adv, int2-adv and ig-norm-sum.

Source: Boopathy et al. (ICML 2020); adv: Madry et al. (2018); trades: Zhang et al. (2019); ig-norm:
Chen et al., "Robust Attribution Regularization" (2019).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from fastinterp._checks import values_unread
from fastinterp._state import uncounted
from fastinterp.attacks import attacked, maximise
from fastinterp.attacks.pgd import as_cross_entropy
from fastinterp.fusion import fuse
from fastinterp.maps._target import parse
from fastinterp.maps.integrated import along_path
from fastinterp.regularizers import InterpretationRegularizer

IG_WEIGHTINGS = ("sum", "batch-mean")


class Objective(nn.Module):
    """The loss of one batch; what a distributed wrapper would wrap.

    Args:
        model: images (N, C, H, W) in [0,1] -> logits (N, K).
        step_size, steps: of the inner maximisation, in units of x.
        restarts: its ascents in all, each example keeping the worst point; from the second on they
            start at random points drawn from torch's global generator.
        gamma: weight of the discrepancy.
        beta: weight of TRADES' divergence.
        ig_weight: lambda, weight of the integrated gradients' norm.
        ig_steps: points of their path.
        ig_weighting: "sum", the gradient of each example's own loss, as IG-Norm's authors; or
            "batch-mean", of the mean over the batch of N, which makes the weight lambda / N, as
            the networks were trained that Boopathy et al. released.
        label_smoothing: of the minimised cross-entropy; attacks raise the plain one.
        map: what the discrepancy of the int family compares, as of InterpretationRegularizer; the
            paper's is "cam". Integrated gradients have ``ig_steps`` points.
        softplus_beta: of InterpretationRegularizer.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        step_size: float,
        steps: int,
        restarts: int = 1,
        gamma: float = 0.01,
        beta: float = 1.0,
        ig_weight: float = 1.0,
        ig_steps: int = 5,
        ig_weighting: str = "sum",
        label_smoothing: float = 0.0,
        map: str = "cam",
        softplus_beta: float | None = None,
    ):
        super().__init__()
        self.model, self.gamma, self.beta = model, gamma, beta
        self.ig_weight, self.ig_steps, self.ig_weighting = ig_weight, ig_steps, ig_weighting
        self._attack = dict(step_size=step_size, steps=steps, restarts=restarts)
        self.map, self.softplus_beta = map, softplus_beta
        self._ce = partial(F.cross_entropy, label_smoothing=label_smoothing)

    def forward(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        eps: float | torch.Tensor,
        start: torch.Tensor | None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss and its parts for one batch.

        Args:
            x: images (N, C, H, W) in [0,1].
            y: int64 (N,).
            eps: radius at this step of the schedule; at 0 there is nothing to maximise. A tensor
                of shape () on x's device, as a CUDA graph wants it, must hold a positive number.
            start: the random start, like x, or None when eps is 0.

        Returns:
            The scalar to minimise and detached scalars to log.
        """
        if _nothing_to_maximise(eps):
            ce = self._ce(self.model(x), y)
            return ce, {"ce": ce.detach(), **{part: torch.zeros_like(ce) for part in self.PARTS}}
        with values_unread():
            return self.attacked_loss(x, y, eps, start)

    PARTS: tuple[str, ...] = ()  # what is logged beside CE

    def attacked_loss(self, x, y, eps, start):
        raise NotImplementedError


def _nothing_to_maximise(eps) -> bool:
    return not isinstance(eps, torch.Tensor) and eps == 0


class Normal(Objective):
    def forward(self, x, y, eps, start):
        return self._ce(self.model(x), y), {}


class Adv(Objective):
    def forward(self, x, y, eps, start):
        if not _nothing_to_maximise(eps):
            with values_unread(), attacked(self.model, x) as logits:
                raised = as_cross_entropy(
                    lambda z: F.cross_entropy(logits(z), y, reduction="none"), logits, y
                )
                x = maximise(raised, x, eps=eps, start=start, **self._attack)
        return self._ce(self.model(x), y), {}


class Trades(Objective):
    PARTS = ("kl",)

    def attacked_loss(self, x, y, eps, start):
        with attacked(self.model, x) as logits:
            with torch.no_grad():
                clean = logits(x).log_softmax(1)
            x_adv = maximise(
                lambda z: _kl(clean, logits(z).log_softmax(1)),
                x,
                eps=eps,
                start=start,
                **self._attack,
            )
        logits = self.model(x)
        with uncounted(self.model):
            log_p_adv = self.model(x_adv).log_softmax(1)
        ce, kl = self._ce(logits, y), _kl(logits.log_softmax(1), log_p_adv).mean()
        return ce + self.beta * kl, {"ce": ce.detach(), "kl": kl.detach()}


def _kl(log_p, log_q):
    """KL(p || q) per example."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)


class Int(Objective):
    """The family of the interpretability-aware objectives.

    Args:
        classes, inner: of InterpretationRegularizer.
        adversarial: cross-entropy of x' instead of x.
    """

    PARTS = ("discrepancy",)

    def __init__(self, model, *, classes="weighted", inner="discrepancy", adversarial=False, **how):
        super().__init__(model, **how)
        self.adversarial = adversarial
        self.regularizer = InterpretationRegularizer(
            self.map,
            classes=classes,
            inner=inner,
            inner_weight=self.gamma,
            eps=0.0,
            softplus_beta=self.softplus_beta,
            map_options={"steps": self.ig_steps} if self.map == "integrated_gradients" else None,
            **self._attack,
        )

    def attacked_loss(self, x, y, eps, start):
        value, aux = self.regularizer(
            self.model,
            x,
            y,
            eps=eps,
            start=start,
            return_aux=True,
            counts="x_adv" if self.adversarial else "x",
            validate=False,
        )
        ce = self._ce(aux.logits_adv if self.adversarial else aux.logits, y)
        return ce + self.gamma * value, {"ce": ce.detach(), "discrepancy": value.detach()}


class IgNorm(Objective):
    """The model is fused: its input gradients are differentiated at every step of the attack."""

    PARTS = ("ig_norm",)

    def __init__(self, model, *, adversarial=False, **how):
        super().__init__(fuse(model), **how)
        self.adversarial = adversarial

    def attacked_loss(self, x, y, eps, start):
        model = self.model
        classes = parse(y, x)
        weight = self.ig_weight / (len(x) if self.ig_weighting == "batch-mean" else 1)

        def penalty(model, z):
            ig = along_path("ig-norm", model, z, classes, x, self.ig_steps, "right", of="loss")
            return weight * ig.abs().flatten(1).sum(1)

        with attacked(model, x) as net:

            def raised(z):
                if not self.adversarial:
                    return penalty(net, z)
                return F.cross_entropy(net(z), y, reduction="none") + penalty(net, z)

            x_adv = maximise(raised, x, eps=eps, start=start, **self._attack)
        norm = penalty(model, x_adv).mean()  # first, with the statistics that the maximisation had
        ce = self._ce(model(x_adv if self.adversarial else x), y)
        return ce + norm, {"ce": ce.detach(), "ig_norm": norm.detach()}


METHODS: dict[str, Callable[..., Objective]] = {
    "normal": Normal,
    "adv": Adv,
    "trades": Trades,
    "int": Int,
    "int-one-class": partial(Int, classes="one"),
    "int-adv": partial(Int, inner="ce+discrepancy", adversarial=True),
    "int2": partial(Int, inner="ce"),
    "int2-adv": partial(Int, inner="ce", adversarial=True),
    "ig-norm": IgNorm,
    "ig-norm-sum": partial(IgNorm, adversarial=True),
}
