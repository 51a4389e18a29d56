"""Checking every byte of a cache."""

import errno
import json
import os
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from clvq.cache.files import sha256_of
from clvq.cache.layout import CARD, MANIFEST, TEXTS
from clvq.cache.verify import Problem, verify
from clvq.errors import CacheCorrupt, CacheIncomplete, CacheNotFound, FormatVersion, Interrupted
from clvq.progress import Silent

from .cache_maker import EVERY_ENCODING, contents, known, seal, without_waiting

no_waiting = pytest.fixture(without_waiting, scope="module", autouse=True)

OTHER_BYTES = "has other bytes than were written (SHA-256 differs)"
SHARD = "activations.zarr/sites/hidden.1/c/0/0"
OTHER = "activations.zarr/sites/hidden.1/c/1/0"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole cache that no test changes."""
    path = tmp_path_factory.mktemp("verify") / "cache"
    known(texts=12, widths=EVERY_ENCODING).write(path)
    return path


@pytest.fixture(scope="module")
def held(original: Path) -> dict[str, bytes]:
    """Its files."""
    return contents(original)


@pytest.fixture
def path(original: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of it to be damaged."""
    shutil.copytree(original, tmp_path / "cache")
    return tmp_path / "cache"


def one_of_each_kind(held: dict[str, bytes]) -> list[str]:
    """One file of every array, each `zarr.json`, a record, the card and the texts."""
    arrays = [name for name in held if re.fullmatch(r".*/c/1(/0)?|.*channel_scale/.*/c/0", name)]
    others = [name for name in held if name.endswith("zarr.json")]
    found = [*arrays, *others, "records/000001.json", CARD, TEXTS]
    assert len(arrays) == 4 + 1 + 1 + 8 + 1
    return found


def put(path: Path, name: str, data: bytes) -> None:
    (path / name).write_bytes(data)


def test_a_whole_cache_has_no_problems_and_every_file_was_read(path: Path, held: dict[str, bytes]) -> None:
    found = verify(path)
    assert found.problems == []
    assert found.files == len(held) - 1
    assert found.bytes == sum(map(len, held.values())) - len(held[MANIFEST])
    assert found.absent == 0


def test_a_flipped_bit_in_any_file_is_named(path: Path, held: dict[str, bytes]) -> None:
    draw = random.Random(0)
    for name, data in held.items():
        if name == MANIFEST:
            continue
        place = draw.randrange(len(data))
        put(path, name, data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :])
        assert verify(path).problems == [Problem(name, OTHER_BYTES)]
        put(path, name, data)


@pytest.mark.parametrize("place", [0, -1])
def test_a_flipped_bit_at_the_start_or_end_of_any_kind_of_file_is_named(
    path: Path, held: dict[str, bytes], place: int
) -> None:
    names = one_of_each_kind(held)
    for name in names:
        data = bytearray(held[name])
        data[place] ^= 1
        put(path, name, bytes(data))
    assert verify(path).problems == [Problem(name, OTHER_BYTES) for name in sorted(names)]


@pytest.mark.parametrize(
    "change",
    [lambda data: data[:-1], lambda data: data[: len(data) // 2], lambda _: b"", lambda data: data + b"\0"],
    ids=["cut by a byte", "cut in half", "emptied", "longer by a byte"],
)
def test_a_file_of_any_kind_with_another_length_is_named(
    path: Path, held: dict[str, bytes], change: Callable[[bytes], bytes]
) -> None:
    names = one_of_each_kind(held)
    for name in names:
        put(path, name, change(held[name]))
    assert verify(path).problems == [
        Problem(name, f"has {len(change(held[name])):,} bytes instead of {len(held[name]):,}") for name in sorted(names)
    ]


def test_a_file_of_another_length_than_any_is_not_read(path: Path, held: dict[str, bytes]) -> None:
    # 1 TiB of nothing on the disk, and hours of hashing.
    os.truncate(path / SHARD, 2**40)
    found = verify(path)
    assert found.problems == [Problem(SHARD, f"has 1,099,511,627,776 bytes instead of {len(held[SHARD]):,}")]
    assert found.bytes == sum(map(len, held.values())) - len(held[MANIFEST]) - len(held[SHARD])


def test_a_missing_file_of_any_kind_is_named(path: Path, held: dict[str, bytes]) -> None:
    names = one_of_each_kind(held)
    for name in names:
        (path / name).unlink()
    assert verify(path).problems == [Problem(name, "is missing") for name in sorted(names)]


def test_a_missing_folder_is_named_by_its_files(path: Path, held: dict[str, bytes]) -> None:
    shutil.rmtree(path / "activations.zarr/scales")
    names = sorted(name for name in held if name.startswith("activations.zarr/scales/"))
    assert verify(path).problems == [Problem(name, "is missing") for name in names]


def test_what_is_no_file_in_the_place_of_one_is_named(path: Path, held: dict[str, bytes]) -> None:
    names = one_of_each_kind(held)
    for number, name in enumerate(names):
        (path / name).unlink()
        (path / name).mkdir() if number % 2 else os.mkfifo(path / name)
    assert verify(path).problems == [Problem(name, "is missing") for name in sorted(names)]


def test_a_link_to_a_file_is_named_though_its_bytes_are_right(path: Path, held: dict[str, bytes]) -> None:
    names = one_of_each_kind(held)
    for number, name in enumerate(names):
        elsewhere = path.parent / f"elsewhere-{number}"
        (path / name).rename(elsewhere)
        (path / name).symlink_to(elsewhere)
    assert verify(path).problems == [Problem(name, "is a symbolic link") for name in sorted(names)]


def test_a_manifest_behind_a_link_is_named(path: Path) -> None:
    (path / MANIFEST).rename(path.parent / "elsewhere")
    (path / MANIFEST).symlink_to(path.parent / "elsewhere")
    assert verify(path).problems == [Problem(MANIFEST, "is a symbolic link")]


@pytest.mark.parametrize("name", ["activations.zarr", "activations.zarr/sites", "activations.zarr/sites/hidden.1/c/0"])
def test_a_link_to_a_folder_is_named_though_its_bytes_are_right(path: Path, name: str) -> None:
    (path / name).rename(path.parent / "elsewhere")
    (path / name).symlink_to(path.parent / "elsewhere")
    assert verify(path).problems == [Problem(name, "is a symbolic link")]


@pytest.mark.parametrize(
    "name", ["notes.txt", "activations.zarr/sites/hidden.1/c/99/0", "records/.hidden", "activations.zarr/.zarray",
             "staging/x", "records/000099.json", "activations.zarr/sites/hidden.9/zarr.json"]
)  # fmt: skip
def test_a_foreign_file_is_named(path: Path, name: str) -> None:
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).write_text("mine")
    assert verify(path).problems == [Problem(name, "does not belong to the cache")]


def test_a_foreign_link_is_named_even_where_it_leads_nowhere(path: Path) -> None:
    (path / "nowhere").symlink_to(path / "not there")
    (path / "outside").symlink_to(path.parent)
    assert verify(path).problems == [
        Problem("nowhere", "does not belong to the cache"),
        Problem("outside", "is a symbolic link"),
    ]


def test_files_swapped_between_shards_are_named_with_whose_bytes_they_hold(path: Path, held: dict[str, bytes]) -> None:
    pairs = [(name, re.sub(r"/c/1\b", "/c/0", name)) for name in one_of_each_kind(held) if "/c/1" in name]
    pairs.append(("records/000001.json", "records/000000.json"))
    for first, second in pairs:
        assert held[first] != held[second]
        put(path, first, held[second])
        put(path, second, held[first])
    expected = dict(pairs) | {second: first for first, second in pairs}
    # Arrays may have equal bytes, and each of them is right.
    twins = {name: {other for other in held if held[other] == held[name]} for name in expected}
    found = verify(path).problems
    assert [problem.file for problem in found] == sorted(expected)
    for problem in found:
        assert problem.found in {f"holds the bytes of {other}" for other in twins[expected[problem.file]]}


def test_a_file_that_holds_another_arrays_bytes_is_named(path: Path, held: dict[str, bytes]) -> None:
    put(path, "activations.zarr/rows/char_start/c/0", held["activations.zarr/rows/char_end/c/0"])
    put(path, CARD, held[TEXTS])
    assert verify(path).problems == [
        Problem(CARD, f"holds the bytes of {TEXTS}"),
        Problem("activations.zarr/rows/char_start/c/0", "holds the bytes of activations.zarr/rows/char_end/c/0"),
    ]


def test_the_files_of_another_cache_are_named(path: Path, tmp_path: Path, held: dict[str, bytes]) -> None:
    known(texts=12, widths=EVERY_ENCODING, seed=1).write(tmp_path / "other")
    other = contents(tmp_path / "other")
    for name in one_of_each_kind(held):
        if name in other and other[name] != held[name] and not name.endswith("zarr.json"):
            put(path, name, other[name])
            assert [problem.file for problem in verify(path).problems] == [name]
            put(path, name, held[name])
    shutil.copy(tmp_path / "other" / MANIFEST, path / MANIFEST)
    assert {OTHER, SHARD, TEXTS, "records/000000.json"} <= {problem.file for problem in verify(path).problems}


def test_a_file_that_the_disk_cannot_read_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(file: Path) -> str:
        if file.relative_to(path).as_posix() == SHARD:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return sha256_of(file)

    monkeypatch.setattr("clvq.cache.verify.sha256_of", failing)
    assert verify(path).problems == [Problem(SHARD, "cannot be read (Input/output error)")]


def test_several_problems_are_all_named(path: Path, held: dict[str, bytes]) -> None:
    put(path, SHARD, held[SHARD][:-1] + b"?")
    (path / OTHER).unlink()
    (path / "notes.txt").write_text("mine")
    assert verify(path).problems == [
        Problem(SHARD, OTHER_BYTES),
        Problem(OTHER, "is missing"),
        Problem("notes.txt", "does not belong to the cache"),
    ]


@pytest.mark.parametrize("threads", [1, 8])
def test_problems_are_the_same_however_many_threads_look(
    path: Path, held: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    monkeypatch.setattr("clvq.cache.verify._THREADS", threads)
    names = [name for name in sorted(held) if name != MANIFEST]
    for name in names[::3]:
        put(path, name, b"x" * len(held[name]))
    found = verify(path)
    assert [problem.file for problem in found.problems] == names[::3]
    assert found.files == len(names)


def test_a_manifest_with_a_flipped_bit_is_refused(path: Path, held: dict[str, bytes]) -> None:
    draw = random.Random(0)
    for bit in draw.sample(range(8 * len(held[MANIFEST])), 100):
        data = bytearray(held[MANIFEST])
        data[bit // 8] ^= 1 << bit % 8
        put(path, MANIFEST, bytes(data))
        with pytest.raises((CacheCorrupt, FormatVersion)):
            verify(path)


def test_metadata_that_describes_another_array_is_named_though_the_manifest_vouches_for_it(path: Path) -> None:
    name = "activations.zarr/sites/hidden.1/zarr.json"
    array = json.loads((path / name).read_bytes())
    array["codecs"] = [{"name": "numcodecs.pickle"}]
    (path / name).write_text(json.dumps(array))
    manifest = json.loads((path / MANIFEST).read_bytes())
    manifest["files"][name] = {"bytes": (path / name).stat().st_size, "sha256": sha256_of(path / name)}
    put(path, MANIFEST, seal(manifest))
    assert verify(path).problems == [Problem(name, "describes another array than the manifest does")]


def test_another_manifest_has_another_id(path: Path) -> None:
    before = verify(path).cache_id
    manifest = json.loads((path / MANIFEST).read_bytes())
    manifest["identity"]["model"]["name"] = "tinY"
    put(path, MANIFEST, seal(manifest))
    assert verify(path).cache_id != before


def test_without_a_readable_manifest_nothing_can_be_verified(path: Path, tmp_path: Path) -> None:
    plain = json.loads((path / MANIFEST).read_bytes())
    (path / MANIFEST).write_text(json.dumps({**plain, "version": 2}))
    with pytest.raises(FormatVersion, match="of format version 2; this clvq reads version 1"):
        verify(path)
    (path / MANIFEST).write_text("{")
    with pytest.raises(CacheCorrupt, match="is not JSON"):
        verify(path)
    (path / MANIFEST).rename(path / "unfinished.json")
    with pytest.raises(CacheIncomplete):
        verify(path)
    with pytest.raises(CacheNotFound):
        verify(tmp_path / "nowhere")


class Counting(Silent):
    """Counts what `verify` reports."""

    total, seen = 0, 0

    def begin(self, task: str, total: int | None, unit: str) -> None:
        assert (task, unit) == ("verify", "bytes")
        self.total = total or 0

    def advance(self, amount: int = 1, **figures: float) -> None:
        self.seen += amount


def test_progress_counts_the_bytes(path: Path) -> None:
    progress = Counting()
    assert verify(path, progress=progress).bytes == progress.seen == progress.total


def test_progress_comes_to_its_end_though_files_are_missing(path: Path) -> None:
    (path / SHARD).unlink()
    progress = Counting()
    assert verify(path, progress=progress).bytes < progress.seen == progress.total


def test_verifying_can_be_interrupted(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stopped(Silent):
        def advance(self, amount: int = 1, **figures: float) -> None:
            raise Interrupted("enough", signal_number=2)

    looked: list[Path] = []

    def slow(file: Path) -> str:
        looked.append(file)
        time.sleep(0.005)
        return sha256_of(file)

    monkeypatch.setattr("clvq.cache.verify._THREADS", 1)
    monkeypatch.setattr("clvq.cache.verify.sha256_of", slow)
    with pytest.raises(Interrupted):
        verify(path, progress=Stopped())
    assert 0 < len(looked) < len(contents(path)) - 1
