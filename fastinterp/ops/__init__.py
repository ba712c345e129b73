"""Dispatcher ops: one file per op with its schema, checks, reference and derivatives."""

from fastinterp.ops.attack_step import attack_step
from fastinterp.ops.cam_discrepancy import cam_discrepancy

__all__ = ["attack_step", "cam_discrepancy"]
