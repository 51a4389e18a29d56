"""Shuffled batches of rows, streamed from disk.

The chunks of all shards are visited in random order and held in pools; a pool's rows are shuffled and cut into batches,
and a batch may span two pools. Memory is that of two pools and of the texts, however many rows the cache has.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Int64

from ..errors import ConfigError
from .chosen import ChosenRows, Special
from .pools import POOL_BYTES, THREADS, Pool, Pools, check_rank
from .reader import Cache

# An epoch's first pools are so small, and grow so slowly, that batches come soon and are not waited for later.
_FIRST_POOLS = tuple(1.5**number / 16 for number in range(7))


@dataclass(frozen=True)
class RowBatch:
    """Rows in random order."""

    values: dict[str, Float32[np.ndarray, "row _d"]]
    """Site → vectors."""
    row: Int64[np.ndarray, " row"]
    """The rows' places in the cache."""


@dataclass(frozen=True)
class _Plan:
    """Some chunks of an epoch, whose rows are the epoch's rows `first` up to `first + rows`."""

    stream: "RowStream"
    chunks: Int64[np.ndarray, " chunk"]
    seed: tuple[int, ...]
    first: int
    rows: int
    start: int
    """The epoch's row to start at; those before are skipped."""

    @property
    def _end(self) -> int:
        return min(self.first + self.rows, self.stream.rows_used)

    @property
    def continues(self) -> bool:
        return self._end < self.stream.rows_used and self._end % self.stream.batch_rows != 0

    def places(self) -> Int64[np.ndarray, " row"]:
        size = self.stream.chunk_rows
        parts = []
        for chunk in self.chunks.tolist():
            start, end = chunk * size, (chunk + 1) * size
            whole = self.stream.per_chunk[chunk] == size
            parts.append(np.arange(start, end) if whole else self.stream.chosen.between(start, end))
        return np.concatenate(parts)

    def steps(self) -> list[Int64[np.ndarray, " _row"]]:
        """Rows of the pool's buffer for each batch, of this rank."""
        stream, start = self.stream, max(self.start, self.first)
        order = np.random.default_rng(self.seed).permutation(self.rows) + 1
        size, steps = stream.batch_rows, []
        while start < self._end:
            inside = start % size
            end = min(start - inside + size, self._end)
            own = (stream.rank - inside) % stream.ranks
            steps.append(order[start - self.first + own : end - self.first : stream.ranks])
            start = end
        return steps


class RowStream:
    """Batches of the chosen rows of a cache, in an order that is a pure function of seed, epoch and step.

    Parameters
    ----------
    cache
        Where to read.
    sites
        The sites to read.
    texts
        Which rows of `cache.texts`.
    special
        Which special rows take part.
    seed
        Decides the order, together with the epoch.
    batch_rows
        Rows of a batch, over all ranks; an epoch's last one may have fewer.
    drop_last
        Leave that one out.
    pool_bytes
        Rows that are shuffled together, as stored, over all sites; at least a chunk and a batch. Twice that much is
        held in memory, and where all rows fit into it they are one pool that stays. The order depends on it.
    rank, ranks
        Row r of a batch goes to rank r mod `ranks`; the batches are the same for every number of ranks. A rank may get
        no row of a batch that has fewer rows than there are ranks. Each rank decodes every chunk.
    threads
        Threads that read.

    Raises
    ------
    ConfigError
        Where no row or no batch is left, or a setting is out of range.
    """

    def __init__(
        self,
        cache: Cache,
        sites: Sequence[str],
        texts: Bool[np.ndarray, " text"],
        *,
        special: Special,
        seed: int,
        batch_rows: int,
        drop_last: bool = False,
        pool_bytes: int = POOL_BYTES,
        rank: int = 0,
        ranks: int = 1,
        threads: int = THREADS,
    ) -> None:
        check_rank(rank, ranks)
        if batch_rows < 1:
            raise ConfigError(f"batch_rows is {batch_rows}: a batch needs at least 1 row")
        self.cache = cache
        self.sites = tuple(sites)
        self.seed = seed
        self.batch_rows = batch_rows
        self.rank, self.ranks = rank, ranks
        self.chosen: ChosenRows = cache.chosen(texts, special=special)
        self.chunk_rows = cache.manifest.geometry.chunk_rows
        self.per_chunk = self.chosen.per_chunk()
        rows = int(self.per_chunk.sum())
        self.rows_used = rows // batch_rows * batch_rows if drop_last else rows
        """Rows in all batches of an epoch."""
        if self.rows_used == 0:
            raise ConfigError(
                f"the chosen texts of {cache.path} have {rows} rows, too few for a batch: "
                "choose other splits or special rows, or a smaller batch"
            )
        self._pool_rows = max(1, pool_bytes // cache.row_bytes(self.sites))
        self._fits = rows <= 2 * self._pool_rows
        largest = rows if self._fits else max(self._pool_rows, batch_rows + self.chunk_rows)
        self._pools = Pools(cache, self.sites, (), rows=largest, keep=self._fits, threads=threads)

    @property
    def steps(self) -> int:
        """Batches in an epoch."""
        return -(-self.rows_used // self.batch_rows)

    def epoch(self, epoch: int, *, start_step: int = 0) -> Iterator[RowBatch]:
        """The batches of an epoch, from `start_step` on. Each is fresh memory, the caller's to keep or change."""
        start = start_step * self.batch_rows
        plans = [
            plan for plan in self._plans(epoch, start) if start < plan.first + plan.rows and plan.first < self.rows_used
        ]
        return self._pools.batches(plans, self._make)

    def _plans(self, epoch: int, start: int) -> Iterator[_Plan]:
        chunks = np.flatnonzero(self.per_chunk)
        chunks = np.random.default_rng([self.seed, epoch]).permutation(chunks)
        counts = self.per_chunk[chunks].tolist()
        number = first = begin = rows = 0
        for end, count in enumerate([*counts, 0]):
            full = rows + count > self._pool_rows * (_FIRST_POOLS[number] if number < len(_FIRST_POOLS) else 1)
            if end == len(counts) or (full and rows >= self.batch_rows and not self._fits):
                seed = (self.seed, epoch, number + 1)
                yield _Plan(self, np.sort(chunks[begin:end]), seed, first, rows, start)
                number, first, begin, rows = number + 1, first + rows, end, 0
            rows += count

    def _make(self, parts: list[tuple[Pool, Int64[np.ndarray, " _row"]]]) -> RowBatch:
        rows = sum(len(index) for _, index in parts)
        values = self._pools.empty(rows)
        places = np.empty(rows, dtype=np.int64)
        done = 0
        for pool, index in parts:
            buffer, part = pool.wait(), slice(done, done + len(index))
            places[part] = buffer.places[index]
            self._pools.gather(buffer, index, {site: whole[part] for site, whole in values.items()})
            done += len(index)
        return RowBatch(values=values, row=places)
