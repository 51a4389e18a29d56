"""Killed or out of disk at any point: what is named is whole, and going on gives the same bytes."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from clvq.cache import files, shard_file, writer
from clvq.cache.extraction import Shard
from clvq.errors import DiskFull

from .cache_maker import FEW_COLUMNS, Known, check_what_is_named_is_whole, contents, known, recorded


@pytest.fixture
def made() -> Known:
    """Contents of a cache of two shards and few files, so that every step of writing it can be tried."""
    return known(texts=6, widths={"hidden.1": (3, "int8")}, columns=FEW_COLUMNS)


NAMING = ("replace", "link", "mkdir")


class Steps:
    """Calls `before(step)` ahead of each step that the cache's code takes towards the disk; fsync does nothing else.

    Steps are the opening of a file for writing, the first write to it, fsync, and the calls of `os` that are named.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *calls: str) -> None:
        self.before: Callable[[int], None] = lambda step: None
        self.count = 0
        self._inside = False
        for name in calls:
            monkeypatch.setattr(os, name, self._hooked(getattr(os, name), makes=name == "mkdir"))
        fsync = self._hooked(lambda descriptor: None) if calls == NAMING else lambda descriptor: None
        monkeypatch.setattr(os, "fsync", fsync)
        for module in (files, shard_file, writer):
            monkeypatch.setattr(module, "open", self._open, raising=False)

    def reset(self, before: Callable[[int], None] = lambda step: None) -> None:
        self.count, self.before = 0, before

    def step(self) -> None:
        if not self._inside:
            self._inside = True
            try:
                self.before(self.count)
            finally:
                self._inside = False
                self.count += 1

    def _hooked(self, function: Callable[..., object], *, makes: bool = False) -> Callable[..., object]:
        def hooked(*args: Any, **settings: Any) -> object:
            # A folder that is there already takes no room.
            if not (makes and os.path.isdir(args[0])):
                self.step()
            return function(*args, **settings)

        return hooked

    def _open(self, path: Path, mode: str) -> object:
        if "w" not in mode:
            return open(path, mode)
        self.step()
        return _File(open(path, mode), self)


class _File:
    def __init__(self, file: Any, steps: Steps) -> None:
        self._file = file
        self._steps = steps

    def write(self, data: bytes) -> None:
        if self._file.tell() == 0:
            self._steps.step()
        self._file.write(data)

    def __getattr__(self, name: str) -> object:
        return getattr(self._file, name)

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def state(folder: Path) -> dict[str, bytes]:
    """What lies in a folder, empty folders included."""
    return contents(folder) | {f"{path.relative_to(folder)}/": b"" for path in folder.rglob("*") if path.is_dir()}


def test_a_kill_before_any_change_of_names_leaves_what_can_be_finished_to_the_same_bytes(
    made: Known, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(monkeypatch, *NAMING, "unlink")
    made.write(tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    seen: list[dict[str, bytes]] = []
    left: list[Path] = []

    def photograph(step: int) -> None:
        # A process that is killed leaves what the system has seen until then.
        if (tmp_path / "cache").exists() and (now := state(tmp_path / "cache")) not in seen:
            seen.append(now)
            left.append(tmp_path / f"left-{step}")
            shutil.copytree(tmp_path / "cache", left[-1])

    steps.reset(photograph)
    made.write(tmp_path / "cache")
    steps.reset()
    assert len(left) > 60
    for folder in left:
        check_what_is_named_is_whole(folder)
        made.write(folder)
        assert contents(folder) == whole


FULL = (
    r"^no room left on the disk while writing .*: [\d,]+ bytes are free( and up to [\d,]+ more are to be written)?; "
    r"everything finished before is kept; free some room and run the same command again$"
)


def full_at(step: int, number: int) -> Callable[[int], None]:
    def fail(now: int) -> None:
        if now == step:
            raise OSError(number, os.strerror(number))

    return fail


def test_a_full_disk_at_any_step_keeps_finished_shards_and_leaves_nothing_half_done(
    made: Known, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(monkeypatch, *NAMING)
    done: set[int] = set()
    commit = writer.CacheWriter.commit

    def noted(self: writer.CacheWriter, shard: Shard) -> None:
        commit(self, shard)
        done.add(shard.number)

    monkeypatch.setattr(writer.CacheWriter, "commit", noted)
    steps.reset()
    made.write(tmp_path / "whole")
    whole, total = contents(tmp_path / "whole"), steps.count
    assert total > 100
    seen: list[dict[str, bytes]] = []
    for step in range(total):
        folder = tmp_path / f"full-{step}"
        done.clear()
        steps.reset(full_at(step, errno.ENOSPC if step % 2 else errno.EDQUOT))
        with pytest.raises(DiskFull, match=FULL):
            made.write(folder)
        steps.reset()
        if state(folder) in seen:
            continue
        seen.append(state(folder))
        check_what_is_named_is_whole(folder)
        assert done <= recorded(folder)
        assert not list(folder.glob("staging/*"))
        assert not list(folder.rglob(".*"))
        made.write(folder)
        assert contents(folder) == whole
    assert len(seen) > 20


def test_the_words_about_a_full_disk_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "free_bytes", lambda path: 4096)
    Steps(monkeypatch, *NAMING).reset(full_at(1, errno.ENOSPC))
    with pytest.raises(DiskFull) as caught:
        files.write_file(tmp_path / "f", b"data")
    assert str(caught.value) == (
        f"no room left on the disk while writing {tmp_path}/f: 4,096 bytes are free; "
        "everything finished before is kept; free some room and run the same command again"
    )


def test_another_error_of_the_disk_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Steps(monkeypatch, *NAMING).reset(full_at(1, errno.EIO))
    with pytest.raises(OSError, match="Input/output error") as caught:
        files.write_file(tmp_path / "f", b"data")
    assert not isinstance(caught.value, DiskFull)
    assert list(tmp_path.iterdir()) == []
