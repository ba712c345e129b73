"""Activations and their first two derivatives on a tile; the formulas of csrc/activations.h.

``z`` and the scalar ``alpha`` are of the accumulation type, float32 or float64; ``KIND`` is a name
of ops/_activations.py. Only what Triton's interpreter knows is used, so there is no libdevice.
"""

import triton
import triton.language as tl


@triton.jit
def _log_one_plus(u):
    """log(1 + u) for 0 <= u <= 1 without cancellation."""
    if u.dtype == tl.float64:
        w = 1.0 + u
        result = tl.where(w == 1.0, u, tl.log(w) * (u / tl.where(w == 1.0, 1.0, w - 1.0)))
    else:
        s = u / (2.0 + u)  # 2 atanh(s)
        q = s * s
        p = 0.134304941 * q + 0.14117524
        p = p * q + 0.200038135
        p = p * q + 0.333333194
        result = 2.0 * s + 2.0 * s * (p * q)
    return result


@triton.jit
def _normal(z):
    """The normal density at z, and its integral up to z."""
    e = tl.exp(-0.5 * z * z)
    if z.dtype == tl.float64:
        integral = 0.5 + 0.5 * tl.erf(z * 0.7071067811865476)
    else:
        # The integral beyond t = |z| is exp(-t^2 / 2) m(t) with a smooth m.
        t = tl.abs(z)
        t = tl.where(t > 14.5, 14.5, t)
        w = (t - 3.0) / (t + 3.0)
        m = 5.31613587e-05 * w + 0.00011501438
        m = m * w - 0.000339012331
        m = m * w - 0.000983288977
        m = m * w + 0.00290438742
        m = m * w + 0.00613194238
        m = m * w - 0.0462132655
        m = m * w + 0.123225041
        m = m * w - 0.206402615
        m = m * w + 0.121513948
        integral = tl.where(z < 0.0, e * m, 1.0 - e * m)
    return e * 0.3989422804014327, integral


@triton.jit
def _logistic(z):
    """s(z) = 1 / (1 + exp(-z)), and s (1 - s) without cancellation."""
    e = tl.exp(-tl.abs(z))
    s = 1.0 / (1.0 + e)
    return tl.where(z < 0.0, e * s, s), e * s * s


@triton.jit
def value(z, alpha, KIND: tl.constexpr):
    """phi(z); a NaN comes through."""
    if KIND == "relu":
        y = tl.where(z < 0.0, 0.0, z)
    elif KIND == "leaky_relu":
        y = tl.where(z > 0.0, z, alpha * z)
    elif KIND == "softplus":
        b = alpha * z
        y = (tl.where(b < 0.0, 0.0, b) + _log_one_plus(tl.exp(-tl.abs(b)))) / alpha
    elif KIND == "silu":
        s, _ = _logistic(z)
        y = z * s
    elif KIND == "gelu":
        _, integral = _normal(z)
        y = z * integral
    else:
        y = z
    return y


@triton.jit
def derivatives(z, alpha, KIND: tl.constexpr):
    """phi'(z) and phi''(z) of a smooth phi."""
    if KIND == "softplus":
        slope, rest = _logistic(alpha * z)
        curvature = alpha * rest
    elif KIND == "silu":
        s, rest = _logistic(z)
        slope = s + z * rest
        curvature = rest * (2.0 + z * (1.0 - 2.0 * s))
    else:
        density, integral = _normal(z)
        slope = integral + z * density
        curvature = density * (2.0 - z * z)
    return slope, curvature


@triton.jit
def times(slope, v, alpha, KIND: tl.constexpr):
    """phi'(z) v, where ``slope`` is phi'(z) of a smooth phi and z > 0 of a piecewise linear one."""
    if KIND == "relu":
        v = tl.where(slope, v, 0.0)
    elif KIND == "leaky_relu":
        v = tl.where(slope, v, alpha * v)
    elif KIND != "identity":
        v = slope * v
    return v
