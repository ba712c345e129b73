"""The lean training loop, its recipes and its run folders."""

from fastinterp.training.config import TrainConfig
from fastinterp.training.loop import Trainer
from fastinterp.training.options import Interrupted, RunOptions, StopRequest, TrainingDiverged
from fastinterp.training.recipes import DEFAULT_RECIPE, RECIPES, recipe

__all__ = [
    "DEFAULT_RECIPE",
    "RECIPES",
    "Interrupted",
    "RunOptions",
    "StopRequest",
    "TrainConfig",
    "Trainer",
    "TrainingDiverged",
    "recipe",
]
