"""Shuffled batches of whole texts."""

import gc
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from clvq import Cache
from clvq.cache.pools import Pools
from clvq.cache.stream import TextBatch, TextStream
from clvq.errors import CacheCorrupt, ConfigError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .cache_maker import EVERY_ENCODING, known, without_waiting

no_waiting = pytest.fixture(without_waiting, scope="module", autouse=True)

SITES = tuple(EVERY_ENCODING)
# 6 × 2 + 5 × 4 + 4 × 2 + 7 × 1 and a scale of 4: what a row takes in memory.
ROW_BYTES = 51


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """A cache of 120 texts in several shards."""
    path = tmp_path_factory.mktemp("stream") / "cache"
    known(texts=120, widths=EVERY_ENCODING).write(path)
    return Cache(path)


def stream(cache: Cache, *, seed: int = 0, chosen: np.ndarray | None = None, **settings: Any) -> TextStream:
    texts = np.ones(len(cache.texts), dtype=bool) if chosen is None else chosen
    return TextStream(cache, SITES, texts, seed=seed, **({"pool_bytes": 600 * ROW_BYTES, "special": "all"} | settings))


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
    "pool_bytes": st.integers(1, 5000 * ROW_BYTES),
    "threads": st.integers(1, 3),
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
    assert made.rows == len(rows)
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
    made = stream(cache, chosen=chosen, special=special)
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
    made = stream(cache, pool_bytes=10**9, texts_per_batch=4)
    lengths = [batch.mask.shape[1] for batch in made.epoch(0)]
    assert abs(np.corrcoef(lengths, np.arange(len(lengths)))[0, 1]) < 0.5


@pytest.mark.parametrize("pool_bytes", [1, 600 * ROW_BYTES, 10**9])
def test_starting_at_a_step_is_slicing(cache: Cache, pool_bytes: int) -> None:
    made = stream(cache, texts_per_batch=5, pool_bytes=pool_bytes)
    whole = list(made.epoch(1))
    for step in range(len(whole) + 3):
        assert equal(list(made.epoch(1, start_step=step)), whole[step:])


def test_pools_hold_whole_shards_up_to_the_limit(cache: Cache) -> None:
    of_text = cache.texts["first_row"].to_numpy() // cache.manifest.geometry.shard_rows
    per_shard = np.bincount(of_text, weights=cache.texts["row_count"].to_numpy())
    for limit in (1, 300, 600):
        pools = [plan.shards for plan in stream(cache, pool_bytes=limit * ROW_BYTES)._plans(0)]
        assert sorted(shard for pool in pools for shard in pool) == list(range(len(per_shard)))
        for pool in pools:
            assert per_shard[pool].sum() <= max(limit, per_shard.max())
        assert len(pools) > 3


def test_rows_that_fit_into_memory_are_decoded_once(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    real = cache.files.read
    monkeypatch.setattr(cache.files, "read", lambda name, *rest, **more: read.append(name) or real(name, *rest, **more))
    made = stream(cache, pool_bytes=10**9)
    first = list(made.epoch(0))
    assert read
    read.clear()
    assert not equal(list(made.epoch(1)), first)
    assert equal(list(made.epoch(0)), first)
    assert read == []


def test_an_epoch_that_was_left_before_all_was_decoded_leaves_nothing_half_decoded(cache: Cache) -> None:
    wanted = list(stream(cache, pool_bytes=10**9).epoch(3))
    made = stream(cache, pool_bytes=10**9)
    made.epoch(0).close()  # type: ignore[attr-defined]
    batches = made.epoch(1)
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert equal(list(made.epoch(3)), wanted)


def test_two_epochs_at_once_do_not_disturb_each_other(cache: Cache) -> None:
    made = stream(cache)
    wanted = [list(made.epoch(epoch)) for epoch in (0, 1)]
    found: list[list[TextBatch]] = [[], []]
    for pair in zip(made.epoch(0), made.epoch(1), strict=False):
        for batches, batch in zip(found, pair, strict=True):
            batches.append(batch)
    for got, all_ in zip(found, wanted, strict=True):
        assert equal(got, all_[: len(got)])
        assert len(got) > 10


def test_a_batch_that_is_kept_is_never_written_over_even_where_only_a_tensor_of_it_is_left(cache: Cache) -> None:
    made = stream(cache, texts_per_batch=4)
    wanted = [batch.values["hidden.1"].copy() for batch in made.epoch(0)]
    kept = [torch.from_numpy(batch.values["hidden.1"])[1:] for batch in made.epoch(0)]
    gc.collect()
    list(made.epoch(1))
    for tensor, values in zip(kept, wanted, strict=True):
        assert np.array_equal(tensor.numpy(), values[1:])


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("special", ["all", "leading"])
def test_ranks_share_each_batch_and_none_is_left_out(cache: Cache, ranks: int, special: str) -> None:
    whole = list(stream(cache, texts_per_batch=7, special=special).epoch(1))
    parts = [
        list(stream(cache, texts_per_batch=7, special=special, rank=rank, ranks=ranks).epoch(1))
        for rank in range(ranks)
    ]
    assert {len(part) for part in parts} == {len(whole)}
    for step, batch in enumerate(whole):
        for rank in range(ranks):
            mine, texts = parts[rank][step], slice(rank, None, ranks)
            assert np.array_equal(mine.text, batch.text[texts])
            longest = int(batch.mask[texts].sum(1).max(initial=0))
            assert mine.mask.shape == (len(mine.text), longest)
            assert np.array_equal(mine.row, batch.row[texts, :longest])
            assert np.array_equal(mine.position, batch.position[texts, :longest])
            for site in SITES:
                assert np.array_equal(mine.values[site], batch.values[site][texts, :longest])


def test_a_rank_of_a_batch_with_fewer_texts_than_ranks_gets_a_batch_without_texts(cache: Cache) -> None:
    whole = list(stream(cache, texts_per_batch=1).epoch(0))
    last = list(stream(cache, texts_per_batch=1, rank=1, ranks=2).epoch(0))
    assert len(last) == len(whole) == 120
    for batch in last:
        assert batch.mask.shape == batch.row.shape == (0, 0)
        assert batch.values["hidden.1"].shape == (0, 0, 6)


@pytest.mark.parametrize(("rank", "ranks"), [(2, 2), (-1, 2), (0, 0)])
def test_a_rank_that_does_not_exist_is_refused(cache: Cache, rank: int, ranks: int) -> None:
    with pytest.raises(ConfigError) as caught:
        stream(cache, rank=rank, ranks=ranks)
    assert str(caught.value) == f"rank {rank} of {ranks} does not exist: ranks are numbered from 0"


def test_batches_hold_what_zarr_reads(cache: Cache) -> None:
    group = zarr.open_group(cache.path / "activations.zarr", mode="r")
    stored = {site: group[f"sites/{site}"][:] for site in SITES}
    wide = (stored["hidden.1"].astype(np.uint32) << 16).view(np.float32)
    scaled = stored["hidden.4"].astype(np.float32) * group["scales/hidden.4"][:][:, None]
    wanted = {
        "hidden.1": wide,
        "hidden.2": stored["hidden.2"],
        "hidden.3": stored["hidden.3"].astype(np.float32),
        "hidden.4": scaled * group["channel_scale/hidden.4"][:],
    }
    for batch in stream(cache).epoch(0):
        for site in SITES:
            assert np.array_equal(batch.values[site][batch.mask], wanted[site][batch.row[batch.mask]])


@pytest.mark.parametrize("after", [0, 1, 5])
def test_a_stream_that_is_left_early_leaves_no_thread(cache: Cache, after: int) -> None:
    before = threading.active_count()
    batches = stream(cache, texts_per_batch=4).epoch(0)
    for _ in range(after):
        next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_an_error_while_a_batch_is_made_reaches_the_caller_at_its_step_and_leaves_no_thread(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, calls = threading.active_count(), iter(range(10**6))
    real = Pools.gather

    def failing(*given: Any) -> None:
        if next(calls) == 7:
            raise RuntimeError("the eighth")
        real(*given)

    monkeypatch.setattr(Pools, "gather", failing)
    seen = []
    with pytest.raises(RuntimeError, match="the eighth"):
        seen.extend(stream(cache, texts_per_batch=4, threads=1).epoch(0))
    assert len(seen) == 0 or len(seen) <= 7
    assert threading.active_count() == before


@pytest.mark.parametrize("pool_bytes", [1, 10**9])
def test_a_damaged_file_stops_the_stream_and_its_threads(tmp_path: Path, pool_bytes: int) -> None:
    known(texts=120, widths=EVERY_ENCODING).write(tmp_path)
    file = tmp_path / "activations.zarr/sites/hidden.2/c/2/0"
    file.write_bytes(file.read_bytes()[:-1])
    before = threading.active_count()
    made = stream(Cache(tmp_path), pool_bytes=pool_bytes)
    for _ in range(2):
        with pytest.raises(CacheCorrupt, match=r"hidden\.2/c/2/0 has [\d,]+ bytes instead of"):
            list(made.epoch(0))
    assert threading.active_count() == before


def test_a_missing_file_stops_the_stream(tmp_path: Path) -> None:
    known(texts=120, widths=EVERY_ENCODING).write(tmp_path)
    (tmp_path / "activations.zarr/sites/hidden.2/c/2/0").unlink()
    with pytest.raises(CacheCorrupt, match="is missing; run `clvq cache verify`"):
        list(stream(Cache(tmp_path)).epoch(0))


def test_nothing_to_read_is_refused(cache: Cache) -> None:
    with pytest.raises(ConfigError) as caught:
        stream(cache, chosen=np.zeros(120, dtype=bool))
    assert str(caught.value) == (f"the chosen texts of {cache.path} have no rows: choose other splits or special rows")
