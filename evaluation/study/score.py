"""What the answers of a study say: of each method, of each annotator, and how far annotators agree.

An answer is right where it is the class that the model predicts. Intervals are by the two-way bootstrap: annotators and
items are both drawn anew, because answers of one annotator, or to one item, are alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest  # type: ignore[import-untyped]

from ..bootstrap import RESAMPLES, Estimate
from .answers import Answer
from .items import Items, Key
from .method_scores import MethodTable, method_table
from .records import check_answers, records


@dataclass(frozen=True)
class Chance:
    """Accuracy without looking at concepts, of the main items by weight."""

    uniform: float
    """Every class alike: 1 / classes."""
    most_frequent: float
    """Always the class that is predicted most often."""
    proportional: float
    """Each class as often as it is predicted: Σ share²."""


@dataclass(frozen=True)
class AnnotatorScore:
    """One annotator."""

    annotator: str
    answers: int
    """To main items; so are the next two."""
    accuracy: Estimate
    """Share of answers that are right, not weighted, with its Wilson interval at 95 %."""
    seconds: float
    """Median."""
    training_seen: int
    training_right: int
    attention_seen: int
    attention_failed: int


@dataclass(frozen=True)
class StudyScore:
    """What a study says."""

    classes: tuple[str, ...]
    chance: Chance
    all: MethodTable
    """Of all annotators."""
    attentive: MethodTable
    """Of those who failed no attention item: to be given beside the other, not instead."""
    failed: tuple[str, ...]
    """Annotators who failed an attention item."""
    annotators: tuple[AnnotatorScore, ...]


def score(
    items: Items,
    answers: Sequence[Answer],
    *,
    key: Key | None,
    seed: int,
    resamples: int = RESAMPLES,
    annotators_drawn: bool = True,
) -> StudyScore:
    """Score the answers of a study. Only main items count; training and attention items are reported by annotator.

    Parameters
    ----------
    key
        Names methods and says which are controls. Without it methods go by their blind ids, and nothing is said of
        controls.
    annotators_drawn
        Whether intervals are over annotators as well as items. Without, they speak of these annotators only, which
        suits a few language models.

    Raises
    ------
    DataError
        For an unknown item or method, an answer or confidence out of range, or a question that one annotator answered
        twice.
    """
    check_answers(items, answers)
    people = tuple(_annotator(items, name, answers) for name in sorted({answer.annotator for answer in answers}))
    failed = tuple(person.annotator for person in people if person.attention_failed)
    kept = [answer for answer in answers if answer.annotator not in failed]
    everyone, attentive = (
        method_table(
            items, records(items, some), key=key, seed=seed, resamples=resamples, annotators_drawn=annotators_drawn
        )
        for some in (answers, kept)
    )
    return StudyScore(
        classes=items.classes,
        chance=chance(items),
        all=everyone,
        attentive=attentive,
        failed=failed,
        annotators=people,
    )


def chance(items: Items) -> Chance:
    """Accuracy at chance; NaN without main items."""
    main = items.of_kind("main")
    weights = np.bincount(
        [item.prediction for item in main], [item.weight for item in main], minlength=len(items.classes)
    )
    shares = weights / weights.sum() if main else np.full(len(items.classes), np.nan)
    return Chance(
        uniform=1 / len(items.classes),
        most_frequent=float(shares.max()),
        proportional=float(np.square(shares).sum()),
    )


def _annotator(items: Items, name: str, answers: Sequence[Answer]) -> AnnotatorScore:
    predictions = {item.id: item.prediction for item in items.items}
    mine = [answer for answer in answers if answer.annotator == name]
    right = {
        kind: [answer.answer == predictions[answer.item] for answer in mine if answer.kind == kind]
        for kind in ("main", "training", "attention")
    }
    times = [answer.milliseconds / 1000 for answer in mine if answer.kind == "main"]
    return AnnotatorScore(
        annotator=name,
        answers=len(right["main"]),
        accuracy=_wilson(sum(right["main"]), len(right["main"])),
        seconds=float(np.median(times)) if times else float("nan"),
        training_seen=len(right["training"]),
        training_right=sum(right["training"]),
        attention_seen=len(right["attention"]),
        attention_failed=right["attention"].count(False),
    )


def _wilson(right: int, answers: int) -> Estimate:
    if answers == 0:
        return Estimate(float("nan"), float("nan"), float("nan"))
    between = binomtest(right, answers).proportion_ci(0.95, method="wilson")
    return Estimate(right / answers, float(between.low), float(between.high))
