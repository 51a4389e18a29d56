"""Do the concepts that speak for a text's predicted class lie where people see the reason for its label?

Each row is scored by how much more likely the predicted class is among the training rows of its concept than among all
of them, and the order of a text's rows is compared with its rationale. The same with words in the place of concepts
needs no concept model: what a run has over that is what its concepts add.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int64

from ..cache.reader import Cache
from ..errors import ConfigError
from .bootstrap import Estimate, estimate
from .partitions import LABEL, WORD, Partition, Sides
from .rationales import METRICS, MarkedRows, agreement, expected_at_random

SET_METRICS = ("set_precision", "set_recall", "set_f1")
"""Of the rows that share the concept of the text's most evident row, as a set, against the rationale."""

WORDS, FIRST, RANDOM = "word", "first rows", "random"
UNPREDICTED = "without a prediction"

# Rows of one concept have equal scores: a text's figures are the mean over so many orders of them.
_ORDERS = 8


@dataclass(frozen=True)
class OverlapLine:
    """How one way of scoring orders the rows of texts; means over texts, intervals paired by text."""

    name: str
    """A run, or a baseline: `word`, `first rows`, `random`."""
    found: dict[str, Estimate]
    """By metric: `METRICS`, and `SET_METRICS` where the way has concepts."""
    over_word: dict[str, Estimate] | None
    """Of runs: less the same of words."""
    first_run_over_this: dict[str, Estimate] | None
    """The first run's less this."""


@dataclass(frozen=True)
class OverlapResult:
    """What the comparison with people found."""

    texts: int
    """Texts whose rationale is a part of their ordinary rows, with a prediction."""
    left_out: dict[str, int]
    """Reason → texts."""
    lines: list[OverlapLine]


def evidence(
    codes: Int64[np.ndarray, " row"], labels: Int64[np.ndarray, " row"], *, concepts: int, classes: int
) -> Float64[np.ndarray, "concept class"]:
    """log-odds of each class among a concept's rows, less those among all rows; 0 for a concept without rows.

    Smoothed towards the share among all rows by as many rows as there are classes: Laplace's rule where classes are of
    one size.

    Parameters
    ----------
    labels
        −1 for a row whose text has none; it does not count.
    """
    known = labels >= 0
    flat = np.bincount(codes[known] * classes + labels[known], minlength=concepts * classes)
    counts = flat.reshape(concepts, classes).astype(np.float64)
    # One row more of each class keeps the odds finite where a class has no row.
    prior = (counts.sum(axis=0) + 1) / (counts.sum() + classes)
    shares = (counts + classes * prior) / (counts.sum(axis=1, keepdims=True) + classes)
    odds: Float64[np.ndarray, "concept class"] = np.log(shares / (1 - shares)) - np.log(prior / (1 - prior))
    return odds


def overlap(
    cache: Cache,
    texts: Bool[np.ndarray, " text"],
    sides: Sides,
    runs: Sequence[Partition],
    marked: Mapping[int, MarkedRows],
    why: Sequence[str | None],
    *,
    seed: int,
) -> OverlapResult:
    """Compare the concepts of runs with rationales.

    Parameters
    ----------
    texts
        The evaluated ones.
    marked, why
        What `marked_rows` says of them.
    seed
        Of the order of equal scores, and of the bootstrap.

    Raises
    ------
    ConfigError
        Where the cache has no predictions or the training texts no labels of two classes, or no text has a rationale
        that can be used.
    """
    predictions = _predictions(cache, texts)
    labels = sides.reference.attributes[LABEL]
    if len(np.unique(labels[labels >= 0])) < 2:
        raise ConfigError(
            "--rationale needs training texts of two classes or more, by which concepts speak for a class"
        )
    classes = int(max(labels.max(), predictions.max())) + 1
    reasons = [reason or (UNPREDICTED if predictions[number] < 0 else None) for number, reason in enumerate(why)]
    usable = [number for number, reason in enumerate(reasons) if reason is None]
    if not usable:
        raise ConfigError("no text has a rationale that is a part of it and a prediction: see what the field holds")
    words = Partition(
        WORDS, len(sides.names[WORD]), *(rows.attributes[WORD] for rows in (sides.reference, sides.evaluated))
    )
    judged: dict[str, Float64[np.ndarray, "text metric"]] = {}
    for part in (*runs, words):
        table = evidence(part.reference, labels, concepts=part.concepts, classes=classes)
        generator = np.random.default_rng([seed, 6])
        values = []
        for number in usable:
            codes = part.evaluated[np.searchsorted(sides.evaluated.place, marked[number].row)]
            scores = table[codes, predictions[number]]
            values.append(_judge(scores, codes, marked[number].inside, generator))
        judged[part.name] = np.array(values)
    inside = [marked[number].inside for number in usable]
    judged[FIRST] = np.array([agreement(-np.arange(len(part), dtype=np.float64), part) for part in inside])
    judged[RANDOM] = np.array([expected_at_random(len(part), int(part.sum())) for part in inside])
    return OverlapResult(
        texts=len(usable),
        left_out={reason: reasons.count(reason) for reason in sorted({part for part in reasons if part})},
        lines=_lines(judged, [part.name for part in runs], seed),
    )


def _predictions(cache: Cache, texts: Bool[np.ndarray, " text"]) -> Int64[np.ndarray, " chosen"]:
    if not cache.manifest.predictions:
        raise ConfigError(
            f"{cache.path} was extracted without predictions, by which --rationale picks the class that concepts are "
            "to speak for: extract with --task classify or prompt"
        )
    found = cache.texts["prediction"].to_pylist()
    return np.array([-1 if found[text] is None else found[text] for text in np.flatnonzero(texts)], dtype=np.int64)


def _judge(
    scores: Float64[np.ndarray, " row"],
    codes: Int64[np.ndarray, " row"],
    inside: Bool[np.ndarray, " row"],
    generator: np.random.Generator,
) -> Float64[np.ndarray, " metric"]:
    found = []
    for _ in range(_ORDERS):
        order = generator.permutation(len(scores))
        mixed, members = scores[order], inside[order]
        mine = codes[order] == codes[order][np.argmax(mixed)]
        hits = float((mine & members).sum())
        precision, recall = hits / mine.sum(), hits / members.sum()
        # 2 · hits / (chosen + inside) is the harmonic mean, and 0 where nothing is hit.
        found.append([*agreement(mixed, members), precision, recall, 2 * hits / (mine.sum() + members.sum())])
    mean: Float64[np.ndarray, " metric"] = np.array(found).mean(axis=0)
    return mean


def _lines(
    judged: Mapping[str, Float64[np.ndarray, "text metric"]], runs: Sequence[str], seed: int
) -> list[OverlapLine]:
    def estimates(values: Float64[np.ndarray, "text metric"]) -> dict[str, Estimate]:
        names = (*METRICS, *SET_METRICS)[: values.shape[1]]
        return {name: estimate(values[:, number], seed=seed) for number, name in enumerate(names)}

    first = judged[runs[0]]
    return [
        OverlapLine(
            name=name,
            found=estimates(values),
            over_word=estimates(values - judged[WORDS]) if name in runs else None,
            first_run_over_this=None if name == runs[0] else estimates(first[:, : values.shape[1]] - values),
        )
        for name, values in judged.items()
    ]
