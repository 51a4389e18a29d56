"""The manifest: what is refused, and with which words."""

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from clvq.cache.layout import Geometry, Manifest, differences, parse_manifest, read_manifest, to_json
from clvq.errors import CacheCorrupt, CacheIncomplete, CacheNotFound, ClvqError, FormatVersion
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from .cache_maker import known, without_waiting

no_waiting = pytest.fixture(without_waiting, scope="module", autouse=True)

HERE = Path("some/cache")
FIELDS = list(Manifest.model_fields)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A manifest as JSON."""
    manifest = known(texts=8).write(tmp_path_factory.mktemp("layout") / "cache")
    assert manifest is not None
    read: dict[str, Any] = json.loads(to_json(manifest))
    return read


def parsed(plain: object) -> Manifest:
    return parse_manifest(json.dumps(plain).encode(), HERE)


def refused(data: bytes) -> str:
    with pytest.raises(CacheCorrupt) as caught:
        parse_manifest(data, HERE)
    return str(caught.value)


def test_a_manifest_survives_json_and_equal_ones_have_equal_bytes(plain: dict[str, Any]) -> None:
    manifest = parsed(plain)
    assert parse_manifest(to_json(manifest), HERE) == manifest
    assert to_json(manifest) == to_json(parsed(dict(reversed(plain.items()))))


@settings(deadline=None)
@given(st.binary())
def test_arbitrary_bytes_are_refused_in_our_own_words(data: bytes) -> None:
    with pytest.raises(ClvqError):
        parse_manifest(data, HERE)


@settings(deadline=None)
@given(JSON)
def test_arbitrary_json_is_refused_in_our_own_words(value: object) -> None:
    with pytest.raises(ClvqError):
        parsed(value)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), JSON), st.sampled_from([1, 2, None]))
def test_arbitrary_fields_are_refused_in_our_own_words(fields: dict[str, object], version: object) -> None:
    with pytest.raises(ClvqError):
        parsed({"version": version, **fields, "format": "clvq-cache"})


@settings(deadline=None)
@given(st.data())
def test_a_manifest_with_any_one_value_replaced_is_read_or_refused_in_our_own_words(
    plain: dict[str, Any], data: st.DataObject
) -> None:
    changed = json.loads(json.dumps(plain))
    node: Any = changed
    while True:
        keys = sorted(node) if isinstance(node, dict) else list(range(len(node)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(node[key], dict | list) or not node[key] or data.draw(st.booleans()):
            break
        node = node[key]
    node[key] = data.draw(JSON)
    with suppress(ClvqError):
        assert isinstance(parsed(changed), Manifest)


@pytest.mark.parametrize("where", ["version", "sites", "shards", None])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
@pytest.mark.parametrize("depth", [200, 500, 900, 940, 960, 980, 100_000])
def test_deep_nesting_is_refused_briefly(
    plain: dict[str, Any], where: str | None, opening: str, closing: str, depth: int
) -> None:
    deep = opening * depth + "1" + closing * depth
    if where is not None:
        deep = json.dumps(plain | {where: "HERE"}).replace('"HERE"', f'{{"a": {deep}}}')
    assert len(refused(deep.encode())) < 2000


@pytest.mark.parametrize("depth", [200, 500, 900, 940, 960, 980, 100_000])
def test_a_deeply_nested_identity_is_read_or_refused_in_our_own_words(plain: dict[str, Any], depth: int) -> None:
    deep = json.dumps(plain | {"identity": {"a": "HERE"}}).replace('"HERE"', "[" * depth + "]" * depth)
    with suppress(CacheCorrupt):
        assert to_json(parse_manifest(deep.encode(), HERE))


def test_what_is_not_json_is_called_so() -> None:
    assert refused(b"{").startswith("some/cache/manifest.json is not JSON (Expecting property name")
    assert refused(b"\xff\xfe\x00").startswith("some/cache/manifest.json is not JSON (")
    assert refused(b"{").endswith("; get a whole copy of the cache")


@pytest.mark.parametrize("data", [b"[]", b"{}", b"1", b"null", b'{"format": "zip"}', b'{"format": ["clvq-cache"]}'])
def test_json_that_is_no_manifest_is_called_so(data: bytes) -> None:
    assert refused(data) == (
        'some/cache/manifest.json is not the manifest of a clvq cache: it has no "format": "clvq-cache"'
    )


@pytest.mark.parametrize("version", [0, 2, 10**40])
def test_another_version_is_named(plain: dict[str, Any], version: int) -> None:
    with pytest.raises(FormatVersion) as caught:
        parsed({**plain, "version": version, "a field of the future": 1})
    assert str(caught.value) == (
        f"some/cache is a cache of format version {version}; this clvq reads version 1: "
        "use the clvq that wrote it, or extract again"
    )


@pytest.mark.parametrize("version", ["1", None, [1], 1.5, {}])
def test_a_version_that_is_no_number_is_refused(plain: dict[str, Any], version: object) -> None:
    assert "is damaged at 'version': Input should be 1" in refused(json.dumps({**plain, "version": version}).encode())


def test_a_missing_or_added_field_is_named(plain: dict[str, Any]) -> None:
    without = {key: value for key, value in plain.items() if key != "geometry"}
    assert refused(json.dumps(without).encode()) == (
        "some/cache/manifest.json is damaged at 'geometry': Field required; get a whole copy"
    )
    assert "damaged at 'extra': Extra inputs are not permitted" in refused(json.dumps({**plain, "extra": 1}).encode())


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../b", "", "a//b", "a/./b", "a\0b", "é", "x" * 300])
@pytest.mark.parametrize("where", ["files", "shards"])
def test_a_file_name_that_leads_outside_the_cache_is_refused(plain: dict[str, Any], name: str, where: str) -> None:
    entry = {name: {"bytes": 1, "sha256": "0"}}
    shards = [{**shard, "files": entry} for shard in plain["shards"]]
    changed = {**plain, where: entry if where == "files" else shards}
    assert f"is damaged at '{where}" in refused(json.dumps(changed).encode())


@pytest.mark.parametrize("name", ["../hidden.8", "a/b", "", "."])
def test_a_site_name_that_leads_outside_the_cache_is_refused(plain: dict[str, Any], name: str) -> None:
    changed = {**plain, "sites": {name: plain["sites"]["hidden.1"]}}
    assert "is damaged at 'sites." in refused(json.dumps(changed).encode())


@pytest.mark.parametrize("field", ["shards", "shard_rows", "chunk_rows", "shard_texts"])
def test_an_impossible_geometry_is_refused(plain: dict[str, Any], field: str) -> None:
    changed = {**plain, "geometry": {**plain["geometry"], field: 0}}
    assert f"damaged at 'geometry.{field}': Input should be greater" in refused(json.dumps(changed).encode())


def test_a_manifest_that_contradicts_itself_is_refused(plain: dict[str, Any]) -> None:
    fewer = {**plain, "shards": plain["shards"][1:]}
    count = len(plain["shards"])
    assert f"{count - 1} shards are listed and {count} are laid out" in refused(json.dumps(fewer).encode())
    site = {**plain["sites"]["hidden.1"], "width": 7}
    wider = {**plain, "sites": {**plain["sites"], "hidden.1": site}}
    assert "the statistics of hidden.1 have another width than its 7 channels" in refused(json.dumps(wider).encode())
    with pytest.raises(ValidationError, match="shard_rows is 10, no multiple of chunk_rows, 4"):
        Geometry(shards=1, shard_rows=10, chunk_rows=4, shard_texts=1, rows=1, texts=1)


def test_a_folder_that_is_no_cache_is_called_so(tmp_path: Path) -> None:
    with pytest.raises(CacheNotFound) as caught:
        read_manifest(tmp_path / "x")
    assert str(caught.value) == (
        f"{tmp_path}/x is not a clvq cache: it does not exist; make one with `clvq extract … --out {tmp_path}/x`"
    )
    with pytest.raises(CacheNotFound, match=r"is not a clvq cache: it has no manifest\.json; make one with `clvq"):
        read_manifest(tmp_path)


def test_an_unfinished_cache_is_called_so(tmp_path: Path) -> None:
    (tmp_path / "unfinished.json").write_text("{}")
    with pytest.raises(CacheIncomplete) as caught:
        read_manifest(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} is an unfinished extraction; run the `clvq extract` command that began it again to finish it"
    )


def test_the_id_is_the_sha256_of_the_manifest(tmp_path: Path) -> None:
    known(texts=5).write(tmp_path)
    assert read_manifest(tmp_path)[1] == hashlib.sha256((tmp_path / "manifest.json").read_bytes()).hexdigest()


def test_differences_name_each_value_by_its_path() -> None:
    found = {"model": {"name": "a", "commit": None}, "length": 128, "sites": ["hidden.1"]}
    wanted = {"model": {"name": "b", "commit": None}, "length": 128, "sites": ["hidden.1"], "pool": "last"}
    assert differences(found, wanted) == ['model.name: "a" there, "b" now', 'pool: null there, "last" now']
    assert differences(found, found) == []
    assert differences("x" * 100, 1, "long") == [f'long: "{"x" * 56}… there, 1 now']
