"""Effect against norm removed: what methods do at equal damage.

A curve is piecewise linear through (0, 0) and the points of all strengths. The last axis holds the strengths, weakest
first.
"""

import numpy as np
from jaxtyping import Float64


def mean_effect(
    norms: Float64[np.ndarray, "*curve strength"],
    effects: Float64[np.ndarray, "*curve strength"],
    limit: Float64[np.ndarray, "*curve"],
) -> Float64[np.ndarray, "*curve"]:
    """The area under each curve from norm 0 to `limit`, divided by `limit`; beyond its last point a curve is flat."""
    x, y = _through_zero(norms), _through_zero(effects)
    total = np.maximum(limit - x[..., -1], 0) * y[..., -1]
    for left in range(x.shape[-1] - 1):
        width = x[..., left + 1] - x[..., left]
        part = np.clip(limit - x[..., left], 0, width)
        share = np.divide(part, width, out=np.zeros_like(part), where=width > 0)
        end = y[..., left] + share * (y[..., left + 1] - y[..., left])
        total = total + part * (y[..., left] + end) / 2
    return np.asarray(np.divide(total, limit, out=np.full_like(total, np.nan), where=limit > 0))


def effect_at(
    norms: Float64[np.ndarray, "*curve strength"],
    effects: Float64[np.ndarray, "*curve strength"],
    limit: Float64[np.ndarray, "*curve"],
) -> Float64[np.ndarray, "*curve"]:
    """The height of each curve at norm `limit`, by linear interpolation; beyond its last point a curve is flat."""
    x, y = _through_zero(norms), _through_zero(effects)
    height = np.zeros_like(y[..., 0])
    for left in range(x.shape[-1] - 1):
        width = x[..., left + 1] - x[..., left]
        part = np.clip(limit - x[..., left], 0, width)
        share = np.divide(part, width, out=np.zeros_like(part), where=width > 0)
        height = height + share * (y[..., left + 1] - y[..., left])
    return np.asarray(height)


def _through_zero(values: Float64[np.ndarray, "*curve strength"]) -> Float64[np.ndarray, "*curve point"]:
    return np.concatenate([np.zeros_like(values[..., :1]), values], axis=-1)
