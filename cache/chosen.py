"""Which rows take part: those of the chosen texts, with or without special tokens, known without listing them all."""

from collections.abc import Callable
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int64, UInt8

from ..errors import CacheCorrupt
from .layout import Geometry

Special = Literal["all", "leading", "none"]
"""Which rows not of the text take part: all, a prompt's included; the first special one (CLS, BOS); or none."""

_KINDS: dict[Special, int] = {"leading": 1, "none": 0}


class ChosenRows:
    """The chosen rows of a cache. Memory is that of the texts, not of the rows: these are worked out shard by shard.

    Parameters
    ----------
    name
        Of the cache, for errors.
    text
        Rows of `Cache.texts`, ascending.
    first_row, row_count
        Of these texts.
    special
        Which special rows take part.
    read_special
        From a shard's number to its column `special`.

    Raises
    ------
    CacheCorrupt
        Where texts overlap or reach beyond their shard.
    """

    def __init__(
        self,
        name: str,
        geometry: Geometry,
        *,
        text: Int64[np.ndarray, " text"],
        first_row: Int64[np.ndarray, " text"],
        row_count: Int64[np.ndarray, " text"],
        special: Special,
        read_special: Callable[[int], UInt8[np.ndarray, " place"]],
    ) -> None:
        self.geometry = geometry
        filled = row_count > 0
        self.text, self._first, self._end = text[filled], first_row[filled], (first_row + row_count)[filled]
        self.shard = self._first // geometry.shard_rows
        within = self._first % geometry.shard_rows + row_count[filled] <= geometry.shard_rows
        inside = (self._first >= 0) & (self._end <= geometry.row_places) & within
        if not inside.all() or (self._first[1:] < self._end[:-1]).any():
            raise CacheCorrupt(f"the texts of {name} overlap or do not fit its shards; get a whole copy of it")
        self._kinds = _KINDS.get(special)
        self._read_special = read_special
        self._kept: tuple[int, Bool[np.ndarray, " place"]] | None = None
        self.length = self._end - self._first
        if self._kinds is not None:
            self._count_kept()

    def _count_kept(self) -> None:
        for shard in np.unique(self.shard).tolist():
            mine = slice(*np.searchsorted(self.shard, [shard, shard + 1]))
            before = np.r_[0, np.cumsum(self._keeps(shard))]
            start = shard * self.geometry.shard_rows
            self.length[mine] = before[self._end[mine] - start] - before[self._first[mine] - start]
        some = self.length > 0
        self.text, self._first, self._end = self.text[some], self._first[some], self._end[some]
        self.shard, self.length = self.shard[some], self.length[some]

    def _keeps(self, shard: int) -> Bool[np.ndarray, " place"]:
        kept = self._kept
        if kept is None or kept[0] != shard:
            kept = self._kept = (shard, self._read_special(shard) <= self._kinds)
        return kept[1]

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return int(self.length.sum())

    def between(self, start: int, end: int) -> Int64[np.ndarray, " row"]:
        """Places of the chosen rows from place `start` up to `end`, which lie in one shard; ascending."""
        texts = slice(np.searchsorted(self._end, start, side="right"), np.searchsorted(self._first, end))
        first = np.maximum(self._first[texts], start)
        places = spans(first, np.minimum(self._end[texts], end) - first)
        if self._kinds is None:
            return places
        shard = start // self.geometry.shard_rows
        kept = self._keeps(shard)[places - shard * self.geometry.shard_rows]
        return np.compress(kept, places)

    def of_shard(self, shard: int) -> Int64[np.ndarray, " row"]:
        """Places of the chosen rows of a shard, ascending."""
        return self.between(shard * self.geometry.shard_rows, (shard + 1) * self.geometry.shard_rows)

    def places(self) -> Int64[np.ndarray, " row"]:
        """Places of all chosen rows, ascending."""
        parts = [self.of_shard(shard) for shard in np.unique(self.shard).tolist()]
        return np.concatenate([np.empty(0, dtype=np.int64), *parts])

    def per_chunk(self) -> Int64[np.ndarray, " chunk"]:
        """How many chosen rows lie in each inner chunk of a site, all shards together."""
        size = self.geometry.chunk_rows
        counts = np.zeros(self.geometry.row_places // size, dtype=np.int64)
        for shard in np.unique(self.shard).tolist():
            counts += np.bincount(self.of_shard(shard) // size, minlength=len(counts))
        return counts


def spans(starts: Int64[np.ndarray, " run"], lengths: Int64[np.ndarray, " run"]) -> Int64[np.ndarray, " item"]:
    """`starts[i], starts[i] + 1, …, starts[i] + lengths[i] − 1` for every run, joined."""
    offsets = np.repeat(starts - np.r_[0, np.cumsum(lengths)[:-1]], lengths)
    return offsets + np.arange(len(offsets))
