"""Intervals over texts of figures that are no means over texts: shares of rows, and information between attributes."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float64, Int64
from scipy.stats import t  # type: ignore[import-untyped]

from .bootstrap import Estimate, interval, ratio, resampled_means

GROUPS = 20
"""Groups of texts that the jackknife leaves out one by one."""


def share_estimates(
    parts: Float64[np.ndarray, "text figure"], wholes: Float64[np.ndarray, "text figure"], *, seed: int
) -> list[Estimate]:
    """Σ part / Σ whole of each figure over texts, with its 95 % percentile bootstrap interval.

    Texts are drawn, with all their rows; equal seeds draw equal texts, so that differences of figures are paired.
    """
    again = resampled_means(np.concatenate([parts, wholes], axis=1), seed=seed)
    count = parts.shape[1]
    values = ratio(parts.sum(axis=0), wholes.sum(axis=0)).tolist()
    shares = ratio(again[:, :count], again[:, count:])
    return [interval(value, drawn) for value, drawn in zip(values, shares.T, strict=True)]


def groups_of(texts: int, *, seed: int) -> Int64[np.ndarray, " text"]:
    """A seeded group of each text; groups are of like size."""
    groups = np.empty(texts, dtype=np.int64)
    groups[np.random.default_rng(seed).permutation(texts)] = np.arange(texts) % min(GROUPS, max(texts, 1))
    return groups


def jackknife(
    figures: Callable[[Bool[np.ndarray, " row"]], Float64[np.ndarray, " figure"]],
    members: Int64[np.ndarray, "row owner"],
) -> list[Estimate]:
    """Figures of rows with 95 % intervals by the delete-a-group jackknife; Student's t, one degree less than groups.

    Drawing texts with replacement repeats rows, which raises every estimate of information and purity. Leaving texts
    out does not.

    Parameters
    ----------
    figures
        The figures of the rows that a mask keeps.
    members
        Groups that a row belongs to: one, or several where it stands for a pair of texts. It goes with any of them.
    """
    whole = figures(np.ones(len(members), dtype=bool))
    present = np.unique(members)
    if len(present) < 2:
        return [Estimate(value, float("nan"), float("nan")) for value in whole.tolist()]
    left = np.stack([figures(~(members == group).any(axis=1)) for group in present.tolist()])
    count = len(present)
    deviation = np.sqrt((count - 1) / count * np.square(left - left.mean(axis=0)).sum(axis=0))
    half = t.ppf(0.975, count - 1) * deviation
    return [
        Estimate(value, value - wide, value + wide) for value, wide in zip(whole.tolist(), half.tolist(), strict=True)
    ]
