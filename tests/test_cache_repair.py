"""Repair: damaged files come back byte for byte, or under a new id, and nothing else is touched."""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import clvq
import numpy as np
import pyarrow as pa
import pytest
from clvq.cache.encoding import channel_scale
from clvq.cache.extraction import Shard
from clvq.cache.layout import read_manifest
from clvq.cache.repair import repair
from clvq.cache.verify import verify
from clvq.cache.writer import CacheWriter
from clvq.errors import CacheCorrupt, ConfigError, FolderInUse, RepairMismatch
from clvq.progress import Progress

from .cache_maker import CLASSES, Known, contents, known, without_waiting

WIDTHS = {"hidden.1": (6, "bf16"), "hidden.2": (5, "int8")}


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    yield from without_waiting()


@dataclass
class Again:
    """Makes the shards of a known cache again; `change` makes them come out otherwise."""

    known: Known
    change: Callable[[Shard], Shard] = lambda shard: shard
    made: list[int] = field(default_factory=list)

    def shard(self, number: int, progress: Progress) -> Shard:
        self.made.append(number)
        return self.change(self.known.shard(number))

    def scales(self, progress: Progress) -> dict[str, np.ndarray]:
        return scales(self.known)

    def texts(self) -> pa.Table:
        return self.known.texts()


def scales(made: Known) -> dict[str, np.ndarray]:
    return {"hidden.2": channel_scale(made.vectors["hidden.2"][:100])}


def louder(shard: Shard) -> Shard:
    """As another machine might compute it: one value of one site rounds differently."""
    values = shard.sites["hidden.1"].copy()
    values[0, 0] *= 1.01
    return replace(shard, sites={**shard.sites, "hidden.1": values})


@pytest.fixture(scope="module")
def made() -> Known:
    return known(widths=WIDTHS)


@pytest.fixture(scope="module")
def whole(made: Known, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "cache"
    with CacheWriter(path, made.extraction) as writer:
        writer.fix_scales(lambda: scales(made))
        for number in range(made.geometry.shards):
            writer.commit(made.shard(number))
        writer.finish(made.texts(), class_names=CLASSES, counts={"texts": len(made.counts)})
    return path


@pytest.fixture
def path(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "cache"))


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


DAMAGE = {
    "flipped site": lambda path: flip(path / "activations.zarr/sites/hidden.1/c/1/0"),
    "missing site": lambda path: (path / "activations.zarr/sites/hidden.2/c/0/0").unlink(),
    "missing folder of an array": lambda path: shutil.rmtree(path / "activations.zarr/rows/word"),
    "emptied column": lambda path: (path / "activations.zarr/rows/text/c/2").write_bytes(b""),
    "row scales": lambda path: flip(path / "activations.zarr/scales/hidden.2/c/1"),
    "channel scales": lambda path: flip(path / "activations.zarr/channel_scale/hidden.2/c/0"),
    "missing channel scales": lambda path: (path / "activations.zarr/channel_scale/hidden.2/c/0").unlink(),
    "logits": lambda path: flip(path / "activations.zarr/texts/logits/c/1/0"),
    "metadata": lambda path: flip(path / "activations.zarr/sites/hidden.1/zarr.json"),
    "group": lambda path: (path / "activations.zarr/zarr.json").unlink(),
    "record": lambda path: flip(path / "records/000001.json"),
    "texts": lambda path: flip(path / "texts.parquet"),
    "card": lambda path: (path / "README.md").write_text("mine"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_what_was_damaged_comes_back_to_the_last_byte(
    damage: Callable[[Path], object], path: Path, whole: Path, made: Known
) -> None:
    damage(path)
    before = [problem.file for problem in verify(path).problems]
    result = repair(path, Again(made))
    assert result.mended == sorted(before)
    assert (result.problems, result.parent) == ([], None)
    assert contents(path) == contents(whole)


def test_only_the_damaged_shards_are_made_again(path: Path, made: Known) -> None:
    flip(path / "activations.zarr/sites/hidden.1/c/1/0")
    flip(path / "activations.zarr/rows/word/c/3")
    again = Again(made)
    repair(path, again)
    assert again.made == [1, 3]


def test_a_whole_cache_is_left_as_it_is(path: Path, made: Known) -> None:
    times = {file: file.stat().st_mtime_ns for file in path.rglob("*")}
    again = Again(made)
    assert repair(path, again).mended == []
    assert again.made == []
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*")} == times


def test_what_follows_from_the_manifest_needs_no_model(path: Path, whole: Path) -> None:
    flip(path / "README.md")
    flip(path / "activations.zarr/rows/zarr.json")
    assert repair(path).problems == []
    assert contents(path) == contents(whole)


def test_without_a_model_the_rest_is_mended_and_the_message_says_what_is_needed(path: Path, whole: Path) -> None:
    flip(path / "README.md")
    flip(path / "activations.zarr/sites/hidden.1/c/1/0")
    with pytest.raises(ConfigError) as caught:
        repair(path)
    assert str(caught.value) == (
        f"{path} has damaged activations or texts: give --model and --data to compute them again, "
        "or where a whole copy is (a folder, s3://… or hf://…) to get them from"
    )
    assert [problem.file for problem in verify(path).problems] == ["activations.zarr/sites/hidden.1/c/1/0"]


def test_foreign_files_are_reported_and_never_touched(path: Path, made: Known) -> None:
    (path / "notes.txt").write_text("mine")
    flip(path / "README.md")
    result = repair(path, Again(made))
    assert [problem.file for problem in result.problems] == ["notes.txt"]
    assert (path / "notes.txt").read_text() == "mine"


def test_a_shard_that_comes_out_otherwise_is_refused_and_everything_else_mended(path: Path, made: Known) -> None:
    file = path / "activations.zarr/sites/hidden.1/c/1/0"
    flip(file)
    flip(path / "README.md")
    damaged = file.read_bytes()
    with pytest.raises(RepairMismatch) as caught:
        repair(path, Again(made, louder))
    assert str(caught.value) == (
        f"{path}/activations.zarr/sites/hidden.1/c/1/0 comes out with other bytes than it had (other hardware, another "
        "number of threads, or other versions of torch, transformers, pyarrow or clvq): get a whole copy, or accept a "
        "cache with a new id with --accept-new-bytes"
    )
    assert file.read_bytes() == damaged
    assert [problem.file for problem in verify(path).problems] == [file.relative_to(path).as_posix()]


def test_only_what_was_damaged_has_to_come_out_as_it_was(path: Path, whole: Path, made: Known) -> None:
    flip(path / "activations.zarr/sites/hidden.2/c/1/0")
    result = repair(path, Again(made, louder))
    assert (result.parent, result.problems) == (None, [])
    assert contents(path) == contents(whole)


def test_a_record_is_not_vouched_for_by_other_values(path: Path, made: Known) -> None:
    flip(path / "records/000001.json")
    with pytest.raises(RepairMismatch, match=r"records/000001\.json comes out with other bytes"):
        repair(path, Again(made, louder))


def test_accepted_new_bytes_make_a_new_cache_that_names_the_old_one(path: Path, made: Known) -> None:
    old, old_id = read_manifest(path)
    flip(path / "activations.zarr/sites/hidden.1/c/1/0")
    result = repair(path, Again(made, louder), accept_new_bytes=True)
    new, new_id = read_manifest(path)
    assert (result.cache_id, result.parent) == (new_id, old_id)
    assert new_id != old_id
    assert new.parent == old_id
    assert verify(path).problems == []
    # Only that shard's pair of sites is new: both come from the same forward pass.
    changed = {name for name, entry in new.entries.items() if entry != old.entries[name]}
    assert changed == {"README.md", "records/000001.json", "activations.zarr/sites/hidden.1/c/1/0"}
    expected = made.vectors["hidden.1"].astype(np.float64)
    first = made.counts[: made.placement.shard_starts[1]].sum()
    expected[first, 0] *= 1.01
    assert np.allclose(new.sites["hidden.1"].statistics.mean, expected.mean(axis=0), atol=2e-3)
    stored = clvq.Cache(path).vectors("hidden.1", made.places)
    assert np.abs(stored - expected).max() <= np.abs(expected).max() * 2**-8


def test_a_killed_acceptance_is_finished_by_repairing_again(
    path: Path, made: Known, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip(path / "activations.zarr/sites/hidden.1/c/1/0")
    whole_again = Path(shutil.copytree(path, path.parent / "undisturbed"))
    repair(whole_again, Again(made, louder), accept_new_bytes=True)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(CacheWriter, "seal", killed)
        with pytest.raises(KeyboardInterrupt):
            repair(path, Again(made, louder), accept_new_bytes=True)
    repair(path, Again(made, louder), accept_new_bytes=True)
    assert contents(path) == contents(whole_again)


def test_other_channel_scales_cannot_be_accepted(path: Path, made: Known) -> None:
    name = "activations.zarr/channel_scale/hidden.2/c/0"
    flip(path / name)
    again = Again(made)
    again.scales = lambda progress: {"hidden.2": 2 * scales(made)["hidden.2"]}  # type: ignore[method-assign]
    with pytest.raises(RepairMismatch, match="every shard of its site depends on it"):
        repair(path, again, accept_new_bytes=True)


def test_a_link_in_the_place_of_a_file_is_replaced_and_its_target_kept(
    path: Path, whole: Path, made: Known, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    file = path / "activations.zarr/rows/word/c/0"
    shutil.move(file, target)
    before = target.read_bytes()
    file.symlink_to(target)
    assert repair(path, Again(made)).problems == []
    assert not file.is_symlink()
    assert target.read_bytes() == before
    assert contents(path) == contents(whole)


def test_nothing_is_written_through_a_linked_folder(path: Path, made: Known, tmp_path: Path) -> None:
    folder, outside = path / "activations.zarr/rows/word/c", tmp_path / "outside"
    shutil.move(folder, outside)
    folder.symlink_to(outside)
    (outside / "0").unlink()
    with pytest.raises(CacheCorrupt, match="is a symbolic link; remove it, and repair again"):
        repair(path, Again(made))
    assert not (outside / "0").exists()


def test_a_folder_in_the_place_of_a_file_is_refused_by_name(path: Path, made: Known) -> None:
    (path / "texts.parquet").unlink()
    (path / "texts.parquet").mkdir()
    with pytest.raises(CacheCorrupt, match="is a folder, and a file belongs there"):
        repair(path, Again(made))


def test_repairing_what_another_process_writes_is_refused(path: Path, made: Known) -> None:
    flip(path / "README.md")
    with CacheWriter(path, made.extraction), pytest.raises(FolderInUse):
        repair(path, Again(made))


def test_the_salt_and_the_selection_are_no_foreign_files(path: Path) -> None:
    (path / "salt").write_text("00")
    assert verify(path).problems == []


def test_a_repaired_cache_has_the_permissions_of_its_neighbours(path: Path, made: Known) -> None:
    file = path / "activations.zarr/sites/hidden.1/c/1/0"
    wanted = os.stat(path / "activations.zarr/sites/hidden.1/c/0/0").st_mode
    flip(file)
    repair(path, Again(made))
    assert os.stat(file).st_mode == wanted
