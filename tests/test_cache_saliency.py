"""Caches with saliency: two columns and a number per text more, and everything else as it is without them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clvq import Cache
from clvq.cache.layout import ALL_COLUMNS, ROW_COLUMNS, TEXTUAL_COLUMNS, parse_manifest, sealed_json, to_json
from clvq.cache.recode import recode
from clvq.cache.repair import repair
from clvq.cache.sharing.pull import pull
from clvq.cache.sharing.push import push
from clvq.cache.verify import verify
from clvq.cache.writer import CacheWriter
from clvq.errors import CacheCorrupt, ConfigError, DataError, ResumeMismatch
from clvq.progress import Progress

from .cache_maker import FEW_COLUMNS, Known, contents, known, seal, without_waiting

no_waiting = pytest.fixture(without_waiting, scope="module", autouse=True)

SETTINGS = {"saliency": "ig", "saliency_site": "hidden.1", "saliency_steps": 50, "saliency_baseline": "pad"}


@pytest.fixture(scope="module")
def made() -> Known:
    found = known(texts=30, saliency=True).with_identity(settings=SETTINGS)
    # One text could not be run.
    assert found.convergence is not None
    found.convergence[7] = np.nan
    return found


@pytest.fixture(scope="module")
def cache(made: Known, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    path = tmp_path_factory.mktemp("saliency") / "cache"
    made.write(path)
    return Cache(path)


@pytest.fixture(scope="module")
def plain(cache: Cache) -> dict[str, Any]:
    """Its manifest as JSON."""
    read: dict[str, Any] = json.loads(to_json(cache.manifest))
    return read


def test_the_manifest_sums_up_how_far_the_saliencies_miss(made: Known, cache: Cache) -> None:
    convergence = cache.manifest.convergence
    assert convergence is not None
    sizes = np.sort(np.abs(np.delete(made.convergence, 7)))
    assert convergence.texts == 29
    # The smallest value that half of the texts, or 95 % of them, do not exceed.
    assert convergence.median == sizes[14]
    assert convergence.quantile_95 == sizes[27]
    card = (cache.path / "README.md").read_text()
    assert "integrated gradients at `hidden.1`, 50 steps, baseline pad" in card
    assert f"{convergence.median:.2g} in the median of 29 texts" in card


def test_of_gradients_nothing_is_summed_up(made: Known, tmp_path: Path) -> None:
    assert made.convergence is not None
    none = replace(made, convergence=np.full_like(made.convergence, np.nan))
    none.with_identity(settings={"saliency": "gradient", "saliency_site": "hidden.1"}).write(tmp_path)
    assert Cache(tmp_path).manifest.convergence is None
    assert b"convergence" not in (tmp_path / "manifest.json").read_bytes().replace(b"texts/convergence_delta", b"")
    assert "gradient × input at `hidden.1`." in (tmp_path / "README.md").read_text()
    assert verify(tmp_path).problems == []


def test_a_cache_without_saliency_says_so(tmp_path: Path) -> None:
    known(texts=5).write(tmp_path)
    cache = Cache(tmp_path)
    for read in (lambda: cache.column("saliency"), lambda: cache.column("saliency_max"), cache.convergence_delta):
        with pytest.raises(ConfigError) as caught:
            read()
        assert str(caught.value) == f"{tmp_path} holds no saliency; extract with `--task classify --saliency ig`"


def test_a_run_follows_from_the_same_vectors_with_and_without_saliency(cache: Cache, tmp_path: Path) -> None:
    known(texts=30).write(tmp_path)
    without = Cache(tmp_path)
    assert without.manifest.vectors_id == cache.manifest.vectors_id
    assert without.id != cache.id


def test_recoding_keeps_it(made: Known, cache: Cache, tmp_path: Path) -> None:
    recode(cache, tmp_path / "recoded", "fp16")
    found = Cache(tmp_path / "recoded")
    everything = np.ones(30, dtype=bool)
    for name in ("saliency", "saliency_max"):
        values = found.column(name)[found.rows_of(everything)]
        assert np.array_equal(values, made.columns[name])
    assert np.array_equal(found.convergence_delta(), made.convergence, equal_nan=True)
    assert found.manifest.convergence == cache.manifest.convergence


def test_a_copy_without_texts_keeps_it(made: Known, cache: Cache, tmp_path: Path) -> None:
    # Pushing so leaves a secret in the folder.
    made.write(tmp_path / "cache")
    push(tmp_path / "cache", str(tmp_path / "place"), without_texts=True)
    pull(str(tmp_path / "place"), tmp_path / "copy")
    copy = Cache(tmp_path / "copy")
    assert set(copy.manifest.columns) == ALL_COLUMNS.keys() - set(TEXTUAL_COLUMNS)
    assert np.array_equal(copy.column("saliency"), cache.column("saliency"), equal_nan=True)
    assert np.array_equal(copy.convergence_delta(), made.convergence, equal_nan=True)
    assert copy.manifest.convergence == cache.manifest.convergence
    assert verify(copy.path).problems == []


def test_an_extraction_goes_on_where_it_stopped_to_the_same_bytes(made: Known, cache: Cache, tmp_path: Path) -> None:
    with CacheWriter(tmp_path, made.extraction) as writer:
        writer.commit(made.shard(1))
    made.write(tmp_path)
    assert contents(tmp_path) == contents(cache.path)


def test_what_was_extracted_without_it_is_not_gone_on_with(made: Known, tmp_path: Path) -> None:
    with CacheWriter(tmp_path, known(texts=30).with_identity(settings=SETTINGS).extraction):
        pass
    with pytest.raises(ResumeMismatch, match="columns: "):
        made.write(tmp_path)


def test_damage_is_repaired_to_the_last_byte(made: Known, cache: Cache, tmp_path: Path) -> None:
    class Again:
        def shard(self, number: int, progress: Progress) -> Any:
            return made.shard(number)

        def scales(self, progress: Progress) -> Any:
            raise AssertionError("no site has scales")

        def texts(self) -> Any:
            return made.texts()

    made.write(tmp_path)
    array = tmp_path / "activations.zarr"
    for file in ("rows/saliency/c/0", "texts/convergence_delta/c/1"):
        (array / file).write_bytes(b"damaged")
    for file in ("rows/saliency_max/zarr.json", "texts/convergence_delta/zarr.json", "../README.md"):
        (array / file).unlink()
    assert len(verify(tmp_path).problems) == 5
    assert repair(tmp_path, Again()).problems == []
    assert contents(tmp_path) == contents(cache.path)


def test_a_shard_with_part_of_it_is_refused(made: Known, tmp_path: Path) -> None:
    shard = made.shard(0)
    with CacheWriter(tmp_path, made.extraction) as writer:
        for wrong, told in [
            (replace(shard, convergence=None), "see texts/convergence_delta"),
            (replace(shard, rows={name: shard.rows[name] for name in ROW_COLUMNS}), "see rows/saliency, rows/"),
        ]:
            with pytest.raises(DataError, match=told):
                writer.commit(wrong)


@pytest.mark.parametrize(
    "columns",
    [
        (*ROW_COLUMNS, "saliency"),
        (*ROW_COLUMNS, "saliency_max", "saliency"),
        ("saliency", "saliency_max"),
        (*FEW_COLUMNS, "saliency_max"),
        (*ROW_COLUMNS, "saliency", "saliency_max", "saliency"),
    ],
)
def test_a_manifest_with_other_columns_is_refused(plain: dict[str, Any], columns: tuple[str, ...]) -> None:
    with pytest.raises(CacheCorrupt, match="columns"):
        parse_manifest(seal(json.dumps({**plain, "columns": columns}).encode()), "it")


@pytest.mark.parametrize(
    "convergence",
    [
        {"texts": 31, "median": 1.0, "quantile_95": 1.0},
        {"texts": 0, "median": 1.0, "quantile_95": 1.0},
        {"texts": 3, "median": -1.0, "quantile_95": 1.0},
        {"texts": 3, "median": 1.0},
        {"texts": 3, "median": "\ud800", "quantile_95": 1.0},
    ],
)
def test_a_manifest_with_an_impossible_convergence_is_refused(plain: dict[str, Any], convergence: Any) -> None:
    with pytest.raises(CacheCorrupt, match=r"it/manifest\.json is damaged"):
        parse_manifest(seal(json.dumps({**plain, "convergence": convergence}).encode()), "it")


def test_convergence_without_saliency_is_refused(plain: dict[str, Any], tmp_path: Path) -> None:
    manifest = known(texts=30).write(tmp_path)
    other = json.loads(to_json(manifest)) | {"convergence": plain["convergence"]}
    with pytest.raises(CacheCorrupt, match="more saliencies that converge than there are"):
        parse_manifest(seal(json.dumps(other).encode()), "it")


def test_a_claim_of_ever_so_many_texts_with_saliency_is_refused(tmp_path: Path) -> None:
    manifest = known(texts=8, saliency=True, predictions=False).write(tmp_path)
    assert manifest is not None
    assert parse_manifest(sealed_json(manifest), "it").saliency
    claimed = json.loads(to_json(manifest))
    claimed["geometry"] |= {"texts": 2**27 + 8 - claimed["shards"][0]["texts"], "shard_texts": 2**27}
    claimed["shards"][0]["texts"] = 2**27
    with pytest.raises(CacheCorrupt, match="no extraction packs so many"):
        parse_manifest(seal(json.dumps(claimed).encode()), "it")


def test_a_card_tells_of_a_strangers_settings_only_what_a_table_can_hold(tmp_path: Path) -> None:
    for number, settings in enumerate(["text", {"saliency": ["x"], "saliency_site": "`|\n# x"}, None]):
        known(texts=3, saliency=True).with_identity(settings=settings).write(tmp_path / str(number))
        card = (tmp_path / str(number) / "README.md").read_text()
        assert "saliency for the predicted class" in card
        assert "\n# x" not in card
