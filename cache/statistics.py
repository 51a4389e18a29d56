"""Exact, mergeable statistics of a site: mean and variance per channel, and a histogram of norms.

Means and squared deviations merge by Chan, Golub & LeVeque (1983). Shards are merged in their order and in float64, so
the result does not depend on who computed which shard. Norms are counted in a fixed logarithmic histogram, whose merge
is a sum; its quantiles are exact to one bin (4.4 %).
"""

import math
from collections.abc import Iterable

import numpy as np
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict

BINS_PER_OCTAVE = 16
# The bin of rows whose norm is zero, below that of any positive float32.
ZERO_BIN = -10_000


class SiteStatistics(BaseModel):
    """Statistics of the rows of one site, of the values as stored."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    count: int
    mean: list[float]
    squares: list[float]
    """Sum of squared deviations from the mean, per channel."""
    norm_histogram: dict[int, int]
    """⌊16 log2(norm)⌋ → rows."""

    @classmethod
    def of(cls, rows: Float[np.ndarray, "row d"]) -> "SiteStatistics":
        """Statistics of one block of rows."""
        if len(rows) == 0:
            return cls.empty(rows.shape[1])
        values = rows.astype(np.float64)
        mean = values.mean(axis=0)
        norms = np.sqrt(np.einsum("rd,rd->r", values, values))
        values -= mean
        squares = np.einsum("rd,rd->d", values, values)
        bins = np.full(len(norms), ZERO_BIN)
        bins[norms > 0] = np.floor(BINS_PER_OCTAVE * np.log2(norms[norms > 0])).astype(int)
        names, counts = np.unique(bins, return_counts=True)
        return cls(
            count=len(rows),
            mean=mean.tolist(),
            squares=squares.tolist(),
            norm_histogram=dict(zip(names.tolist(), counts.tolist(), strict=True)),
        )

    @classmethod
    def empty(cls, width: int) -> "SiteStatistics":
        """Statistics of no rows."""
        return cls(count=0, mean=[0.0] * width, squares=[0.0] * width, norm_histogram={})

    @classmethod
    def merged(cls, parts: Iterable["SiteStatistics"], *, width: int) -> "SiteStatistics":
        """Statistics of all parts together, merged in the order given."""
        count, mean, squares = 0, np.zeros(width), np.zeros(width)
        histogram: dict[int, int] = {}
        for part in parts:
            if part.count == 0:
                continue
            total = count + part.count
            shift = np.array(part.mean) - mean
            squares += np.array(part.squares) + shift**2 * (count * part.count / total)
            mean += shift * (part.count / total)
            count = total
            for name, rows in part.norm_histogram.items():
                histogram[name] = histogram.get(name, 0) + rows
        return cls(
            count=count, mean=mean.tolist(), squares=squares.tolist(), norm_histogram=dict(sorted(histogram.items()))
        )

    def variance(self) -> Float[np.ndarray, " d"]:
        """Population variance per channel."""
        return np.array(self.squares) / max(self.count, 1)

    def norm_quantile(self, share: float) -> float:
        """The norm below which `share` of the rows lie: the geometric middle of the bin that holds it."""
        rank, seen = share * self.count, 0
        for name, rows in sorted(self.norm_histogram.items()):
            seen += rows
            if seen >= rank:
                return 0.0 if name == ZERO_BIN else 2.0 ** ((name + 0.5) / BINS_PER_OCTAVE)
        return math.nan
