"""Accuracy on clean and on attacked images."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn

from fastinterp._state import eval_mode
from fastinterp.attacks import pgd
from fastinterp.data import LabelledImages


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
def predictions(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Classes, int64 (N,), that ``model``, in evaluation mode, gives the images (N, C, H, W)."""
    with eval_mode(model):
        return model(x).argmax(1)


def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """Share of the images (N, C, H, W) that ``model``, in evaluation mode, gives class y (N,)."""
    return (predictions(model, x) == y).double().mean().item()


def batches(
    model: nn.Module, split: LabelledImages, index: torch.Tensor, batch_size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Images in [0,1] and labels at ``index``, on the model's device, ``batch_size`` at a time."""
    device = next(model.parameters()).device
    for x, y in split.batches(index.split(batch_size)):
        yield x.to(device), y.to(device)


def attacked_batches(
    model: nn.Module,
    split: LabelledImages,
    index: torch.Tensor,
    attack: Callable[..., torch.Tensor],
    *,
    batch_size: int = 500,
    seed: int = 0,
    progress: Callable[[int], None] = lambda examples: None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Images, labels and attacked images, batch by batch.

    Args:
        model: images in [0,1] -> logits.
        split, index: which images.
        attack: called as attack(model, x, y, generator=...) and gives x'.
        batch_size: images attacked at a time.
        seed: of the generator, which draws on the CPU, so that devices agree.
        progress: called with the number of images done after each batch.
    """
    generator = torch.Generator().manual_seed(seed)
    for x, y in batches(model, split, index, batch_size):
        yield x, y, attack(model, x, y, generator=generator)
        progress(len(x))


def evaluate_pgd(
    model: nn.Module,
    split: LabelledImages,
    index: torch.Tensor,
    *,
    eps: list[float],
    batch_size: int = 500,
    seed: int = 0,
    progress: Callable[[int], None] = lambda examples: None,
    **settings,
) -> dict:
    """Clean accuracy and accuracy under PGD, by default untargeted and without random start.

    Args:
        model: images in [0,1] -> logits.
        split, index: which images.
        eps: radii in units of the images; may be empty.
        batch_size: images attacked at a time; without random numbers the result does not depend on
            it but for rounding.
        seed: of random starts.
        progress: called with the number of images done after each batch and radius.
        settings: of attacks.pgd: steps, step_size, loss, random_start, restarts, ...

    Returns:
        {"clean_accuracy": float, "examples": int, "results": [{"eps": float, "accuracy": float}]}
    """
    clean = sum(
        (predictions(model, x) == y).sum().item()
        for x, y in batches(model, split, index, batch_size)
    )
    results = []
    for radius in eps:

        def attack(model, x, y, radius=radius, **context):
            return pgd(model, x, y, eps=radius, **settings, **context)

        correct = sum(
            (predictions(model, x_adv) == y).sum().item()
            for _, y, x_adv in attacked_batches(
                model, split, index, attack, batch_size=batch_size, seed=seed, progress=progress
            )
        )
        results.append({"eps": radius, "accuracy": correct / len(index)})
    return {
        "clean_accuracy": clean / len(index),
        "examples": len(index),
        "results": results,
    }
