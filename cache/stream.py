"""Shuffled batches of whole texts, streamed from disk.

Shards are visited in random order and held in pools; within a pool texts are shuffled, bucketed by length and cut into
batches, at least 90 % of whose slots are real rows. The order is a pure function of (seed, epoch); step `n` of an epoch
is the same whether the epoch was begun at step 0 or at step `n`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float32, Int64

from ..errors import ConfigError
from .chosen import ChosenRows, Special
from .pools import POOL_BYTES, THREADS, Pool, Pools, check_rank
from .reader import Cache

REAL_SHARE = 0.9


@dataclass(frozen=True)
class TextBatch:
    """Whole texts side by side, padded at the end."""

    values: dict[str, Float32[np.ndarray, "batch seq _d"]]
    """Site → vectors; zero where `mask` is false."""
    mask: Bool[np.ndarray, "batch seq"]
    """Where there is a row."""
    position: Int64[np.ndarray, "batch seq"]
    """The row's token position in its text; 0 where there is none."""
    row: Int64[np.ndarray, "batch seq"]
    """The row's place in the cache; −1 where there is none."""
    text: Int64[np.ndarray, " batch"]
    """Row of `Cache.texts`."""


@dataclass(frozen=True)
class _Texts:
    """The texts of a batch."""

    start: Int64[np.ndarray, " batch"]
    """The first row of each in the pool's buffer."""
    length: Int64[np.ndarray, " batch"]
    text: Int64[np.ndarray, " batch"]


@dataclass(frozen=True)
class _Plan:
    """Some shards of an epoch."""

    stream: "TextStream"
    shards: list[int]
    seed: tuple[int, ...]
    skip: int = 0
    """Batches to leave out, from the first on."""

    continues = False

    def places(self) -> Int64[np.ndarray, " row"]:
        return np.concatenate([self.stream.chosen.of_shard(shard) for shard in self.shards])

    def batches(self) -> list[Int64[np.ndarray, " _text"]]:
        """The chosen texts of each batch, over all ranks."""
        stream, generator = self.stream, np.random.default_rng(self.seed)
        mixed = generator.permutation(self._texts())
        lengths = stream.chosen.length[mixed]
        order = np.argsort(lengths, kind="stable")
        mixed, batches, start, real = mixed[order], [], 0, 0
        for end, length in enumerate(lengths[order].tolist()):
            count = end - start
            slots = length * (count + 1)
            full = count >= stream.texts_per_batch or slots > stream.slots_per_batch
            if count and (full or real + length < REAL_SHARE * slots):
                batches.append(mixed[start:end])
                start, real = end, 0
            real += length
        batches.append(mixed[start:])
        return [batches[index] for index in generator.permutation(len(batches))]

    def _texts(self) -> Int64[np.ndarray, " text"]:
        bounds = [np.searchsorted(self.stream.chosen.shard, [shard, shard + 1]) for shard in self.shards]
        return np.concatenate([np.arange(*pair) for pair in bounds])

    def steps(self) -> list[_Texts]:
        chosen, texts = self.stream.chosen, self._texts()
        start = 1 + np.cumsum(chosen.length[texts]) - chosen.length[texts]
        own = [batch[self.stream.rank :: self.stream.ranks] for batch in self.batches()[self.skip :]]
        return [_Texts(start[np.searchsorted(texts, batch)], chosen.length[batch], chosen.text[batch]) for batch in own]


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
        Upper limits of a batch, over all ranks.
    pool_bytes
        Rows that are shuffled together, as stored, over all sites; at least those of the fullest shard. Twice that much
        is held in memory, and where all rows fit into it they are one pool that stays. The order depends on it.
    rank, ranks
        Text t of a batch goes to rank t mod `ranks`; the batches are the same for every number of ranks, and so many on
        each. Where a batch has fewer texts than there are ranks, the last ranks get one of no texts. Each rank decodes
        every shard.
    threads
        Threads that read.

    Raises
    ------
    ConfigError
        Where no row is left, or a setting is out of range.
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
        pool_bytes: int = POOL_BYTES,
        rank: int = 0,
        ranks: int = 1,
        threads: int = THREADS,
    ) -> None:
        check_rank(rank, ranks)
        self.cache = cache
        self.sites = tuple(sites)
        self.seed = seed
        self.texts_per_batch = texts_per_batch
        self.slots_per_batch = slots_per_batch
        self.rank, self.ranks = rank, ranks
        self.chosen: ChosenRows = cache.chosen(texts, special=special)
        self.rows = self.chosen.rows
        """Rows that an epoch delivers, over all ranks."""
        if self.rows == 0:
            raise ConfigError(f"the chosen texts of {cache.path} have no rows: choose other splits or special rows")
        per_shard = np.bincount(self.chosen.shard, weights=self.chosen.length).astype(np.int64)
        self._per_shard = {shard: int(per_shard[shard]) for shard in np.flatnonzero(per_shard).tolist()}
        self._pool_rows = max(pool_bytes // cache.row_bytes(self.sites), max(self._per_shard.values()))
        keep = self.rows <= 2 * self._pool_rows
        if keep:
            self._pool_rows = self.rows
        self._pools = Pools(cache, self.sites, ("position",), rows=self._pool_rows, keep=keep, threads=threads)

    def _plans(self, epoch: int) -> Iterator[_Plan]:
        shards = np.random.default_rng([self.seed, epoch]).permutation(list(self._per_shard)).tolist()
        pools: list[list[int]] = [[]]
        rows = 0
        for shard in shards:
            if pools[-1] and rows + self._per_shard[shard] > self._pool_rows:
                pools.append([])
                rows = 0
            pools[-1].append(shard)
            rows += self._per_shard[shard]
        for number, pool in enumerate(pools):
            yield _Plan(self, sorted(pool), (self.seed, epoch, number + 1))

    def steps(self, epoch: int) -> int:
        """Batches in an epoch."""
        return sum(len(plan.batches()) for plan in self._plans(epoch))

    def epoch(self, epoch: int, *, start_step: int = 0) -> Iterator[TextBatch]:
        """The batches of an epoch, from `start_step` on. Each is fresh memory, the caller's to keep or change."""
        plans, skip = list(self._plans(epoch)), start_step
        while plans and skip and skip >= (count := len(plans[0].batches())):
            skip -= count
            plans.pop(0)
        return self._pools.batches([replace(plan, skip=skip if plan is plans[0] else 0) for plan in plans], self._make)

    def _make(self, parts: list[tuple[Pool, _Texts]]) -> TextBatch:
        ((pool, texts),) = parts
        buffer = pool.wait()
        slots = np.arange(texts.length.max(initial=0))
        mask = slots < texts.length[:, None]
        # Row 0 of the buffer is the padding.
        index = np.where(mask, texts.start[:, None] + slots, 0)
        values = self._pools.empty(*mask.shape)
        self._pools.gather(
            buffer, index.ravel(), {site: out.reshape(mask.size, out.shape[2]) for site, out in values.items()}
        )
        return TextBatch(
            values=values,
            mask=mask,
            position=buffer.columns["position"][index].astype(np.int64),
            row=buffer.places[index],
            text=texts.text,
        )
