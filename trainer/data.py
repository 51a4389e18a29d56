"""Which texts train and which measure, and the training rows' statistics."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int64

from ..cache.reader import Cache
from ..cache.statistics import SiteStatistics
from ..errors import ConfigError
from ..progress import Progress
from .config import TrainConfig


@dataclass(frozen=True)
class Texts:
    """The two sides, as masks over the rows of `Cache.texts`."""

    train: Bool[np.ndarray, " text"]
    held_out: Bool[np.ndarray, " text"]

    @classmethod
    def of(cls, cache: Cache, config: TrainConfig) -> "Texts":
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
        rows, codes = len(texts.train_rows(cache, config)), config.quantizer.codes
        if rows < codes:
            raise ConfigError(
                f"{cache.path} gives {rows} training rows, fewer than the {codes} codes: "
                f"use --codes N with N no more than {rows}, or extract more texts"
            )
        if config.start.rows < codes:
            raise ConfigError(
                f"start.rows = {config.start.rows} is fewer than the {codes} codes: set start.rows to {codes} or more"
            )
        return texts

    def train_rows(self, cache: Cache, config: TrainConfig) -> Int64[np.ndarray, " row"]:
        """Places of the training rows."""
        return cache.rows_of(self.train, special=config.special)


def _share(cache: Cache, chosen: Bool[np.ndarray, " text"], config: TrainConfig) -> Bool[np.ndarray, " text"]:
    """A seeded share of the distinct texts; texts that are equal stay on one side."""
    contents = np.asarray(cache.texts["text_sha256"].to_pylist(), dtype=str)
    distinct = np.unique(contents[chosen])
    if len(distinct) < 2:
        raise ConfigError(
            f"{cache.path} holds {len(distinct)} distinct texts in {', '.join(config.split)}: at least 2 are needed, "
            "one to train on and one to hold out; or name a split with --held-out"
        )
    wanted = min(max(1, round(config.fit.held_out_share * len(distinct))), len(distinct) - 1)
    picked = np.random.default_rng(config.seed).permutation(len(distinct))[:wanted]
    return chosen & np.isin(contents, distinct[picked])


def statistics(
    cache: Cache, rows: Int64[np.ndarray, " row"], sites: tuple[str, ...], *, progress: Progress
) -> dict[str, SiteStatistics]:
    """Mean and variance of the rows at each site, in float64."""
    progress.begin("statistics", len(rows), "row")
    parts: dict[str, list[SiteStatistics]] = {site: [] for site in sites}
    for block, vectors in cache.blocks(tuple(parts), rows):
        for site, values in vectors.items():
            parts[site].append(SiteStatistics.of(values))
        progress.advance(len(block))
    return {site: SiteStatistics.merged(blocks, width=cache.width(site)) for site, blocks in parts.items()}
