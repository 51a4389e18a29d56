"""How far judges agree: with each other, with themselves, and with people."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64
from scipy.stats import kendalltau, spearmanr  # type: ignore[import-untyped]

from ..bootstrap import RESAMPLES, Estimate, draw_counts, estimate, interval
from ..raters import Level, alpha_resamples, kendall_w
from ..study.answers import Answer
from ..study.items import Items
from ..study.records import check_answers, records
from .figures import Sums, item_sums, mean_known
from .outcomes import Outcomes, Replies, check_replies, outcomes


@dataclass(frozen=True)
class JudgeAgreement:
    """Agreement of judges. NaN with one judge.

    A judge's value of a method on an item is its mean rating over presentations, or for comparisons its win share.
    """

    alpha: Estimate
    """Krippendorff's α over items and methods, with an interval over items. Values are means, so that the metric is
    that of intervals. A judge who is stricter than another lowers it."""
    w_methods: float
    """Kendall's W of judges over methods' means: whether they rank the methods alike."""
    w_items: Estimate
    """Mean over items of Kendall's W of judges over the item's concepts."""


def value_of(sums: Sums) -> Float64[np.ndarray, "item method"]:
    """A judge's value of each method on each item: its mean rating, or without ratings its win share."""
    return sums.win_share if np.isnan(sums.rating).all() else sums.rating


def judge_agreement(
    judges: list[Sums], weights: Float64[np.ndarray, " item"], *, seed: int, resamples: int = RESAMPLES
) -> JudgeAgreement:
    """Compare judges with each other."""
    values = np.stack([value_of(sums) for sums in judges])
    within = np.array([_concordance(values[:, item]) for item in range(values.shape[1])])
    known = ~np.isnan(values)
    often = weights[:, None] * known
    means = np.divide(
        (np.nan_to_num(values) * often).sum(axis=1),
        often.sum(axis=1),
        out=np.full((len(judges), values.shape[2]), np.nan),
        where=often.sum(axis=1) > 0,
    )
    return JudgeAgreement(
        alpha=_alpha(
            values.reshape(len(judges), -1), values.shape[1], level="interval", seed=seed, resamples=resamples
        ),
        w_methods=_concordance(means),
        w_items=estimate(within, seed=seed, resamples=resamples),
    )


def self_consistency(outcomes: Outcomes, *, seed: int, resamples: int = RESAMPLES) -> Estimate:
    """Krippendorff's α of a judge's presentations, with an interval over items; NaN where each item has only one.

    The metric is ordinal. Units are ratings of a method on an item. Of comparisons they are the outcomes of two methods
    on an item, each seen from either side: which of them is called the first must not matter.
    """
    rated = not np.isnan(outcomes.rating).all()
    values = outcomes.rating if rated else outcomes.lead
    flat = np.moveaxis(values, 1, 0).reshape(values.shape[1], -1)
    return _alpha(flat, len(values), level="ordinal", seed=seed, resamples=resamples)


def _alpha(
    values: Float64[np.ndarray, "rater unit"], items: int, *, level: Level, seed: int, resamples: int
) -> Estimate:
    """α of units that come in equal numbers from each item, items in order."""
    each = values.shape[1] // items if items else 0
    parts = [
        alpha_resamples(values, np.repeat(drawn, each, axis=1), level=level)
        for drawn in draw_counts(items, seed=seed, resamples=resamples, width=values.shape[1])
    ]
    observed = alpha_resamples(values, np.ones((1, values.shape[1])), level=level)
    return interval(float(observed[0]), np.concatenate(parts))


def _concordance(scores: Float64[np.ndarray, "judge method"]) -> float:
    """Kendall's W over the methods that any judge has valued."""
    return kendall_w(scores[:, ~np.isnan(scores).all(axis=0)])


@dataclass(frozen=True)
class PeopleAgreement:
    """Whether judges prefer the concepts by which people guess the prediction."""

    units: int
    """Items with one method's concept that judges valued and people answered."""
    items: int
    answers: int
    """Of people, to these."""
    spearman: Estimate
    """ρ over units of the judges' mean value with the share of people who were right, with an interval over items.
    Shares of few people are coarse, which keeps it well below 1 even for judges who know best."""
    methods: int
    """With both. With few, the next two say little: of 4 methods one order in 24 is right by chance."""
    methods_spearman: float
    """ρ over methods of their means over these units."""
    methods_kendall: float
    """τ-b of the same."""


def agreement_with_people(
    items: Items, replies: Replies, answers: Sequence[Answer], *, seed: int, resamples: int = RESAMPLES
) -> PeopleAgreement:
    """Compare judges' ratings or comparisons with the answers of people to the same items and methods.

    Raises
    ------
    DataError
        Where replies or answers do not fit the item file.
    """
    check_replies(items, replies)
    check_answers(items, answers)
    names = sorted({reply.judge for reply in replies})
    judged = mean_known(np.stack([value_of(item_sums(outcomes(items, replies, name))) for name in names]))
    found = records(items, answers)
    place = {item.id: number for number, item in enumerate(items.of_kind("main"))}
    rows = np.array([place[name] for name in found.things], dtype=np.int64)[found.item]
    asked, right = np.zeros(judged.shape), np.zeros(judged.shape)
    np.add.at(asked, (rows, found.method), 1.0)
    np.add.at(right, (rows, found.method), found.right.astype(np.float64))
    shared = (asked > 0) & ~np.isnan(judged)
    owner, method = np.nonzero(shared)
    theirs, ours = right[shared] / asked[shared], judged[shared]
    used, group = np.unique(owner, return_inverse=True)
    parts = [
        spearman_resamples(ours, theirs, drawn[:, group])
        for drawn in draw_counts(len(used), seed=seed, resamples=resamples, width=len(ours))
    ]
    observed = spearman_resamples(ours, theirs, np.ones((1, len(ours))))
    present = np.unique(method)
    means = np.array([[side[method == one].mean() for one in present] for side in (ours, theirs)])
    ranked = len(present) >= 2 and bool((np.ptp(means, axis=1) > 0).all())
    return PeopleAgreement(
        units=len(ours),
        items=len(used),
        answers=int(asked[shared].sum()),
        spearman=interval(float(observed[0]), np.concatenate(parts)),
        methods=len(present),
        methods_spearman=float(spearmanr(means[0], means[1]).statistic) if ranked else float("nan"),
        methods_kendall=float(kendalltau(means[0], means[1]).statistic) if ranked else float("nan"),
    )


def spearman_resamples(
    first: Float64[np.ndarray, " unit"],
    second: Float64[np.ndarray, " unit"],
    draws: Float64[np.ndarray, "resample unit"],
) -> Float64[np.ndarray, " resample"]:
    """Spearman's ρ of units that are counted as often as they were drawn; NaN where either side does not vary."""
    total = draws.sum(axis=1, keepdims=True)
    ranks = [_ranks(values, draws) - (total + 1) / 2 for values in (first, second)]
    product = (draws * ranks[0] * ranks[1]).sum(axis=1)
    spread = np.sqrt(np.prod([(draws * np.square(one)).sum(axis=1) for one in ranks], axis=0))
    rho: Float64[np.ndarray, " resample"] = np.divide(
        product, spread, out=np.full(len(draws), np.nan), where=spread > 1e-9 * np.maximum(total[:, 0], 1)
    )
    return rho


def _ranks(
    values: Float64[np.ndarray, " unit"], draws: Float64[np.ndarray, "resample unit"]
) -> Float64[np.ndarray, "resample unit"]:
    """Mid-ranks among the drawn units."""
    order = np.argsort(values, kind="stable")
    _, starts, place = np.unique(values[order], return_index=True, return_inverse=True)
    often = np.add.reduceat(draws[:, order], starts, axis=1) if len(starts) else draws
    ranks = np.empty_like(draws)
    ranks[:, order] = (np.cumsum(often, axis=1) - (often - 1) / 2)[:, place]
    return ranks
