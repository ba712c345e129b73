"""Accuracy on clean and on attacked images, by the paper's protocol."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from fastinterp._state import eval_mode
from fastinterp.attacks import pgd
from fastinterp.data import Split
from fastinterp.maps import find_cam_network


def choose_examples(size: int, examples: int, seed: int) -> torch.Tensor:
    """Indices of the evaluated images: the first ``examples`` of a seeded numpy permutation.

    Args:
        size: length of the split.
        examples: how many; 0 for all of them, in order.
        seed: of numpy's legacy generator (99 in the paper).

    Raises:
        ValueError: more are asked for than there are.
    """
    if examples == 0:
        return torch.arange(size)
    if not 0 < examples <= size:
        raise ValueError(f"examples must be between 0 (all) and {size}, got {examples}")
    return torch.from_numpy(np.random.RandomState(seed).permutation(size)[:examples])


@torch.no_grad()
def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """Share of the images (N, C, H, W) that ``model``, in evaluation mode, gives class y (N,)."""
    with eval_mode(model):
        return (model(x).argmax(1) == y).double().mean().item()


def evaluate_pgd(
    model: nn.Module,
    split: Split,
    index: torch.Tensor,
    *,
    eps: list[float],
    steps: int,
    step_size: float,
    batch_size: int = 500,
    progress: Callable[[int], None] = lambda examples: None,
) -> dict:
    """Clean accuracy and accuracy under untargeted PGD without random start, last iterate.

    Args:
        model: images in [0,1] -> logits.
        split, index: which images.
        eps: radii in units of the images; may be empty.
        steps, step_size: of PGD.
        batch_size: images attacked at a time; the result does not depend on it but for rounding.
        progress: called with the number of images done after each batch and radius.

    Returns:
        {"clean_accuracy": float, "examples": int, "results": [{"eps": float, "accuracy": float}]}
    """
    device = next(model.parameters()).device
    correct_clean, correct = 0.0, [0.0] * len(eps)
    network = None
    for part in index.split(batch_size):
        x, y = (t.to(device) for t in split.batch(part))
        correct_clean += accuracy(model, x, y) * len(part)
        if network is None:
            network = find_cam_network(model, x)
        for i, radius in enumerate(eps):
            x_adv = pgd(model, x, y, eps=radius, steps=steps, step_size=step_size, network=network)
            correct[i] += accuracy(model, x_adv, y) * len(part)
            progress(len(part))
    return {
        "clean_accuracy": correct_clean / len(index),
        "examples": len(index),
        "results": [
            {"eps": radius, "accuracy": value / len(index)}
            for radius, value in zip(eps, correct, strict=True)
        ],
    }
