"""Which texts train and which measure, and the training rows' statistics."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32

from ..cache.chosen import ChosenRows
from ..cache.reader import Cache
from ..cache.statistics import SiteStatistics
from ..cache.stream import TextStream
from ..errors import ConfigError
from ..progress import Progress
from . import ranks
from .config import READING, MethodConfig, StreamConfig


@dataclass(frozen=True)
class Texts:
    """The two sides, as masks over the rows of `Cache.texts`."""

    train: Bool[np.ndarray, " text"]
    held_out: Bool[np.ndarray, " text"]

    @classmethod
    def of(cls, cache: Cache, config: MethodConfig) -> "Texts":
        """The sides that the settings name.

        Raises
        ------
        ConfigError
            Where a split is missing or named on both sides, or there are too few texts or rows.
        """
        chosen = cache.splits(config.split)
        if config.held_out is None:
            held_out = _share(cache, chosen, config)
        elif config.held_out in config.split:
            raise ConfigError(
                f"split {config.held_out!r} is named both for training and as held out: leave it out of one of the two"
            )
        else:
            held_out = cache.splits([config.held_out])
        texts = cls(train=chosen & ~held_out, held_out=held_out)
        rows, least = texts.train_rows(cache, config).rows, config.least_rows
        if rows < least:
            raise ConfigError(
                f"{cache.path} gives {rows} training rows, fewer than the {least} codes: "
                f"use --codes N with N no more than {rows}, or extract more texts"
            )
        return texts

    def train_rows(self, cache: Cache, config: MethodConfig) -> ChosenRows:
        """The training rows."""
        return cache.chosen(self.train, special=config.special)


def _share(cache: Cache, chosen: Bool[np.ndarray, " text"], config: MethodConfig) -> Bool[np.ndarray, " text"]:
    """A seeded share of the distinct texts; texts that are equal stay on one side."""
    contents = np.asarray(cache.texts["text_sha256"].to_pylist(), dtype=str)
    distinct = np.unique(contents[chosen])
    if len(distinct) < 2:
        raise ConfigError(
            f"{cache.path} holds {len(distinct)} distinct texts in {', '.join(config.split)}: at least 2 are needed, "
            "one to train on and one to hold out; or name a split with --held-out"
        )
    wanted = min(max(1, round(config.share * len(distinct))), len(distinct) - 1)
    picked = np.random.default_rng(config.seed).permutation(len(distinct))[:wanted]
    return chosen & np.isin(contents, distinct[picked])


def text_stream(
    cache: Cache,
    config: MethodConfig,
    side: Bool[np.ndarray, " text"],
    *,
    portions: StreamConfig = READING,
) -> TextStream:
    """This process' batches of whole texts of one side, with the vectors of both sites."""
    return TextStream(
        cache,
        tuple(dict.fromkeys([config.lower, config.upper])),
        side,
        special=config.special,
        seed=config.seed,
        texts_per_batch=portions.texts_per_batch,
        slots_per_batch=portions.slots_per_batch,
        pool_bytes=portions.pool_bytes,
        rank=ranks.number(),
        ranks=ranks.count(),
    )


def blocks(
    cache: Cache, rows: ChosenRows, sites: Iterable[str], *, size: int = 2_048
) -> Iterator[dict[str, Float32[np.ndarray, "block _d"]]]:
    """The rows' vectors at each site, in blocks of at most `size` rows, in the order in which they lie on disk.

    An encoder's hidden units take eight times a block's memory.
    """
    for shard in np.unique(rows.shard).tolist():
        for _, vectors in cache.blocks(tuple(sites), rows.of_shard(shard), size=size):
            yield vectors


def statistics(
    cache: Cache, rows: ChosenRows, sites: tuple[str, ...], *, progress: Progress
) -> dict[str, SiteStatistics]:
    """Mean and variance of the rows at each site, in float64."""
    progress.begin("statistics", rows.rows, "row")
    parts: dict[str, list[SiteStatistics]] = {site: [] for site in sites}
    for block in blocks(cache, rows, sites):
        for site, values in block.items():
            parts[site].append(SiteStatistics.of(values))
        progress.advance(len(values))
    return {site: SiteStatistics.merged(own, width=cache.width(site)) for site, own in parts.items()}
