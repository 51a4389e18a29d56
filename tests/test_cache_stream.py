"""Shuffled batches of whole texts."""

import threading
from pathlib import Path

import numpy as np
import pytest
from clvq import Cache
from clvq.cache.stream import TextBatch, TextStream
from clvq.errors import CacheCorrupt, ConfigError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .cache_maker import known, without_waiting

no_waiting = pytest.fixture(without_waiting, scope="module", autouse=True)

SITES = ("hidden.1", "hidden.2")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """A cache of 120 texts in several shards."""
    path = tmp_path_factory.mktemp("stream") / "cache"
    known(texts=120).write(path)
    return Cache(path)


def stream(cache: Cache, *, seed: int = 0, chosen: np.ndarray | None = None, **limits: int) -> TextStream:
    texts = np.ones(len(cache.texts), dtype=bool) if chosen is None else chosen
    return TextStream(cache, SITES, texts, special="all", seed=seed, **({"pool_rows": 600} | limits))


def equal(first: list[TextBatch], second: list[TextBatch]) -> bool:
    return len(first) == len(second) and all(
        np.array_equal(a.row, b.row)
        and np.array_equal(a.text, b.text)
        and np.array_equal(a.position, b.position)
        and all(np.array_equal(a.values[site], b.values[site]) for site in SITES)
        for a, b in zip(first, second, strict=True)
    )


LIMITS = {
    "texts_per_batch": st.integers(1, 40),
    "slots_per_batch": st.integers(1, 2000),
    "pool_rows": st.integers(1, 5000),
}


@settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.fixed_dictionaries({}, optional=LIMITS), st.integers(0, 5), st.integers(0, 3), st.integers(1, 2**120 - 1))
def test_every_epoch_holds_each_chosen_text_once_whole_within_the_limits(
    cache: Cache, limits: dict[str, int], seed: int, epoch: int, choice: int
) -> None:
    chosen = np.array([choice >> number & 1 for number in range(120)], dtype=bool)
    made = stream(cache, seed=seed, chosen=chosen, **limits)
    batches = list(made.epoch(epoch))
    assert len(batches) == made.steps(epoch)
    assert sorted(np.concatenate([batch.text for batch in batches])) == np.flatnonzero(chosen).tolist()
    rows = np.concatenate([batch.row[batch.mask] for batch in batches])
    assert np.array_equal(np.sort(rows), cache.rows_of(chosen))
    assert np.array_equal(made.rows, cache.rows_of(chosen))
    for batch in batches:
        assert batch.mask.mean() >= 0.9
        assert batch.mask.any(axis=0).all()
        assert len(batch.mask) <= limits.get("texts_per_batch", 1 << 30)
        # One text longer than the limit still has to go somewhere: alone.
        assert batch.mask.size <= limits.get("slots_per_batch", 1 << 30) or len(batch.mask) == 1


def test_a_batch_holds_what_the_cache_holds_and_zeros_elsewhere(cache: Cache) -> None:
    for batch in stream(cache).epoch(0):
        assert np.array_equal(batch.mask, np.sort(batch.mask, axis=1)[:, ::-1])
        rows = batch.row[batch.mask]
        for site in SITES:
            assert np.array_equal(batch.values[site][batch.mask], cache.vectors(site, rows))
            assert not batch.values[site][~batch.mask].any()
            assert batch.values[site].dtype == np.float32
        assert (batch.row[~batch.mask] == -1).all()
        assert (batch.position[~batch.mask] == 0).all()
        assert np.array_equal(batch.position[batch.mask], cache.column("position")[rows])
        owners = np.repeat(batch.text, batch.mask.sum(1))
        assert np.array_equal(cache.text_index[cache.column("text")[rows]], owners)
        for text, row, mask in zip(batch.text, batch.row, batch.mask, strict=True):
            first, count = cache.texts["first_row"][int(text)].as_py(), cache.texts["row_count"][int(text)].as_py()
            assert row[mask].tolist() == list(range(first, first + count))


@pytest.mark.parametrize(("special", "kinds"), [("all", 2), ("leading", 1), ("none", 0)])
def test_special_rows_take_part_as_asked(cache: Cache, special: str, kinds: int) -> None:
    chosen = cache.splits(["train"])
    made = TextStream(cache, SITES, chosen, special=special, seed=0)  # type: ignore[arg-type]
    rows = np.concatenate([batch.row[batch.mask] for batch in made.epoch(0)])
    assert np.array_equal(np.sort(rows), cache.rows_of(chosen, special=special))  # type: ignore[arg-type]
    assert cache.column("special")[rows].max() == kinds


def test_the_order_is_a_function_of_seed_and_epoch_alone(cache: Cache) -> None:
    made = stream(cache, seed=3)
    first = list(made.epoch(2))
    list(made.epoch(0))
    assert equal(list(made.epoch(2)), first)
    assert equal(list(stream(Cache(cache.path), seed=3).epoch(2)), first)


def test_other_epochs_and_seeds_have_other_orders(cache: Cache) -> None:
    orders = {
        tuple(np.concatenate([batch.text for batch in stream(cache, seed=seed).epoch(epoch)]).tolist())
        for seed in range(4)
        for epoch in range(4)
    }
    assert len(orders) == 16


def test_batches_mix_lengths_of_time_not_only_of_place(cache: Cache) -> None:
    # Were batches given in order of length, the loss would drift within every pool.
    made = stream(cache, pool_rows=10**6, texts_per_batch=4)
    lengths = [batch.mask.shape[1] for batch in made.epoch(0)]
    assert abs(np.corrcoef(lengths, np.arange(len(lengths)))[0, 1]) < 0.5


def test_starting_at_a_step_is_slicing(cache: Cache) -> None:
    made = stream(cache, texts_per_batch=5)
    whole = list(made.epoch(1))
    ends = np.cumsum([len(pool) for pool in made.plan(1)])
    assert len(ends) > 3
    for step in range(len(whole) + 3):
        assert equal(list(made.epoch(1, start_step=step)), whole[step:])


def test_pools_hold_whole_shards_up_to_the_limit(cache: Cache) -> None:
    for limit in (1, 300, 600, 10**6):
        made = stream(cache, pool_rows=limit)
        pools = [np.concatenate(pool) for pool in made.plan(0)]
        shards = [np.unique(made._shards[pool]) for pool in pools]
        joined = np.concatenate(shards)
        assert len(np.unique(joined)) == len(joined) == cache.manifest.geometry.shards
        for pool, held in zip(pools, shards, strict=True):
            assert made._lengths[pool].sum() <= limit or len(held) == 1
        assert limit > 1 or len(pools) == len(joined)
        assert limit < 10**6 or len(pools) == 1


def test_a_stream_that_is_left_early_leaves_no_thread(cache: Cache) -> None:
    before = threading.active_count()
    batches = stream(cache).epoch(0)
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_a_damaged_file_stops_the_stream(tmp_path: Path) -> None:
    known(texts=120).write(tmp_path)
    (tmp_path / "activations.zarr/sites/hidden.2/c/2/0").unlink()
    with pytest.raises(CacheCorrupt, match="is missing; run `clvq cache verify`"):
        list(stream(Cache(tmp_path)).epoch(0))


def test_nothing_to_read_is_refused(cache: Cache) -> None:
    with pytest.raises(ConfigError) as caught:
        stream(cache, chosen=np.zeros(120, dtype=bool))
    assert str(caught.value) == (f"the chosen texts of {cache.path} have no rows: choose other splits or special rows")
