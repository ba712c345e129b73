"""Dispatcher ops: one file per op with its schema, checks, reference and derivatives."""

from fastinterp.ops.activation import activation
from fastinterp.ops.attack_step import attack_step
from fastinterp.ops.cam_discrepancy import cam_discrepancy
from fastinterp.ops.max_pool2d import max_pool2d

__all__ = ["activation", "attack_step", "cam_discrepancy", "max_pool2d"]
