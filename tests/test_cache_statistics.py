"""Statistics of a site, and of what encoding did to it, against numpy in float64."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from clvq.cache.statistics import BINS_PER_OCTAVE, EncodingLoss, SiteStatistics
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError


def heavy_tailed(rows: int, width: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    values = generator.standard_t(3, size=(rows, width)) * np.exp(generator.normal(0, 4, width)) + 100
    return values.astype(np.float32)


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 8), st.integers(0, 99))
def test_mean_and_variance_are_numpys(rows: int, width: int, seed: int) -> None:
    values = heavy_tailed(rows, width, seed)
    statistics = SiteStatistics.of(values)
    wide = values.astype(np.float64)
    assert statistics.count == rows
    assert np.allclose(statistics.mean, wide.mean(0), rtol=1e-12)
    assert np.allclose(statistics.variance(), wide.var(0), rtol=1e-9)
    assert sum(statistics.norm_histogram.values()) == rows


@settings(deadline=None)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=12), st.integers(0, 99))
def test_parts_merged_equal_the_whole(sizes: list[int], seed: int) -> None:
    values = heavy_tailed(sum(sizes), 5, seed)
    parts = [SiteStatistics.of(part) for part in np.split(values, np.cumsum(sizes)[:-1])]
    merged, whole = SiteStatistics.merged(parts, width=5), SiteStatistics.of(values)
    assert merged.count == whole.count
    assert np.allclose(merged.mean, whole.mean, rtol=1e-12)
    assert np.allclose(merged.squares, whole.squares, rtol=1e-9, atol=1e-9)
    assert merged.norm_histogram == whole.norm_histogram
    assert SiteStatistics.merged(parts, width=5) == merged


def test_a_large_common_mean_does_not_drown_the_variance() -> None:
    values = (1e5 + np.random.default_rng(0).normal(size=(4096, 3))).astype(np.float32)
    merged = SiteStatistics.merged((SiteStatistics.of(part) for part in np.split(values, 16)), width=3)
    assert np.allclose(merged.variance(), values.astype(np.float64).var(0), rtol=1e-9)


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(0, 99), st.sampled_from([0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0]))
def test_norm_quantiles_are_within_a_bin_of_numpys(rows: int, seed: int, share: float) -> None:
    values = heavy_tailed(rows, 4, seed)
    norms = np.linalg.norm(values.astype(np.float64), axis=1)
    oracle = np.quantile(norms, share, method="inverted_cdf")
    found = SiteStatistics.of(values).norm_quantile(share)
    assert abs(math.log2(found / oracle)) <= 1 / BINS_PER_OCTAVE


def test_rows_of_zeros_have_a_norm_of_zero() -> None:
    statistics = SiteStatistics.of(np.array([[0.0, 0.0], [0.0, 0.0], [3.0, 4.0]]))
    assert statistics.norm_quantile(0.5) == 0.0
    assert statistics.norm_quantile(1.0) == pytest.approx(5.0, rel=0.05)


def test_the_smallest_and_the_largest_values_are_counted() -> None:
    tiny, huge = np.float32(1.4e-45), np.finfo(np.float32).max
    statistics = SiteStatistics.of(np.array([[tiny], [huge]], dtype=np.float32))
    assert statistics.norm_quantile(0.5) == pytest.approx(float(tiny), rel=0.05)
    assert statistics.norm_quantile(1.0) == pytest.approx(float(huge), rel=0.05)


def test_no_rows_have_no_statistics() -> None:
    empty = SiteStatistics.of(np.zeros((0, 3)))
    assert empty == SiteStatistics.empty(3) == SiteStatistics.merged([], width=3)
    assert math.isnan(empty.norm_quantile(0.5))
    assert empty.variance().tolist() == [0.0, 0.0, 0.0]


@settings(deadline=None)
@given(st.integers(1, 50), st.integers(0, 99))
def test_statistics_survive_json_exactly(rows: int, seed: int) -> None:
    statistics = SiteStatistics.of(heavy_tailed(rows, 3, seed))
    assert SiteStatistics.model_validate_json(statistics.model_dump_json()) == statistics


def rounded(values: np.ndarray, bits: int) -> np.ndarray:
    """The values with the last bits of their mantissa cut off, and the smallest quarter lost."""
    cut = (values.view(np.uint32) & np.uint32(2**32 - 2**bits)).view(np.float32)
    return np.where(np.abs(cut) < np.quantile(np.abs(cut), 0.25), np.float32(0), cut)


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(1, 6), st.integers(0, 99), st.integers(0, 22))
def test_the_loss_is_numpys_in_float64(rows: int, width: int, seed: int, bits: int) -> None:
    values = heavy_tailed(rows, width, seed)
    values[seed % rows] = 0
    stored = rounded(values, bits)
    loss, before, after = EncodingLoss.of(values, stored), values.astype(np.float64), stored.astype(np.float64)
    own, other, error = (np.linalg.norm(part, axis=1) for part in (before, after, after - before))
    relative = np.divide(error, own, out=np.zeros(rows), where=own > 0)
    dot = (before * after).sum(1)
    cosine = np.where(own == 0, 1, np.divide(dot, own * other, out=np.zeros(rows), where=own * other > 0))
    total = np.linalg.norm(before)
    assert (loss.rows, loss.values) == (rows, rows * width)
    assert loss.lost == np.count_nonzero((after == 0) & (before != 0))
    assert loss.lost_share == loss.lost / (rows * width)
    assert loss.relative_l2 == pytest.approx(np.linalg.norm(after - before) / total if total else 0, rel=1e-9)
    assert loss.worst_row == pytest.approx(relative.max(), rel=1e-9)
    assert loss.mean_cosine == pytest.approx(cosine.mean(), abs=1e-12)
    median = np.quantile(relative, 0.5, method="inverted_cdf")
    assert (loss.median_row == 0) == (median == 0)
    if median:
        assert abs(math.log2(loss.median_row / median)) <= 1 / BINS_PER_OCTAVE
    assert sum(loss.histogram.values()) == rows


@settings(deadline=None)
@given(st.lists(st.integers(0, 90), min_size=1, max_size=9), st.integers(0, 99))
def test_losses_merged_equal_the_whole(sizes: list[int], seed: int) -> None:
    values = heavy_tailed(sum(sizes), 5, seed)
    stored = rounded(values, 16) if len(values) else values
    cuts = np.cumsum(sizes)[:-1]
    parts = [EncodingLoss.of(*pair) for pair in zip(np.split(values, cuts), np.split(stored, cuts), strict=True)]
    merged, whole = EncodingLoss.merged(parts), EncodingLoss.of(values, stored)
    assert (merged.rows, merged.values, merged.lost) == (whole.rows, whole.values, whole.lost)
    assert (merged.histogram, merged.worst_row) == (whole.histogram, whole.worst_row)
    for name in ("squares", "error_squares", "cosine_sum"):
        assert getattr(merged, name) == pytest.approx(getattr(whole, name), rel=1e-12)
    assert EncodingLoss.model_validate_json(merged.model_dump_json()) == merged


def test_values_stored_as_they_are_lose_nothing() -> None:
    loss = EncodingLoss.of(*[heavy_tailed(100, 3, 0)] * 2)
    assert (loss.lost, loss.error_squares, loss.worst_row, loss.relative_l2, loss.median_row) == (0, 0, 0, 0, 0)
    assert loss.mean_cosine == pytest.approx(1, abs=1e-15)


def test_a_row_that_became_zeros_counts_as_lost_and_one_that_was_zeros_does_not() -> None:
    values = np.array([[0, 0], [3, 4], [1, 0]], dtype=np.float32)
    stored = np.array([[0, 0], [0, 0], [1, 0]], dtype=np.float32)
    loss = EncodingLoss.of(values, stored)
    assert (loss.lost, loss.worst_row, loss.cosine_sum) == (2, 1, 2)


def test_no_values_have_no_loss() -> None:
    none = EncodingLoss.of(*[np.zeros((0, 3), np.float32)] * 2)
    assert none == EncodingLoss.merged([])
    assert (none.relative_l2, none.mean_cosine, none.lost_share) == (0, 1, 0)
    assert math.isnan(none.median_row)


def test_the_loss_of_the_smallest_and_of_the_largest_values_is_finite() -> None:
    tiny, huge = np.float32(2.0**-149), np.finfo(np.float32).max
    values = np.array([[tiny, tiny]] * 3 + [[huge, -huge]], dtype=np.float32)
    stored = np.array([[tiny, 0]] * 3 + [[huge, huge]], dtype=np.float32)
    loss = EncodingLoss.of(values, stored)
    assert loss.worst_row == pytest.approx(math.sqrt(2))
    assert loss.median_row == pytest.approx(math.sqrt(0.5), rel=0.05)
    assert math.isfinite(loss.squares)


@pytest.mark.parametrize("kind", [SiteStatistics.empty, lambda _: EncodingLoss.merged([])])
def test_statistics_that_are_no_numbers_are_refused(kind: Callable[[int], SiteStatistics | EncodingLoss]) -> None:
    plain = kind(1).model_dump()
    for name, value in plain.items():
        wrong = [-1, 2**63] if isinstance(value, int) else [math.nan, math.inf]
        if isinstance(value, list):
            wrong = [[each] for each in wrong]
        if isinstance(value, dict):
            wrong = [{10_001: 1}, {-10_001: 1}, {0: -1}, {0: 2**63}, {0.5: 1}]
        for other in wrong:
            with pytest.raises(ValidationError):
                type(kind(1)).model_validate({**plain, name: other})
