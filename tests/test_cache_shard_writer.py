"""Several writers of one extraction at once: whoever is first says what a shard is."""

import fcntl
import os
import re
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from clvq.cache import shard_writer
from clvq.cache.files import only_writer
from clvq.cache.shard_writer import ShardWriter
from clvq.cache.verify import verify
from clvq.cache.writer import CacheWriter
from clvq.errors import FolderInUse, ResumeMismatch

from .cache_maker import Known, contents, known


@pytest.fixture(scope="module")
def made() -> Known:
    return known(texts=60, widths={"hidden.1": (6, "bf16"), "hidden.2": (5, "int8")})


@pytest.fixture(scope="module")
def whole(made: Known, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    made.write(folder)
    return contents(folder)


def begun(path: Path, made: Known) -> None:
    with CacheWriter(path, made.extraction) as writer:
        writer.fix_scales(lambda: made.scales)


@pytest.mark.parametrize("writers", [2, 5])
def test_writers_that_all_write_every_shard_make_one_cache(
    writers: int, made: Known, whole: dict[str, bytes], tmp_path: Path
) -> None:
    begun(tmp_path, made)
    failed: list[BaseException] = []

    def write() -> None:
        try:
            with ShardWriter(tmp_path, made.extraction) as writer:
                writer.fix_scales(dict)
                for number in range(made.geometry.shards):
                    assert writer.commit(made.shard(number)) == writer.written(number)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=write) for _ in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert not list(tmp_path.glob("staging/*"))
    made.write(tmp_path)
    assert contents(tmp_path) == whole


def test_of_two_that_made_a_shard_differently_the_first_one_stays(
    made: Known, whole: dict[str, bytes], tmp_path: Path
) -> None:
    begun(tmp_path, made)
    shard = made.shard(1)
    other = replace(shard, sites={name: values + 1 for name, values in shard.sites.items()})
    with ShardWriter(tmp_path, made.extraction) as one, ShardWriter(tmp_path, made.extraction) as two:
        one.fix_scales(dict)
        two.fix_scales(dict)
        # Both have encoded it before either places it.
        with two.encoded(other) as record:
            one.commit(shard)
            with pytest.raises(ResumeMismatch, match=r"^shard 1 of .* was already written with other bytes"):
                two._is_recorded(record)
        with pytest.raises(ResumeMismatch, match=r"^shard 1 of .* was already written with other bytes"):
            two.commit(other)
    made.write(tmp_path)
    assert contents(tmp_path) == whole


def test_one_that_stopped_while_placing_is_named(
    made: Known, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun(tmp_path, made)
    monkeypatch.setattr(shard_writer, "_PATIENCE_SECONDS", 0.05)
    folder = os.open(tmp_path / "activations.zarr/sites/hidden.1/c/2", os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    with ShardWriter(tmp_path, made.extraction) as writer:
        writer.fix_scales(dict)
        with pytest.raises(FolderInUse) as caught:
            writer.commit(made.shard(2))
        assert str(caught.value) == (
            f"shard 2 of {tmp_path} is being placed by another process, which does not go on: "
            "end that process, and run the same command again"
        )
        # Other shards do not wait for it.
        writer.commit(made.shard(3))
        os.close(folder)
        writer.commit(made.shard(2))
    made.write(tmp_path)
    assert contents(tmp_path) == whole


def test_a_writer_left_over_writes_nothing_into_another_extraction(made: Known, tmp_path: Path) -> None:
    path = tmp_path / "cache"
    other = made.with_identity(length=64)
    with ShardWriter(path, made.extraction) as left_over:
        begun(path, made)
        left_over.fix_scales(dict)
        other.write(path, force=True)
        before = contents(path)
        with pytest.raises(ResumeMismatch, match=r"no longer holds this extraction: another one was begun there$"):
            left_over.commit(made.shard(0))
        assert contents(path) == before
        assert verify(path).problems == []
        # Its own staging folder is all that it made anew; the cache's files are not there.
        shutil.rmtree(path)
        with pytest.raises(ResumeMismatch, match=r"no longer holds this extraction: it was deleted meanwhile$"):
            left_over.commit(made.shard(0))


def test_a_writer_left_over_finds_its_shard_in_the_finished_cache(
    made: Known, whole: dict[str, bytes], tmp_path: Path
) -> None:
    begun(tmp_path, made)
    with ShardWriter(tmp_path, made.extraction) as left_over:
        left_over.fix_scales(dict)
        made.write(tmp_path)
        assert left_over.commit(made.shard(0)) == left_over.written(0)
    shutil.rmtree(tmp_path / "staging", ignore_errors=True)
    assert contents(tmp_path) == whole


def test_a_folder_is_held_together_or_alone(tmp_path: Path) -> None:
    message = f"^{re.escape(str(tmp_path))} is being written by another process; wait until it ends, or give another"
    with only_writer(tmp_path, shared=True) as one, only_writer(tmp_path, shared=True) as two:
        with pytest.raises(FolderInUse, match=message), only_writer(tmp_path):
            pytest.fail("held alone while others hold it")
        assert not one.become_only()
        # The first one let go when it asked; so the last one gets it.
        assert two.become_only()
        with pytest.raises(FolderInUse, match=message), only_writer(tmp_path, shared=True):
            pytest.fail("shared while another holds it alone")
    with only_writer(tmp_path):
        pass


def test_writers_that_share_a_folder_delete_nothing_of_each_other(made: Known, tmp_path: Path) -> None:
    begun(tmp_path, made)
    (tmp_path / "staging" / "of-another").mkdir(parents=True)
    (tmp_path / ".texts.parquet.0123abcd.aside").write_bytes(b"on its way")
    with CacheWriter(tmp_path, made.extraction, shared=True):
        pass
    assert (tmp_path / "staging" / "of-another").is_dir()
    assert (tmp_path / ".texts.parquet.0123abcd.aside").is_file()
    with CacheWriter(tmp_path, made.extraction):
        pass
    assert not (tmp_path / "staging").exists()
    assert not (tmp_path / ".texts.parquet.0123abcd.aside").exists()
