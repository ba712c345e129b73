"""Dispatcher ops: one file per op with its schema, checks, reference and derivatives."""

from fastinterp.ops._recompute import recompute
from fastinterp.ops.activation import activation
from fastinterp.ops.attack_step import attack_step
from fastinterp.ops.avg_pool2d import adaptive_avg_pool2d, avg_pool2d
from fastinterp.ops.batch_norm_act import batch_norm_act
from fastinterp.ops.cam_discrepancy import cam_discrepancy
from fastinterp.ops.conv2d import conv2d
from fastinterp.ops.cross_entropy import cross_entropy
from fastinterp.ops.group_norm_act import group_norm_act
from fastinterp.ops.kendall_tau import kendall_tau
from fastinterp.ops.layer_norm_act import layer_norm_act
from fastinterp.ops.linear import linear
from fastinterp.ops.max_pool2d import max_pool2d

__all__ = [
    "activation",
    "adaptive_avg_pool2d",
    "attack_step",
    "avg_pool2d",
    "batch_norm_act",
    "cam_discrepancy",
    "conv2d",
    "cross_entropy",
    "group_norm_act",
    "kendall_tau",
    "layer_norm_act",
    "linear",
    "max_pool2d",
    "recompute",
]
