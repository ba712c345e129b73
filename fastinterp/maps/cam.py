"""Class activation map (CAM).

I_c = sum_k W[c,k] A_k with A the last feature maps and W the weight of
the linear head behind global average pooling; mean_hw I_c = logit_c (less the head's bias). Raw
sign, no ReLU, no scaling. Source: Zhou et al., "Learning Deep Features for Discriminative
Localization" (2016).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from fastinterp._checks import check_images
from fastinterp._state import attack_parameters, depends_on_mode, eval_mode, substituted
from fastinterp.folding import (
    AttackForm,
    Chain,
    enabled,
    make_attack_form,
    remembered,
    times_head,
)
from fastinterp.maps._call import borrowed
from fastinterp.maps._layers import UnsupportedModelError, is_global_pool
from fastinterp.maps._target import at_least_float, parse


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def _version(tensor: torch.Tensor) -> int:
    """Counts in-place changes, which object identity and addresses do not show."""
    return 0 if tensor.is_inference() else tensor._version


def _place(tensor: torch.Tensor) -> tuple[int, int, int]:
    """The same for views of all of a tensor, as flattening and backward hooks make."""
    return tensor.data_ptr(), tensor.numel(), _version(tensor)


def _last(model: nn.Module, wanted) -> tuple[str, nn.Module] | None:
    found = [(name, module) for name, module in model.named_modules() if wanted(module)]
    return found[-1] if found else None


class Attacked:
    """z -> (features, head, logits), what an inner maximisation sees of a CamNetwork."""

    def __init__(self, run: Callable, head: torch.Tensor | None):
        self._run, self._head = run, head

    def __call__(self, z):
        features, logits = self._run(z)
        return features, self._head, logits

    def ascend(self, x, **how) -> torch.Tensor | None:
        """See Chain.ascend; None where there are no kernels for it."""
        return self._run.ascend(x, **how) if isinstance(self._run, Chain) else None


class CamNetwork:
    """A classifier seen as feature maps, global average pooling and a linear head.

    Args:
        model: maps images (N, C, H, W) to logits (N, K); contains an nn.AdaptiveAvgPool2d(1) whose
            output, flattened, is the input of the last nn.Linear.
        x: a batch, of which one image is run through the model to see how it is wired, unless that
            is known; None where ``attacked`` is not wanted.

    Raises:
        UnsupportedModelError: the model has no such head.
    """

    def __init__(self, model: nn.Module, x: torch.Tensor | None):
        self.model = model
        pool, head = _last(model, is_global_pool), _last(model, _is_linear)
        if pool is None or head is None:
            missing = "nn.AdaptiveAvgPool2d(1)" if pool is None else "nn.Linear"
            raise UnsupportedModelError(
                f"CAM needs global average pooling followed by a linear head; "
                f"{type(model).__name__} has no {missing} module"
            )
        self._pool = pool[1]
        self.head_name, self.head = head
        if f"{self.head_name}.weight" not in dict(model.named_parameters(remove_duplicate=False)):
            raise UnsupportedModelError(
                f"CAM needs a linear head with a weight of its own; that of {self.head_name!r} in "
                f"{type(model).__name__} is computed from other parameters"
            )
        self.form = None if x is None or len(x) == 0 else self._find_form(x[:1])

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Feature maps (N, C, h, w) and logits (N, K) of one forward pass."""
        with self._recorded() as run:
            return run(x)

    def folds(self) -> bool:
        """Whether ``folded`` can be entered."""
        return (
            self.form is not None
            and self.form.last is not None
            and self.form.fits()
            and not depends_on_mode(self.model)
            and not torch.is_autocast_enabled(self.head.weight.device.type)
        )

    @contextmanager
    def folded(self) -> Iterator[None]:
        """Inside, the features are the class maps, differentiable to the same parameters.

        The last convolution computes W (conv(a) + b) = (W conv)(a) + W b: K channels instead of C,
        in both passes and in the gradient of its weight.
        """
        name = self.form.last
        parts = times_head(self.model.get_submodule(name), self.head.weight)
        tensors = {f"{name}.{key}": tensor for key, tensor in parts.items()}
        tensors[f"{self.head_name}.weight"] = torch.eye(
            len(self.head.weight), dtype=self.head.weight.dtype, device=self.head.weight.device
        )
        with substituted(self.model, tensors):
            yield

    @contextmanager
    def attacked(self) -> Iterator[Attacked]:
        """Inside, an Attacked, z -> (features, head, logits), for the inner maximisation.

        Parameters are detached and the model is in evaluation mode. Where the head can be folded
        into what is pooled (see fastinterp.folding) the features are the class maps themselves and
        head is None. The model is as before afterwards.
        """
        if self.form is not None and self.form.fits():
            head = None if self.form.tails else self.head.weight.detach()
            with self.form.made() as run:
                yield Attacked(run, head)
            return
        tensors = attack_parameters(self.model)
        head = tensors[f"{self.head_name}.weight"]
        with substituted(self.model, tensors), eval_mode(self.model), self._recorded() as run:
            yield Attacked(run, head)

    def attacked_features(self, features: torch.Tensor, folded: bool = False) -> torch.Tensor:
        """The features that ``attacked`` would give where this network gives ``features``.

        Args:
            folded: ``features`` are those that it gives inside ``folded``.
        """
        features = features.detach()
        if self.form is None or not self.form.tails or not self.form.fits():
            return features
        maps = features
        if not folded:
            maps = torch.einsum("kc,nchw->nkhw", self.head.weight.detach(), features)
        # einsum chooses strides of its own
        last = features.is_contiguous(memory_format=torch.channels_last)
        return maps.contiguous(
            memory_format=torch.channels_last
            if last and not features.is_contiguous()
            else torch.contiguous_format
        )

    def _find_form(self, x: torch.Tensor) -> AttackForm | None:
        def find() -> tuple[AttackForm | None, str | None]:
            try:
                with torch.no_grad(), eval_mode(self.model), self._recorded() as run:
                    run(x)
            except UnsupportedModelError as error:
                return None, str(error)
            return make_attack_form(self.model, x, (self._pool, self.head)), None

        key = "cam", enabled(), x.shape[1:], x.dtype, x.device
        form, refusal = remembered(self.model, key, find)
        if refusal is not None:
            raise UnsupportedModelError(refusal)
        return form

    @contextmanager
    def _recorded(self) -> Iterator:
        seen = {}

        def pooled(_, args, output):
            seen["features"], seen["pooled"] = args[0], _place(output)

        def classified(_, args, output):
            seen["head_input"] = _place(args[0])
            seen["head_shape"], seen["logits"] = args[0].shape, _place(output)

        hooks = [
            self._pool.register_forward_hook(pooled),
            self.head.register_forward_hook(classified),
        ]

        def run(x):
            seen.clear()
            logits = self.model(x)
            if (
                seen.get("logits") != _place(logits)
                or seen.get("pooled") != seen["head_input"]
                or seen["head_shape"][1:] != seen["features"].shape[1:2]
            ):
                raise UnsupportedModelError(
                    f"CAM needs logits = linear(flatten(global average pool)); in "
                    f"{type(self.model).__name__} something else stands between the last "
                    f"pooling and the output of {self.head_name!r}"
                )
            return seen["features"], logits

        try:
            yield run
        finally:
            for hook in hooks:
                hook.remove()


def find_cam_network(model: nn.Module, x: torch.Tensor) -> CamNetwork | None:
    """The model's CamNetwork, whose folded form makes attacks cheaper; None if it has none."""
    try:
        return CamNetwork(model, x)
    except UnsupportedModelError:
        return None


def cam(
    model: nn.Module,
    x: torch.Tensor,
    target: int | torch.Tensor | None = None,
    *,
    detach: bool = False,
    return_logits: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Class activation maps, differentiable to the input and every parameter.

    Args:
        model: a classifier with global average pooling and a linear head (see CamNetwork), run in
            its own mode.
        x: images (N, C, H, W) in [0,1].
        target: None for every class, a class, or int64 (N,) or (N, k).
        detach: a constant map. Inside torch.no_grad() the map is constant anyway.
        return_logits: also the logits of x, with the same graph; see fastinterp.maps.

    Returns:
        (N, 1, h, w) for a class or (N,), (N, k or K, h, w) for (N, k) or None; raw sign; float32,
        or float64 for float64 features. With return_logits, (map, logits).

    Raises:
        UnsupportedModelError: the model has no GAP + linear head.
        TypeError, ValueError: x or target is out of range.
    """
    check_images(x)
    classes = parse(target, x)
    grad = torch.is_grad_enabled() and not detach
    loan = borrowed(model, x, differentiable=grad, counts=grad and return_logits)
    with torch.set_grad_enabled(grad), loan as net:
        network = CamNetwork(net, None)
        features, logits = network(x)
        classes.check_below(logits.shape[1])
        with torch.autocast(x.device.type, enabled=False):
            weight, features = at_least_float(network.head.weight), at_least_float(features)
            if classes.index is None:
                value = torch.einsum("kc,nchw->nkhw", weight, features)
            else:
                value = torch.einsum("nkc,nchw->nkhw", weight[classes.index], features)
    return (value, logits) if return_logits else value
