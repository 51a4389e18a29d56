"""Making damaged files of a cache anew, byte for byte, or under a new id where that cannot be.

Small files follow from the manifest. A shard is computed again, which gives the same bytes on the same hardware with
the same libraries and number of threads; where it gives others, the old id cannot stand for them.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
from jaxtyping import Float32

from ..errors import CacheCorrupt, ConfigError, RepairMismatch
from ..progress import SILENT, Progress
from .card import card
from .encoding import metadata
from .extraction import Extraction, Shard
from .files import make_folder, write_file
from .layout import CARD, MANIFEST, TEXTS, Manifest, array_file, in_shards, read_manifest, record_file, sealed_json
from .selection import read_selection
from .sharing.pull import pull
from .sharing.remote import manifest_of
from .verify import Problem, verify
from .writer import CacheWriter


@runtime_checkable
class Remake(Protocol):
    """Computes parts of a cache again."""

    def shard(self, number: int, progress: Progress) -> Shard:
        """The contents of a shard."""
        ...

    def scales(self, progress: Progress) -> dict[str, Float32[np.ndarray, " _d"]]:
        """Site → channel scales."""
        ...

    def texts(self) -> pa.Table:
        """`texts.parquet` without its predictions."""
        ...


@dataclass(frozen=True)
class Repair:
    """What a repair did."""

    cache_id: str
    """Id of the cache as it is now."""
    parent: str | None
    """Its id before, where bytes had to change."""
    mended: list[str]
    """Files that are whole again."""
    problems: list[Problem]
    """What is left: files that do not belong to the cache are not touched."""


def repair(
    path: Path, remake: Remake | None = None, *, accept_new_bytes: bool = False, progress: Progress = SILENT
) -> Repair:
    """Make the damaged and missing files of a cache anew, and nothing else.

    Parameters
    ----------
    path
        The cache.
    remake
        Computes shards again; without it only the files that follow from the manifest can be mended.
    accept_new_bytes
        Where a shard cannot be had as it was, write it as it comes out now, under a new manifest with the old id as
        its parent.

    Raises
    ------
    CacheNotFound, CacheIncomplete, FormatVersion, CacheCorrupt
        Where there is no whole manifest to repair by.
    ConfigError
        Where a damaged file needs `remake`.
    RepairMismatch
        Where new bytes differ and are not accepted, after everything else was mended; what differs is kept as it was.
    FolderInUse, DiskFull, Interrupted
    """
    manifest, cache_id = read_manifest(path)
    found = verify(path, progress=progress)
    named = manifest.entries
    damaged = {problem.file for problem in found.problems if problem.file in named}
    if not damaged:
        return Repair(cache_id=cache_id, parent=None, mended=[], problems=found.problems)
    for name in sorted(damaged):
        _clear(path, name)
    with CacheWriter(path, Extraction.of(manifest)) as writer:
        changed = _Mending(writer, manifest, cache_id, remake, accept_new_bytes).run(damaged, progress)
        if changed:
            writer.seal(
                splits=manifest.splits, class_names=manifest.class_names, counts=manifest.counts, parent=cache_id
            )
    left = verify(path, progress=progress)
    mended = sorted(damaged - {problem.file for problem in left.problems})
    return Repair(cache_id=left.cache_id, parent=cache_id if changed else None, mended=mended, problems=left.problems)


def refetch(path: Path, url: str, *, progress: Progress = SILENT) -> Repair:
    """Fetch the damaged and missing files of a cache from a whole copy of it.

    Raises
    ------
    CacheNotFound, CacheIncomplete, FormatVersion, CacheCorrupt
        Where there is no whole cache to fetch from.
    ResumeMismatch
        Where the copy is of another cache.
    """
    _, cache_id = manifest_of(url)
    selection = read_selection(path, cache_id)
    try:
        before = {problem.file for problem in verify(path, progress=progress).problems}
    except CacheCorrupt:
        before = {MANIFEST}
    pull(
        url,
        path,
        sites=selection.sites if selection else None,
        splits=selection.splits if selection else None,
        manifest_only=selection is not None and selection.manifest_only,
        progress=progress,
    )
    left = verify(path, progress=progress)
    mended = sorted(before - {problem.file for problem in left.problems})
    return Repair(cache_id=left.cache_id, parent=None, mended=mended, problems=left.problems)


def _clear(path: Path, name: str) -> None:
    """Make sure that writing `name` stays inside the cache and meets no folder."""
    for folder in (path / part for part in reversed(Path(name).parents[:-1])):
        if folder.is_symlink():
            raise CacheCorrupt(f"{folder} is a symbolic link; remove it, and repair again")
    if (path / name).is_dir() and not (path / name).is_symlink():
        raise CacheCorrupt(f"{path / name} is a folder, and a file belongs there; move it away, and repair again")
    make_folder((path / name).parent)


class _Mending:
    """The steps of one repair."""

    def __init__(
        self, writer: CacheWriter, manifest: Manifest, cache_id: str, remake: Remake | None, accept: bool
    ) -> None:
        self._writer, self._manifest, self._cache_id = writer, manifest, cache_id
        self._given, self._accept = remake, accept
        self._path = writer.path
        self._refused: list[str] = []

    def run(self, damaged: set[str], progress: Progress) -> bool:
        """Mend the files; whether any has other bytes than before."""
        changed = False
        follows = {**metadata(self._writer.layouts), CARD: card(self._manifest)}
        for name in sorted(damaged & follows.keys()):
            changed |= self._put(name, follows[name])
        scales = [array_file(name, 0, 1) for name in self._writer.layouts if not in_shards(name)]
        shards = sorted(set(_shards(self._manifest, damaged)))
        if damaged & set(scales):
            self._scales(scales, damaged, progress)
        if shards:
            self._writer.fix_scales(lambda: self._remake.scales(progress))
            progress.begin("repair", len(shards), "shards")
        for number in shards:
            changed |= self._shard(number, damaged, progress)
            progress.advance()
        if TEXTS in damaged:
            changed |= self._put(TEXTS, self._writer.texts_file(self._remake.texts()))
        if self._refused:
            raise RepairMismatch(
                f"{self._path / self._refused[0]} comes out with other bytes than it had"
                f"{f', and so do {len(self._refused) - 1} more files' if len(self._refused) > 1 else ''} (other "
                "hardware, another number of threads, or other versions of torch, transformers, pyarrow or clvq): "
                "get a whole copy, or accept a cache with a new id with --accept-new-bytes"
            )
        return changed

    @property
    def _remake(self) -> Remake:
        if self._given is None:
            raise ConfigError(
                f"{self._path} has damaged activations or texts: give --model and --data to compute them again, "
                "or where a whole copy is (a folder, s3://… or hf://…) to get them from"
            )
        return self._given

    def _scales(self, files: list[str], damaged: set[str], progress: Progress) -> None:
        scales = self._remake.scales(progress)
        for name in sorted(damaged & set(files)):
            (self._path / name).unlink(missing_ok=True)
        self._writer.fix_scales(lambda: scales)
        for name in files:
            if not self._matches(name, (self._path / name).read_bytes()):
                raise RepairMismatch(
                    f"{self._path / name} comes out with other values here than it had, and every shard of its site "
                    "depends on it: get a whole copy of it, or extract into another --out"
                )

    def _shard(self, number: int, damaged: set[str], progress: Progress) -> bool:
        before, name = self._manifest.shards[number].files, record_file(number)
        with self._writer.encoded(self._remake.shard(number, progress)) as record:
            # Only what is damaged has to come out as it was: the rest is there, though it may come out otherwise.
            other = [file for file in before if file in damaged and record.files[file] != before[file]]
            data = sealed_json(record.model_copy(update={"files": before}))
            other += [name] if name in damaged and not self._matches(name, data) else []
            if other and not self._accept:
                self._refused.append(other[0])
                return False
            if other:
                data = sealed_json(record)
            self._writer.place(before if other else damaged & before.keys())
            if other or name in damaged:
                write_file(self._path / name, data)
        return bool(other)

    def _put(self, name: str, data: bytes) -> bool:
        same = self._matches(name, data)
        if not same and not self._accept:
            self._refused.append(name)
            return False
        write_file(self._path / name, data)
        return not same

    def _matches(self, name: str, data: bytes) -> bool:
        return hashlib.sha256(data).hexdigest() == self._manifest.entries[name].sha256


def _shards(manifest: Manifest, damaged: set[str]) -> Iterator[int]:
    for number, shard in enumerate(manifest.shards):
        if damaged & {*shard.files, record_file(number)}:
            yield number
