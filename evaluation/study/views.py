"""How a concept is shown to judges and people: its most frequent words, and sentences drawn from its rows.

Sentences are drawn at random from the concept's training rows unless the most typical ones are asked for. Those flatter
a concept: what its strongest rows have in common need not hold of the others (Bolukbasi et al. 2021, "An
interpretability illusion for BERT").
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool

from ...cache.reader import Cache
from ...trainer.run import Run
from ..concepts import cut, members_of, shorten
from .items import ConceptView, Sentence, Word

Examples = Literal["random", "typical"]


@dataclass(frozen=True)
class Portrait:
    """Everything that may be shown of a concept, more than one item shows."""

    words: tuple[Word, ...]
    """Most frequent first."""
    sentences: tuple[tuple[str, Sentence], ...]
    """Content of the text → the sentence, in the order in which they are taken; no content and no sentence twice."""
    labels: tuple[float, ...]

    def sentences_without(self, contents: Collection[str]) -> list[Sentence]:
        """The sentences, less those of texts with any of these contents."""
        return [sentence for content, sentence in self.sentences if content not in contents]


NOTHING = Portrait((), (), ())


def portraits(
    cache: Cache,
    run: Run,
    concepts: Sequence[int],
    texts: Bool[np.ndarray, " text"],
    *,
    classes: int,
    words: int,
    sentences: int,
    examples: Examples,
    seed: int,
) -> dict[int, Portrait]:
    """The portraits of concepts by their rows in the chosen texts.

    Parameters
    ----------
    words, sentences
        At most so many of each.
    """
    members = members_of(cache, run, concepts, texts)
    return {
        concept: _portrait(
            cache, concept, members[concept], classes, words=words, sentences=sentences, examples=examples, seed=seed
        )
        for concept in concepts
    }


def _portrait(
    cache: Cache,
    concept: int,
    members: Sequence[tuple[int, float]],
    classes: int,
    *,
    words: int,
    sentences: int,
    examples: Examples,
    seed: int,
) -> Portrait:
    if not members:
        return NOTHING
    rows = np.array([row for row, _ in members], dtype=np.int64)
    owners = cache.text_index[cache.column("text")[rows]].tolist()
    contents, labels = cache.texts["text"], cache.texts["label"]
    said = {owner: contents[owner].as_py() for owner in set(owners)}
    parts = [_trimmed(*cut(cache, int(row), said[owner])) for row, owner in zip(rows, owners, strict=True)]
    counts = Counter(word.lower() for _, word, _ in parts)
    if examples == "typical":
        order = sorted(range(len(members)), key=lambda place: -members[place][1])
    else:
        order = np.random.default_rng([seed, concept]).permutation(len(members)).tolist()
    taken: dict[str, Sentence] = {}
    lines: set[str] = set()
    for place in order:
        if len(taken) == sentences:
            break
        content = said[owners[place]]
        before, word, after = shorten(*parts[place])
        # Two texts that differ in spaces alone, or beyond what is shown, look the same.
        line = f"{before}{word}{after}"
        if content not in taken and line not in lines:
            taken[content] = Sentence(before=before, word=word, after=after)
            lines.add(line)
    known = [label for owner in owners if (label := labels[owner].as_py()) is not None]
    shares = Counter(known)
    return Portrait(
        words=tuple(Word(word=word, share=count / len(members)) for word, count in counts.most_common(words)),
        sentences=tuple(taken.items()),
        labels=tuple(shares[label] / len(known) for label in range(classes)) if known else (),
    )


def _trimmed(before: str, word: str, after: str) -> tuple[str, str, str]:
    """The parts with the spaces around the word, which many tokenizers count to it, outside of it."""
    bare = word.strip()
    if not bare:
        return before, word, after
    start = word.index(bare)
    return before + word[:start], bare, word[start + len(bare) :] + after


def equal_views(
    portraits_of: Mapping[str, Portrait], content: str, *, words: int, sentences: int
) -> dict[str, ConceptView]:
    """The portraits of one item, cut to as many words and sentences as each of them has; empty ones stay empty.

    Parameters
    ----------
    content
        Of the item's text, which is not shown.
    """
    said = {method: portrait.sentences_without({content}) for method, portrait in portraits_of.items()}
    full = [method for method, portrait in portraits_of.items() if portrait.words]
    few_words = min((len(portraits_of[method].words) for method in full), default=0)
    few_sentences = min((len(said[method]) for method in full), default=0)
    return {
        method: ConceptView(
            words=portrait.words[: min(words, few_words)],
            sentences=tuple(said[method][: min(sentences, few_sentences)]),
            labels=portrait.labels,
        )
        for method, portrait in portraits_of.items()
    }
