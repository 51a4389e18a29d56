"""The manifest: what is refused, and with which words."""

import hashlib
import json
import random
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clvq.cache.layout import (
    ROW_COLUMNS,
    FileEntry,
    Geometry,
    Manifest,
    ShardEntry,
    SiteEntry,
    array_axes,
    common_files,
    differences,
    is_sealed,
    parse_manifest,
    read_manifest,
    sealed_json,
    shard_files,
    to_json,
)
from clvq.cache.placement import place
from clvq.cache.statistics import EncodingLoss, SiteStatistics
from clvq.errors import CacheCorrupt, CacheIncomplete, CacheNotFound, ClvqError, FormatVersion
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from .cache_maker import known, seal, without_waiting

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
    """Read as a manifest that someone wrote on purpose: its checksum is right, where it has one."""
    return parse_manifest(seal(json.dumps(plain).encode()), HERE)


def refused(manifest: bytes | dict[str, Any]) -> str:
    with pytest.raises(CacheCorrupt) as caught:
        parse_manifest(manifest, HERE) if isinstance(manifest, bytes) else parsed(manifest)
    return str(caught.value)


def with_place(plain: dict[str, Any], *where: str | int, value: object) -> dict[str, Any]:
    """A copy with another value at one place."""
    changed: dict[str, Any] = json.loads(json.dumps(plain))
    node: Any = changed
    for key in where[:-1]:
        node = node[key]
    node[where[-1]] = value
    return changed


def test_a_manifest_survives_json_and_equal_ones_have_equal_bytes(plain: dict[str, Any]) -> None:
    manifest = parsed(plain)
    assert parse_manifest(sealed_json(manifest), HERE).model_copy(update={"checksum": manifest.checksum}) == manifest
    assert sealed_json(manifest) == sealed_json(parsed(dict(reversed(plain.items()))))


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
        parsed({"version": version, "checksum": "0" * 64, **fields, "format": "clvq-cache"})


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
    data = deep.encode()
    if where is not None:
        data = seal(json.dumps(plain | {where: "HERE"}).replace('"HERE"', f'{{"a": {deep}}}').encode())
    assert len(refused(data)) < 2000


@pytest.mark.parametrize("depth", [200, 500, 900, 940, 960, 980, 100_000])
def test_a_deeply_nested_identity_is_read_or_refused_in_our_own_words(plain: dict[str, Any], depth: int) -> None:
    deep = json.dumps(plain | {"identity": {"a": "HERE"}}).replace('"HERE"', "[" * depth + "]" * depth)
    with suppress(CacheCorrupt):
        assert to_json(parse_manifest(seal(deep.encode()), HERE))


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
    assert "is damaged at 'version': Input should be 1" in refused({**plain, "version": version})


def test_a_missing_or_added_field_is_named(plain: dict[str, Any]) -> None:
    without = {key: value for key, value in plain.items() if key != "geometry"}
    assert refused(without) == ("some/cache/manifest.json is damaged at 'geometry': Field required; get a whole copy")
    assert "damaged at 'extra': Extra inputs are not permitted" in refused({**plain, "extra": 1})


OUTSIDE = ["../x", "/etc/passwd", "a/../../b", "..", "", "a//b", "a/./b", "a/", "./a", ".hidden", "a\0b", "a\n", "é"]
OUTSIDE += ["C:\\x", "C:/x", "c:x", "\\\\server\\share", "//server/share", "a\\..\\b", "~/x", "$HOME", "x" * 300, "a b"]


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("where", ["files", "shards"])
def test_a_file_name_that_leads_outside_the_cache_is_refused(plain: dict[str, Any], name: str, where: str) -> None:
    entry = {name: {"bytes": 1, "sha256": "0" * 64}}
    place = ("files",) if where == "files" else ("shards", 0, "files")
    assert f"is damaged at '{'.'.join(map(str, place))}." in refused(with_place(plain, *place, value=entry))


@pytest.mark.parametrize("name", ["../hidden.8", "a/b", "", ".", "..", ".x", "a\\b", "C:", "a\n", "é", "x" * 101])
def test_a_site_name_that_leads_outside_the_cache_is_refused(plain: dict[str, Any], name: str) -> None:
    changed = {**plain, "sites": {name: plain["sites"]["hidden.1"]}}
    assert "is damaged at 'sites." in refused(changed)


def test_a_site_named_as_a_file_is_refused(plain: dict[str, Any]) -> None:
    changed = {**plain, "sites": {"zarr.json": plain["sites"]["hidden.1"]}}
    assert "a site has the name of a file, zarr.json; get a whole copy" in refused(changed)


@pytest.mark.parametrize("field", ["shards", "shard_rows", "chunk_rows", "shard_texts"])
def test_an_impossible_geometry_is_refused(plain: dict[str, Any], field: str) -> None:
    for value, complaint in [(0, "greater than or equal to 1"), (2**63, "less than or equal to 9223372036854775807")]:
        changed = with_place(plain, "geometry", field, value=value)
        assert f"damaged at 'geometry.{field}': Input should be {complaint}" in refused(changed)


def test_chunks_that_do_not_fill_a_shard_are_refused() -> None:
    with pytest.raises(ValidationError, match="shard_rows is 10, no multiple of chunk_rows, 4"):
        Geometry(shards=1, shard_rows=10, chunk_rows=4, shard_texts=1, rows=1, texts=1)


def test_a_manifest_that_contradicts_itself_is_refused(plain: dict[str, Any]) -> None:
    shards, rows = plain["shards"], plain["geometry"]["rows"]
    site = ("sites", "hidden.1")
    entry = {"bytes": 1, "sha256": "0" * 64}
    fewer = dict.fromkeys(list(shards[1]["files"])[1:], entry)
    for changed, complaint in [
        ({**plain, "shards": shards[1:]}, f"{len(shards) - 1} shards are listed and {len(shards)} are laid out"),
        (
            with_place(plain, *site, "width", value=7),
            "the statistics of hidden.1 have another width than its 7 channels",
        ),
        (
            with_place(plain, *site, "statistics", "count", value=rows + 1),
            f"the statistics of hidden.1 are of {rows + 1} rows, not {rows}",
        ),
        (
            with_place(plain, "shards", 0, "rows", value=shards[0]["rows"] + 1),
            f"the rows of the shards do not add up to {rows}, or do not fit",
        ),
        (
            with_place(plain, "shards", 0, "texts", value=shards[0]["texts"] + 1),
            "the texts of the shards do not add up to 8, or do not fit",
        ),
        (
            {**plain, "columns": ["text", "position"]},
            "the columns are neither all columns nor those of a cache without its texts",
        ),
        (
            with_place(plain, "files", "notes.txt", value=entry),
            "its files are not those that its sites and columns imply",
        ),
        (
            {**plain, "files": {name: entry for name in plain["files"] if name != "README.md"}},
            "its files are not those that its sites and columns imply",
        ),
        (
            with_place(plain, "shards", 1, "files", value=fewer),
            "the files of shard 1 are not those that its sites and columns imply",
        ),
        ({**plain, "classes": None}, "its files are not those that its sites and columns imply"),
        ({**plain, "sites": {}}, "its files are not those that its sites and columns imply"),
    ]:
        assert (
            refused(changed) == f"some/cache/manifest.json is damaged at '': Value error, {complaint}; get a whole copy"
        )


def test_rows_that_overfill_one_shard_are_refused_though_they_add_up(plain: dict[str, Any]) -> None:
    shards = [{**shard, "rows": 0} for shard in plain["shards"]]
    shards[0]["rows"] = plain["geometry"]["rows"]
    assert "the rows of the shards do not add up to" in refused({**plain, "shards": shards})


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("sites", "hidden.1", "statistics", "mean", 0), 1e999),
        (("sites", "hidden.1", "statistics", "squares", 0), "x"),
        (("sites", "hidden.1", "statistics", "norm_histogram"), {"10001": 1}),
        (("sites", "hidden.1", "statistics", "norm_histogram"), {"-10001": 1}),
        (("sites", "hidden.1", "statistics", "norm_histogram"), {"5": -1}),
        (("sites", "hidden.1", "loss", "rows"), -1),
        (("sites", "hidden.1", "loss", "worst_row"), 1e999),
        (("shards", 0, "files"), [1]),
        (("identity",), {"a": 1e999}),
        (("identity",), {"a": "\ud800"}),
        (("identity",), {"\ud800": 1}),
        (("identity",), {"a": "x" * 2**22}),
        (("class_names",), ["\ud800"]),
        (("parent",), "somewhere"),
    ],
)
def test_values_that_nothing_could_work_with_are_refused(
    plain: dict[str, Any], where: tuple[str | int, ...], value: object
) -> None:
    found = refused(with_place(plain, *where, value=value))
    # Infinity is not JSON, whatever Python's parser makes of it.
    assert "is not JSON (it holds Infinity)" in found or "is damaged at '" in found
    assert len(found) < 500


def test_a_number_that_overflows_is_refused(plain: dict[str, Any]) -> None:
    data = json.dumps(with_place(plain, "sites", "hidden.1", "loss", "squares", value="HERE"))
    assert "Input should be a finite number" in refused(seal(data.replace('"HERE"', "1e999").encode()))


@pytest.mark.parametrize("name", ["class_names", "counts", "files", "shards", "sites", "splits", "columns"])
@pytest.mark.parametrize("value", [[], {}, "", 0, True])
def test_an_empty_value_of_another_kind_is_refused(plain: dict[str, Any], name: str, value: object) -> None:
    if type(value) is not type(plain[name]):
        assert f"is damaged at '{name}': Input should be a valid" in refused({**plain, name: value})


def laid_out(plain: dict[str, Any], *, rows: list[int], texts: list[int], **geometry: int) -> dict[str, Any]:
    """The manifest with as many rows and texts in its shards, in another geometry; its files stay the same."""
    changed: dict[str, Any] = json.loads(json.dumps(plain))
    changed["geometry"] |= {"rows": sum(rows), "texts": sum(texts), **geometry}
    for shard, own_rows, own_texts in zip(changed["shards"], rows, texts, strict=True):
        shard |= {"rows": own_rows, "texts": own_texts}
    for site in changed["sites"].values():
        site["statistics"]["count"] = sum(rows)
    return changed


def test_a_geometry_of_ever_so_many_places_is_refused(plain: dict[str, Any]) -> None:
    # A shard whose texts would have fitted beside those of the next; axes and chunks that only their claim makes long.
    few = {"rows": [61, 52], "texts": [2, 6]}
    many = [2**25, 1]
    for changed, complaint in [
        (laid_out(plain, **few, shard_rows=256), "512 places for 113 rows: no extraction makes so many"),
        (laid_out(plain, **few, shard_texts=7), "no shard has as many texts as shards have places for"),
        (
            laid_out(plain, rows=few["rows"], texts=[2**30, 1], shard_texts=2**30),
            "2147483648 places for texts are more than text ids can name",
        ),
        (
            laid_out(plain, rows=many, texts=few["texts"], shard_rows=2**25),
            "67108864 rows in 6108 bytes: no extraction packs so many",
        ),
        (
            laid_out(plain, rows=few["rows"], texts=[2**24, 1], shard_texts=2**24),
            "50331651 logits in 6108 bytes: no extraction packs so many",
        ),
        (
            laid_out(plain, rows=[10**8, 1], texts=few["texts"], shard_rows=10**8 + 32, chunk_rows=32),
            "200000064 rows in 6108 bytes: no extraction packs so many",
        ),
    ]:
        assert refused(changed).endswith(f"damaged at '': Value error, {complaint}; get a whole copy")


def test_texts_that_crowd_in_one_shard_are_refused_where_they_are_many(tmp_path: Path) -> None:
    manifest = known(texts=60, longest=60).write(tmp_path)
    assert manifest is not None
    shards = [shard.rows for shard in manifest.shards]
    assert len(shards) > 16
    few, many = [[texts, *[0] * (len(shards) - 1)] for texts in (2**19, 2**21)]
    plain = json.loads(to_json(manifest))
    assert parsed(laid_out(plain, rows=shards, texts=few, shard_texts=few[0]))
    assert "places for 2097152 texts: no extraction makes so many" in refused(
        laid_out(plain, rows=shards, texts=many, shard_texts=many[0])
    )


def test_a_chunk_of_ever_so_many_bytes_is_refused(plain: dict[str, Any]) -> None:
    changed = laid_out(plain, rows=[2**25, 1], texts=[2, 6], shard_rows=2**25, chunk_rows=2**25)
    # As many bytes as the rows would need, so that it is the chunk that is found too large.
    for shard in changed["shards"]:
        for entry in shard["files"].values():
            entry["bytes"] = 2**40
    assert refused(changed).endswith(
        "a chunk of 805306368 bytes is larger than any extraction makes (268435456); get a whole copy"
    )
    assert parsed(laid_out(plain, rows=[61, 52], texts=[2, 6]))


@settings(deadline=None)
@given(st.lists(st.integers(1, 3000), min_size=1, max_size=80), st.integers(1, 20_000))
def test_whatever_texts_are_laid_out_the_limits_allow(counts: list[int], row_bytes: int) -> None:
    placement = place(np.array(counts), row_bytes=row_bytes)
    ends = placement.shard_starts
    site = SiteEntry(
        width=1,
        encoding="bf16",
        statistics=SiteStatistics(count=sum(counts), mean=[0.0], squares=[0.0], norm_histogram={}),
        loss=EncodingLoss.merged([]),
    )
    entry = FileEntry(bytes=1, sha256="0" * 64)
    axes = array_axes({"hidden.1": site}, ROW_COLUMNS, predictions=True)
    manifest = Manifest(
        format="clvq-cache",
        version=1,
        parent=None,
        identity={},
        geometry=placement.geometry,
        sites={"hidden.1": site},
        columns=tuple(ROW_COLUMNS),
        splits={},
        class_names=None,
        classes=2,
        counts={},
        files=dict.fromkeys(common_files(axes, placement.geometry.shards), entry),
        shards=[
            ShardEntry(
                rows=sum(counts[first:end]), texts=end - first, files=dict.fromkeys(shard_files(axes, number), entry)
            )
            for number, (first, end) in enumerate(pairwise(ends.tolist()))
        ],
    )
    assert parse_manifest(sealed_json(manifest), HERE).geometry == placement.geometry


def test_a_manifest_longer_than_any_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "manifest.json", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(CacheCorrupt) as caught:
        read_manifest(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}/manifest.json has 1,099,511,627,776 bytes; a manifest has at most 67,108,864"
    )


def test_the_seal_is_the_sha256_of_the_file_with_zeros_in_its_place(plain: dict[str, Any]) -> None:
    data = sealed_json(parsed(plain))
    assert data.startswith(b'{\n "checksum": "')
    held = data[16:80]
    assert hashlib.sha256(data.replace(held, b"0" * 64)).hexdigest().encode() == held
    assert is_sealed(data)
    assert not is_sealed(data.replace(held, held.upper()))
    assert not is_sealed(data.replace(b'"checksum"', b'"chequesum"'))


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data + b"\n",
        lambda data: data + b" ",
        lambda data: data[:-1],
        lambda data: data.replace(b"\n", b"\r\n"),
        lambda data: data.replace(b": ", b":", 1),
        lambda data: json.dumps(json.loads(data)).encode(),
        lambda data: data.replace(b'"tiny"', b'"tinY"'),
        lambda data: b" " + data,
    ],
)
def test_a_manifest_that_changed_by_as_little_as_a_space_is_refused(
    plain: dict[str, Any], change: Callable[[bytes], bytes]
) -> None:
    changed = change(sealed_json(parsed(plain)))
    assert changed != sealed_json(parsed(plain))
    assert refused(changed) == (
        "some/cache/manifest.json is damaged: its bytes do not have the checksum that it holds; get a whole copy of it"
    )


@pytest.mark.soak
def test_a_manifest_with_any_one_bit_flipped_is_refused(
    plain: dict[str, Any], soak: bool, tell: Callable[[str], None]
) -> None:
    data = sealed_json(parsed(plain))
    draw = random.Random(0)
    bits = range(8 * len(data)) if soak else sorted(draw.sample(range(8 * len(data)), 1000))
    for bit in bits:
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        # A flipped version may be that of another format.
        with pytest.raises((CacheCorrupt, FormatVersion)):
            parse_manifest(bytes(flipped), HERE)
    tell(f"{len(bits)} single bits flipped in a manifest of {8 * len(data)}: each refused")


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
