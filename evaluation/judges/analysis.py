"""What judges say of methods, and what is to be known of the judges: bias, consistency, agreement."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..bootstrap import RESAMPLES, Estimate
from ..study.items import Items, Key
from .agreement import JudgeAgreement, judge_agreement, self_consistency
from .biases import Biases, Invalid, biases, invalid
from .figures import FigureTable, figure_tables, item_sums
from .outcomes import Attention, Replies, are_ratings, attention, check_replies, outcomes


@dataclass(frozen=True)
class JudgeReport:
    """One judge."""

    judge: str
    table: FigureTable
    biases: Biases
    consistency: Estimate
    """Krippendorff's α of its presentations of an item."""
    invalid: Invalid
    attention: Attention


@dataclass(frozen=True)
class JudgeAnalysis:
    """What all judges say. Only main items count, but for `attention`; no judge is dropped."""

    protocol: Literal["rate", "pairs"]
    items: int
    pooled: FigureTable
    """Means over judges, each weighing the same. Intervals are over items: they speak of these judges."""
    judges: tuple[JudgeReport, ...]
    agreement: JudgeAgreement


def analyse(items: Items, replies: Replies, *, key: Key | None, seed: int, resamples: int = RESAMPLES) -> JudgeAnalysis:
    """Analyse the ratings, or the comparisons, of one judge or more.

    Parameters
    ----------
    key
        Names methods and says which are controls. Without it methods go by their blind ids, and nothing is said of
        controls.

    Raises
    ------
    DataError
        For an unknown item or method, a rating out of range, two replies to one question, ratings mixed with
        comparisons, or no replies.
    """
    check_replies(items, replies)
    names = sorted({reply.judge for reply in replies})
    found = [outcomes(items, replies, name) for name in names]
    sums = [item_sums(one) for one in found]
    tables, pooled = figure_tables(items, sums, key=key, seed=seed, resamples=resamples)
    main = items.of_kind("main")
    return JudgeAnalysis(
        protocol="rate" if are_ratings(replies) else "pairs",
        items=len(main),
        pooled=pooled,
        judges=tuple(
            JudgeReport(
                judge=name,
                table=table,
                biases=biases(one, seed=seed),
                consistency=self_consistency(one, seed=seed, resamples=resamples),
                invalid=invalid(items, replies, name),
                attention=attention(items, replies, name),
            )
            for name, one, table in zip(names, found, tables, strict=True)
        ),
        agreement=judge_agreement(
            sums, np.array([item.weight for item in main], dtype=np.float64), seed=seed, resamples=resamples
        ),
    )
