"""Concepts in words: what the rows of a concept say, and sentences in which they say it."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool

from ..cache.reader import Cache
from ..trainer.run import Run

_CONTEXT = 90


@dataclass(frozen=True)
class Concept:
    """A concept as a person sees it."""

    concept: int
    rows: int
    """Training rows that belong to it."""
    words: list[tuple[str, int]]
    """Its most frequent words (in lower case) and how often they belong to it."""
    examples: list[tuple[str, str, str]]
    """Sentences as (before, the word, after), most typical first, one per text and, while they last, per word."""
    labels: dict[str, float]
    """Shares of the labels of its rows' texts."""


def describe(
    cache: Cache,
    run: Run,
    concepts: list[int],
    texts: Bool[np.ndarray, " text"],
    *,
    words: int = 8,
    examples: int = 3,
) -> list[Concept]:
    """Describe concepts by their rows in the chosen texts.

    Typical rows are those whose centred vectors have the largest cosine with the concept's direction.
    """
    members = members_of(cache, run, concepts, texts)
    return [_describe(cache, concept, members[concept], words=words, examples=examples) for concept in concepts]


def members_of(
    cache: Cache, run: Run, concepts: Sequence[int], texts: Bool[np.ndarray, " text"]
) -> dict[int, list[tuple[int, float]]]:
    """The rows of each concept in the chosen texts, and the cosine of each with the concept's direction, centred.

    Only rows of kinds that the run was trained on belong to it. A concept without training rows has none.
    """
    site = run.config.lower
    members: dict[int, list[tuple[int, float]]] = {concept: [] for concept in concepts}
    directions = {concept: run.direction(concept, site) for concept in concepts}
    for block, vectors in cache.blocks([site], cache.rows_of(texts, special=run.config.special)):
        codes = run.assign(vectors[site])
        for concept in concepts:
            mine = np.flatnonzero(codes == concept)
            if len(mine) == 0 or len(directions[concept]) == 0:
                continue
            offset = vectors[site][mine] - run.lower_mean
            cosine = offset @ directions[concept][0] / np.maximum(np.linalg.norm(offset, axis=1), 1e-12)
            members[concept] += zip(block[mine].tolist(), cosine.tolist(), strict=True)
    return members


def _describe(cache: Cache, concept: int, members: list[tuple[int, float]], *, words: int, examples: int) -> Concept:
    typical = [row for row, _ in sorted(members, key=lambda member: -member[1])]
    text_of = cache.text_index[cache.column("text")[np.array(typical, dtype=np.int64)]]
    all_texts, all_labels = cache.texts["text"], cache.texts["label"]
    parts = {row: cut(cache, row, all_texts[int(text)].as_py()) for row, text in zip(typical, text_of, strict=True)}
    shown: list[int] = []
    texts_used: set[int] = set()
    words_used: set[str] = set()
    for distinct_words in (True, False):
        for row, text in zip(typical, text_of.tolist(), strict=True):
            word = parts[row][1].lower()
            if len(shown) == examples:
                break
            if text not in texts_used and not (distinct_words and word in words_used):
                shown.append(row)
                texts_used.add(text)
                words_used.add(word)
    names = cache.manifest.class_names or []
    known = [label for text in text_of.tolist() if (label := all_labels[text].as_py()) is not None]
    shares = Counter(known)
    return Concept(
        concept=concept,
        rows=len(members),
        words=Counter(word.lower() for _, word, _ in parts.values()).most_common(words),
        examples=[shorten(*parts[row]) for row in shown],
        labels={names[label]: count / len(known) for label, count in sorted(shares.items())},
    )


def cut(cache: Cache, row: int, text: str) -> tuple[str, str, str]:
    """A row's text as what stands before its word, the word, and what stands behind it."""
    kind = int(cache.column("special")[row])
    if kind:
        return "", "‹instruction›" if kind == 3 else "‹special token›", f" {text}"
    start, end = int(cache.column("char_start")[row]), int(cache.column("char_end")[row])
    if start == end:
        return text[:start], "‹token without text›", f" {text[end:]}"
    return text[:start], text[start:end], text[end:]


def shorten(before: str, word: str, after: str) -> tuple[str, str, str]:
    """The three parts on one line, with 90 characters of context on either side."""
    # A line break of the text would break the line in which it is shown.
    before, word, after = (re.sub(r"\s+", " ", part) for part in (before, word, after))
    if len(before) > _CONTEXT:
        before = "…" + before[-_CONTEXT:]
    if len(after) > _CONTEXT:
        after = after[:_CONTEXT] + "…"
    return before, word, after
