"""Recoding: the same rows in another encoding, laid out as an extraction would lay them out."""

from collections.abc import Iterator
from pathlib import Path

import clvq
import numpy as np
import pytest
import zarr
from clvq.cache import writer as writer_module
from clvq.cache.encoding import channel_scale, dequantise, quantise
from clvq.cache.extraction import Shard
from clvq.cache.recode import recode
from clvq.cache.verify import verify
from clvq.errors import CacheCorrupt, ConfigError, ResumeMismatch

from .cache_maker import Known, contents, known, without_waiting

WIDTHS = {"hidden.1": (6, "fp32"), "hidden.2": (5, "fp32")}
NUMPY = {"bf16": None, "fp16": np.float16, "fp32": np.float32}


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    yield from without_waiting()


@pytest.fixture(scope="module")
def made() -> Known:
    return known(widths=WIDTHS)


@pytest.fixture(scope="module")
def cache(made: Known, tmp_path_factory: pytest.TempPathFactory) -> clvq.Cache:
    path = tmp_path_factory.mktemp("exact") / "cache"
    made.write(path)
    return clvq.Cache(path)


def by_text(cache: clvq.Cache, site: str) -> np.ndarray:
    """All vectors, text after text."""
    return cache.vectors(site, cache.rows_of(np.ones(len(cache.texts), dtype=bool)))


@pytest.mark.parametrize("encoding", ["bf16", "fp16", "int8"])
def test_every_row_column_text_and_prediction_is_kept(cache: clvq.Cache, tmp_path: Path, encoding: str) -> None:
    result = recode(cache, tmp_path / "new", encoding)
    new = clvq.Cache(tmp_path / "new")
    assert verify(tmp_path / "new").problems == []
    assert (new.manifest.parent, result.cache_id) == (cache.id, new.id)
    for table in (cache, new):
        assert table.texts["text"].to_pylist() == [f"text {number}" for number in range(40)]
    same = ["split", "label", "prediction", "row_count"]
    assert new.texts.select(same).equals(cache.texts.select(same))
    everything = np.ones(40, dtype=bool)
    old_rows, new_rows = cache.rows_of(everything), new.rows_of(everything)
    for column in set(cache.manifest.columns) - {"text"}:
        assert np.array_equal(new.column(column)[new_rows], cache.column(column)[old_rows])
    owner = new.text_index[new.column("text")[new_rows]]
    assert np.array_equal(owner, cache.text_index[cache.column("text")[old_rows]])
    assert np.array_equal(new.logits(), cache.logits())


@pytest.mark.parametrize("encoding", ["bf16", "fp16"])
def test_values_are_rounded_once_and_the_loss_is_measured(cache: clvq.Cache, tmp_path: Path, encoding: str) -> None:
    import ml_dtypes

    recode(cache, tmp_path / "new", encoding)
    new = clvq.Cache(tmp_path / "new")
    for site in WIDTHS:
        before = by_text(cache, site)
        kind = ml_dtypes.bfloat16 if encoding == "bf16" else np.float16
        expected = before.astype(kind).astype(np.float32)
        assert np.array_equal(by_text(new, site), expected)
        exact, error = before.astype(np.float64), expected.astype(np.float64) - before
        assert new.manifest.sites[site].loss.relative_l2 == pytest.approx(
            np.linalg.norm(error) / np.linalg.norm(exact), rel=1e-9
        )


def test_int8_takes_its_channel_scales_from_the_first_texts(cache: clvq.Cache, tmp_path: Path) -> None:
    recode(cache, tmp_path / "new", "int8")
    new = clvq.Cache(tmp_path / "new")
    group = zarr.open_group(tmp_path / "new" / "activations.zarr", mode="r")
    for site in WIDTHS:
        before = by_text(cache, site)
        # 40 texts are fewer than the 256 that scales come from.
        scale = channel_scale(before)
        assert np.array_equal(group[f"channel_scale/{site}"][:], scale)
        assert np.array_equal(by_text(new, site), dequantise(*quantise(before, scale, site=site), scale))


def test_a_stopped_recoding_goes_on_to_the_same_bytes(
    cache: clvq.Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recode(cache, tmp_path / "undisturbed", "int8")
    commit = writer_module.CacheWriter.commit
    count = iter(range(100))

    def stopped(self: writer_module.CacheWriter, shard: Shard) -> None:
        if next(count) == 2:
            raise KeyboardInterrupt
        commit(self, shard)

    with monkeypatch.context() as patched:
        patched.setattr(writer_module.CacheWriter, "commit", stopped)
        with pytest.raises(KeyboardInterrupt):
            recode(cache, tmp_path / "new", "int8")
    recode(cache, tmp_path / "new", "int8")
    assert contents(tmp_path / "new") == contents(tmp_path / "undisturbed")
    assert recode(cache, tmp_path / "new", "int8").cache_id == clvq.Cache(tmp_path / "undisturbed").id


def test_another_encoding_in_the_same_folder_is_refused(cache: clvq.Cache, tmp_path: Path) -> None:
    recode(cache, tmp_path / "new", "bf16")
    with pytest.raises(ResumeMismatch, match="encoding"):
        recode(cache, tmp_path / "new", "fp16")
    recode(cache, tmp_path / "new", "fp16", force=True)
    assert clvq.Cache(tmp_path / "new").manifest.sites["hidden.1"].encoding == "fp16"


def test_recoding_into_itself_or_to_what_it_is_is_refused(cache: clvq.Cache, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is the cache that is to be recoded: give another --out"):
        recode(cache, cache.path, "bf16")
    with pytest.raises(ConfigError, match="is stored as fp32 already"):
        recode(cache, tmp_path / "new", "fp32")
    assert not (tmp_path / "new").exists()


def test_a_damaged_cache_is_not_recoded_into_a_whole_one(made: Known, tmp_path: Path) -> None:
    made.write(tmp_path / "old")
    file = tmp_path / "old/activations.zarr/sites/hidden.2/c/2/0"
    data = bytearray(file.read_bytes())
    data[10] ^= 1
    file.write_bytes(data)
    with pytest.raises(CacheCorrupt, match="fails its checksum"):
        recode(clvq.Cache(tmp_path / "old"), tmp_path / "new", "bf16")
    assert not (tmp_path / "new" / "manifest.json").exists()


def test_the_card_says_what_the_losses_are_against(cache: clvq.Cache, tmp_path: Path) -> None:
    recode(cache, tmp_path / "new", "int8")
    card = (tmp_path / "new" / "README.md").read_text(encoding="utf-8")
    assert f"Made from the cache `{cache.id}`" in card
    assert "The originals are the values of the cache that this one was recoded from." in card
