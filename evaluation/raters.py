"""How far raters agree: Krippendorff's α, Fleiss' κ and Kendall's W."""

from typing import Literal

import numpy as np
from jaxtyping import Float64, Int64
from scipy.sparse import csr_array  # type: ignore[import-untyped]
from scipy.stats import rankdata  # type: ignore[import-untyped]

Level = Literal["nominal", "ordinal", "interval"]


def krippendorff_alpha(values: Float64[np.ndarray, "rater unit"], *, level: Level) -> float:
    """Krippendorff's α: 1 − observed ÷ expected disagreement (Krippendorff 2011, Computing Krippendorff's Alpha).

    Parameters
    ----------
    values
        NaN where a rater said nothing. Units with fewer than two values take no part.

    Returns
    -------
    float
        1 where raters always agree, 0 where they agree as by chance. NaN where no unit has two values, and where all
        values are equal: no disagreement is to be expected then, so that agreement shows nothing.
    """
    return float(alpha_resamples(values, np.ones((1, values.shape[1])), level=level)[0])


def alpha_resamples(
    values: Float64[np.ndarray, "rater unit"], draws: Float64[np.ndarray, "resample unit"], *, level: Level
) -> Float64[np.ndarray, " resample"]:
    """Krippendorff's α of units that are counted as often as they were drawn.

    The expected disagreement is that of the drawn units, so that α is the same as of a table with repeated units.
    """
    known = ~np.isnan(values)
    pairable = known.sum(axis=0) >= 2
    alpha = np.full(len(draws), np.nan)
    if not pairable.any():
        return alpha
    known, kept, drawn = known[:, pairable], values[:, pairable], draws[:, pairable]
    answers = known.sum(axis=0).astype(np.float64)
    total = drawn @ answers
    # Sums of δ² over ordered pairs: within units, each pair of a unit of m values weighing 1 / (m - 1), and over all.
    share = drawn / (answers - 1)
    if level == "interval":
        centred = np.where(known, kept - kept[known].mean(), 0.0)
        first, second = centred.sum(axis=0), np.square(centred).sum(axis=0)
        within = share @ (2 * (answers * second - np.square(first)))
        overall = 2 * (total * (drawn @ second) - np.square(drawn @ first))
    else:
        distinct, place = np.unique(kept[known], return_inverse=True)
        # By value and unit; sparse, for values that are means can be nearly as many as the units.
        counts = csr_array((np.ones(len(place)), (place, np.nonzero(known)[1])), shape=(len(distinct), len(answers)))
        totals = (counts @ drawn.T).T
        if level == "nominal":
            within = share @ (np.square(answers) - counts.power(2).sum(axis=0))
            overall = np.square(total) - np.square(totals).sum(axis=1)
        else:
            # The ordinal metric is the interval metric of the mid-ranks among the drawn values.
            ranked = np.cumsum(totals, axis=1) - totals / 2 - total[:, None] / 2
            first = (counts.T @ ranked.T).T
            second = (counts.T @ np.square(ranked).T).T
            within = (share * 2 * (answers * second - np.square(first))).sum(axis=1)
            overall = 2 * (total * (totals * np.square(ranked)).sum(axis=1) - np.square((totals * ranked).sum(axis=1)))
    low, high = np.where(known, kept, np.inf).min(axis=0), np.where(known, kept, -np.inf).max(axis=0)
    least, most = np.where(drawn > 0, low, np.inf).min(axis=1), np.where(drawn > 0, high, -np.inf).max(axis=1)
    varied = most > least
    alpha[varied] = 1 - (total[varied] - 1) * within[varied] / overall[varied]
    return alpha


def fleiss_kappa(counts: Int64[np.ndarray, "unit category"]) -> float:
    """Fleiss' κ (Fleiss 1971), in its form for unequally many answers (Gwet 2014, Handbook of Inter-Rater Reliability).

    Each unit weighs the same, however many answers it has: agreement is the mean over units of the share of pairs of
    answers that are the same, and by chance Σ π² with π the mean over units of a category's share.

    Parameters
    ----------
    counts
        Answers. Units with fewer than two take no part.

    Returns
    -------
    float
        NaN where no unit has two answers, or all answers are the same.
    """
    used = counts[counts.sum(axis=1) >= 2].astype(np.float64)
    if len(used) == 0 or (used.sum(axis=0) > 0).sum() < 2:
        return float("nan")
    answers = used.sum(axis=1)
    agreement = float(np.mean((np.square(used).sum(axis=1) - answers) / (answers * (answers - 1))))
    chance = float(np.square((used / answers[:, None]).mean(axis=0)).sum())
    return (agreement - chance) / (1 - chance)


def kendall_w(scores: Float64[np.ndarray, "rater object"]) -> float:
    """Kendall's coefficient of concordance, corrected for ties (Kendall and Gibbons 1990).

    Parameters
    ----------
    scores
        Raters with NaN take no part.

    Returns
    -------
    float
        From 0 to 1. NaN with fewer than two raters or objects, or where every rater scores all objects alike.
    """
    full = scores[~np.isnan(scores).any(axis=1)]
    raters, objects = full.shape
    if raters < 2 or objects < 2:
        return float("nan")
    ranks = rankdata(full, axis=1)
    # Of ranks without ties the squares sum to objects (objects + 1) (2 objects + 1) / 6; ties lower that.
    spread = float(np.square(ranks - (objects + 1) / 2).sum())
    if spread == 0:
        return float("nan")
    apart = float(np.square(ranks.sum(axis=0) - raters * (objects + 1) / 2).sum())
    return apart / (float(raters) * spread)
