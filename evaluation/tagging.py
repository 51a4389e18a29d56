"""Parts of speech of rows, by an English tagger whose weights come with its package.

The tagger is that of `denckring-en-pos`: an averaged perceptron trained on the English Web Treebank, which its authors
measured at 93.4 % of the treebank's test words. It sees words; punctuation and symbols are told by their characters.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
from jaxtyping import Int64

from ..errors import MissingExtra

PACKAGE = "denckring-en-pos"
_TOKEN = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")
_ENDS = frozenset(".!?")


@dataclass(frozen=True)
class Tagger:
    """A tagger and what it is called in results."""

    name: str
    tag: Callable[[Sequence[str]], list[str]]
    """The tags of the words of one sentence."""


def load_tagger() -> Tagger:
    """The tagger of the extra `pos`.

    Raises
    ------
    MissingExtra
    """
    try:
        from denckring_en_pos import tagger
    except ImportError as error:
        raise MissingExtra(f"parts of speech need the package {PACKAGE}: pip install 'clvq[pos]'") from error
    model = tagger()

    def tag(words: Sequence[str]) -> list[str]:
        # Its labels are a universal tag and a verb form.
        return [label.split("|")[0] for label in model.tag(words)]

    return Tagger(f"{PACKAGE} {version(PACKAGE)}", tag)


def tag_rows(
    tagger: Tagger, text: str, starts: Int64[np.ndarray, " row"], ends: Int64[np.ndarray, " row"]
) -> list[str | None]:
    """The tag of the first word or sign that lies in each row, by character offsets; `None` for a row without any."""
    spans = [match.span() for match in _TOKEN.finditer(text)]
    tags = _tags(tagger, [text[start:end] for start, end in spans])
    begin, end = (np.array([span[side] for span in spans], dtype=np.int64) for side in (0, 1))
    first = np.searchsorted(end, starts, side="right")
    return [
        tags[place] if place < len(spans) and begin[place] < stop else None
        for place, stop in zip(first.tolist(), ends.tolist(), strict=True)
    ]


def _tags(tagger: Tagger, tokens: Sequence[str]) -> list[str]:
    tags: list[str] = []
    sentence: list[int] = []

    def close() -> None:
        for place, tag in zip(sentence, tagger.tag([tokens[number] for number in sentence]), strict=True):
            tags[place] = tag
        sentence.clear()

    for place, token in enumerate(tokens):
        if token[0].isalnum() or token[0] == "_":
            tags.append("")
            sentence.append(place)
        else:
            tags.append("SYM" if unicodedata.category(token[0]).startswith("S") else "PUNCT")
            if token in _ENDS:
                close()
    close()
    return tags
