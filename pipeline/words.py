"""Rows of a text: its tokens, or its words pooled from sub-words.

Words are found in the text itself and sub-words are assigned to them by character offsets, so that every fast tokenizer
gives the same words. (A tokenizer's own `word_ids` will not do: Llama-type ones call a whole text one word.) A sub-word
that overlaps two words belongs to both.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import regex
from jaxtyping import Bool, Int64

# Kinds of tokens and rows, as the column `special` has them.
TEXT, LEADING, SPECIAL, INSTRUCTION = range(4)

Policy = Literal["mark", "keep", "drop"]
"""What becomes of tokens that are not of the text: rows of their own kind, rows like the text's, or none."""

# Letters, marks, digits and underscores, joined inside a word by apostrophes and by the invisible characters that
# Persian, Indic scripts and hyphenation put there; else one user-perceived character.
# Marks belong to words: without them, Indic vowel signs and decomposed accents would cut words apart.
_WORD = regex.compile(r"[\w\p{M}]+(?:['’\u200c\u200d\u00ad][\w\p{M}]+)*|(?!\s)\X")


@dataclass(frozen=True, slots=True)
class Tokens:
    """One text, tokenised for the model."""

    ids: Int64[np.ndarray, " token"]
    start: Int64[np.ndarray, " token"]
    end: Int64[np.ndarray, " token"]
    """Characters `start` up to `end` of the text; equal for tokens that are not of the text."""
    kind: Int64[np.ndarray, " token"]
    """What the token is: the cache's column `special`."""
    truncated: int
    """Tokens cut off at the end of the window."""
    cut: int
    """Character at which the cut-off tokens begin; the text's length where none is cut off."""


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of one text; the fields are the columns of a cache."""

    position: Int64[np.ndarray, " row"]
    subwords: Int64[np.ndarray, " row"]
    token: Int64[np.ndarray, " row"]
    word: Int64[np.ndarray, " row"]
    char_start: Int64[np.ndarray, " row"]
    char_end: Int64[np.ndarray, " row"]
    special: Int64[np.ndarray, " row"]

    def __len__(self) -> int:
        return len(self.position)

    def take(self, which: Bool[np.ndarray, " row"]) -> "Rows":
        """The chosen rows."""
        return Rows(**{name: getattr(self, name)[which] for name in self.__slots__})


def find_words(text: str) -> list[tuple[int, int]]:
    """Character spans of the words and punctuation marks of a text."""
    return [match.span() for match in _WORD.finditer(text)]


def token_rows(tokens: Tokens) -> Rows:
    """One row per token, those that are not of the text included."""
    count = len(tokens.ids)
    return Rows(
        position=np.arange(count),
        subwords=np.ones(count, dtype=np.int64),
        token=tokens.ids,
        word=np.full(count, -1, dtype=np.int64),
        char_start=tokens.start,
        char_end=tokens.end,
        special=tokens.kind,
    )


def word_rows(text: str, tokens: Tokens) -> tuple[Rows, int]:
    """One row per word that has sub-words, and one per token that is not of the text, in token order.

    Returns
    -------
    rows, lost
        `lost` counts words that the tokenizer gave no sub-word; words cut by the window are not counted, and left out.
    """
    spans = np.array(find_words(text), dtype=np.int64).reshape(-1, 2)
    ordinary = np.flatnonzero((tokens.kind == TEXT) & (tokens.end > tokens.start))
    # Offsets ascend but for oddities of some normalisers; made sure of, since the search below relies on it.
    ends = np.maximum.accumulate(tokens.end[ordinary])
    starts = np.minimum.accumulate(tokens.start[ordinary][::-1])[::-1]
    # Judged by what was cut off: the last token kept may be the first of several that share one character.
    spans = spans[spans[:, 1] <= tokens.cut]
    first = np.searchsorted(ends, spans[:, 0], side="right")
    last = np.searchsorted(starts, spans[:, 1], side="left") - 1
    has = first <= last
    number = np.flatnonzero(has)
    first_position, last_position = ordinary[first[has]], ordinary[last[has]]
    special = np.flatnonzero(tokens.kind != TEXT)
    ones = np.ones(len(special), dtype=np.int64)
    position = np.concatenate([last_position, special])
    order = np.lexsort((np.concatenate([number, -ones]), position))
    rows = Rows(
        position=position[order],
        subwords=np.concatenate([last_position - first_position + 1, ones])[order],
        token=tokens.ids[position[order]],
        word=np.concatenate([number, -ones])[order],
        char_start=np.concatenate([spans[has, 0], tokens.start[special]])[order],
        char_end=np.concatenate([spans[has, 1], tokens.end[special]])[order],
        special=np.concatenate([0 * number, tokens.kind[special]])[order],
    )
    return rows, int((~has).sum())


def kinds_of(added: Bool[np.ndarray, " token"]) -> Int64[np.ndarray, " token"]:
    """Kinds of the tokens of a text, by which of them the tokenizer added."""
    kinds = np.where(added, SPECIAL, TEXT)
    if len(kinds) and added[0]:
        kinds[0] = LEADING
    return kinds


def under(rows: Rows, *, special: Policy, instruction: Policy) -> Rows:
    """The rows that the policies leave, marked as they say."""
    of_special = (rows.special == LEADING) | (rows.special == SPECIAL)
    of_instruction = rows.special == INSTRUCTION
    kept = (of_special & (special == "keep")) | (of_instruction & (instruction == "keep"))
    dropped = (of_special & (special == "drop")) | (of_instruction & (instruction == "drop"))
    return replace(rows, special=np.where(kept, TEXT, rows.special)).take(~dropped)
