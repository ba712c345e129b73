"""Interpretability-aware robust training at the cost of ordinary training."""

from importlib.metadata import version

from fastinterp import attacks, discrepancy, maps, ops
from fastinterp.models import create_model, load_weights
from fastinterp.regularizers import InterpretationRegularizer

__version__ = version("fastinterp")

__all__ = [
    "InterpretationRegularizer",
    "attacks",
    "create_model",
    "discrepancy",
    "load_weights",
    "maps",
    "ops",
]
