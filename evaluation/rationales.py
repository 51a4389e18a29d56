"""How well stored saliency agrees with human rationales: the words that people say a label rests on.

A row belongs to the rationale where at least half of its characters do. Of each text, as many rows are chosen as its
rationale has, so that precision, recall and F1 are one number; the order of all rows is judged by average precision.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float64, Int, Int64

from ..cache.reader import Cache
from ..errors import ConfigError
from .bootstrap import Estimate, estimate
from .rows import rows_by_text

METRICS = ("f1", "top1", "average_precision")
"""Share of the rationale among as many top rows; whether the top row is inside; area under precision and recall."""

_CHANCE, _FIRST = "random", "first rows"
ABSENT, NOT_FOUND, WHOLE = "without a rationale", "rationale not in the text", "rationale is the whole text"


@dataclass(frozen=True)
class RationaleLine:
    """How one score of one cache orders the rows of texts; means over texts, intervals paired."""

    cache: str
    score: str
    found: dict[str, Estimate]
    """By metric."""
    over_random: dict[str, Estimate] | None
    over_first_cache: dict[str, Estimate] | None
    """Less the same score of the first cache, where there are several."""


@dataclass(frozen=True)
class RationaleResult:
    """What a comparison found."""

    texts: int
    """Texts compared: in all caches, their rationale is a part of the rows."""
    left_out: dict[str, int]
    """Reason → texts."""
    lines: list[RationaleLine]


@dataclass(frozen=True)
class MarkedRows:
    """The ordinary rows of one text."""

    row: Int64[np.ndarray, " row"]
    inside: Bool[np.ndarray, " row"]


def compare_rationales(
    caches: Mapping[str, Cache], field: str, *, splits: Sequence[str] = (), seed: int = 0
) -> RationaleResult:
    """Compare the saliency of caches of the same texts with the rationales in a kept field.

    Parameters
    ----------
    caches
        By the name that lines call them.
    field
        Kept field of `texts.parquet` with the rationale: a part of the text, or a list of parts. All places where a
        part stands in the text are marked.
    splits
        Splits to compare; all where none is given.
    seed
        Of the bootstrap.

    Raises
    ------
    ConfigError
        Where a cache has no saliency, no such field or other texts, or no text has a rationale that can be used.
    """
    judged: dict[str, dict[str, Float64[np.ndarray, "text metric"]]] = {}
    reasons: list[list[str | None]] = []
    first: list[tuple[Any, ...]] | None = None
    for name, cache in caches.items():
        chosen = cache.splits(splits or list(cache.manifest.splits))
        keys = _keys(cache, chosen)
        if first is not None and sorted(keys) != sorted(first):
            raise ConfigError(f"{name} and {next(iter(caches))} hold other texts: compare caches of the same texts")
        first = first or keys
        place = {key: number for number, key in enumerate(first)}
        order = [place[key] for key in keys]
        marked, why = marked_rows(cache, chosen, field)
        reasons.append([why[number] for number in np.argsort(order)])
        judged[name] = {score: values[np.argsort(order)] for score, values in _judge(cache, marked, len(keys)).items()}
    telling = [next(filter(None, of_text), None) for of_text in zip(*reasons, strict=True)]
    used = np.array([reason is None for reason in telling], dtype=bool)
    if not used.any():
        raise ConfigError(f"no text has a rationale in {field!r} that is a part of it: see what the field holds")
    return RationaleResult(
        texts=int(used.sum()),
        left_out={reason: telling.count(reason) for reason in (ABSENT, NOT_FOUND, WHOLE)},
        lines=_lines({name: {s: v[used] for s, v in scores.items()} for name, scores in judged.items()}, seed),
    )


def _keys(cache: Cache, chosen: Bool[np.ndarray, " text"]) -> list[tuple[Any, ...]]:
    """What tells texts apart, whatever order a cache has them in."""
    table = cache.texts.select(["split", "source_row", "text_sha256"])
    return [tuple(row.values()) for row, taken in zip(table.to_pylist(), chosen, strict=True) if taken]


def marked_rows(
    cache: Cache, chosen: Bool[np.ndarray, " text"], field: str
) -> tuple[dict[int, MarkedRows], list[str | None]]:
    """The rows of each text that can be used, by its number among the chosen ones; and why each other one cannot.

    Raises
    ------
    ConfigError
        Where the cache keeps no such field, or the field holds no parts of texts.
    """
    names = cache.texts.column_names
    for needed in ("text", field):
        if needed not in names:
            raise ConfigError(
                f"{cache.path} keeps no field {needed!r} of its texts (it has {', '.join(names)}): "
                f"extract with --keep-fields {field}"
            )
    number_of = {int(text): number for number, text in enumerate(np.flatnonzero(chosen))}
    texts, parts = cache.texts["text"], cache.texts[field]
    starts, ends = cache.column("char_start"), cache.column("char_end")
    marked: dict[int, MarkedRows] = {}
    # Where a text has no rows, its rationale is in none.
    why: list[str | None] = [NOT_FOUND] * len(number_of)
    for text in number_of:
        if not parts_of(parts[text].as_py(), field):
            why[number_of[text]] = ABSENT
    for rows in rows_by_text(cache, chosen):
        number = number_of[rows.text]
        if why[number] == ABSENT:
            continue
        own = rows.row[rows.ordinary()]
        inside = _inside(texts[rows.text].as_py(), parts_of(parts[rows.text].as_py(), field), starts[own], ends[own])
        if inside.any():
            why[number] = WHOLE if inside.all() else None
        if why[number] is None:
            marked[number] = MarkedRows(own, inside)
    return marked, why


def parts_of(value: Any, field: str) -> list[str]:
    """The parts of a text that a kept field names.

    Raises
    ------
    ConfigError
        Where it holds something else.
    """
    parts = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(part, str) for part in parts):
        raise ConfigError(
            f"the field {field!r} holds {value!r:.60}; a rationale is a part of the text, or a list of them"
        )
    return [part.strip() for part in parts if part.strip()]


def _inside(
    text: str, parts: Sequence[str], starts: Int[np.ndarray, " row"], ends: Int[np.ndarray, " row"]
) -> Bool[np.ndarray, " row"]:
    """Which rows lie in the parts by at least half; none where a part is not in the text."""
    marks = np.zeros(len(text) + 1, dtype=np.int64)
    for part in parts:
        begin = text.find(part)
        if begin < 0:
            return np.zeros(len(starts), dtype=bool)
        while begin >= 0:
            marks[begin + 1 : begin + 1 + len(part)] = 1
            begin = text.find(part, begin + 1)
    # A stranger's cache may say that a row lies outside its text.
    starts, ends = np.clip(starts, 0, len(text)), np.clip(ends, 0, len(text))
    sums = np.cumsum(marks)
    covered = sums[ends] - sums[starts]
    found: Bool[np.ndarray, " row"] = (covered > 0) & (2 * covered >= ends - starts)
    return found


def _judge(cache: Cache, marked: Mapping[int, MarkedRows], texts: int) -> dict[str, Float64[np.ndarray, "text metric"]]:
    signed, largest = cache.column("saliency"), cache.column("saliency_max")
    values = {
        name: np.full((texts, len(METRICS)), np.nan)
        for name in (_CHANCE, _FIRST, "saliency", "|saliency|", "saliency_max")
    }
    for number, text in marked.items():
        scores = {
            _FIRST: -np.arange(len(text.row), dtype=np.float64),
            "saliency": signed[text.row],
            "|saliency|": np.abs(signed[text.row]),
            "saliency_max": largest[text.row],
        }
        values[_CHANCE][number] = expected_at_random(len(text.row), int(text.inside.sum()))
        for name, given in scores.items():
            values[name][number] = agreement(given, text.inside)
    return values


def agreement(scores: Float[np.ndarray, " row"], inside: Bool[np.ndarray, " row"]) -> tuple[float, float, float]:
    """The metrics of one text whose rows are ordered by a score; of equal scores, the first row comes first."""
    hits = inside[np.argsort(-scores, kind="stable")]
    count = int(inside.sum())
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    return float(hits[:count].mean()), float(hits[0]), float(precision[hits].mean())


def expected_at_random(rows: int, inside: int) -> tuple[float, float, float]:
    """What the metrics are on average over all orders of `rows` rows, of which `inside` are in the rationale."""
    share, harmonic = inside / rows, float((1 / np.arange(1, rows + 1)).sum())
    # Above a row of the rationale at place k there are (k − 1)(inside − 1)/(rows − 1) others, on average.
    others = (inside - 1) / (rows - 1) * (rows - harmonic) if rows > 1 else 0.0
    return share, share, (harmonic + others) / rows


def _lines(judged: Mapping[str, Mapping[str, Float64[np.ndarray, "text metric"]]], seed: int) -> list[RationaleLine]:
    def estimates(values: Float64[np.ndarray, "text metric"]) -> dict[str, Estimate]:
        return {metric: estimate(values[:, number], seed=seed) for number, metric in enumerate(METRICS)}

    lines = []
    first = next(iter(judged))
    for name, scores in judged.items():
        for score, values in scores.items():
            lines.append(
                RationaleLine(
                    cache=name,
                    score=score,
                    found=estimates(values),
                    over_random=None if score == _CHANCE else estimates(values - scores[_CHANCE]),
                    over_first_cache=None if name == first else estimates(values - judged[first][score]),
                )
            )
    return lines
