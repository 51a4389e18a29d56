"""Which shard each text lies in."""

import numpy as np
import pytest
from clvq.cache.placement import CHUNK_BYTES, SHARD_BYTES, place
from hypothesis import given, settings
from hypothesis import strategies as st

COUNTS = st.lists(st.integers(0, 400), min_size=1, max_size=200).map(lambda counts: np.array(counts, dtype=np.int64))
ROW_BYTES = st.integers(1, 50_000)


@settings(deadline=None)
@given(COUNTS, ROW_BYTES)
def test_every_text_lies_whole_in_one_shard_and_overlaps_no_other(counts: np.ndarray, row_bytes: int) -> None:
    placement = place(counts, row_bytes=row_bytes)
    geometry = placement.geometry
    used = np.zeros(geometry.row_places, dtype=int)
    for first, count, text in zip(placement.first_row, counts, placement.text_id, strict=True):
        used[first : first + count] += 1
        if count:
            assert first // geometry.shard_rows == (first + count - 1) // geometry.shard_rows
            assert first // geometry.shard_rows == text // geometry.shard_texts
    assert used.max(initial=0) <= 1
    assert used.sum() == counts.sum() == geometry.rows
    assert geometry.texts == len(counts)


@settings(deadline=None)
@given(COUNTS, ROW_BYTES)
def test_used_places_come_first_in_every_shard_and_keep_the_order(counts: np.ndarray, row_bytes: int) -> None:
    placement = place(counts, row_bytes=row_bytes)
    geometry, starts = placement.geometry, placement.shard_starts
    assert starts[0] == 0
    assert starts[-1] == len(counts)
    assert len(starts) == geometry.shards + 1
    for shard in range(geometry.shards):
        part = slice(starts[shard], starts[shard + 1])
        rows = np.cumsum(counts[part])
        assert np.array_equal(placement.first_row[part], shard * geometry.shard_rows + np.r_[0, rows][:-1])
        texts = starts[shard + 1] - starts[shard]
        assert np.array_equal(placement.text_id[part], shard * geometry.shard_texts + np.arange(texts))
        assert texts <= geometry.shard_texts
        assert rows[-1] <= geometry.shard_rows
    assert (np.diff(placement.text_id) > 0).all()


@settings(deadline=None)
@given(COUNTS, ROW_BYTES)
def test_chunks_divide_shards_and_neither_is_larger_than_it_should_be(counts: np.ndarray, row_bytes: int) -> None:
    geometry = place(counts, row_bytes=row_bytes).geometry
    assert geometry.shard_rows % geometry.chunk_rows == 0
    assert geometry.chunk_rows % 64 == 0
    assert geometry.chunk_rows == 64 or geometry.chunk_rows * row_bytes <= CHUNK_BYTES
    slack = max(64, CHUNK_BYTES // row_bytes)
    wanted = max(SHARD_BYTES // row_bytes, int(counts.max()), 1)
    assert geometry.shard_rows < wanted + slack


@settings(deadline=None)
@given(COUNTS, ROW_BYTES)
def test_placement_is_deterministic(counts: np.ndarray, row_bytes: int) -> None:
    first, second = place(counts, row_bytes=row_bytes), place(counts.copy(), row_bytes=row_bytes)
    assert first.geometry == second.geometry
    assert np.array_equal(first.text_id, second.text_id)
    assert np.array_equal(first.first_row, second.first_row)
    assert np.array_equal(first.shard_starts, second.shard_starts)


@pytest.mark.parametrize("width", [384, 768, 1024, 2048, 4096])
@pytest.mark.parametrize("rows", [20_000, 50_000, 81_456, 120_299, 300_000])
def test_a_small_cache_still_has_about_sixteen_shards(width: int, rows: int) -> None:
    counts = np.full(rows // 30, 30, dtype=np.int64)
    assert place(counts, row_bytes=2 * width).geometry.shards >= 14


def test_a_large_cache_has_shards_of_about_a_hundred_megabytes() -> None:
    geometry = place(np.full(100_000, 50, dtype=np.int64), row_bytes=2 * 768).geometry
    assert 0.98 * SHARD_BYTES < geometry.shard_rows * 2 * 768 < 1.02 * SHARD_BYTES
    assert 0.75 * 2**20 <= geometry.chunk_rows * 2 * 768 <= 2**20


def test_a_text_longer_than_a_shard_should_be_makes_the_shards_longer() -> None:
    geometry = place(np.array([10, 200_000, 10], dtype=np.int64), row_bytes=2 * 4096).geometry
    assert 200_000 <= geometry.shard_rows < 200_000 + geometry.chunk_rows


def test_no_texts_and_texts_without_rows_have_a_place_too() -> None:
    assert place(np.zeros(0, dtype=np.int64), row_bytes=8).geometry.shards == 1
    assert place(np.zeros(5, dtype=np.int64), row_bytes=8).text_id.tolist() == [0, 1, 2, 3, 4]
