"""Getting a cache, or a part of one: nothing of what a store sends is believed before its SHA-256 was checked."""

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...errors import (
    CacheCorrupt,
    CacheIncomplete,
    CacheNotFound,
    ConfigError,
    DiskFull,
    FormatVersion,
    RemoteUnreachable,
    ResumeMismatch,
)
from ...progress import SILENT, Progress
from ..files import disk_full_names, free_bytes, fsync_folder, make_folder, only_writer, sha256_of, write_file
from ..layout import (
    MANIFEST,
    MANIFEST_BYTES,
    SELECTION,
    STAGING,
    TEXTS,
    UNFINISHED,
    FileEntry,
    Manifest,
    parse_manifest,
    record_file,
    to_json,
)
from ..selection import Selection, expected_files, named_sites, named_splits, read_selection
from ..texts_file import read_texts_table
from ..unfinished import NOTE_BYTES, Transfer, unfinished
from .stores import Store, open_store
from .transfer import in_parallel

# Of a file that comes with other bytes, or not to its end.
_TRIES = 3


@dataclass(frozen=True)
class Pulled:
    """What a pull did."""

    cache_id: str
    source: str
    files: int
    """Files that were fetched."""
    bytes: int
    """Bytes that were fetched."""
    kept: int
    """Files that were there, with the right bytes."""
    selection: Selection | None
    """What the copy holds; `None` for a whole one."""


def pull(
    url: str,
    out: Path,
    *,
    sites: Sequence[str] | None = None,
    splits: Sequence[str] | None = None,
    manifest_only: bool = False,
    progress: Progress = SILENT,
) -> Pulled:
    """Fetch a cache, or a part of one, into a folder. Safe to repeat and to interrupt; damaged files are replaced.

    A copy that is there is extended by what it does not hold yet.

    Parameters
    ----------
    url
        A folder, `s3://bucket/prefix`, or `hf://user/name`, with `@revision` if wanted.
    out
        The copy's folder; empty, or a copy of the same cache.
    sites, splits
        The part to fetch; everything where not given. Whole shards are fetched, so further splits may come along.
    manifest_only
        Fetch no texts and no vectors.

    Raises
    ------
    CacheNotFound, CacheIncomplete, FormatVersion, CacheCorrupt
        Where there is no whole cache at the URL; a file that came with other bytes again and again is named.
    ConfigError
        Where the URL names no place, or the cache lacks a site or split.
    ResumeMismatch
        Where the folder holds another cache.
    RemoteNotFound, RemoteDenied, RemoteUnreachable, DiskFull, FolderInUse
    Interrupted
        Where a stop was asked for; what was fetched is kept.
    """
    if manifest_only and (sites is not None or splits is not None):
        raise ConfigError("the manifest alone was asked for, and sites or splits as well: leave out one of the two")
    store = open_store(url)
    data, manifest = remote_manifest(store)
    wanted = Selection(
        cache=hashlib.sha256(data).hexdigest(),
        source=store.name,
        sites=() if manifest_only else named_sites(manifest, sites or list(manifest.sites), store.name),
        splits=() if manifest_only else named_splits(manifest, splits or list(manifest.splits), store.name),
        shards=(),
    )
    with only_writer(out), disk_full_names(out):
        return _Pull(store, manifest, data, out, wanted, progress).run()


def remote_manifest(store: Store) -> tuple[bytes, Manifest]:
    """The manifest that stands in a store.

    Raises
    ------
    CacheNotFound, CacheIncomplete, FormatVersion, CacheCorrupt
    """
    data = store.read(MANIFEST, limit=MANIFEST_BYTES)
    if data is None:
        note = store.read(UNFINISHED, limit=NOTE_BYTES)
        if note is not None:
            raise CacheIncomplete(unfinished(store.name, note))
        raise CacheNotFound(f"{store.name} holds no cache: there is no {MANIFEST}; see whether the URL is right")
    manifest = parse_manifest(data, store.name)
    if store.read(SELECTION, limit=NOTE_BYTES) is not None:
        raise ConfigError(f"{store.name} is a partial copy (it has a {SELECTION}): pull from where the whole cache is")
    return data, manifest


class _Pull:
    def __init__(
        self, store: Store, manifest: Manifest, data: bytes, out: Path, wanted: Selection, progress: Progress
    ) -> None:
        self.store = store
        self.manifest = manifest
        self.data = data
        self.out = out
        self.wanted = wanted
        self.progress = progress
        self.staging = out / STAGING
        self.fetched: set[str] = set()

    def run(self) -> Pulled:
        finished = self._take_over()
        note = Transfer("pull", self.wanted.cache, self.store.name).note()
        if not finished:
            write_file(self.out / UNFINISHED, note)
        shutil.rmtree(self.staging, ignore_errors=True)
        make_folder(self.staging)
        selection = self._selected(self._held() if finished else None)
        chosen, absent = expected_files(self.manifest, selection)
        self._fetch(chosen)
        if absent:
            write_file(self.out / SELECTION, to_json(selection))
        else:
            (self.out / SELECTION).unlink(missing_ok=True)
        if not finished or (self.out / MANIFEST).read_bytes() != self.data:
            write_file(self.out / MANIFEST, self.data)
        (self.out / UNFINISHED).unlink(missing_ok=True)
        shutil.rmtree(self.staging)
        fsync_folder(self.out)
        return Pulled(
            cache_id=self.wanted.cache,
            source=self.store.name,
            files=len(self.fetched),
            bytes=sum(self.manifest.entries[name].bytes for name in self.fetched),
            kept=len(chosen.keys() - self.fetched),
            selection=selection if absent else None,
        )

    def _take_over(self) -> bool:
        """Make sure that the folder is empty or ours; whether a copy was finished there."""
        names = {entry.name for entry in self.out.iterdir()}
        mine = self.wanted.cache
        if MANIFEST in names:
            found = (self.out / MANIFEST).read_bytes()
            if found != self.data and not (_is_damaged(found) and self._holds_a_record()):
                raise ResumeMismatch(
                    f"{self.out} holds another cache ({hashlib.sha256(found).hexdigest()[:12]}; {self.store.name} is "
                    f"{mine[:12]}): pull into another folder"
                )
            return True
        if UNFINISHED in names:
            transfer = Transfer.of((self.out / UNFINISHED).read_bytes())
            if transfer is None or transfer.kind != "pull" or transfer.cache_id != mine:
                what = "extraction" if transfer is None else f"{transfer.kind} of the cache {transfer.cache_id[:12]}"
                raise ResumeMismatch(
                    f"{self.out} holds an unfinished {what}, and {self.store.name} is {mine[:12]}: "
                    "pull into another folder"
                )
            return False
        foreign = sorted(name for name in names if not name.startswith(f".{UNFINISHED}."))
        if foreign:
            raise ConfigError(
                f"{self.out} is not empty and is not a clvq cache (it holds {foreign[0]!r}): pull into another folder"
            )
        return False

    def _holds_a_record(self) -> bool:
        """Whether a folder without a readable manifest is a copy of this cache all the same."""
        for number in range(self.manifest.geometry.shards):
            name = record_file(number)
            if _is(self.out / name, self.manifest.files[name]):
                return True
        return False

    def _held(self) -> Selection | None:
        """What the finished copy was to hold until now, as far as it still says so."""
        try:
            found = read_selection(self.out, self.wanted.cache)
        except CacheCorrupt:
            return None
        everything = {"sites": tuple(self.manifest.sites), "splits": tuple(self.manifest.splits)}
        return found or self.wanted.model_copy(update=everything)

    def _selected(self, held: Selection | None) -> Selection:
        """What the copy is to hold: what it holds and what was asked for."""
        wanted, manifest = self.wanted, self.manifest
        sites = {*wanted.sites, *(held.sites if held else ())}
        splits = {*wanted.splits, *(held.splits if held else ())}
        if splits == manifest.splits.keys():
            shards = list(range(manifest.geometry.shards))
        elif not splits:
            shards = []
        else:
            self._fetch({TEXTS: manifest.files[TEXTS]})
            shards = _shards_of(splits, self.out / TEXTS, manifest)
        return wanted.model_copy(
            update={
                "sites": tuple(name for name in manifest.sites if name in sites),
                "splits": tuple(name for name in manifest.splits if name in splits),
                "shards": tuple(shards),
            }
        )

    def _fetch(self, chosen: Mapping[str, FileEntry]) -> None:
        """Have these files there, each with the right bytes; what is right stays as it is."""
        missing = sum(entry.bytes for name, entry in chosen.items() if not _has_size(self.out / name, entry))
        if missing > free_bytes(self.out):
            raise DiskFull(
                f"{self.out} needs {missing:,} more bytes, and {free_bytes(self.out):,} are free on its disk: free "
                "some room, or pull single sites or splits"
            )
        self.progress.begin("pull", sum(entry.bytes for entry in chosen.values()), "bytes")
        folders = {(self.out / name).parent for name in chosen}
        for folder in sorted(folders):
            self._clear(folder)
            make_folder(folder)

        def have(name: str, stopped: Callable[[], bool]) -> None:
            if not stopped() and not _is(self.out / name, chosen[name]):
                self._get(name, chosen[name], stopped)
                self.fetched.add(name)

        in_parallel(have, sorted(chosen), check=self.progress.check, done=lambda name: self._done(chosen[name]))
        for folder in sorted(folders):
            fsync_folder(folder)

    def _clear(self, folder: Path) -> None:
        """Make sure that what is written into a folder of the copy stays there."""
        while folder != self.out:
            if folder.is_symlink():
                raise CacheCorrupt(f"{folder} is a symbolic link, and a cache holds none: remove it, and pull again")
            folder = folder.parent

    def _done(self, entry: FileEntry) -> None:
        self.progress.advance(entry.bytes)

    def _get(self, name: str, entry: FileEntry, stopped: Callable[[], bool]) -> None:
        # Names inside a cache are too long and have folders in them.
        aside = self.staging / hashlib.sha256(name.encode()).hexdigest()
        get_checked(self.store, name, entry, aside, stopped=stopped)
        os.replace(aside, self.out / name)


def get_checked(
    store: Store, name: str, entry: FileEntry, target: Path, *, stopped: Callable[[], bool] = lambda: False
) -> None:
    """Fetch a file to `target` and make it durable; one that comes with other bytes is fetched again.

    Raises
    ------
    CacheCorrupt
        Where the store goes on sending other bytes than were written.
    RemoteUnreachable
        Where it goes on breaking off.
    """
    for left in reversed(range(_TRIES)):
        try:
            store.fetch(name, target, size=entry.bytes)
        except RemoteUnreachable:
            if left and not stopped():
                continue
            raise
        if sha256_of(target) == entry.sha256:
            break
        if not left:
            raise CacheCorrupt(
                f"{store.name}/{name} has other bytes than its manifest says (SHA-256 differs), {_TRIES} times over: "
                "ask whoever shared it to push it again"
            )
    with open(target, "rb") as file:
        os.fsync(file.fileno())


def _is_damaged(manifest: bytes) -> bool:
    try:
        parse_manifest(manifest, "")
    except FormatVersion:
        return False
    except CacheCorrupt:
        return True
    return False


def _has_size(file: Path, entry: FileEntry) -> bool:
    return not file.is_symlink() and file.is_file() and file.stat().st_size == entry.bytes


def _is(file: Path, entry: FileEntry) -> bool:
    return _has_size(file, entry) and sha256_of(file) == entry.sha256


def _shards_of(splits: set[str], file: Path, manifest: Manifest) -> list[int]:
    """The shards that hold a text of the splits."""
    texts = read_texts_table(file.read_bytes(), manifest.geometry, name=str(file))
    inside = pc.is_in(texts["split"], value_set=pa.array(sorted(splits)))
    first = np.asarray(texts["first_row"].filter(inside), dtype=np.int64)
    return [int(shard) for shard in np.unique(first // manifest.geometry.shard_rows)]
