"""Stock normalisation layers computed by this package's ops, alone or with what follows them."""

from __future__ import annotations

from torch import nn

from fastinterp import ops


def normalise(norm, x, residual=None, kind: str = "identity", alpha: float | None = None):
    """activation(norm(x) + residual) for a stock norm, by the rules of torch's own forward."""
    options = dict(residual=residual, eps=norm.eps, activation=kind, alpha=alpha)
    if isinstance(norm, nn.LayerNorm):
        return ops.layer_norm_act(x, norm.normalized_shape, norm.weight, norm.bias, **options)
    if isinstance(norm, nn.GroupNorm):
        return ops.group_norm_act(x, norm.num_groups, norm.weight, norm.bias, **options)
    return _batch_normalise(norm, x, options)


def _batch_normalise(bn, x, options):
    bn._check_input_dim(x)
    momentum = 0.0 if bn.momentum is None else bn.momentum
    if bn.training and bn.track_running_stats and bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
        if bn.momentum is None:  # cumulative average
            momentum = 1.0 / float(bn.num_batches_tracked)
    keep = not bn.training or bn.track_running_stats
    return ops.batch_norm_act(
        x,
        bn.weight,
        bn.bias,
        bn.running_mean if keep else None,
        bn.running_var if keep else None,
        training=bn.training or (bn.running_mean is None and bn.running_var is None),
        momentum=momentum,
        **options,
    )


class _FusedNorm:
    def forward(self, input):
        return normalise(self, input)


class FusedBatchNorm1d(_FusedNorm, nn.BatchNorm1d):
    _stock_type = nn.BatchNorm1d


class FusedBatchNorm2d(_FusedNorm, nn.BatchNorm2d):
    _stock_type = nn.BatchNorm2d


class FusedLayerNorm(_FusedNorm, nn.LayerNorm):
    _stock_type = nn.LayerNorm


class FusedGroupNorm(_FusedNorm, nn.GroupNorm):
    _stock_type = nn.GroupNorm


# stock class -> fused class and the op behind it
NORMS = {
    nn.BatchNorm1d: (FusedBatchNorm1d, "batch_norm_act"),
    nn.BatchNorm2d: (FusedBatchNorm2d, "batch_norm_act"),
    nn.LayerNorm: (FusedLayerNorm, "layer_norm_act"),
    nn.GroupNorm: (FusedGroupNorm, "group_norm_act"),
}
