"""Bootstrap of records that annotators and items share: both are drawn anew (Owen 2007, The pigeonhole bootstrap).

Records of one annotator, or on one item, are alike, so that drawing records one by one gives intervals that are too
narrow. Here a record counts as often as its annotator was drawn times as often as its item was. No exact bootstrap of
crossed data exists (McCullagh 2000): this one has up to three times the variance where records differ mostly by
themselves, and the percentiles of draws of a dozen people lie too near. `TwoWay` therefore keeps the shape of the draws
and gives them the width that variance by both clusters has (Cameron, Gelbach and Miller 2011, Robust inference with
multiway clustering). On 12 people and 60 items with each item answered by 3 of them, that covers the truth in 96 % of
simulations instead of 99 %, at 0.83 of the width.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64
from scipy.stats import norm, t  # type: ignore[import-untyped]

from .bootstrap import RESAMPLES, Estimate, draw_counts, interval, ratio


def ratios(
    values: Float64[np.ndarray, " record"],
    weights: Float64[np.ndarray, " record"],
    group: Int64[np.ndarray, " record"],
    *,
    groups: int,
) -> Float64[np.ndarray, " group"]:
    """The weighted mean of each group's records; NaN without any."""
    return ratio(
        np.bincount(group, weights * values, minlength=groups).astype(np.float64),
        np.bincount(group, weights, minlength=groups).astype(np.float64),
    )


def ratio_resamples(
    values: Float64[np.ndarray, " record"],
    weights: Float64[np.ndarray, " record"],
    annotator: Int64[np.ndarray, " record"],
    item: Int64[np.ndarray, " record"],
    group: Int64[np.ndarray, " record"],
    *,
    groups: int,
    seed: int,
    resamples: int = RESAMPLES,
    annotators_drawn: bool = True,
) -> Float64[np.ndarray, "resample group"]:
    """The weighted mean of each group over annotators and items drawn anew, all groups over the same draws.

    Parameters
    ----------
    annotator, item
        Numbers from 0 without gaps.
    annotators_drawn
        Whether annotators are drawn as well. Without, the interval is of these annotators only.

    Returns
    -------
    Float64[np.ndarray, "resample group"]
        NaN where no record of the group was drawn.
    """
    people = int(annotator.max()) + 1 if len(annotator) else 0
    things = int(item.max()) + 1 if len(item) else 0
    # Of weights × values, and of weights.
    sums = np.zeros((things, 2, groups, people))
    np.add.at(sums[:, 0], (item, group, annotator), weights * values)
    np.add.at(sums[:, 1], (item, group, annotator), weights)
    width = 2 * groups * people
    flat = sums.reshape(things, width)
    others = np.random.default_rng([seed, people])
    parts = []
    for items_drawn in draw_counts(things, seed=seed, resamples=resamples, width=width):
        count = len(items_drawn)
        totals = (items_drawn @ flat).reshape(count, 2 * groups, people)
        chosen = others.multinomial(people, np.full(people, 1 / people), size=count) if people else np.zeros((count, 0))
        often = chosen.astype(np.float64) if annotators_drawn else np.ones((count, people))
        drawn = (totals @ often[:, :, None]).reshape(count, 2, groups)
        parts.append(ratio(drawn[:, 0], drawn[:, 1]))
    return np.concatenate(parts)


@dataclass(frozen=True)
class TwoWay:
    """Weighted means of groups of records, and what draws of annotators and items make of them."""

    observed: Float64[np.ndarray, " group"]
    drawn: Float64[np.ndarray, "resample group"]
    variance: Float64[np.ndarray, "source group group"] | None
    """Of the means, by sums of residuals over annotators, over items, and over both at once. `None` where annotators
    are not drawn, so that the draws are those of an ordinary bootstrap."""
    degrees: int
    """Of freedom: one less than there are annotators or items, whichever are fewer."""

    def estimate(self, contrast: Float64[np.ndarray, " group"], *, less: float = 0.0) -> Estimate:
        """Σ contrast × mean, less a constant, with its 95 % interval.

        Without two annotators and two items, where both are drawn, the interval is NaN.
        """
        value, again = self._of(contrast, less)
        return interval(value, again) if len(again) else Estimate(value, float("nan"), float("nan"))

    def p(self, contrast: Float64[np.ndarray, " group"]) -> float:
        """Two-sided p of the contrast being 0: twice the share of draws beyond 0, so that it fits the interval."""
        _, again = self._of(contrast, 0.0)
        known = again[~np.isnan(again)]
        if len(known) == 0:
            return float("nan")
        beyond = min(int((known <= 0).sum()), int((known >= 0).sum()))
        return min(1.0, 2 * (1 + beyond) / (1 + len(known)))

    def _of(
        self, contrast: Float64[np.ndarray, " group"], less: float
    ) -> tuple[float, Float64[np.ndarray, " _resample"]]:
        part = contrast != 0
        value = float(contrast[part] @ self.observed[part]) - less
        again = self.drawn[:, part] @ contrast[part] - less
        if self.variance is None:
            return value, again
        known = again[~np.isnan(again)]
        if self.degrees < 1 or np.isnan(value) or len(known) == 0:
            return value, np.zeros(0)
        by_annotator, by_item, by_both = np.einsum("i,sij,j->s", contrast, self.variance, contrast).tolist()
        # What both count is counted once; the sum can come out too small by chance, but not under either.
        wanted = max(by_annotator + by_item - by_both, by_annotator, by_item) ** 0.5
        spread = float(known.std())
        stretch = wanted / spread * float(t.ppf(0.975, self.degrees) / norm.ppf(0.975)) if spread > 0 else 1.0
        return value, value + (known - known.mean()) * stretch


def two_way(
    values: Float64[np.ndarray, " record"],
    weights: Float64[np.ndarray, " record"],
    annotator: Int64[np.ndarray, " record"],
    item: Int64[np.ndarray, " record"],
    group: Int64[np.ndarray, " record"],
    *,
    groups: int,
    seed: int,
    resamples: int = RESAMPLES,
    annotators_drawn: bool = True,
) -> TwoWay:
    """The weighted mean of each group, to be compared by contrasts; parameters as of `ratio_resamples`."""
    observed = ratios(values, weights, group, groups=groups)
    drawn = ratio_resamples(
        values,
        weights,
        annotator,
        item,
        group,
        groups=groups,
        seed=seed,
        resamples=resamples,
        annotators_drawn=annotators_drawn,
    )
    residual = weights * (values - observed[group]) / np.bincount(group, weights, minlength=groups)[group]
    sources, counts = [], []
    _, cell = np.unique(np.stack([annotator, item]), axis=1, return_inverse=True)
    for cluster in (annotator, item, cell.ravel()):
        count = int(cluster.max()) + 1 if len(cluster) else 0
        sums = np.zeros((count, groups))
        np.add.at(sums, (cluster, group), residual)
        sources.append(sums.T @ sums * (count / max(1, count - 1)))
        counts.append(count)
    return TwoWay(
        observed=observed,
        drawn=drawn,
        variance=np.stack(sources) if annotators_drawn else None,
        degrees=min(counts[:2]) - 1,
    )
