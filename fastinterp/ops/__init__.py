"""Dispatcher ops: one file per op with its schema, checks, reference and derivatives."""

from fastinterp.ops.attack_step import attack_step
from fastinterp.ops.batch_norm_act import batch_norm_act
from fastinterp.ops.cam_discrepancy import cam_discrepancy
from fastinterp.ops.conv2d import conv2d

__all__ = ["attack_step", "batch_norm_act", "cam_discrepancy", "conv2d"]
