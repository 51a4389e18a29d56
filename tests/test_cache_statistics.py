"""Statistics of a site against numpy in float64."""

import math

import numpy as np
import pytest
from clvq.cache.statistics import BINS_PER_OCTAVE, SiteStatistics
from hypothesis import given, settings
from hypothesis import strategies as st


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
