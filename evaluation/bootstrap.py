"""Bootstrap intervals over texts, and over texts and seeds at once."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

RESAMPLES = 2_000
_BLOCK_VALUES = 4_000_000


@dataclass(frozen=True)
class Estimate:
    """A mean over texts with its 95 % percentile bootstrap interval."""

    value: float
    low: float
    high: float


def estimate(values: Float64[np.ndarray, " text"], *, seed: int, resamples: int = RESAMPLES) -> Estimate:
    """The mean of per-text values. Equal seeds draw equal texts, so that differences of values are paired.

    Texts whose value is NaN take no part; without any, all numbers are NaN.
    """
    known = values[~np.isnan(values)]
    if len(known) == 0:
        return Estimate(float("nan"), float("nan"), float("nan"))
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    block = max(1, _BLOCK_VALUES // len(known))
    for start in range(0, resamples, block):
        end = min(start + block, resamples)
        means[start:end] = known[generator.integers(len(known), size=(end - start, len(known)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Estimate(float(known.mean()), float(low), float(high))


def estimates(values: Float64[np.ndarray, "text column"], *, seed: int, resamples: int = RESAMPLES) -> list[Estimate]:
    """The mean of each column over texts, all columns over the same draws of texts.

    Texts whose value is NaN take no part in that column; without any, all its numbers are NaN.
    """
    means = column_means(values)
    again = resampled_means(values, seed=seed, resamples=resamples)
    return [interval(float(mean), column) for mean, column in zip(means, again.T, strict=True)]


def column_means(values: Float64[np.ndarray, "text column"]) -> Float64[np.ndarray, " column"]:
    """The mean of each column over the texts that have a value there; NaN where none has."""
    known = ~np.isnan(values)
    return ratio(np.where(known, values, 0.0).sum(axis=0), known.sum(axis=0).astype(np.float64))


def resampled_means(
    values: Float64[np.ndarray, "text column"], *, seed: int, resamples: int = RESAMPLES
) -> Float64[np.ndarray, "resample column"]:
    """The mean of each column over texts drawn anew; equal seeds draw equal texts."""
    known = ~np.isnan(values)
    plain = np.where(known, values, 0.0)
    parts = []
    for drawn in draw_counts(len(values), seed=seed, resamples=resamples):
        amount = drawn.sum(axis=1, keepdims=True) if known.all() else drawn @ known.astype(np.float64)
        parts.append(ratio(drawn @ plain, amount))
    return np.concatenate(parts)


def resampled_over_seeds(
    values: Float64[np.ndarray, "seed text column"], *, seed: int, resamples: int = RESAMPLES
) -> Float64[np.ndarray, "resample column"]:
    """The mean of each column over texts and seeds, both drawn anew: the same texts for all seeds.

    The texts are those of `resampled_means`. With one seed the two are the same.
    """
    count = len(values)
    texts = np.stack([resampled_means(one, seed=seed, resamples=resamples) for one in values])
    drawn = np.random.default_rng([seed, count]).integers(count, size=(resamples, count))
    means: Float64[np.ndarray, "resample column"] = np.mean(
        [texts[drawn[:, place], np.arange(resamples)] for place in range(count)], axis=0
    )
    return means


def interval(value: float, again: Float64[np.ndarray, " resample"]) -> Estimate:
    """A value with the 95 % interval of its resamples; those that are NaN are left out."""
    known = again[~np.isnan(again)]
    if np.isnan(value) or len(known) == 0:
        return Estimate(float("nan"), float("nan"), float("nan"))
    low, high = np.percentile(known, [2.5, 97.5])
    return Estimate(value, float(low), float(high))


def draw_counts(
    units: int, *, seed: int | list[int], resamples: int = RESAMPLES, width: int = 0
) -> Iterator[Float64[np.ndarray, "block unit"]]:
    """How often each unit is drawn, in blocks of resamples; equal seeds draw equal units, whatever the blocks.

    Parameters
    ----------
    width
        Values that the caller holds for each resample of a block, where they are more than the units.
    """
    generator = np.random.default_rng(seed)
    block = max(1, _BLOCK_VALUES // max(1, units, width))
    for start in range(0, resamples, block):
        count = min(block, resamples - start)
        drawn = generator.integers(units, size=(count, units)) if units else np.zeros((count, 0), dtype=np.int64)
        flat = (drawn + units * np.arange(count)[:, None]).ravel()
        yield np.bincount(flat, minlength=count * units).reshape(count, units).astype(np.float64)


def ratio(
    total: Float64[np.ndarray, "*shape"], amount: Float64[np.ndarray, "*amounts"]
) -> Float64[np.ndarray, "*shape"]:
    """total / amount, which is broadcast; NaN where the amount is 0."""
    amount = np.broadcast_to(amount, total.shape)
    shares: Float64[np.ndarray, "*shape"] = np.divide(total, amount, out=np.full_like(total, np.nan), where=amount > 0)
    return shares
