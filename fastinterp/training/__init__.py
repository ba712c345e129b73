"""The lean training loop, its recipes and its run folders."""

from fastinterp.training.config import TrainConfig
from fastinterp.training.loop import Interrupted, RunOptions, Trainer, TrainingDiverged
from fastinterp.training.recipes import DEFAULT_RECIPE, RECIPES, recipe

__all__ = [
    "DEFAULT_RECIPE",
    "RECIPES",
    "Interrupted",
    "RunOptions",
    "TrainConfig",
    "Trainer",
    "TrainingDiverged",
    "recipe",
]
