"""The evaluated texts of a cache: their rows, and which of them a removal changes."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int64

from ..cache.reader import Cache, Special

RowsChanged = Literal["salient", "cls", "all"]


@dataclass(frozen=True)
class TextRows:
    """All rows of one text, in token order."""

    text: int
    """Row of `Cache.texts`."""
    row: Int64[np.ndarray, " row"]
    """Place in the cache."""
    position: Int64[np.ndarray, " row"]
    """Last sub-word of the row."""
    subwords: Int64[np.ndarray, " row"]
    token: Int64[np.ndarray, " row"]
    """Id of the token at `position`."""
    special: Int64[np.ndarray, " row"]

    def first_special(self) -> int | None:
        """Number of the row of the leading special token (CLS, BOS), where there is one."""
        found = np.flatnonzero(self.special == 1)
        return int(found[0]) if len(found) else None

    def ordinary(self) -> Int64[np.ndarray, " _ordinary"]:
        """Numbers of the rows that are no special tokens."""
        return np.flatnonzero(self.special == 0)

    def positions(self, number: int) -> slice:
        """The token positions that a row spans."""
        last = int(self.position[number])
        return slice(last - int(self.subwords[number]) + 1, last + 1)


def rows_by_text(cache: Cache, texts: Bool[np.ndarray, " text"]) -> list[TextRows]:
    """The rows of each chosen text, in the order of `Cache.texts`; texts without rows are left out."""
    rows = cache.rows_of(texts)
    owner = cache.text_index[cache.column("text")[rows]]
    cuts = np.flatnonzero(np.diff(owner)) + 1
    columns = {name: cache.column(name)[rows].astype(np.int64) for name in ("position", "subwords", "token", "special")}
    result = []
    for part in np.split(np.arange(len(rows)), cuts):
        if len(part):
            mine = {name: values[part] for name, values in columns.items()}
            result.append(TextRows(text=int(owner[part[0]]), row=rows[part], **mine))
    return result


def changed_rows(
    rows: TextRows, salient: int | None, which: RowsChanged, special: Special
) -> Int64[np.ndarray, " row"]:
    """Numbers of the rows of a text that a removal changes; none where the text has no such row.

    Parameters
    ----------
    salient
        Number of the most salient row.
    special
        With `all`: the special rows that the run was trained on are changed too.
    """
    if which == "all":
        limit = {"all": 3, "leading": 1, "none": 0}[special]
        return np.flatnonzero(rows.special <= limit)
    number = salient if which == "salient" else rows.first_special()
    return np.array([] if number is None else [number], dtype=np.int64)
