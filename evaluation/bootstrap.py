"""Bootstrap intervals over texts."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

RESAMPLES = 2_000
_BLOCK_VALUES = 4_000_000


@dataclass(frozen=True)
class Estimate:
    """A mean over texts with its 95 % percentile bootstrap interval."""

    value: float
    low: float
    high: float


def estimate(values: Float64[np.ndarray, " text"], *, seed: int, resamples: int = RESAMPLES) -> Estimate:
    """The mean of per-text values. Equal seeds draw equal texts, so that differences of values are paired.

    Texts whose value is NaN take no part; without any, all numbers are NaN.
    """
    known = values[~np.isnan(values)]
    if len(known) == 0:
        return Estimate(float("nan"), float("nan"), float("nan"))
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    block = max(1, _BLOCK_VALUES // len(known))
    for start in range(0, resamples, block):
        end = min(start + block, resamples)
        means[start:end] = known[generator.integers(len(known), size=(end - start, len(known)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Estimate(float(known.mean()), float(low), float(high))
