"""Exact, mergeable statistics of a site: its values, and what encoding did to them.

Means and squared deviations merge by Chan, Golub & LeVeque (1983). Shards are merged in their order and in float64, so
the result does not depend on who computed which shard. Norms are counted in a fixed logarithmic histogram, whose merge
is a sum; its quantiles are exact to one bin (4.4 %).

Sums run in an order that no vector unit changes: channel by channel down the rows, and NumPy's pairwise order within a
row. So the same values give the same statistics, to the last bit, on another machine.
"""

import math
from collections.abc import Iterable
from typing import Annotated

import numpy as np
from jaxtyping import Float, Float32
from pydantic import Field

from .frozen import SOON_REFUSED, Count, Frozen

BINS_PER_OCTAVE = 16
# The bin of rows whose norm is zero, below that of any positive float32.
ZERO_BIN = -10_000
# Rows that are worked on at a time, so that they stay in the processor's cache. Part of the result's last bits.
_BLOCK = 128

_Floats = Annotated[list[float], SOON_REFUSED]
# The bins of float32 norms, and of the ratios of two.
_Bin = Annotated[int, Field(ge=ZERO_BIN, le=-ZERO_BIN)]
_Histogram = Annotated[dict[_Bin, Count], SOON_REFUSED]


class SiteStatistics(Frozen):
    """Statistics of the rows of one site, of the values as stored."""

    count: Count
    mean: _Floats
    squares: _Floats
    """Sum of squared deviations from the mean, per channel."""
    norm_histogram: _Histogram
    """⌊16 log2(norm)⌋ → rows."""

    @classmethod
    def of(cls, rows: Float[np.ndarray, "row d"]) -> "SiteStatistics":
        """Statistics of one block of rows."""
        if len(rows) == 0:
            return cls.empty(rows.shape[1])
        count, mean, squares = 0, np.zeros(rows.shape[1]), np.zeros(rows.shape[1])
        norms = np.empty(len(rows))
        for start in range(0, len(rows), _BLOCK):
            values = rows[start : start + _BLOCK].astype(np.float64)
            norms[start : start + _BLOCK] = np.sqrt((values * values).sum(axis=1))
            own = values.mean(axis=0)
            values -= own
            values *= values
            count = _merge(count, mean, squares, len(values), own, values.sum(axis=0))
        return cls(count=count, mean=mean.tolist(), squares=squares.tolist(), norm_histogram=_histogram(norms))

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
            count = _merge(count, mean, squares, part.count, np.array(part.mean), np.array(part.squares))
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
        return _quantile(self.norm_histogram, share)


class EncodingLoss(Frozen):
    """What storing did to the values of one site: the values stored against those that were to be stored."""

    rows: Count
    values: Count
    lost: Count
    """Values that were not zero and are stored as zero."""
    squares: float
    """Sum of the squares of the values to be stored."""
    error_squares: float
    """Sum of the squares of (stored − to be stored)."""
    cosine_sum: float
    """Sum over rows of the cosine between the two; 1 for a row of zeros, 0 for one that became zeros."""
    worst_row: float
    """Largest ‖stored − to be stored‖ / ‖to be stored‖ of a row; 0 for a row of zeros."""
    histogram: _Histogram
    """⌊16 log2(‖stored − to be stored‖ / ‖to be stored‖)⌋ → rows."""

    @classmethod
    def of(cls, values: Float32[np.ndarray, "row d"], stored: Float32[np.ndarray, "row d"]) -> "EncodingLoss":
        """The loss of one block of rows."""
        error, own, other = (np.empty(len(values)) for _ in range(3))
        lost = 0
        for start in range(0, len(values), _BLOCK):
            part = slice(start, start + _BLOCK)
            lost += int(np.count_nonzero((stored[part] == 0) & (values[part] != 0)))
            before, after = values[part].astype(np.float64), stored[part].astype(np.float64)
            other[part] = (after * after).sum(axis=1)
            after -= before
            after *= after
            error[part] = after.sum(axis=1)
            before *= before
            own[part] = before.sum(axis=1)
        relative = np.sqrt(np.divide(error, own, out=np.zeros(len(values)), where=own > 0))
        # a·b = (a² + b² − (a − b)²) / 2 saves one pass over the values.
        product = np.sqrt(own * other)
        cosine = np.divide((own + other - error) / 2, product, out=(own == 0).astype(float), where=product > 0)
        return cls(
            rows=len(values),
            values=values.size,
            lost=lost,
            squares=float(own.sum()),
            error_squares=float(error.sum()),
            cosine_sum=float(cosine.sum()),
            worst_row=float(relative.max(initial=0.0)),
            histogram=_histogram(relative),
        )

    @classmethod
    def merged(cls, parts: Iterable["EncodingLoss"]) -> "EncodingLoss":
        """The loss of all parts together, merged in the order given."""
        total = {"rows": 0, "values": 0, "lost": 0, "squares": 0.0, "error_squares": 0.0, "cosine_sum": 0.0}
        worst, histogram = 0.0, dict[int, int]()
        for part in parts:
            for name in total:
                total[name] += getattr(part, name)
            worst = max(worst, part.worst_row)
            for level, rows in part.histogram.items():
                histogram[level] = histogram.get(level, 0) + rows
        return cls.model_validate({**total, "worst_row": worst, "histogram": dict(sorted(histogram.items()))})

    @property
    def relative_l2(self) -> float:
        """√(Σ error² / Σ value²) over all values."""
        return math.sqrt(self.error_squares / self.squares) if self.squares else 0.0

    @property
    def median_row(self) -> float:
        """Median over rows of the relative error, to one bin of its histogram (4.4 %)."""
        return _quantile(self.histogram, 0.5)

    @property
    def mean_cosine(self) -> float:
        """Mean over rows of the cosine between stored and original."""
        return self.cosine_sum / self.rows if self.rows else 1.0

    @property
    def lost_share(self) -> float:
        """Share of the values that were not zero and are stored as zero."""
        return self.lost / self.values if self.values else 0.0


def _merge(
    count: int,
    mean: Float[np.ndarray, " d"],
    squares: Float[np.ndarray, " d"],
    more: int,
    more_mean: Float[np.ndarray, " d"],
    more_squares: Float[np.ndarray, " d"],
) -> int:
    """Merge a part into `mean` and `squares`, in place (Chan, Golub & LeVeque 1983, eq. 2.1); returns the new count."""
    total = count + more
    shift = more_mean - mean
    squares += more_squares
    squares += shift * shift * (count * more / total)
    mean += shift * (more / total)
    return total


def _histogram(values: Float[np.ndarray, " row"]) -> dict[int, int]:
    bins = np.full(len(values), ZERO_BIN)
    bins[values > 0] = np.floor(BINS_PER_OCTAVE * np.log2(values[values > 0])).astype(int)
    names, counts = np.unique(bins, return_counts=True)
    return dict(zip(names.tolist(), counts.tolist(), strict=True))


def _quantile(histogram: dict[int, int], share: float) -> float:
    """The geometric middle of the bin that holds the quantile."""
    rank, seen = share * sum(histogram.values()), 0
    for name, rows in sorted(histogram.items()):
        seen += rows
        if seen >= rank:
            return 0.0 if name == ZERO_BIN else 2.0 ** ((name + 0.5) / BINS_PER_OCTAVE)
    return math.nan
