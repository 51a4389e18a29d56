"""Checking every byte of a cache."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from clvq.cache.layout import MANIFEST
from clvq.cache.verify import Problem, verify
from clvq.errors import CacheCorrupt, CacheIncomplete, CacheNotFound, FormatVersion
from clvq.progress import Silent

from .cache_maker import contents, known, without_waiting

no_waiting = pytest.fixture(without_waiting, scope="module", autouse=True)

SHARD = "activations.zarr/sites/hidden.1/c/0/0"
OTHER = "activations.zarr/sites/hidden.1/c/1/0"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole cache that no test changes."""
    path = tmp_path_factory.mktemp("verify") / "cache"
    known(texts=12).write(path)
    return path


@pytest.fixture
def path(original: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of it to be damaged."""
    shutil.copytree(original, tmp_path / "cache")
    return tmp_path / "cache"


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_a_whole_cache_has_no_problems_and_every_file_was_read(path: Path) -> None:
    found, held = verify(path), contents(path)
    assert found.problems == []
    assert found.files == len(held) - 1
    assert found.bytes == sum(map(len, held.values())) - len(held[MANIFEST])


def test_a_flipped_bit_in_any_file_is_named(path: Path) -> None:
    for name in contents(path):
        if name == MANIFEST:
            continue
        data = (path / name).read_bytes()
        flip(path / name)
        assert verify(path).problems == [Problem(name, "has other bytes than were written (SHA-256 differs)")]
        (path / name).write_bytes(data)


def test_a_cut_file_is_named(path: Path) -> None:
    size = (path / SHARD).stat().st_size
    os.truncate(path / SHARD, size - 1)
    assert verify(path).problems == [Problem(SHARD, f"has {size - 1:,} bytes instead of {size:,}")]


def test_a_missing_file_is_named(path: Path) -> None:
    (path / SHARD).unlink()
    assert verify(path).problems == [Problem(SHARD, "is missing")]


def test_a_folder_in_the_place_of_a_file_is_named(path: Path) -> None:
    (path / SHARD).unlink()
    (path / SHARD).mkdir()
    assert verify(path).problems == [Problem(SHARD, "is missing")]


@pytest.mark.parametrize("name", ["notes.txt", "activations.zarr/sites/hidden.1/c/99/0", "records/.hidden"])
def test_a_foreign_file_is_named(path: Path, name: str) -> None:
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).write_text("mine")
    assert verify(path).problems == [Problem(name, "does not belong to the cache")]


def test_swapped_files_are_named(path: Path) -> None:
    first, second = (path / SHARD).read_bytes(), (path / OTHER).read_bytes()
    (path / SHARD).write_bytes(second)
    (path / OTHER).write_bytes(first)
    assert {problem.file for problem in verify(path).problems} == {SHARD, OTHER}


def test_a_link_to_a_file_is_named_though_its_bytes_are_right(path: Path) -> None:
    (path / SHARD).rename(path.parent / "elsewhere")
    (path / SHARD).symlink_to(path.parent / "elsewhere")
    assert verify(path).problems == [Problem(SHARD, "is a symbolic link")]


def test_a_link_to_a_folder_is_named_though_its_bytes_are_right(path: Path) -> None:
    (path / "activations.zarr/sites").rename(path.parent / "elsewhere")
    (path / "activations.zarr/sites").symlink_to(path.parent / "elsewhere")
    assert verify(path).problems == [Problem("activations.zarr/sites", "is a symbolic link")]


def test_several_problems_are_all_named(path: Path) -> None:
    flip(path / SHARD)
    (path / OTHER).unlink()
    (path / "notes.txt").write_text("mine")
    assert [problem.file for problem in verify(path).problems] == [SHARD, OTHER, "notes.txt"]


def test_a_changed_manifest_changes_the_id(path: Path) -> None:
    before = verify(path).cache_id
    data = (path / MANIFEST).read_text()
    (path / MANIFEST).write_text(data.replace('"tiny"', '"tinY"'))
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


def test_progress_counts_the_files(path: Path) -> None:
    class Counting(Silent):
        total, seen = 0, 0

        def begin(self, task: str, total: int | None, unit: str) -> None:
            assert (task, unit) == ("verify", "files")
            self.total = total or 0

        def advance(self, amount: int = 1, **figures: float) -> None:
            self.seen += amount

    progress = Counting()
    assert verify(path, progress=progress).files == progress.seen == progress.total
