"""What two attributes of the same rows tell of each other, without the share that they tell by chance."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64
from scipy.special import gammaln  # type: ignore[import-untyped]

_TERMS_AT_ONCE = 4_000_000
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Pairs:
    """How often values of two attributes occur together: the pairs that occur, ordered by the first and the second."""

    first: Int64[np.ndarray, " pair"]
    second: Int64[np.ndarray, " pair"]
    count: Int64[np.ndarray, " pair"]


def pairs_of(first: Int64[np.ndarray, " row"], second: Int64[np.ndarray, " row"]) -> Pairs:
    """The pairs of values, none of them negative, that rows have."""
    width = int(second.max(initial=0)) + 1
    keys, count = np.unique(first.astype(np.int64) * width + second, return_counts=True)
    return Pairs(keys // width, keys % width, count)


def most_frequent(pairs: Pairs, size: int) -> Int64[np.ndarray, " size"]:
    """Of each value of the first attribute, below `size`, the second's most frequent value; −1 where it never occurs.

    Of equally frequent values it is the smallest.
    """
    best = np.full(size, -1, dtype=np.int64)
    order = np.lexsort((pairs.second, -pairs.count, pairs.first))
    values, place = np.unique(pairs.first[order], return_index=True)
    best[values] = pairs.second[order][place]
    return best


def purity(pairs: Pairs) -> float:
    """Share of rows whose second value is the most frequent one with their first; NaN without rows."""
    if len(pairs.count) == 0:
        return float("nan")
    starts = np.unique(pairs.first, return_index=True)[1]
    return float(np.maximum.reduceat(pairs.count, starts).sum() / pairs.count.sum())


def effective_numbers(pairs: Pairs, size: int) -> Float64[np.ndarray, " size"]:
    """exp(entropy of the second attribute) of each value of the first, below `size`; NaN where it never occurs."""
    totals = np.bincount(pairs.first, weights=pairs.count, minlength=size)
    shares = pairs.count / totals[pairs.first]
    entropy = np.bincount(pairs.first, weights=-shares * np.log(shares), minlength=size)
    numbers: Float64[np.ndarray, " size"] = np.where(totals > 0, np.exp(entropy), np.nan)
    return numbers


def effective_number(pairs: Pairs) -> float:
    """exp(entropy of the second attribute given the first), the geometric mean over rows; NaN without rows."""
    if len(pairs.count) == 0:
        return float("nan")
    return float(np.exp(_entropy(pairs.count) - _entropy(_sums(pairs.first, pairs.count))))


def adjusted_information(pairs: Pairs) -> float:
    """Mutual information adjusted for chance, arithmetic mean of the entropies (Vinh et al. 2010); NaN without rows.

    As scikit-learn's `adjusted_mutual_info_score`, but rows and columns of equal sums are computed once.
    """
    if len(pairs.count) == 0:
        return float("nan")
    rows = int(pairs.count.sum())
    sums = [_sums(values, pairs.count) for values in (pairs.first, pairs.second)]
    if any(len(part) == 1 for part in sums):
        return float(all(len(part) == 1 for part in sums))
    found = _entropy(sums[0]) + _entropy(sums[1]) - _entropy(pairs.count)
    (first, often), (second, times) = (np.unique(part, return_counts=True) for part in sums)
    a, b = (grid.ravel() for grid in np.meshgrid(first, second, indexing="ij"))
    by_chance = float(expected_terms(a, b, np.full(len(a), rows)) @ np.outer(often, times).ravel())
    room = (_entropy(sums[0]) + _entropy(sums[1])) / 2 - by_chance
    # Where each row has values of its own, chance finds all that there is.
    return float((found - by_chance) / room) if room > _ROUNDING else 1.0


def _sums(values: Int64[np.ndarray, " pair"], count: Int64[np.ndarray, " pair"]) -> Int64[np.ndarray, " value"]:
    place = np.unique(values, return_inverse=True)[1]
    return np.bincount(place, weights=count).astype(np.int64)


def _entropy(count: Int64[np.ndarray, " value"]) -> float:
    shares = count / count.sum()
    return float(-(shares * np.log(shares)).sum())


def expected_terms(
    a: Int64[np.ndarray, " cell"], b: Int64[np.ndarray, " cell"], n: Int64[np.ndarray, " cell"]
) -> Float64[np.ndarray, " cell"]:
    """What a cell of a table adds to the mutual information, in nats, on average over all orders of the rows.

    Parameters
    ----------
    a, b, n
        The cell's row sum and column sum, and the sum of its table.
    """
    result = np.zeros(len(a))
    log_factorial = gammaln(np.arange(int(n.max(initial=0)) + 1) + 1.0)
    low = np.maximum(1, a + b - n)
    lengths = np.minimum(a, b) - low + 1
    ends = np.cumsum(lengths)
    start = 0
    while start < len(a):
        before = ends[start - 1] if start else 0
        end = max(start + 1, int(np.searchsorted(ends, before + _TERMS_AT_ONCE, side="right")))
        cell = np.repeat(np.arange(start, end), lengths[start:end])
        k = np.arange(len(cell)) - np.repeat(ends[start:end] - lengths[start:end] - before, lengths[start:end])
        k += low[cell]
        ka, kb, kn = a[cell], b[cell], n[cell]
        # The hypergeometric probability that k of the b rows are among the a.
        log_probability = (
            (log_factorial[ka] + log_factorial[kb] + log_factorial[kn - ka] + log_factorial[kn - kb])
            - (log_factorial[kn] + log_factorial[k] + log_factorial[ka - k] + log_factorial[kb - k])
            - log_factorial[kn - ka - kb + k]
        )
        terms = k / kn * np.log(kn * k / (ka * kb)) * np.exp(log_probability)
        result[start:end] = np.bincount(cell - start, weights=terms, minlength=end - start)
        start = end
    return result


def information_within(
    given: Int64[np.ndarray, " row"], first: Int64[np.ndarray, " row"], second: Int64[np.ndarray, " row"]
) -> tuple[float, float]:
    """I(first; second | given) in bits per row, and what it is on average where `first` is shuffled within `given`.

    The average over all shuffles is exact: no shuffle is drawn. Both are NaN without rows.
    """
    rows = len(given)
    if rows == 0:
        return float("nan"), float("nan")
    with_first, with_second = pairs_of(given, first), pairs_of(given, second)
    all_three = pairs_of(_number(given, first), second)
    sums = np.bincount(given)
    entropies = [_entropy(part) for part in (with_first.count, with_second.count, all_three.count, sums[sums > 0])]
    found = entropies[0] + entropies[1] - entropies[2] - entropies[3]
    # Each value of `first` within a value of `given`, beside each of `second` there.
    there = np.bincount(with_second.first, minlength=len(sums))
    begin = np.cumsum(there) - there
    repeat = there[with_first.first]
    left = np.repeat(np.arange(len(with_first.first)), repeat)
    step = np.arange(len(left)) - np.repeat(np.cumsum(repeat) - repeat, repeat)
    right = begin[with_first.first[left]] + step
    cells = np.stack([with_first.count[left], with_second.count[right], sums[with_first.first[left]]])
    unlike, often = np.unique(cells, axis=1, return_counts=True)
    by_chance = float((expected_terms(*unlike) * unlike[2]) @ often) / rows
    return max(found, 0.0) / np.log(2), by_chance / np.log(2)


def _number(first: Int64[np.ndarray, " row"], second: Int64[np.ndarray, " row"]) -> Int64[np.ndarray, " row"]:
    """One number for each pair of values."""
    width = int(second.max(initial=0)) + 1
    numbers: Int64[np.ndarray, " row"] = np.unique(first.astype(np.int64) * width + second, return_inverse=True)[1]
    return numbers
