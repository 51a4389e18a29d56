"""What is said of each concept: numbers for the overview; words, sentences, shares and neighbours for its own view."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from ..cache.reader import Cache
from ..evaluation.concepts import cut, shorten
from ..evaluation.information import pairs_of
from ..trainer.run import Run
from .effects import Effect
from .layout import map_of
from .members import Members
from .rows import Rows, short

OVERVIEW_WORDS = 5
NEAREST = 8
# Of so many candidates for each sentence, those are shown whose texts, and while they last words, differ.
CANDIDATES = 4
_LONGEST_WORD = 200
_BLOCK = 1_024


@dataclass(frozen=True)
class TextFacts:
    """What is known of each row of `Cache.texts`."""

    labels: Int64[np.ndarray, " text"]
    """−1 where there is none."""
    predictions: Int64[np.ndarray, " text"]
    """−1 where there is none."""
    classes: int


@dataclass(frozen=True)
class Concepts:
    """The concepts of a run that have training rows, in order of their numbers."""

    code: Int64[np.ndarray, " concept"]
    uses: Int64[np.ndarray, " concept"]
    """Training rows, as the run counted them."""
    rows: Int64[np.ndarray, " concept"]
    """Training rows that were found."""
    words: list[list[tuple[str, int]]]
    """Most frequent words among the training rows, and how often."""
    labels: Float64[np.ndarray, "concept class"]
    """Shares of the labels of the training rows' texts; NaN where none is known."""
    predictions: Float64[np.ndarray, "concept class"]
    typical: list[list[int]]
    """Numbers of rows."""
    drawn: list[list[int]]


def concepts_of(run: Run, rows: Rows, members: Members, facts: TextFacts, *, words: int, sentences: int) -> Concepts:
    """Count words, labels and predictions, and choose sentences."""
    code = np.flatnonzero(run.counts > 0)
    mine = np.flatnonzero(members.trained)
    codes = members.codes[mine].astype(np.int64)
    frequent = dict(_most_frequent(codes, rows.word[mine].astype(np.int64), words))
    return Concepts(
        code=code,
        uses=run.counts[code],
        rows=np.bincount(codes, minlength=run.concepts)[code],
        words=[[(rows.words[word], count) for word, count in frequent.get(one, [])] for one in code.tolist()],
        labels=_shares(codes, facts.labels[rows.text[mine]], run.concepts, facts.classes)[code],
        predictions=_shares(codes, facts.predictions[rows.text[mine]], run.concepts, facts.classes)[code],
        typical=[_spread(rows, members.typical[one], sentences) for one in code.tolist()],
        drawn=[_spread(rows, members.drawn[one], sentences, words_differ=False) for one in code.tolist()],
    )


def _most_frequent(
    codes: Int64[np.ndarray, " row"], words: Int64[np.ndarray, " row"], most: int
) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """Concept → its most frequent words; of equally frequent ones, the one that was seen first."""
    pairs = pairs_of(codes, words)
    order = np.lexsort((pairs.second, -pairs.count, pairs.first))
    concepts, starts = np.unique(pairs.first[order], return_index=True)
    for concept, start, end in zip(concepts.tolist(), starts.tolist(), [*starts[1:].tolist(), len(order)], strict=True):
        chosen = order[start : min(end, start + most)]
        yield concept, list(zip(pairs.second[chosen].tolist(), pairs.count[chosen].tolist(), strict=True))


def _shares(
    codes: Int64[np.ndarray, " row"], values: Int64[np.ndarray, " row"], concepts: int, classes: int
) -> Float64[np.ndarray, "concept class"]:
    known = values >= 0
    counts = np.bincount(codes[known] * classes + values[known], minlength=concepts * classes)
    table = counts.reshape(concepts, classes).astype(np.float64)
    total = table.sum(axis=1, keepdims=True)
    shares: Float64[np.ndarray, "concept class"] = np.divide(
        table, total, out=np.full_like(table, np.nan), where=total > 0
    )
    return shares


def _spread(rows: Rows, candidates: Int64[np.ndarray, " kept"], most: int, *, words_differ: bool = True) -> list[int]:
    """The first rows of different texts, of different words while they last."""
    there = candidates[candidates >= 0].tolist()
    chosen: list[int] = []
    texts: set[int] = set()
    words: set[int] = set()
    for differ in (True, False) if words_differ else (False,):
        for row in there:
            text, word = int(rows.text[row]), int(rows.word[row])
            if len(chosen) < most and text not in texts and not (differ and word in words):
                chosen.append(row)
                texts.add(text)
                words.add(word)
    return chosen


def overview(
    run: Run, members: Members, concepts: Concepts, effects: Mapping[int, Effect], *, seed: int
) -> dict[str, Any]:
    """The columns of the overview; one entry per concept with training rows."""
    places = map_of(members.directions[concepts.code], concepts.uses, seed=seed)
    known = ~np.isnan(concepts.labels).any(axis=1) & (concepts.labels.shape[1] > 0)
    labels = np.nan_to_num(concepts.labels)
    purity = labels.max(axis=1, initial=0.0).tolist()
    label = labels.argmax(axis=1).tolist() if labels.shape[1] else [0] * len(purity)
    found = [effects.get(code) for code in concepts.code.tolist()]
    return {
        "code": concepts.code,
        "uses": concepts.uses,
        "x": places[:, 0],
        "y": places[:, 1],
        "purity": [value if there else None for value, there in zip(purity, known.tolist(), strict=True)],
        "label": [value if there else None for value, there in zip(label, known.tolist(), strict=True)],
        "words": [[word for word, _ in own[:OVERVIEW_WORDS]] for own in concepts.words],
        "top_share": [
            own[0][1] / rows if own else None for own, rows in zip(concepts.words, concepts.rows.tolist(), strict=True)
        ],
        "effect": [one and one.lost for one in found],
        "effect_low": [one and one.low for one in found],
        "effect_high": [one and one.high for one in found],
        "flipped": [one and one.flipped for one in found],
        "effect_texts": [one and one.texts for one in found],
    }


def details(
    cache: Cache,
    run: Run,
    rows: Rows,
    members: Members,
    concepts: Concepts,
    effects: Mapping[int, Effect],
    facts: TextFacts,
    numbers: Mapping[int, int],
) -> Iterator[dict[str, Any]]:
    """What the view of each concept shows, in the order of the overview.

    Parameters
    ----------
    numbers
        Row of `Cache.texts` → the text's number on the site; texts that cannot be opened are not in it.
    """
    displaced = run.upper_table[concepts.code].astype(np.float64) - members.upper_mean
    lengths = np.linalg.norm(displaced, axis=1)
    upper = _unit(displaced)
    classes = _unit(members.upper_labels)
    lower_nearest = _nearest(_unit(members.directions[concepts.code].astype(np.float64)), concepts.code)
    upper_nearest = _nearest(upper, concepts.code)
    towards = upper @ classes.T
    towards[:, ~classes.any(axis=1)] = np.nan
    for place, code in enumerate(concepts.code.tolist()):
        effect = effects.get(code)
        chosen = [("typical", row) for row in concepts.typical[place]]
        chosen += [("random", row) for row in concepts.drawn[place]]
        yield {
            "words": concepts.words[place],
            "sentences": [_sentence(cache, rows, row, kind, facts, numbers) for kind, row in chosen],
            "labels": concepts.labels[place],
            "predictions": concepts.predictions[place],
            "nearest": next(lower_nearest),
            "upper_nearest": next(upper_nearest),
            "upper_labels": towards[place],
            "upper_norm": lengths[place] / members.upper_norm if members.upper_norm else None,
            "effect": None if effect is None else effect.told(),
        }


def _sentence(
    cache: Cache, rows: Rows, row: int, kind: str, facts: TextFacts, numbers: Mapping[int, int]
) -> dict[str, Any]:
    text = int(rows.text[row])
    before, word, after = shorten(*cut(cache, int(rows.place[row]), cache.texts["text"][text].as_py()))
    label, prediction = int(facts.labels[text]), int(facts.predictions[text])
    return {
        "text": numbers.get(text),
        "row": row - int(rows.first[text]),
        "before": before,
        "word": short(word, _LONGEST_WORD),
        "after": after,
        "label": None if label < 0 else label,
        "prediction": None if prediction < 0 else prediction,
        "kind": kind,
    }


def _unit(vectors: Float64[np.ndarray, "vector d"]) -> Float64[np.ndarray, "vector d"]:
    """At length 1; what has none stays zero."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: Float64[np.ndarray, "vector d"] = vectors / np.where(lengths > 0, lengths, 1.0)
    return unit


def _nearest(
    unit: Float64[np.ndarray, "concept d"], code: Int64[np.ndarray, " concept"]
) -> Iterator[list[tuple[int, float]]]:
    """The concepts with the largest cosines to each one; those without a direction have and are none."""
    there = np.asarray(unit.any(axis=1))
    for start in range(0, len(unit), _BLOCK):
        cosines = unit[start : start + _BLOCK] @ unit.T
        cosines[:, ~there] = -np.inf
        cosines[np.arange(len(cosines)), start + np.arange(len(cosines))] = -np.inf
        order = np.argsort(-cosines, axis=1, kind="stable")[:, :NEAREST]
        for place, best in enumerate(order):
            fine = best[np.isfinite(cosines[place, best])] if there[start + place] else best[:0]
            yield list(zip(code[fine].tolist(), cosines[place, fine].tolist(), strict=True))
