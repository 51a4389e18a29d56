"""The rows of a cache as the explorer sees them: a few numbers for each, whatever the texts are."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int32, Int64

from ..cache.reader import Cache
from ..errors import ConfigError
from ..evaluation.concepts import cut
from ..progress import Progress
from ..trainer.run import Run

_LONGEST_WORD = 60
_LIMITS = {"all": 3, "leading": 1, "none": 0}


@dataclass(frozen=True)
class Rows:
    """All rows that are there, in the order in which they lie on disk."""

    place: Int64[np.ndarray, " row"]
    """In the cache."""
    text: Int32[np.ndarray, " row"]
    """Row of `Cache.texts`."""
    first: Int64[np.ndarray, " text_and_end"]
    """Where the rows of each row of `Cache.texts` begin, in its order; a last entry says where they all end."""
    special: Int32[np.ndarray, " row"]
    """What kind of token it is, as the cache has it."""
    word: Int32[np.ndarray, " row"]
    """Number in `words`."""
    words: list[str]
    """In lower case; of rows that are not of the text, what they are."""

    def members(self, run: Run) -> Bool[np.ndarray, " row"]:
        """Rows of the kinds that the run was trained on."""
        there: Bool[np.ndarray, " row"] = self.special <= _LIMITS[run.config.special]
        return there


def read_rows(cache: Cache, *, progress: Progress) -> Rows:
    """The rows of the texts that this copy of the cache holds.

    Raises
    ------
    ConfigError
        Where the cache was shared without its texts, or holds no row.
    """
    if "text" not in cache.texts.column_names:
        raise ConfigError(f"{cache.path} was shared without its texts, which are what is shown: use a whole copy")
    held = list(cache.manifest.splits) if cache.selection is None else list(cache.selection.splits)
    place = cache.rows_of(cache.splits(held))
    if len(place) == 0:
        raise ConfigError(f"{cache.path} holds no rows: there is nothing to show")
    owner = cache.text_index[cache.column("text")[place]].astype(np.int32)
    numbers: dict[str, int] = {}
    word = np.empty(len(place), dtype=np.int32)
    cuts = np.r_[0, np.flatnonzero(np.diff(owner)) + 1, len(place)]
    column = cache.texts["text"]
    progress.begin("words", len(cuts) - 1, "texts")
    for start, end in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
        text = column[int(owner[start])].as_py()
        for row in range(start, end):
            said = cut(cache, int(place[row]), text)[1].strip().lower()
            word[row] = numbers.setdefault(short(said, _LONGEST_WORD) or "‹blank›", len(numbers))
        progress.advance()
    return Rows(
        place=place,
        text=owner,
        first=np.searchsorted(owner, np.arange(len(cache.texts) + 1)),
        special=cache.column("special")[place].astype(np.int32),
        word=word,
        words=list(numbers),
    )


def short(text: str, longest: int) -> str:
    """The beginning of a text that is longer."""
    return text if len(text) <= longest else f"{text[: longest - 1]}…"
