"""The lean training loop, its recipes and its run folders."""

from fastinterp.training.config import DEFAULT_RECIPE, RECIPES, TrainConfig, recipe
from fastinterp.training.loop import Interrupted, Trainer, TrainingDiverged

__all__ = [
    "DEFAULT_RECIPE",
    "RECIPES",
    "Interrupted",
    "TrainConfig",
    "Trainer",
    "TrainingDiverged",
    "recipe",
]
