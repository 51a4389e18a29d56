"""Accuracy of each method, differences between methods, and agreement of annotators."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from jaxtyping import Int64

from ..bootstrap import Estimate, draw_counts, interval
from ..clustered import TwoWay, two_way
from ..raters import alpha_resamples, fleiss_kappa, krippendorff_alpha
from ..significance import holm
from .items import Items, Key, Role
from .records import Records


@dataclass(frozen=True)
class MethodScore:
    """One method."""

    method: str
    """Blind id."""
    name: str
    """The blind id where there is no key."""
    role: Role | None
    """`None` without a key."""
    answers: int
    items: int
    annotators: int
    accuracy: Estimate
    """Share of answers that are right, by the items' weights."""
    over_uniform: Estimate
    """Less 1 / classes."""
    over_most_frequent: Estimate
    """Less what always the most frequent prediction would have got on the same questions, over the same draws."""
    over_random: Estimate | None
    """Less the random control, over the same draws; `None` without one, and for itself."""
    confidence_right: float
    """Mean from 1 to 4, where the answer was right."""
    confidence_wrong: float
    seconds: float
    """Median."""
    answered: tuple[tuple[int, ...], ...]
    """Answers by predicted class, then by answered class."""


@dataclass(frozen=True)
class Difference:
    """Accuracy of one method less that of another, over the same draws."""

    first: str
    """Blind id."""
    second: str
    difference: Estimate
    p: float
    """Two-sided: twice the share of draws beyond 0, so that it is under 0.05 where the interval leaves 0 out. Never
    under 2 / (draws + 1)."""
    p_holm: float
    """Adjusted for all pairs of methods of the table."""


@dataclass(frozen=True)
class Agreement:
    """Agreement over questions (an item with one method's concept) that two annotators or more answered."""

    questions: int
    answers: int
    alpha: Estimate
    """Krippendorff's α for names, with an interval over items: annotators stay as they are."""
    kappa: float
    """Fleiss' κ."""


@dataclass(frozen=True)
class MethodTable:
    """What a set of annotators says."""

    annotators: int
    answers: int
    methods: tuple[MethodScore, ...]
    """From the most accurate to the least."""
    differences: tuple[Difference, ...]
    """Of all pairs, in the order of `methods`."""
    duplicates: tuple[Difference, ...]
    """Duplicate controls less what they repeat: 0 but for noise. They stand among `differences` as well."""
    agreement: Agreement


def method_table(
    items: Items, answered: Records, *, key: Key | None, seed: int, resamples: int, annotators_drawn: bool = True
) -> MethodTable:
    """Score methods by the answers to main items."""
    count = len(items.methods)
    main = items.of_kind("main")
    weights = np.bincount([item.prediction for item in main], [item.weight for item in main], minlength=2)
    guess = (answered.prediction == int(np.argmax(weights))).astype(np.float64)
    # The guess of the most frequent class is as many methods again, on the same questions.
    values = np.concatenate([answered.right.astype(np.float64), guess])
    weight = np.tile(answered.weight, 2)
    group = np.concatenate([answered.method, answered.method + count])
    found = two_way(
        values,
        weight,
        np.tile(answered.annotator, 2),
        np.tile(answered.item, 2),
        group,
        groups=2 * count,
        seed=seed,
        resamples=resamples,
        annotators_drawn=annotators_drawn,
    )
    accuracy, unit = found.observed[:count], np.eye(2 * count)
    random = [place for place, name in enumerate(items.methods) if key and key.methods[name].role == "random"]
    scores = []
    for place, name in enumerate(items.methods):
        mine, right = answered.method == place, answered.right
        table = np.zeros((len(items.classes), len(items.classes)), dtype=np.int64)
        np.add.at(table, (answered.prediction[mine], answered.answer[mine]), 1)
        control = random[0] if random and place != random[0] else None
        scores.append(
            MethodScore(
                method=name,
                name=key.methods[name].name if key else name,
                role=key.methods[name].role if key else None,
                answers=int(mine.sum()),
                items=len(np.unique(answered.item[mine])),
                annotators=len(np.unique(answered.annotator[mine])),
                accuracy=found.estimate(unit[place]),
                over_uniform=found.estimate(unit[place], less=1 / len(items.classes)),
                over_most_frequent=found.estimate(unit[place] - unit[place + count]),
                over_random=None if control is None else found.estimate(unit[place] - unit[control]),
                confidence_right=_mean(answered.confidence[mine & right]),
                confidence_wrong=_mean(answered.confidence[mine & ~right]),
                seconds=float(np.median(answered.seconds[mine])) if mine.any() else float("nan"),
                answered=tuple(tuple(row) for row in table.tolist()),
            )
        )
    order = sorted(range(count), key=lambda place: (-np.nan_to_num(accuracy[place], nan=-1.0), items.methods[place]))
    pairs = list(combinations(order, 2))
    repeats = _repeats(items, key)
    return MethodTable(
        annotators=len(answered.people),
        answers=len(answered.answer),
        methods=tuple(scores[place] for place in order),
        differences=_differences(items.methods, found, pairs, pairs),
        duplicates=_differences(items.methods, found, repeats, pairs),
        agreement=_agreement(items, answered, seed=seed, resamples=resamples),
    )


def _repeats(items: Items, key: Key | None) -> list[tuple[int, int]]:
    if key is None:
        return []
    place = {name: number for number, name in enumerate(items.methods)}
    originals = [(number, key.methods[name].of) for name, number in place.items()]
    return [(number, place[of]) for number, of in originals if of is not None]


def _mean(values: Int64[np.ndarray, " value"]) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _differences(
    names: Sequence[str], found: TwoWay, pairs: list[tuple[int, int]], family: list[tuple[int, int]]
) -> tuple[Difference, ...]:
    """The differences of some pairs; p is adjusted for all of the family."""
    unit = np.eye(len(found.observed))
    p = np.array([found.p(unit[first] - unit[second]) for first, second in family])
    tests = {frozenset(pair): both for pair, *both in zip(family, p.tolist(), holm(p).tolist(), strict=True)}
    made = []
    for first, second in pairs:
        p_alone, p_holm = tests[frozenset((first, second))]
        less = found.estimate(unit[first] - unit[second])
        made.append(Difference(names[first], names[second], less, p_alone, p_holm))
    return tuple(made)


def _agreement(items: Items, answered: Records, *, seed: int, resamples: int) -> Agreement:
    count, classes = len(items.methods), len(items.classes)
    numbers, question = np.unique(answered.item * count + answered.method, return_inverse=True)
    values = np.full((len(answered.people), len(numbers)), np.nan)
    values[answered.annotator, question] = answered.answer
    often = np.bincount(question, minlength=len(numbers))
    counts = np.zeros((len(numbers), classes), dtype=np.int64)
    np.add.at(counts, (question, answered.answer), 1)
    owner = numbers // count
    again = [
        alpha_resamples(values, drawn[:, owner], level="nominal")
        for drawn in draw_counts(len(answered.things), seed=seed, resamples=resamples, width=len(numbers))
    ]
    return Agreement(
        questions=int((often >= 2).sum()),
        answers=int(often[often >= 2].sum()),
        alpha=interval(krippendorff_alpha(values, level="nominal"), np.concatenate(again)),
        kappa=fleiss_kappa(counts),
    )
