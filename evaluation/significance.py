"""Paired tests: sign flips, and Holm's correction for several of them."""

import numpy as np
from jaxtyping import Float64

FLIPS = 10_000
_BLOCK_VALUES = 4_000_000
# A flip that gives the observed sum but for rounding is as extreme as it.
_ROUNDING = 1e-9


def sign_flip_p(
    values: Float64[np.ndarray, "text *contrast"], seed: int, *, flips: int = FLIPS
) -> Float64[np.ndarray, "*contrast"]:
    """Two-sided p of each contrast: that a paired difference is as likely to have either sign.

    p = (1 + flips whose |mean| is at least the observed one) / (1 + flips), so that it is never 0.

    Parameters
    ----------
    values
        Paired differences. Texts with NaN take no part in that contrast; without any, p is NaN.
    """
    columns = values.reshape(len(values), -1)
    known = ~np.isnan(columns)
    plain = np.where(known, columns, 0.0)
    observed = np.abs(plain.sum(axis=0))
    least = observed - _ROUNDING * np.abs(plain).sum(axis=0)
    generator = np.random.default_rng(seed)
    hits = np.zeros(columns.shape[1])
    block = max(1, _BLOCK_VALUES // max(1, len(values)))
    for start in range(0, flips, block):
        count = min(block, flips - start)
        signs = 2.0 * generator.integers(0, 2, size=(count, len(values)), dtype=np.int8) - 1.0
        hits += (np.abs(signs @ plain) >= least).sum(axis=0)
    p = np.where(known.any(axis=0), (1 + hits) / (1 + flips), np.nan)
    return p.reshape(values.shape[1:])


def holm(p: Float64[np.ndarray, " test"]) -> Float64[np.ndarray, " test"]:
    """p-values adjusted for all tests of one family by Holm's step-down method; NaN is no test and stays NaN."""
    adjusted = np.full(len(p), np.nan)
    known = np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * factors), 1.0)
    return adjusted
