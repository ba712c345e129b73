"""Maps laid over their images: true and predicted class, clean beside perturbed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import nn

from fastinterp import maps as _maps
from fastinterp._state import eval_mode
from fastinterp.discrepancy import class_weights, map_distance

_STEPS = 50  # points of integrated gradients
MAPS: dict[str, Callable] = {
    "cam": _maps.cam,
    "grad_cam": _maps.grad_cam,
    "grad_cam_plus_plus": _maps.grad_cam_plus_plus,
    "input_gradient": _maps.input_gradient,
    "gradient_x_input": _maps.gradient_x_input,
    "integrated_gradients": lambda *args, **kw: _maps.integrated_gradients(
        *args, steps=_STEPS, **kw
    ),
}


@dataclass(frozen=True, eq=False)
class Explained:
    """Images before and after an attack with the maps of two classes.

    Attributes:
        x, x_adv: (N, C, H, W), in [0,1].
        true, before, after: classes, int64 (N,): the label and what the network says of x and x'.
        maps, maps_adv: (N, 2, h, w), of the true class and of ``after`` (of ``before`` where x' is
            x), of x and of x'; channels of gradient maps are added up.
        discrepancy: two-class l1, (N,), of these maps.
        labelled: whether ``true`` is a label rather than ``before``.
    """

    x: torch.Tensor
    x_adv: torch.Tensor
    true: torch.Tensor
    before: torch.Tensor
    after: torch.Tensor
    maps: torch.Tensor
    maps_adv: torch.Tensor
    discrepancy: torch.Tensor
    labelled: bool

    def at(self, i: int) -> Explained:
        """Image i alone."""
        values = (getattr(self, field.name) for field in fields(self))
        return Explained(*(v[i : i + 1] if isinstance(v, torch.Tensor) else v for v in values))


def explain(
    model: nn.Module,
    x: torch.Tensor,
    x_adv: torch.Tensor,
    y: torch.Tensor | None,
    kind: str = "cam",
) -> Explained:
    """The maps of the true and of the predicted class of x and of x'.

    Args:
        model: images -> logits (N, K), used in evaluation mode.
        x, x_adv: (N, C, H, W) in [0,1].
        y: true classes, int64 (N,); None takes what the model says of x.
        kind: one of MAPS.

    Raises:
        ValueError: there is no such map.
        UnsupportedModelError: the model has no such map.
    """
    if kind not in MAPS:
        raise ValueError(f"map must be one of {', '.join(MAPS)}, got {kind!r}")
    with eval_mode(model), torch.no_grad():
        logits, logits_adv = model(x), model(x_adv)
    before, after = logits.argmax(1), logits_adv.argmax(1)
    true = before if y is None else y
    classes = torch.stack([true, after], 1)
    with eval_mode(model):
        found = [MAPS[kind](model, z, classes, detach=True) for z in (x, x_adv)]
    # Gradient maps have the image's channels.
    clean, moved = (m.sum(2) if m.dim() == 5 else m for m in found)
    weights = class_weights("two", logits_adv, true)
    each = map_distance(clean, moved)
    # Where x' is classified right both columns are the true class, which counts once.
    value = (weights.gather(1, classes) * each).sum(1) / (1 + (true == after))
    return Explained(x, x_adv, true, before, after, clean, moved, value, y is not None)


def overlay_figure(explained: Explained, names: tuple[str, ...]):
    """A matplotlib figure with a row per image: x and its two maps, x' and its two maps.

    The six pictures of a row share one colour scale, symmetric around zero.

    Args:
        explained: what to draw.
        names: of the classes.
    """
    from matplotlib.figure import Figure

    count = len(explained.x)
    figure = Figure(figsize=(11.5, 2 * count))
    grid = figure.subplots(
        count,
        6,
        squeeze=False,
        gridspec_kw=dict(
            left=0.03, right=0.93, bottom=0.03, top=1 - 0.24 / (2 * count), wspace=0.06
        ),
    )
    for i, axes in enumerate(grid):
        true, before, after = (
            names[int(c[i])] for c in (explained.true, explained.before, explained.after)
        )
        limit = max(m[i].abs().max().item() for m in (explained.maps, explained.maps_adv)) or 1.0
        kind = "true" if explained.labelled else "clean"
        maps = [f"map of {true} ({kind})", f"map of {after} (pred.)"]
        titles = [f"clean: {before}", *maps, f"perturbed: {after}", *maps]
        pictures = (
            (explained.x[i], None),
            *((explained.x[i], m) for m in explained.maps[i]),
            (explained.x_adv[i], None),
            *((explained.x_adv[i], m) for m in explained.maps_adv[i]),
        )
        for axis, title, (image, heat) in zip(axes, titles, pictures, strict=True):
            drawn = _draw(axis, image, heat, limit)
            axis.set_title(title, fontsize=8)
        place = axes[-1].get_position()
        bar = figure.add_axes((0.94, place.y0, 0.012, place.height))
        figure.colorbar(drawn, cax=bar).ax.tick_params(labelsize=7)
        axes[0].set_ylabel(f"D = {explained.discrepancy[i].item():.3g}", fontsize=8)
    return figure


def _draw(axis, image: torch.Tensor, heat: torch.Tensor | None, limit: float):
    """One picture; a map is stretched over the image, whose grey shows through."""
    image = image.detach().cpu().numpy()
    extent = (0, image.shape[2], image.shape[1], 0)
    axis.set_xticks([])
    axis.set_yticks([])
    if heat is None:
        shown = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
        return axis.imshow(shown, cmap="gray", vmin=0, vmax=1, extent=extent)
    axis.imshow(image.mean(0), cmap="gray", vmin=0, vmax=1, extent=extent)
    return axis.imshow(
        heat.detach().cpu().numpy(),
        cmap="RdBu_r",
        vmin=-limit,
        vmax=limit,
        alpha=0.75,
        extent=extent,
        interpolation="bilinear",
    )
