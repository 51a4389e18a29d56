"""Caches of each format version, made once and kept: what later code must go on reading. `make_golden.py` made them."""

import base64
import hashlib
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tensorstore
import zarr
from clvq import Cache
from clvq.cache.layout import ALL_COLUMNS, TEXTUAL_COLUMNS, read_manifest, sealed_json
from clvq.cache.shard_file import read_record
from clvq.cache.verify import verify

GOLDEN = Path(__file__).with_name("golden")
NAMES = sorted(file.stem for file in GOLDEN.glob("*.zip"))


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    """Each golden cache."""
    return str(request.param)


@pytest.fixture
def path(name: str, tmp_path: Path) -> Path:
    """Its folder."""
    with zipfile.ZipFile(GOLDEN / f"{name}.zip") as archive:
        archive.extractall(tmp_path)
    return tmp_path


@pytest.fixture
def expected(name: str) -> dict[str, Any]:
    """What is in it; see `make_golden.py`."""
    version, _, own = name.partition("-")
    read: dict[str, Any] = json.loads((GOLDEN / f"{version}-expected.json").read_bytes())[own]
    return read


def unpacked(text: str, width: int) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype="<f4").reshape(-1, width)


def test_there_are_golden_caches_of_this_version_with_all_that_there_can_be() -> None:
    assert NAMES == ["v1-few", "v1-saliency", "v1-whole"]
    assert sum(file.stat().st_size for file in GOLDEN.iterdir()) < 150_000


def test_it_is_whole_and_has_the_id_that_it_had(path: Path, expected: dict[str, Any]) -> None:
    found = verify(path)
    assert found.problems == []
    assert found.cache_id == expected["id"] == hashlib.sha256((path / "manifest.json").read_bytes()).hexdigest()


def test_vectors_columns_and_logits_are_what_went_in(path: Path, expected: dict[str, Any]) -> None:
    cache, places = Cache(path), np.array(expected["places"])
    assert np.array_equal(cache.rows_of(np.ones(len(cache.texts), dtype=bool)), places)
    for site, packed in expected["vectors"].items():
        found = cache.vectors(site, places)
        # Bits, so that negative zeros and subnormal numbers count.
        assert np.array_equal(found.view(np.uint32), unpacked(packed, found.shape[1]).view(np.uint32))
    for column, values in expected["columns"].items():
        assert cache.column(column)[places].tolist() == values
        unused = np.delete(cache.column(column), places)
        assert len(unused)
        assert np.array_equal(unused, np.full(len(unused), ALL_COLUMNS[column][1]), equal_nan=True)
    if expected["logits"]:
        assert np.array_equal(cache.logits(), unpacked(expected["logits"], 3), equal_nan=True)
    if expected["convergence"]:
        assert np.array_equal(cache.convergence_delta(), unpacked(expected["convergence"], 1)[:, 0], equal_nan=True)


def test_texts_and_splits_are_what_went_in(path: Path, expected: dict[str, Any]) -> None:
    cache = Cache(path)
    predicted = expected["predictions"] or [None] * len(cache.texts)
    assert cache.texts["prediction"].to_pylist() == predicted
    assert cache.texts.drop_columns("prediction").to_pylist() == expected["texts"]
    for split, count in expected["splits"].items():
        assert cache.splits([split]).sum() == cache.manifest.splits[split].texts == count


def test_zarr_and_tensorstore_read_the_same_vectors(path: Path, expected: dict[str, Any]) -> None:
    group, places = zarr.open_group(path / "activations.zarr", mode="r"), np.array(expected["places"])

    def read(array: str) -> np.ndarray:
        store = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path / "activations.zarr" / array)}}
        first, second = np.asarray(group[array][:]), tensorstore.open(store).result().read().result()
        assert first.dtype == second.dtype
        assert first.tobytes() == second.tobytes()
        return first

    for site, packed in expected["vectors"].items():
        stored, encoding = read(f"sites/{site}")[places], group[f"sites/{site}"].attrs["encoding"]
        if encoding == "bf16":
            stored = (stored.astype(np.uint32) << 16).view(np.float32)
        elif encoding == "int8":
            rows, channels = read(f"scales/{site}")[places], read(f"channel_scale/{site}")
            stored = stored.astype(np.float32) * rows[:, None] * channels
        found = stored.astype(np.float32)
        assert np.array_equal(found.view(np.uint32), unpacked(packed, found.shape[1]).view(np.uint32))
    for column, values in expected["columns"].items():
        assert read(f"rows/{column}")[places].tolist() == values
    if expected["logits"]:
        texts = pq.read_table(path / "texts.parquet")["text_id"].to_pylist()
        assert np.array_equal(read("texts/logits")[texts], unpacked(expected["logits"], 3), equal_nan=True)
    if expected["convergence"]:
        texts, found = Cache(path).texts["text_id"].to_pylist(), read("texts/convergence_delta")
        assert np.array_equal(found[texts], unpacked(expected["convergence"], 1)[:, 0], equal_nan=True)
        assert np.isnan(np.delete(found, texts)).all()


def test_manifest_and_records_come_back_to_the_last_byte(path: Path) -> None:
    manifest = read_manifest(path)[0]
    assert sealed_json(manifest) == (path / "manifest.json").read_bytes()
    for number, shard in enumerate(manifest.shards):
        record = read_record(path, number)
        assert sealed_json(record) == (path / f"records/{number:06d}.json").read_bytes()
        assert (record.rows, record.texts, record.files) == (shard.rows, shard.texts, shard.files)


def test_statistics_and_losses_are_of_the_values_that_are_read(path: Path, expected: dict[str, Any]) -> None:
    for site, entry in Cache(path).manifest.sites.items():
        values = unpacked(expected["vectors"][site], entry.width).astype(np.float64)
        assert entry.statistics.count == entry.loss.rows == len(values)
        assert np.allclose(entry.statistics.mean, values.mean(0), rtol=1e-9)
        assert np.allclose(entry.statistics.variance(), values.var(0), rtol=1e-6)
        assert (entry.loss.error_squares == 0) == (entry.encoding == "fp32")


def test_all_that_a_cache_may_have_is_in_one_of_them() -> None:
    held: set[str] = set()
    for name in NAMES:
        with zipfile.ZipFile(GOLDEN / f"{name}.zip") as archive:
            held |= {re.sub(r"hidden\.\d+|mlp_out\.\d+", "SITE", file) for file in archive.namelist()}
            manifest = json.loads(archive.read("manifest.json"))
            held |= {site["encoding"] for site in manifest["sites"].values()}
            held |= {"no predictions"} if manifest["classes"] is None else set()
            held |= {"no texts"} if TEXTUAL_COLUMNS[0] not in manifest["columns"] else set()
            held |= {"parent"} if manifest["parent"] else set()
            assert len(manifest["shards"]) > 1
            assert manifest["geometry"]["shard_rows"] > manifest["geometry"]["chunk_rows"]
    assert {"bf16", "fp16", "fp32", "int8", "no predictions", "no texts", "parent"} <= held
    assert {f"activations.zarr/{kind}/SITE/zarr.json" for kind in ("sites", "scales", "channel_scale")} <= held
    assert {f"activations.zarr/rows/{column}/zarr.json" for column in ALL_COLUMNS} <= held
    assert {f"activations.zarr/texts/{name}/zarr.json" for name in ("logits", "convergence_delta")} <= held
