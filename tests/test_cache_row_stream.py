"""Shuffled batches of rows."""

import threading
import time
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from clvq import Cache
from clvq.cache.pools import Pools
from clvq.cache.row_stream import RowBatch, RowStream
from clvq.cache.stream import TextStream
from clvq.errors import CacheCorrupt, ConfigError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .cache_maker import EVERY_ENCODING, known, without_waiting

no_waiting = pytest.fixture(without_waiting, scope="module", autouse=True)

SITES = tuple(EVERY_ENCODING)
# 6 × 2 + 5 × 4 + 4 × 2 + 7 × 1 and a scale of 4: what a row takes in memory.
ROW_BYTES = 51
# Small pools of which a cache of 2,400 rows has many.
FEW = 200 * ROW_BYTES
ALL = 10**9


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """A cache of 120 texts in several shards of several chunks."""
    path = tmp_path_factory.mktemp("rows") / "cache"
    known(texts=120, widths=EVERY_ENCODING).write(path)
    return Cache(path)


def stream(cache: Cache, *, chosen: np.ndarray | None = None, **settings: Any) -> RowStream:
    texts = np.ones(len(cache.texts), dtype=bool) if chosen is None else chosen
    defaults: dict[str, Any] = {"special": "all", "seed": 0, "batch_rows": 100, "pool_bytes": FEW}
    return RowStream(cache, SITES, texts, **(defaults | settings))


def equal(first: list[RowBatch], second: list[RowBatch]) -> bool:
    return len(first) == len(second) and all(
        np.array_equal(a.row, b.row) and all(np.array_equal(a.values[site], b.values[site]) for site in SITES)
        for a, b in zip(first, second, strict=True)
    )


def rows_in(batches: list[RowBatch]) -> np.ndarray:
    return np.concatenate([batch.row for batch in batches])


SETTINGS = {
    "pool_bytes": st.integers(1, 1500 * ROW_BYTES),
    "special": st.sampled_from(["all", "leading", "none"]),
    "drop_last": st.booleans(),
    "threads": st.integers(1, 3),
}


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(
    st.fixed_dictionaries({"batch_rows": st.integers(1, 700)}, optional=SETTINGS),
    st.integers(0, 5),
    st.integers(0, 3),
    st.integers(1, 2**120 - 1),
)
def test_every_epoch_holds_each_chosen_row_once_in_batches_of_the_size_asked_for(
    cache: Cache, given: dict[str, Any], seed: int, epoch: int, choice: int
) -> None:
    chosen = np.array([choice >> number & 1 for number in range(120)], dtype=bool)
    wanted, size = cache.rows_of(chosen, special=given.get("special", "all")), given["batch_rows"]
    if len(wanted) < (size if given.get("drop_last") else 1):
        with pytest.raises(ConfigError, match="too few for a batch"):
            stream(cache, chosen=chosen, seed=seed, **given)
        return
    made = stream(cache, chosen=chosen, seed=seed, **given)
    batches = list(made.epoch(epoch))
    assert len(batches) == made.steps
    whole, rest = divmod(len(wanted), size)
    short = [] if given.get("drop_last") or rest == 0 else [rest]
    assert [len(batch.row) for batch in batches] == [size] * whole + short
    rows = rows_in(batches)
    assert len(np.unique(rows)) == len(rows)
    assert np.isin(rows, wanted).all()
    assert given.get("drop_last") or len(rows) == len(wanted)


def test_batches_hold_what_zarr_reads_at_the_places_that_they_name(cache: Cache) -> None:
    group = zarr.open_group(cache.path / "activations.zarr", mode="r")
    stored = {site: group[f"sites/{site}"][:] for site in SITES}
    wanted = {
        "hidden.1": (stored["hidden.1"].astype(np.uint32) << 16).view(np.float32),
        "hidden.2": stored["hidden.2"],
        "hidden.3": stored["hidden.3"].astype(np.float32),
        "hidden.4": (stored["hidden.4"].astype(np.float32) * group["scales/hidden.4"][:][:, None])
        * group["channel_scale/hidden.4"][:],
    }
    for pool_bytes in (1, FEW, ALL):
        for batch in stream(cache, pool_bytes=pool_bytes, special="leading").epoch(3):
            for site in SITES:
                assert batch.values[site].dtype == np.float32
                assert np.array_equal(batch.values[site], wanted[site][batch.row])


@pytest.mark.parametrize("pool_bytes", [1, FEW, ALL])
def test_the_order_is_a_function_of_seed_and_epoch_alone(cache: Cache, pool_bytes: int) -> None:
    made = stream(cache, pool_bytes=pool_bytes)
    first = list(made.epoch(2))
    assert not np.array_equal(rows_in(list(made.epoch(0))), rows_in(first))
    assert equal(list(made.epoch(2)), first)
    assert equal(list(stream(Cache(cache.path), pool_bytes=pool_bytes, threads=1).epoch(2)), first)
    assert not np.array_equal(rows_in(list(stream(cache, pool_bytes=pool_bytes, seed=1).epoch(2))), rows_in(first))


@pytest.mark.parametrize("pool_bytes", [1, FEW, ALL])
@pytest.mark.parametrize("drop_last", [False, True])
def test_starting_at_a_step_is_slicing(cache: Cache, pool_bytes: int, drop_last: bool) -> None:
    made = stream(cache, pool_bytes=pool_bytes, drop_last=drop_last)
    whole = list(made.epoch(1))
    for step in range(len(whole) + 3):
        assert equal(list(made.epoch(1, start_step=step)), whole[step:])


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("batch_rows", [1, 7, 100, 5000])
def test_ranks_share_each_batch_and_none_is_left_out(cache: Cache, ranks: int, batch_rows: int) -> None:
    texts = np.arange(120) < (20 if batch_rows < 100 else 120)
    whole = list(stream(cache, batch_rows=batch_rows, chosen=texts).epoch(1))
    parts = [
        list(stream(cache, batch_rows=batch_rows, chosen=texts, rank=rank, ranks=ranks).epoch(1))
        for rank in range(ranks)
    ]
    assert {len(part) for part in parts} == {len(whole)}
    for step, batch in enumerate(whole):
        for rank in range(ranks):
            assert np.array_equal(parts[rank][step].row, batch.row[rank::ranks])
            for site in SITES:
                assert np.array_equal(parts[rank][step].values[site], batch.values[site][rank::ranks])


def test_a_batch_mixes_rows_of_many_chunks_and_all_shards_come_early(cache: Cache) -> None:
    geometry = cache.manifest.geometry
    batches = list(stream(cache, pool_bytes=600 * ROW_BYTES, batch_rows=50, seed=2).epoch(0))
    # An epoch begins with smaller pools.
    full = batches[25:-4]
    assert len(full) > 10
    assert all(len(np.unique(batch.row // geometry.chunk_rows)) > 10 for batch in full)
    assert len(np.unique(rows_in(batches[:24]) // geometry.shard_rows)) > geometry.shards / 2
    # Within a batch the order has nothing to do with the places.
    correlations = [np.corrcoef(batch.row, np.arange(len(batch.row)))[0, 1] for batch in full]
    assert abs(np.mean(correlations)) < 0.1


def test_rows_that_fit_into_memory_are_decoded_once(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    real = cache.files.read
    monkeypatch.setattr(cache.files, "read", lambda name, *rest, **more: read.append(name) or real(name, *rest, **more))
    made = stream(cache, pool_bytes=ALL)
    list(made.epoch(0))
    assert read
    read.clear()
    list(made.epoch(1))
    assert read == []


@pytest.mark.parametrize("special", ["all", "leading"])
def test_no_column_is_ever_read_whole(cache: Cache, monkeypatch: pytest.MonkeyPatch, special: str) -> None:
    longest = 0
    real = cache.files.read

    def measured(name: str, layout: Any, places: np.ndarray, **more: Any) -> np.ndarray:
        nonlocal longest
        longest = max(longest, len(places))
        return real(name, layout, places, **more)

    monkeypatch.setattr(cache.files, "read", measured)
    list(stream(cache, special=special, threads=1).epoch(0))
    list(TextStream(cache, SITES, np.ones(120, dtype=bool), special=special, seed=0, pool_bytes=1).epoch(0))
    assert 0 < longest < 400
    assert cache._columns == {}


def test_memory_of_dropped_batches_is_used_again(cache: Cache) -> None:
    made = RowStream(cache, ["hidden.1"], np.ones(120, dtype=bool), special="all", seed=0, batch_rows=20)
    seen = {batch.values["hidden.1"].ctypes.data for batch in made.epoch(0)}
    assert len(seen) < 12 < made.steps / 5


def test_kept_batches_are_never_written_over(cache: Cache) -> None:
    made = stream(cache)
    wanted = [{site: batch.values[site].copy() for site in SITES} for batch in made.epoch(0)]
    kept = [batch.values for batch in made.epoch(0)]
    list(made.epoch(1))
    for values, copied in zip(kept, wanted, strict=True):
        assert all(np.array_equal(values[site], copied[site]) for site in SITES)


def test_two_epochs_at_once_do_not_disturb_each_other(cache: Cache) -> None:
    made = stream(cache)
    wanted = [list(made.epoch(epoch)) for epoch in (0, 1, 2)]
    found: list[list[RowBatch]] = [[], [], []]
    for batches in zip(made.epoch(0), made.epoch(1), made.epoch(2), strict=True):
        for one, batch in zip(found, batches, strict=True):
            one.append(batch)
    assert all(equal(one, two) for one, two in zip(found, wanted, strict=True))


@pytest.mark.parametrize("slow", ["gather", "read"])
def test_whichever_thread_is_late_every_batch_is_right(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, slow: str
) -> None:
    wanted = list(stream(cache, batch_rows=30, threads=1).epoch(0))
    late = np.random.default_rng(0).exponential(0.002, 10_000)
    calls = count()
    thing = Pools if slow == "gather" else cache.files
    real = getattr(thing, slow)

    def slowly(*given: Any, **more: Any) -> Any:
        time.sleep(late[next(calls)])
        return real(*given, **more)

    monkeypatch.setattr(thing, slow, slowly)
    for threads in (2, 4):
        assert equal(list(stream(cache, batch_rows=30, threads=threads).epoch(0)), wanted)


@pytest.mark.parametrize("after", [0, 1, 9])
def test_a_stream_that_is_left_early_leaves_no_thread(cache: Cache, after: int) -> None:
    before = threading.active_count()
    batches = stream(cache).epoch(0)
    for _ in range(after):
        next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


@pytest.mark.parametrize("pool_bytes", [1, FEW, ALL])
def test_a_damaged_file_stops_the_stream_and_its_threads(tmp_path: Path, pool_bytes: int) -> None:
    known(texts=120, widths=EVERY_ENCODING).write(tmp_path)
    file = tmp_path / "activations.zarr/scales/hidden.4/c/2"
    data = file.read_bytes()
    file.write_bytes(data[:30] + bytes([data[30] ^ 1]) + data[31:])
    before = threading.active_count()
    with pytest.raises(CacheCorrupt, match=r"scales/hidden\.4/c/2 is damaged: a chunk fails its checksum"):
        list(stream(Cache(tmp_path), pool_bytes=pool_bytes).epoch(0))
    assert threading.active_count() == before


def test_nothing_to_read_is_refused(cache: Cache) -> None:
    with pytest.raises(ConfigError) as caught:
        stream(cache, chosen=np.zeros(120, dtype=bool))
    assert str(caught.value) == (
        f"the chosen texts of {cache.path} have 0 rows, too few for a batch: "
        "choose other splits or special rows, or a smaller batch"
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch_rows": 0}, "batch_rows is 0: a batch needs at least 1 row"),
        ({"rank": 2, "ranks": 2}, "rank 2 of 2 does not exist: ranks are numbered from 0"),
    ],
)
def test_settings_out_of_range_are_refused(cache: Cache, wrong: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        stream(cache, **wrong)
    assert str(caught.value) == message
