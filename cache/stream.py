"""Shuffled batches of whole texts, streamed from disk.

Shards are visited in random order and read in pools; within a pool texts are shuffled, bucketed by length and cut into
batches, at least 90 % of whose slots are real rows. The order is a pure function of (seed, epoch); step `n` of an epoch
is the same whether the epoch was begun at step 0 or at step `n`. One thread reads the next pool while this one is used.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Int64, Shaped

from ..errors import ConfigError
from .encoding import from_bits
from .reader import Cache, Special

REAL_SHARE = 0.9


@dataclass(frozen=True)
class TextBatch:
    """Whole texts side by side, padded at the end."""

    values: dict[str, Float32[np.ndarray, "batch seq d"]]
    """Site → vectors; zero where `mask` is false."""
    mask: Bool[np.ndarray, "batch seq"]
    """Where there is a row."""
    position: Int64[np.ndarray, "batch seq"]
    """The row's token position in its text; 0 where there is none."""
    row: Int64[np.ndarray, "batch seq"]
    """The row's place in the cache; −1 where there is none."""
    text: Int64[np.ndarray, " batch"]
    """Row of `Cache.texts`."""


class TextStream:
    """Batches of the chosen texts of a cache.

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
    texts_per_batch, slots_per_batch
        Upper limits of a batch.
    pool_rows
        Rows held in memory at a time (twice: one pool in use, one being read).

    Raises
    ------
    ConfigError
        Where no row is left.
    """

    def __init__(
        self,
        cache: Cache,
        sites: Sequence[str],
        texts: Bool[np.ndarray, " text"],
        *,
        special: Special,
        seed: int,
        texts_per_batch: int = 1 << 30,
        slots_per_batch: int = 1 << 30,
        pool_rows: int = 262_144,
    ) -> None:
        self.cache = cache
        self.sites = tuple(sites)
        self.seed = seed
        self.texts_per_batch = texts_per_batch
        self.slots_per_batch = slots_per_batch
        self.pool_rows = pool_rows
        self._rows = cache.rows_of(texts, special=special)
        if len(self._rows) == 0:
            raise ConfigError(f"the chosen texts of {cache.path} have no rows: choose other splits or special rows")
        # A text's rows lie side by side, and texts ascend, so each text is one run.
        owner = cache.column("text")[self._rows]
        self._starts = np.flatnonzero(np.r_[True, owner[1:] != owner[:-1]])
        self._lengths = np.diff(np.r_[self._starts, len(self._rows)])
        self._texts = cache.text_index[owner[self._starts]]
        self._shards = self._rows[self._starts] // cache.manifest.geometry.shard_rows

    @property
    def rows(self) -> Int64[np.ndarray, " row"]:
        """The places of all rows that the stream delivers in an epoch."""
        return self._rows

    def plan(self, epoch: int) -> list[list[Int64[np.ndarray, " _"]]]:
        """Pools of batches of an epoch; the numbers are the stream's own text numbers."""
        generator = np.random.default_rng([self.seed, epoch])
        shards = generator.permutation(np.unique(self._shards))
        members = np.split(np.arange(len(self._texts)), np.flatnonzero(np.diff(self._shards)) + 1)
        by_shard = {int(self._shards[part[0]]): part for part in members}
        pools: list[Int64[np.ndarray, " text"]] = []
        pool: list[Int64[np.ndarray, " text"]] = []
        rows = 0
        for shard in shards.tolist():
            part = by_shard[shard]
            count = int(self._lengths[part].sum())
            if pool and rows + count > self.pool_rows:
                pools.append(np.concatenate(pool))
                pool, rows = [], 0
            pool.append(part)
            rows += count
        pools.append(np.concatenate(pool))
        return [self._batches(part, generator) for part in pools]

    def _batches(
        self, pool: Int64[np.ndarray, " text"], generator: np.random.Generator
    ) -> list[Int64[np.ndarray, " _"]]:
        mixed = generator.permutation(pool)
        mixed = mixed[np.argsort(self._lengths[mixed], kind="stable")]
        batches, start, real = [], 0, 0
        for end, length in enumerate(self._lengths[mixed].tolist()):
            count = end - start
            slots = length * (count + 1)
            full = count >= self.texts_per_batch or slots > self.slots_per_batch
            if count and (full or real + length < REAL_SHARE * slots):
                batches.append(mixed[start:end])
                start, real = end, 0
            real += length
        batches.append(mixed[start:])
        return [batches[index] for index in generator.permutation(len(batches))]

    def steps(self, epoch: int) -> int:
        """Batches in an epoch."""
        return sum(map(len, self.plan(epoch)))

    def epoch(self, epoch: int, *, start_step: int = 0) -> Iterator[TextBatch]:
        """The batches of an epoch, from `start_step` on."""
        pools = self.plan(epoch)
        skip = start_step
        while pools and skip >= len(pools[0]):
            skip -= len(pools.pop(0))
        with ThreadPoolExecutor(1, thread_name_prefix="clvq-read") as reader:
            ahead = reader.submit(self._read, pools[0]) if pools else None
            for number, batches in enumerate(pools):
                if ahead is None:
                    return
                rows, bits = ahead.result()
                ahead = reader.submit(self._read, pools[number + 1]) if number + 1 < len(pools) else None
                for batch in batches[skip:]:
                    yield self._assemble(batch, rows, bits)
                skip = 0

    def _read(
        self, batches: list[Int64[np.ndarray, " _"]]
    ) -> tuple[Int64[np.ndarray, " row"], dict[str, Shaped[np.ndarray, "row d"]]]:
        texts = np.sort(np.concatenate(batches))
        rows = self._rows[_spans(self._starts[texts], self._lengths[texts])]
        return rows, {site: self.cache.bits(site, rows) for site in self.sites}

    def _assemble(
        self,
        batch: Int64[np.ndarray, " batch"],
        pool_rows: Int64[np.ndarray, " row"],
        bits: dict[str, Shaped[np.ndarray, "row d"]],
    ) -> TextBatch:
        lengths = self._lengths[batch]
        mask = np.arange(lengths.max()) < lengths[:, None]
        flat = self._rows[_spans(self._starts[batch], lengths)]
        inside = np.searchsorted(pool_rows, flat)
        values = {}
        for site in self.sites:
            out = np.zeros((*mask.shape, self.cache.width(site)), dtype=np.float32)
            out[mask] = from_bits(bits[site][inside], self.cache.manifest.sites[site].encoding)
            values[site] = out
        position = np.zeros(mask.shape, dtype=np.int64)
        position[mask] = self.cache.column("position")[flat]
        row = np.full(mask.shape, -1, dtype=np.int64)
        row[mask] = flat
        return TextBatch(values=values, mask=mask, position=position, row=row, text=self._texts[batch])


def _spans(starts: Int64[np.ndarray, " run"], lengths: Int64[np.ndarray, " run"]) -> Int64[np.ndarray, " item"]:
    """`starts[i], starts[i] + 1, …, starts[i] + lengths[i] − 1` for every run, joined."""
    offsets = np.repeat(starts - np.r_[0, np.cumsum(lengths)[:-1]], lengths)
    return offsets + np.arange(len(offsets))
