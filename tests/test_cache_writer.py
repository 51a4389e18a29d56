"""Writing: what is continued, what is refused, what is deleted."""

import hashlib
import random
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from clvq import Cache
from clvq.cache.files import free_bytes, make_folder, only_writer, sha256_of, write_file
from clvq.cache.layout import SiteLayout, is_sealed, to_json
from clvq.cache.shard_file import read_record
from clvq.cache.verify import verify
from clvq.cache.writer import CacheWriter
from clvq.errors import CacheCorrupt, ClvqError, ConfigError, DataError, FolderInUse, FormatVersion, ResumeMismatch

from .cache_maker import EVERY_ENCODING, FEW_COLUMNS, Known, contents, known, seal, without_waiting

no_waiting = pytest.fixture(without_waiting, scope="module", autouse=True)


@pytest.fixture(scope="module")
def made() -> Known:
    """The contents of a cache."""
    return known(texts=12)


@pytest.fixture(scope="module")
def whole(made: Known, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of the finished cache."""
    path = tmp_path_factory.mktemp("writer") / "cache"
    made.write(path)
    return contents(path)


def with_site(made: Known, **changes: object) -> Known:
    sites = {**made.extraction.sites}
    sites["hidden.1"] = SiteLayout(**{**sites["hidden.1"].model_dump(), **changes})
    return replace(made, extraction=replace(made.extraction, sites=sites))


def refusal(path: Path, made: Known, error: type[ClvqError] = ResumeMismatch, *, force: bool = False) -> str:
    before = contents(path)
    with pytest.raises(error) as caught:
        CacheWriter(path, made.extraction, force=force)
    assert contents(path) == before
    return str(caught.value)


def begin(path: Path, made: Known, *, shards: int = 1) -> None:
    """Leave an unfinished extraction with its first shards."""
    with CacheWriter(path, made.extraction) as writer:
        for number in range(shards):
            writer.commit(made.shard(number))


def test_the_bytes_depend_on_neither_folder_nor_order(made: Known, whole: dict[str, bytes], tmp_path: Path) -> None:
    with CacheWriter(tmp_path / "a" / "b", made.extraction) as writer:
        for number in reversed(range(made.geometry.shards)):
            writer.commit(made.shard(number))
        writer.finish(made.texts(), class_names=["bad", "good", "none"], counts={"texts": 12})
    assert contents(tmp_path / "a" / "b") == whole


def test_the_bytes_do_not_depend_on_the_number_of_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = known(texts=40, longest=120, widths=EVERY_ENCODING, chunk_rows=16)
    assert large.geometry.shard_rows >= 10 * 16
    for threads in (1, 4):
        monkeypatch.setattr("clvq.cache.shard_writer._THREADS", threads)
        large.write(tmp_path / str(threads))
    assert contents(tmp_path / "1") == contents(tmp_path / "4")


def test_a_finished_cache_is_recognised_and_left_alone(made: Known, whole: dict[str, bytes], tmp_path: Path) -> None:
    made.write(tmp_path)
    for force in (False, True):
        with CacheWriter(tmp_path, made.extraction, force=force) as writer:
            assert writer.finished
    assert contents(tmp_path) == whole


def test_an_extraction_goes_on_where_it_stopped(made: Known, whole: dict[str, bytes], tmp_path: Path) -> None:
    begin(tmp_path, made, shards=2)
    with CacheWriter(tmp_path, made.extraction) as writer:
        assert not writer.finished
        assert writer.done == {0, 1}
    made.write(tmp_path)
    assert contents(tmp_path) == whole


def test_a_kill_between_the_manifest_and_the_end_leaves_a_finished_cache(
    made: Known, whole: dict[str, bytes], tmp_path: Path
) -> None:
    made.write(tmp_path)
    write_file(tmp_path / "unfinished.json", to_json(made.extraction.to_plain()))
    assert Cache(tmp_path).manifest.geometry == made.geometry
    assert made.write(tmp_path) is None
    assert contents(tmp_path) == whole


@pytest.mark.parametrize("damage", ["missing", "short", "record", "flipped record", "emptied record"])
def test_a_shard_that_lost_a_file_is_made_again(
    made: Known, whole: dict[str, bytes], tmp_path: Path, damage: str
) -> None:
    begin(tmp_path, made, shards=2)
    file = tmp_path / "activations.zarr/sites/hidden.1/c/1/0"
    if damage == "missing":
        file.unlink()
    elif damage == "short":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        record = tmp_path / "records/000001.json"
        data = record.read_bytes()
        # The digit stands in a number that nothing else checks.
        flipped = re.sub(rb'"cosine_sum": (\d)', lambda found: found[0][:-1] + bytes([found[0][-1] ^ 1]), data, count=1)
        assert flipped != data
        record.write_bytes({"record": data[:11], "flipped record": flipped, "emptied record": b""}[damage])
    with CacheWriter(tmp_path, made.extraction) as writer:
        assert writer.done == {0}
    made.write(tmp_path)
    assert contents(tmp_path) == whole


@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_are_refused_and_each_difference_is_named(made: Known, tmp_path: Path, finished: bool) -> None:
    made.write(tmp_path) if finished else begin(tmp_path, made)
    assert refusal(tmp_path, made.with_identity(length=256, model={"name": "large", "commit": None})) == (
        f"{tmp_path} holds an extraction with other settings (identity.length: 128 there, 256 now; "
        'identity.model.name: "tiny" there, "large" now): give another --out, or --force to delete it'
    )
    assert "sites.hidden.1.encoding" in refusal(tmp_path, with_site(made, encoding="fp32"))
    assert "sites.hidden.1.width: 6 there, 8 now" in refusal(tmp_path, with_site(made, width=8))
    other = replace(made, extraction=replace(made.extraction, classes=None))
    assert "classes: 3 there, null now" in refusal(tmp_path, other)
    other = replace(made, extraction=replace(made.extraction, columns=FEW_COLUMNS))
    assert "columns: [" in refusal(tmp_path, other)
    other = replace(made, extraction=replace(made.extraction, parent="0" * 64))
    assert 'parent: null there, "000' in refusal(tmp_path, other)
    moved = made.geometry.model_copy(update={"chunk_rows": 64})
    other = replace(made, extraction=replace(made.extraction, geometry=moved))
    assert "geometry.chunk_rows: 32 there, 64 now" in refusal(tmp_path, other)
    many = made.with_identity(**{f"setting_{number}": 1 for number in range(9)})
    assert "; …): give" in refusal(tmp_path, many)


@pytest.mark.parametrize("finished", [True, False])
def test_force_deletes_the_cache_and_nothing_else(made: Known, tmp_path: Path, finished: bool) -> None:
    made.write(tmp_path) if finished else begin(tmp_path, made)
    (tmp_path / "notes.txt").write_text("mine")
    other = known(texts=7, seed=3)
    other.write(tmp_path, force=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    (tmp_path / "notes.txt").unlink()
    assert verify(tmp_path).problems == []
    assert Cache(tmp_path).manifest.geometry == other.geometry


def test_a_forced_deletion_that_was_killed_can_be_forced_again(
    made: Known, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made.write(tmp_path)
    other = known(texts=7, seed=3)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        CacheWriter(tmp_path, other.extraction, force=True)
    monkeypatch.undo()
    assert "identity" not in refusal(tmp_path, other)
    other.write(tmp_path, force=True)
    assert verify(tmp_path).problems == []


@pytest.mark.parametrize("force", [True, False])
def test_a_folder_that_is_not_a_cache_is_refused(made: Known, tmp_path: Path, force: bool) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert refusal(tmp_path, made, ConfigError, force=force) == (
        f"{tmp_path} is not empty and is not a clvq cache (it holds 'thesis.tex'): give another --out"
    )
    (tmp_path / "manifest.json").write_text('{"name": "a web app"}')
    assert "is not the manifest of a clvq cache" in refusal(tmp_path, made, CacheCorrupt, force=force)
    (tmp_path / "manifest.json").write_text('{"format": "clvq-cache", "version": 2}')
    assert "of format version 2" in refusal(tmp_path, made, FormatVersion, force=force)


@pytest.mark.parametrize("data", [b"", b"[]", b'{"format": "clvq-cache"}', b"[" * 100_000])
def test_an_unreadable_beginning_is_refused(made: Known, tmp_path: Path, data: bytes) -> None:
    (tmp_path / "unfinished.json").write_bytes(data)
    assert refusal(tmp_path, made, ConfigError, force=True) == (
        f"{tmp_path}/unfinished.json cannot be read: another version of clvq may have begun this extraction; "
        "delete the folder, or give another --out"
    )


def test_what_a_kill_at_the_very_first_write_leaves_is_no_hindrance(
    made: Known, whole: dict[str, bytes], tmp_path: Path
) -> None:
    (tmp_path / ".unfinished.json.123.aside").write_text("{")
    made.write(tmp_path)
    assert contents(tmp_path) == whole


def test_a_file_in_the_place_of_the_folder_is_refused(made: Known, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "cache"):
        with pytest.raises(ConfigError) as caught:
            CacheWriter(path, made.extraction)
        assert str(caught.value) == f"{tmp_path}/file is a file, and a folder is needed there: give another --out"


def test_two_writers_at_once_are_refused(made: Known, whole: dict[str, bytes], tmp_path: Path) -> None:
    with CacheWriter(tmp_path, made.extraction):
        with pytest.raises(FolderInUse) as caught:
            CacheWriter(tmp_path, made.extraction)
        assert str(caught.value) == (
            f"{tmp_path} is being written by another process; wait until it ends, or give another --out"
        )
    made.write(tmp_path)
    assert contents(tmp_path) == whole


def test_a_refused_writer_lets_go_of_the_folder(made: Known, tmp_path: Path) -> None:
    begin(tmp_path, made)
    refusal(tmp_path, made.with_identity(length=1))
    with only_writer(tmp_path):
        pass


def test_committing_twice_changes_nothing(made: Known, whole: dict[str, bytes], tmp_path: Path) -> None:
    begin(tmp_path, made, shards=2)
    before = contents(tmp_path)
    begin(tmp_path, made, shards=2)
    assert contents(tmp_path) == before


def test_committing_again_with_other_values_is_refused_and_keeps_what_was_committed(
    made: Known, tmp_path: Path
) -> None:
    begin(tmp_path, made)
    before = contents(tmp_path)
    shard = made.shard(0)
    other = replace(shard, sites={name: values + 1 for name, values in shard.sites.items()})
    with CacheWriter(tmp_path, made.extraction) as writer:
        with pytest.raises(ResumeMismatch) as caught:
            writer.commit(other)
        assert list((tmp_path / "staging").iterdir()) == []
    assert str(caught.value) == (
        f"shard 0 of {tmp_path} was already written with other bytes: "
        "run `clvq cache verify`, and extract into another --out"
    )
    assert contents(tmp_path) == before


def test_a_value_that_cannot_be_stored_leaves_no_shard(tmp_path: Path) -> None:
    made = known(texts=5, widths={"hidden.1": (3, "fp16")})
    made.vectors["hidden.1"][0, 0] = 1e5
    with CacheWriter(tmp_path, made.extraction) as writer:
        with pytest.raises(DataError, match=r"^hidden\.1 has a value of magnitude 100000, and fp16 holds at most"):
            writer.commit(made.shard(0))
        assert writer.done == set()
    assert contents(tmp_path / "records") == {}


def test_a_value_that_cannot_be_stored_anywhere_in_a_large_shard_leaves_the_writer_usable(tmp_path: Path) -> None:
    made = known(texts=60, longest=60, widths={"hidden.1": (3, "fp16")}, chunk_rows=16)
    shard = made.shard(1)
    wrong = replace(shard, sites={"hidden.1": shard.sites["hidden.1"].copy()})
    wrong.sites["hidden.1"][len(shard.rows["text"]) // 2, 1] = np.nan
    with CacheWriter(tmp_path, made.extraction) as writer:
        with pytest.raises(DataError, match=r"^hidden\.1 has a value that is not finite"):
            writer.commit(wrong)
        assert list((tmp_path / "staging").iterdir()) == []
        writer.commit(shard)
        assert writer.done == {1}
    made.write(tmp_path)
    assert verify(tmp_path).problems == []


def test_a_shard_that_does_not_fit_is_refused(made: Known, tmp_path: Path) -> None:
    shard = made.shard(0)
    rows = len(shard.rows["text"])
    with CacheWriter(tmp_path, made.extraction) as writer:
        for wrong, message in [
            (replace(shard, number=99), r"^shard 99 is not of this extraction \(\d+ shards\): see its number$"),
            (replace(shard, logits=None), r"^shard 0 is not of this extraction .*: see texts/logits$"),
            (replace(shard, texts=shard.texts + 1), r"^texts/logits of shard 0 is .*: .* belongs there"),
            (
                replace(shard, rows={**shard.rows, "word": shard.rows["word"].astype(np.int64)}),
                rf"^rows/word of shard 0 is \('int64', {rows}\): \('int32', {rows}\) belongs there, and at most \d+ p",
            ),
        ]:
            with pytest.raises(DataError, match=message):
                writer.commit(wrong)
    assert contents(tmp_path / "records") == {}


def test_staging_is_gone_after_the_writer_even_when_it_failed(made: Known, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), CacheWriter(tmp_path, made.extraction):
        raise KeyboardInterrupt
    assert not (tmp_path / "staging").exists()
    assert [path for path in tmp_path.rglob("*") if path.name.startswith(".")] == []


def test_a_cache_made_from_another_names_it(made: Known, tmp_path: Path) -> None:
    parent = "0123456789abcdef" * 4
    child = replace(made, extraction=replace(made.extraction, parent=parent))
    child.write(tmp_path)
    assert Cache(tmp_path).manifest.parent == parent
    assert f"Made from the cache `{parent}`." in (tmp_path / "README.md").read_text()


def test_records_are_sealed_and_say_what_was_written(made: Known, whole: dict[str, bytes], tmp_path: Path) -> None:
    made.write(tmp_path)
    for number in range(made.geometry.shards):
        record, shard = read_record(tmp_path, number), made.shard(number)
        assert is_sealed(whole[f"records/{number:06d}.json"])
        assert (record.shard, record.rows, record.texts) == (number, len(shard.rows["text"]), shard.texts)
        for name, entry in record.files.items():
            assert (len(whole[name]), hashlib.sha256(whole[name]).hexdigest()) == (entry.bytes, entry.sha256)


def test_a_damaged_record_is_named(made: Known, tmp_path: Path) -> None:
    begin(tmp_path, made)
    file = tmp_path / "records/000000.json"
    data = file.read_bytes()
    draw = random.Random(0)
    for place in draw.sample(range(len(data)), 200):
        file.write_bytes(data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :])
        with pytest.raises(CacheCorrupt) as caught:
            read_record(tmp_path, 0)
        assert str(caught.value) == f"{file} is damaged: its bytes do not have the checksum that it holds"
    file.write_bytes(seal({"checksum": "0" * 64, "shard": 0}))
    with pytest.raises(CacheCorrupt) as caught:
        read_record(tmp_path, 0)
    assert str(caught.value) == f"{file} is damaged: 5 things are wrong in it"


def test_the_card_says_what_the_cache_holds(made: Known, whole: dict[str, bytes]) -> None:
    text = whole["README.md"].decode()
    for part in [
        "library_name: clvq",
        "| `hidden.1` | 6 | bf16 |",
        f"{made.geometry.rows:,} rows of 12 texts",
        "Classes: bad, good, none.",
        "| model.name | tiny |",
        'cache.vectors("hidden.1", rows[:1000])  # float32 [row, 6]',
    ]:
        assert part in text


def test_the_card_keeps_foreign_strings_inside_the_table(tmp_path: Path) -> None:
    known(texts=5).with_identity(field="a|b\nc").write(tmp_path)
    assert "| field | a\\|b c |\n" in (tmp_path / "README.md").read_text()


def test_a_written_file_replaces_the_old_one_whole(tmp_path: Path) -> None:
    write_file(tmp_path / "f", b"old")
    write_file(tmp_path / "f", b"new")
    assert contents(tmp_path) == {"f": b"new"}
    assert sha256_of(tmp_path / "f") == "11507a0e2f5e69d5dfa40a62a1bd7b6ee57e6bcd85c67c9b8431b36fff21c437"


def test_free_bytes_are_those_of_the_disk_that_will_hold_the_folder(tmp_path: Path) -> None:
    assert abs(free_bytes(tmp_path / "not" / "yet") - free_bytes(tmp_path)) < 10**9
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
