"""Which questions a person gets, and in which order.

A person's main questions are planned together: each item at most once, each method equally often, and of all such
plans one with the fewest answers, given or expected, for its cells (item, method). This is an assignment problem. Where
every person gets every item, it leaves each cell with ⌊n/m⌋ or ⌈n/m⌉ of n answers by m methods, and each person with
equally many of each method; a rule that looks at one question at a time cannot promise both. Nothing is drawn: ties are
broken by hashes of the seed.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Bool, Float64, Int64
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

from ...errors import ConfigError
from .items import Items, Kind
from .settings import StudySettings


@dataclass(frozen=True)
class Question:
    """An item, shown with one method's concept."""

    item: str
    method: str
    """Empty where the item has no concepts."""
    kind: Kind


@dataclass(frozen=True)
class Pool:
    """What is dealt from."""

    main: tuple[str, ...]
    training: tuple[Question, ...]
    """In the order in which everyone gets them."""
    attention: tuple[str, ...]
    methods: tuple[str, ...]
    questions: int
    """Main questions per person."""
    seed: int


def hashed(*parts: int | str) -> float:
    """A number in [0, 1) that looks random, and is the same for the same parts on every machine."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def make_pool(items: Items, settings: StudySettings) -> Pool:
    """The questions of a study.

    Raises
    ------
    ConfigError
        Where there are no main items, or fewer than a person is to get.
    """
    main = tuple(item.id for item in items.of_kind("main"))
    if not main:
        raise ConfigError("the item file has no main items, so that nothing can be asked: make one with `study items`")
    questions = settings.per_annotator or len(main)
    if questions > len(main):
        raise ConfigError(
            f"a person sees each item at most once, and there are {len(main):,} main items for {questions:,} questions "
            f"per person: ask for at most {len(main):,}"
        )
    seed = settings.seed
    training = [
        Question(item.id, min(items.methods, key=lambda method: hashed(seed, "practice", item.id, method)), item.kind)
        for item in items.of_kind("training")
    ]
    training.sort(key=lambda question: hashed(seed, "order", question.item))
    attention = tuple(item.id for item in items.of_kind("attention"))
    return Pool(main, tuple(training), attention, items.methods, questions, seed)


def assign(
    counts: Int64[np.ndarray, "item method"],
    seen: Bool[np.ndarray, " item"],
    own: Int64[np.ndarray, " method"],
    keys: Float64[np.ndarray, "item method"],
    *,
    questions: int,
) -> Int64[np.ndarray, " item"]:
    """The method of each item that a person is still to get; -1 where it is not asked.

    Parameters
    ----------
    counts
        Answers of each cell, given or expected, without what is planned here.
    seen
        Items that the person has had.
    own
        How often the person has had each method.
    keys
        In [0, 1); the smaller is taken of what is otherwise equal.
    questions
        How many the person is still to get; at most the items not seen.
    """
    chosen = np.full(len(seen), -1, dtype=np.int64)
    if questions == 0:
        return chosen
    method = np.repeat(np.arange(len(own)), _quotas(own, counts.sum(axis=0) + keys[0], questions))
    items = np.flatnonzero(~seen)
    coverage = counts.sum(axis=1)[items]
    coverage = coverage - coverage.min()
    # Squared, so that one cell far ahead is worse than two a little ahead. In order of weight: answers of the cells,
    # answers of the items, keys; each outweighs all sums of the later ones.
    ahead = counts[items] - counts[items].min()
    scale = len(items) + 1.0
    weight = scale * (scale * (int(coverage.max()) + 1))
    cost = weight * ahead**2 + scale * coverage[:, None] + keys[items]
    rows, slots = linear_sum_assignment(cost[:, method])
    chosen[items[rows]] = method[slots]
    return chosen


def _quotas(
    own: Int64[np.ndarray, " method"], covered: Float64[np.ndarray, " method"], questions: int
) -> Int64[np.ndarray, " method"]:
    """How often each method is still to come, so that a person ends with equally many of each."""
    quota = np.zeros(len(own), dtype=np.int64)
    for _ in range(questions):
        had = own + quota
        least = np.flatnonzero(had == had.min())
        quota[least[np.argmin((covered + quota)[least])]] += 1
    return quota


def in_rounds(
    chosen: Int64[np.ndarray, " item"],
    counts: Int64[np.ndarray, "item method"],
    own: Int64[np.ndarray, " method"],
    keys: Float64[np.ndarray, "item method"],
) -> list[tuple[int, int]]:
    """Items with their methods, in the order of asking: the method had least comes first, then the rarest cell.

    So whoever stops early has had all methods about equally often.
    """
    waiting: list[list[int]] = []
    for method in range(len(own)):
        items = np.flatnonzero(chosen == method)
        waiting.append(list(map(int, items[np.lexsort((keys[items, method], counts[items, method]))])))
    had = own.copy()
    order = []
    while any(waiting):
        left = [method for method in range(len(own)) if waiting[method]]
        method = min(left, key=lambda one: (had[one], keys[waiting[one][0], one]))
        order.append((waiting[method].pop(0), method))
        had[method] += 1
    return order


def tie_keys(pool: Pool, annotator: int) -> Float64[np.ndarray, "item method"]:
    """What breaks an annotator's ties."""
    return np.array([[hashed(pool.seed, annotator, item, method) for method in pool.methods] for item in pool.main])


def main_questions(
    pool: Pool,
    counts: Int64[np.ndarray, "item method"],
    seen: Bool[np.ndarray, " item"],
    own: Int64[np.ndarray, " method"],
    annotator: int,
) -> list[Question]:
    """The main questions that an annotator is still to get, in order."""
    keys = tie_keys(pool, annotator)
    chosen = assign(counts, seen, own, keys, questions=pool.questions - int(own.sum()))
    return [
        Question(pool.main[item], pool.methods[method], "main") for item, method in in_rounds(chosen, counts, own, keys)
    ]


def booklet(pool: Pool, counts: Int64[np.ndarray, "item method"], annotator: int) -> list[Question]:
    """All questions of an annotator who begins: practice, then main ones with attention checks among them."""
    items, methods = counts.shape
    main = iter(main_questions(pool, counts, np.zeros(items, bool), np.zeros(methods, np.int64), annotator))
    checks = iter(sorted(pool.attention, key=lambda item: hashed(pool.seed, annotator, "check", item)))
    return [
        *pool.training,
        *(Question(next(checks), "", "attention") if check else next(main) for check in _checks(pool, annotator)),
    ]


def _checks(pool: Pool, annotator: int) -> Iterator[bool]:
    """For each place after practice, whether an attention check stands there: one somewhere in each equal part."""
    checks = len(pool.attention)
    total = pool.questions + checks
    bounds = [total * part // checks for part in range(checks + 1)] if checks else []
    there = {
        start + int(hashed(pool.seed, annotator, "place", part) * (end - start))
        for part, (start, end) in enumerate(pairwise(bounds))
    }
    return (place in there for place in range(total))


def booklets(pool: Pool, annotators: int) -> list[list[Question]]:
    """The questions of so many annotators, all of whom are expected to answer everything."""
    counts = np.zeros((len(pool.main), len(pool.methods)), dtype=np.int64)
    dealt = []
    for annotator in range(1, annotators + 1):
        dealt.append(booklet(pool, counts, annotator))
        add_to(counts, pool, dealt[-1])
    return dealt


def add_to(counts: Int64[np.ndarray, "item method"], pool: Pool, questions: Sequence[Question]) -> None:
    """Count main questions, in place."""
    item_at = {item: place for place, item in enumerate(pool.main)}
    method_at = {method: place for place, method in enumerate(pool.methods)}
    for question in questions:
        if question.kind == "main":
            counts[item_at[question.item], method_at[question.method]] += 1
