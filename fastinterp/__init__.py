"""Interpretability-aware robust training at the cost of ordinary training."""

from fastinterp import attacks, attr, discrepancy, maps, metrics, objectives, ops, regularizers
from fastinterp.compile import compile_step
from fastinterp.fusion import fuse, unfuse
from fastinterp.models import create_model, load_weights
from fastinterp.ops import recompute
from fastinterp.regularizers import InterpretationRegularizer

__version__ = "0.1.0"

__all__ = [
    "InterpretationRegularizer",
    "attacks",
    "attr",
    "compile_step",
    "create_model",
    "discrepancy",
    "fuse",
    "load_weights",
    "maps",
    "metrics",
    "objectives",
    "ops",
    "recompute",
    "regularizers",
    "unfuse",
]
