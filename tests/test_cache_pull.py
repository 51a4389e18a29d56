"""Pulling a cache or a part of one: nothing is believed, nothing is fetched twice, what is damaged is mended."""

import hashlib
import json
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from clvq.cache.reader import Cache
from clvq.cache.selection import expected_files, read_selection
from clvq.cache.sharing import pull as pulling
from clvq.cache.sharing.pull import Pulled, pull
from clvq.cache.sharing.push import push
from clvq.cache.sharing.stores import FolderStore
from clvq.cache.verify import verify
from clvq.errors import (
    CacheCorrupt,
    CacheIncomplete,
    CacheNotFound,
    ConfigError,
    DiskFull,
    FolderInUse,
    Interrupted,
    RemoteUnreachable,
    ResumeMismatch,
)
from clvq.progress import Silent

from .cache_maker import EVERY_ENCODING, Known, contents, known, without_waiting
from .sharing import KINDS, FolderPlace, StopsAfter, a_place, resealed, started

pytestmark = [
    # The Hub's client calls its own HTTP library in a way that this one advises against.
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
    pytest.mark.usefixtures("_quick"),
]


@pytest.fixture
def _quick() -> Iterator[None]:
    yield from without_waiting()


@pytest.fixture(scope="module")
def made() -> Known:
    """Texts of one split lie in the first shards, those of the other in the last ones."""
    made = known(texts=60, longest=12, widths=EVERY_ENCODING)
    return replace(made, splits=["train"] * 40 + ["dev"] * 20)


@pytest.fixture(scope="module")
def cache(made: Known, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made.write(folder := tmp_path_factory.mktemp("pull") / "cache")
    return folder


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return tmp_path / "copy"


@pytest.fixture
def place(cache: Path, tmp_path: Path) -> Path:
    """A folder that holds the cache, to be changed as one likes."""
    return Path(shutil.copytree(cache, tmp_path / "place"))


def refused(kind: type[Exception], action: Callable[[], object]) -> str:
    with pytest.raises(kind) as caught:
        action()
    return str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_is_as_large_as_what_was_asked_for_and_can_be_extended_to_the_whole(
    kind: str, cache: Path, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = contents(cache)
    with a_place(kind, tmp_path / "shared", monkeypatch) as place:
        push(cache, place.url)
        first = pull(place.url, copy, sites=["4", "hidden.2"], splits=["dev"])
        shards = sorted({int(row) // Cache(cache).manifest.geometry.shard_rows for row in first_rows(cache, "dev")})
        assert 0 < len(shards) < Cache(cache).manifest.geometry.shards
        there = contents(copy)
        assert first.selection is not None
        assert first.selection.shards == tuple(shards)
        assert first.selection.sites == ("hidden.2", "hidden.4")
        for name, data in whole.items():
            left_out = any(f"/{site}/" in name for site in ("hidden.1", "hidden.3"))
            number = shard_of(name)
            assert (name in there) == (not left_out and number in (None, *shards)), name
            assert there.get(name, data) == data
        assert there.keys() - whole.keys() == {"selection.json"}
        wider = pull(place.url, copy, sites=["3"], splits=["dev"])
        assert wider.kept == first.files + first.kept
        assert wider.files < 20
        rest = pull(place.url, copy)
        assert rest.selection is None
        assert contents(copy) == whole
        assert pull(place.url, copy).files == 0


def first_rows(cache: Path, split: str) -> list[int]:
    texts = Cache(cache).texts
    return [
        row
        for row, name in zip(texts["first_row"].to_pylist(), texts["split"].to_pylist(), strict=True)
        if name == split
    ]


def shard_of(name: str) -> int | None:
    if name.startswith("records/"):
        return int(Path(name).stem)
    if "/c/" in name and "channel_scale" not in name:
        return int(name.split("/c/")[1].split("/")[0])
    return None


def test_a_part_reads_as_the_whole_does_and_refuses_the_rest_by_name(cache: Path, copy: Path) -> None:
    pull(str(cache), copy, sites=["2", "4"], splits=["dev"])
    part, whole = Cache(copy), Cache(cache)
    assert part.id == whole.id
    rows = part.rows_of(part.splits(["dev"]))
    assert len(rows) > 0
    assert np.array_equal(rows, whole.rows_of(whole.splits(["dev"])))
    for site in ("hidden.2", "hidden.4"):
        assert np.array_equal(part.vectors(part.site(site), rows), whole.vectors(site, rows))
    missing = f"{copy} is a partial copy without the"
    pull_it = f"pull it with `clvq cache pull {cache} {copy}"
    assert refused(ConfigError, lambda: part.site("1")) == f"{missing} site 'hidden.1': {pull_it} --sites hidden.1`"
    assert refused(ConfigError, lambda: part.vectors("hidden.1", rows)) == (
        f"{missing} site 'hidden.1': {pull_it} --sites hidden.1`"
    )
    assert refused(ConfigError, lambda: part.splits(["dev", "train"])) == (
        f"{missing} split 'train': {pull_it} --split train`"
    )
    with pytest.raises(ConfigError, match="is not in this partial copy"):
        part.vectors("hidden.2", np.array([0]))


def test_verify_checks_what_was_selected_and_reports_the_rest_as_absent(cache: Path, copy: Path) -> None:
    pull(str(cache), copy, sites=["2"], splits=["dev"])
    result = verify(copy)
    assert result.problems == []
    assert result.files + result.absent == len(contents(cache)) - 1
    assert result.files == len(contents(copy)) - 2
    (copy / "records/000006.json").unlink()
    assert [(problem.file, problem.found) for problem in verify(copy).problems] == [
        ("records/000006.json", "is missing")
    ]


def test_the_manifest_alone_tells_of_the_cache_and_reads_nothing(cache: Path, copy: Path) -> None:
    pulled = pull(str(cache), copy, manifest_only=True)
    assert sorted(contents(copy)) == ["manifest.json", "selection.json"]
    assert pulled.files == 0
    part = Cache(copy)
    assert part.manifest == Cache(cache).manifest
    assert verify(copy).problems == []
    pull_it = f"pull it with `clvq cache pull {cache} {copy}"
    assert refused(ConfigError, lambda: part.site("1")) == (
        f"{copy} holds the manifest alone, no site 'hidden.1': {pull_it} --sites hidden.1`"
    )
    assert refused(ConfigError, lambda: part.splits(["dev"])) == (
        f"{copy} holds the manifest alone, no split 'dev': {pull_it} --split dev`"
    )
    assert refused(ConfigError, lambda: part.texts) == (
        f"{copy} holds the manifest alone, no texts or vectors: pull them with `clvq cache pull {cache} {copy}`"
    )
    pull(str(cache), copy)
    assert contents(copy) == contents(cache)


def test_a_whole_copy_stays_whole_when_a_part_is_pulled_into_it(cache: Path, copy: Path) -> None:
    pull(str(cache), copy)
    assert pull(str(cache), copy, sites=["1"], splits=["dev"]).selection is None
    assert contents(copy) == contents(cache)


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_at_any_moment_it_says_so_and_goes_on_where_it_was(
    kind: str, cache: Path, made: Known, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with a_place(kind, tmp_path / "shared", monkeypatch) as place:
        push(cache, place.url)
        for step in (1, 40, 80):
            with pytest.raises(Interrupted):
                pull(place.url, copy, progress=StopsAfter(step))
            message = (
                f"{copy} holds an unfinished pull of the cache {Cache(cache).id[:12]}; run `clvq cache pull "
                f"{place.url} {copy}` again to finish it"
            )
            for look in (Cache, verify, lambda path: pull(str(path), tmp_path / "another")):
                assert refused(CacheIncomplete, lambda look=look: look(copy)) == message  # type: ignore[misc]
            # An extraction has nothing to do there.
            assert refused(ResumeMismatch, lambda: made.write(copy)) == f"{message}; or give another --out"
        pulled = pull(place.url, copy)
        assert pulled.kept >= 80
        assert contents(copy) == contents(cache)


def test_whatever_is_damaged_is_mended_and_nothing_else_is_fetched(cache: Path, copy: Path) -> None:
    pull(str(cache), copy)
    whole = contents(cache)
    broken = ["manifest.json", "README.md", "texts.parquet", "records/000003.json", "activations.zarr/zarr.json",
              "activations.zarr/sites/hidden.1/c/2/0", "activations.zarr/channel_scale/hidden.4/c/0"]  # fmt: skip
    for name in broken:
        data = bytearray(whole[name])
        data[len(data) // 2] ^= 1
        (copy / name).write_bytes(data)
    (copy / "activations.zarr/rows/text/c/1").unlink()
    (copy / "activations.zarr/rows/text/c/2").write_bytes(b"short")
    (copy / "activations.zarr/rows/text/c/3").unlink()
    (copy / "activations.zarr/rows/text/c/3").symlink_to(cache / "activations.zarr/rows/text/c/3")
    assert pull(str(cache), copy).files == len(broken) - 1 + 3
    assert contents(copy) == whole
    assert verify(copy).problems == []


def test_a_damaged_selection_is_written_anew_from_what_is_asked_for(cache: Path, copy: Path) -> None:
    pull(str(cache), copy, sites=["1"], splits=["dev"])
    whole = contents(copy)
    (copy / "selection.json").write_bytes(b"{")
    assert pull(str(cache), copy, sites=["1"], splits=["dev"]).files == 0
    assert contents(copy) == whole


def test_a_file_that_comes_damaged_is_fetched_again_and_refused_when_it_always_does(
    cache: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that breaks off."""
    fetched: dict[str, int] = {}
    fetch = FolderStore.fetch
    name = "activations.zarr/sites/hidden.1/c/2/0"
    bad = 2

    def fetch_badly(self: FolderStore, file: str, target: Path, *, size: int) -> None:
        fetched[file] = fetched.get(file, 0) + 1
        fetch(self, file, target, size=size)
        if file == name and fetched[file] <= bad:
            target.write_bytes(bytes(size))
        if file == "README.md" and fetched[file] == 1:
            raise RemoteUnreachable("broke off")

    monkeypatch.setattr(FolderStore, "fetch", fetch_badly)
    pull(str(cache), copy)
    assert contents(copy) == contents(cache)
    assert fetched.pop(name) == 3
    assert fetched.pop("README.md") == 2
    assert set(fetched.values()) == {1}
    bad = 100
    (copy / name).unlink()
    assert refused(CacheCorrupt, lambda: pull(str(cache), copy)) == (
        f"{cache}/{name} has other bytes than its manifest says (SHA-256 differs), 3 times over: "
        "ask whoever shared it to push it again"
    )
    assert not (copy / name).exists()


@pytest.mark.parametrize("kind", ["s3", "hub"])
def test_files_that_a_server_lost_or_changed_are_named(
    kind: str, cache: Path, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "activations.zarr/sites/hidden.1/c/2/0"
    data = (cache / name).read_bytes()
    with a_place(kind, tmp_path, monkeypatch) as place:
        push(cache, place.url)
        for other, words in (
            (None, "is missing, though the manifest lists it"),
            (data + b"x", f"has {len(data) + 1:,} bytes instead of {len(data):,}"),
            (bytes(len(data)), "has other bytes than its manifest says (SHA-256 differs), 3 times over"),
        ):
            place.put(name, other)
            assert refused(CacheCorrupt, lambda: pull(place.url, copy)) == (
                f"{place.url}/{name} {words}: ask whoever shared it to push it again"
            )
        place.put(name, data)
        pull(place.url, copy)
        assert contents(copy) == contents(cache)


@pytest.mark.parametrize(
    "name",
    ["../outside", "/tmp/outside", "records/../../outside", "C:/outside", "a\\..\\outside", "~/outside", "records//x"],
)
def test_a_manifest_that_leads_out_of_the_folder_is_refused(place: Path, copy: Path, tmp_path: Path, name: str) -> None:
    plain = json.loads((place / "manifest.json").read_bytes())
    plain["files"][name] = plain["files"].pop("README.md")
    (place / "manifest.json").write_bytes(resealed((place / "manifest.json").read_bytes(), files=plain["files"]))
    before = sorted(tmp_path.iterdir())
    assert refused(CacheCorrupt, lambda: pull(str(place), copy)).startswith(f"{place}/manifest.json is damaged at ")
    assert sorted(tmp_path.iterdir()) == before


def test_a_manifest_is_not_read_further_than_any_manifest_reaches(
    place: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulling, "MANIFEST_BYTES", 1000)
    size = (place / "manifest.json").stat().st_size
    assert refused(CacheCorrupt, lambda: pull(str(place), copy)) == (
        f"{place}/manifest.json has {size:,} bytes, more than the 1,000 that it may have; nothing was read"
    )


def with_texts(place: Path, texts: pa.Table) -> None:
    """Replace the texts of a cache, so that everything fits together again."""
    pq.write_table(texts, place / "texts.parquet")
    data = (place / "texts.parquet").read_bytes()
    plain = json.loads((place / "manifest.json").read_bytes())
    plain["files"]["texts.parquet"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (place / "manifest.json").write_bytes(resealed((place / "manifest.json").read_bytes(), files=plain["files"]))


@pytest.mark.parametrize("what", ["rows", "shards", "type", "none"])
def test_texts_of_a_stranger_that_name_no_shards_are_refused(place: Path, copy: Path, what: str) -> None:
    texts = pq.read_table(place / "texts.parquet")
    where = texts.schema.get_field_index("first_row")
    match what:
        case "rows":
            texts = texts.slice(1)
        case "shards":
            texts = texts.set_column(where, "first_row", pa.array([10**12] * len(texts)))
        case "type":
            texts = texts.set_column(where, "first_row", pa.array(["x"] * len(texts)))
        case "none":
            texts = texts.drop_columns(["split"])
    with_texts(place, texts)
    with pytest.raises(CacheCorrupt):
        pull(str(place), copy, splits=["dev"])
    assert sorted(file.name for file in copy.iterdir()) == ["staging", "texts.parquet", "unfinished.json"]


def test_a_part_that_names_what_the_cache_lacks_is_refused(cache: Path, copy: Path) -> None:
    pull(str(cache), copy, sites=["1"], splits=["dev"])
    manifest, plain = Cache(cache).manifest, json.loads((copy / "selection.json").read_bytes())
    for change in ({"shards": [10**9]}, {"sites": ["hidden.9"]}, {"splits": ["test"]}):
        (copy / "selection.json").write_text(json.dumps(plain | change))
        selection = read_selection(copy, Cache(cache).id)
        with pytest.raises(CacheCorrupt, match=r"^selection\.json names sites, splits or shards that the cache"):
            expected_files(manifest, selection)
    for wrong in ("{}", "[", json.dumps(plain | {"shards": [-1]}), json.dumps(plain | {"cache": "0" * 64})):
        (copy / "selection.json").write_text(wrong)
        with pytest.raises(CacheCorrupt, match=r"remove it and pull again, or get a whole copy$"):
            Cache(copy)


def test_where_there_is_no_whole_cache_it_is_said_what_there_is(cache: Path, copy: Path, tmp_path: Path) -> None:
    assert refused(CacheNotFound, lambda: pull(str(tmp_path / "none"), copy)) == (
        f"{tmp_path}/none holds no cache: there is no manifest.json; see whether the URL is right"
    )
    pull(str(cache), tmp_path / "part", sites=["1"])
    assert refused(ConfigError, lambda: pull(str(tmp_path / "part"), copy)) == (
        f"{tmp_path}/part is a partial copy (it has a selection.json): pull from where the whole cache is"
    )
    assert not copy.exists()


def test_what_the_cache_does_not_hold_cannot_be_asked_for(cache: Path, copy: Path) -> None:
    held = "hidden.1, hidden.2, hidden.3, hidden.4"
    assert refused(ConfigError, lambda: pull(str(cache), copy, sites=["1", "9"])) == (
        f"{cache} holds no site 'hidden.9'; it holds {held}"
    )
    assert refused(ConfigError, lambda: pull(str(cache), copy, splits=["test"])) == (
        f"{cache} holds no split 'test'; it holds dev, train"
    )
    assert refused(ConfigError, lambda: pull(str(cache), copy, sites=["1"], manifest_only=True)) == (
        "the manifest alone was asked for, and sites or splits as well: leave out one of the two"
    )
    assert not copy.exists()


def test_a_folder_that_holds_something_else_is_left_as_it_is(
    made: Known, cache: Path, copy: Path, tmp_path: Path
) -> None:
    mine = Cache(cache).id[:12]
    other = made.with_identity(other=1)
    copy.mkdir()
    (copy / "thesis.txt").write_text("words")
    assert refused(ConfigError, lambda: pull(str(cache), copy)) == (
        f"{copy} is not empty and is not a clvq cache (it holds 'thesis.txt'): pull into another folder"
    )
    other.write(tmp_path / "other")
    before = contents(tmp_path / "other")
    assert refused(ResumeMismatch, lambda: pull(str(cache), tmp_path / "other")) == (
        f"{tmp_path}/other holds another cache ({Cache(tmp_path / 'other').id[:12]}; {cache} is {mine}): "
        "pull into another folder"
    )
    assert contents(tmp_path / "other") == before
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "unfinished.json").write_text('{"format": "clvq-cache", "version": 1}')
    assert refused(ResumeMismatch, lambda: pull(str(cache), tmp_path / "begun")) == (
        f"{tmp_path}/begun holds an unfinished extraction, and {cache} is {mine}: pull into another folder"
    )
    with pytest.raises(Interrupted):
        pull(str(tmp_path / "other"), tmp_path / "third", progress=StopsAfter(1))
    assert refused(ResumeMismatch, lambda: pull(str(cache), tmp_path / "third")) == (
        f"{tmp_path}/third holds an unfinished pull of the cache {Cache(tmp_path / 'other').id[:12]}, and {cache} is "
        f"{mine}: pull into another folder"
    )


def test_links_in_a_copy_do_not_lead_what_is_written_elsewhere(cache: Path, copy: Path, tmp_path: Path) -> None:
    pull(str(cache), copy)
    elsewhere = tmp_path / "elsewhere"
    (copy / "activations.zarr/sites").rename(elsewhere)
    shutil.rmtree(elsewhere / "hidden.1")
    before = contents(elsewhere)
    (copy / "activations.zarr/sites").symlink_to(elsewhere)
    assert refused(CacheCorrupt, lambda: pull(str(cache), copy)) == (
        f"{copy}/activations.zarr/sites is a symbolic link, and a cache holds none: remove it, and pull again"
    )
    assert contents(elsewhere) == before


def test_two_do_not_pull_into_one_folder_at_once(cache: Path, copy: Path) -> None:
    class Second(Silent):
        def check(self) -> None:
            with pytest.raises(FolderInUse):
                pull(str(cache), copy)
            raise Interrupted("seen", signal_number=2)

    with pytest.raises(Interrupted, match=r"^seen$"):
        pull(str(cache), copy, progress=Second())


def test_a_disk_too_small_is_noticed_before_anything_is_fetched(
    cache: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulling, "free_bytes", lambda path: 1000)
    size = sum(len(data) for name, data in contents(cache).items() if name != "manifest.json")
    assert refused(DiskFull, lambda: pull(str(cache), copy)) == (
        f"{copy} needs {size:,} more bytes, and 1,000 are free on its disk: free some room, or pull single sites or "
        "splits"
    )
    assert sorted(contents(copy)) == ["unfinished.json"]
    monkeypatch.undo()
    assert isinstance(pull(str(cache), copy), Pulled)


@pytest.mark.soak
@pytest.mark.timeout(3000)
def test_killed_again_and_again_a_copy_is_whole_or_says_that_it_is_not(
    cache: Path, tmp_path: Path, soak: bool, tell: Callable[[str], None]
) -> None:
    whole, kills, finished, draw = contents(cache), 0, 0, random.Random(0)
    wanted = 60 if soak else 3
    place = FolderPlace(cache)
    with started("pull", tmp_path / "first", place) as process:
        began = time.monotonic()
        process.wait()
        takes = time.monotonic() - began
    while kills < wanted:
        copy, done = tmp_path / f"copy-{kills}", False
        while not done:
            with started("pull", copy, place) as process:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=draw.uniform(0, takes / 2) if kills < wanted else None)
                done = process.poll() == 0
                process.kill()
            if (copy / "manifest.json").exists():
                assert verify(copy).problems == []
            else:
                with pytest.raises((CacheIncomplete, CacheNotFound)):
                    Cache(copy)
            kills += not done
        finished += 1
        assert contents(copy) == whole
    tell(f"pulls: {kills} kills, {finished} copies finished, all of them byte for byte as they should be")
