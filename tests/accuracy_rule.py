"""The tolerance of a kernel: how wrong plain torch itself is in the same dtype."""

import torch


def relative_error(value, exact):
    exact = exact.double()
    scale = exact.norm().item()
    return (value.double() - exact).norm().item() / (scale if scale else 1.0)


def assert_as_accurate(value, plain, exact, factor):
    """The error of ``value`` is at most ``factor`` times that of ``plain``.

    Plus a floor, since ``plain`` may be lucky or, in float64, the exact value itself: one rounding
    of the result's dtype and a few of a sum in another order.
    """
    assert torch.isfinite(value).all()
    eps = torch.finfo(value.dtype).eps
    floor = eps / 2 if eps > 1e-3 else 8 * eps
    allowed = factor * relative_error(plain, exact) + floor
    assert relative_error(value, exact) <= allowed
