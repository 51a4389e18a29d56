"""Sharing a cache: its files into a store, the manifest last, so that nobody ever reads half a cache there."""

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from ...errors import ConfigError, RemoteUnreachable, ResumeMismatch
from ...progress import SILENT, Progress
from ..layout import (
    CARD,
    MANIFEST,
    MANIFEST_BYTES,
    SELECTION,
    TEXTUAL_COLUMNS,
    UNFINISHED,
    Manifest,
    parse_manifest,
    record_file,
)
from ..reader import Cache
from ..selection import read_selection
from ..unfinished import NOTE_BYTES, Transfer
from .stores import Store, Upload, open_store
from .without_texts import derive

# Of a claim that somebody takes away while it is looked at.
_TRIES = 5


@dataclass(frozen=True)
class Pushed:
    """What a push did."""

    cache_id: str
    """Id of the cache as it stands there; another one than that of the local cache where texts were left out."""
    url: str
    files: int
    """Files that were sent."""
    bytes: int
    """Bytes that were sent."""
    shards_there: int
    """Shards that stood there from an earlier push."""
    was_there: bool
    """Whether the whole cache stood there before."""


def push(
    path: Path,
    url: str,
    *,
    without_texts: bool = False,
    public: bool = False,
    progress: Progress = SILENT,
) -> Pushed:
    """Send a cache to a folder, to `s3://bucket/prefix` or to `hf://user/name`. Safe to repeat and to interrupt.

    Every file is checked against the manifest while it is read.

    Parameters
    ----------
    path
        The cache's folder.
    url
        Where to. Credentials are taken from the environment.
    without_texts
        Leave out texts, tokens and words; see `without_texts`.
    public
        Make a repository that is created on the Hub visible to all.

    Raises
    ------
    CacheNotFound, CacheIncomplete, FormatVersion, CacheCorrupt
        Where there is no whole cache; a damaged file is named.
    ConfigError
        Where the URL names no place, or the cache is a partial copy.
    ResumeMismatch
        Where another cache stands there, finished or not.
    RemoteNotFound, RemoteDenied, RemoteUnreachable, RemoteUnsafe
    Interrupted
        Where a stop was asked for; what was sent is kept, and nobody can read it yet.
    """
    cache = Cache(path)
    if read_selection(path, cache.id) is not None:
        raise ConfigError(
            f"{path} is a partial copy (it has a {SELECTION}): push the whole cache, or pull the rest first"
        )
    store = open_store(url)
    with ExitStack() as stack:
        if without_texts and set(TEXTUAL_COLUMNS) & set(cache.manifest.columns):
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="clvq-")))
            data, where = derive(cache, folder)
        else:
            data = (path / MANIFEST).read_bytes()
            where = {name: path / name for name in cache.manifest.entries}
        manifest = parse_manifest(data, path)
        stack.enter_context(store.writing(public=public))
        return _Push(store, manifest, data, where, progress).run()


class _Push:
    def __init__(
        self, store: Store, manifest: Manifest, data: bytes, where: dict[str, Path], progress: Progress
    ) -> None:
        self.store = store
        self.manifest = manifest
        self.data = data
        self.id = hashlib.sha256(data).hexdigest()
        self.progress = progress
        self.files = self.bytes = 0
        entries = manifest.entries
        self.uploads = {name: Upload(name, source, entries[name]) for name, source in where.items()}

    def run(self) -> Pushed:
        was_there, there = self._stands_there(), 0
        if not was_there:
            claimed = self._claim()
            # Again: whoever finishes takes the claim away after the manifest stands.
            try:
                was_there = self._stands_there()
            except ResumeMismatch:
                if claimed:
                    self.store.delete(UNFINISHED)
                raise
        if not was_there:
            there = self._send()
        self.store.publish(self.data, tag=f"clvq-{self.id[:12]}")
        # Somebody who took our claim away may have come first.
        if not self._stands_there():
            raise RemoteUnreachable(f"{self.store.name} does not give back what was written: run the command again")
        return Pushed(
            cache_id=self.id,
            url=self.store.name,
            files=self.files,
            bytes=self.bytes,
            shards_there=there,
            was_there=was_there,
        )

    def _stands_there(self) -> bool:
        """Whether this cache is finished there; another one is refused."""
        found = self.store.read(MANIFEST, limit=MANIFEST_BYTES)
        if found is not None and found != self.data:
            raise ResumeMismatch(
                f"{self.store.name} holds another cache ({hashlib.sha256(found).hexdigest()[:12]}; this one is "
                f"{self.id[:12]}): push to another place"
            )
        return found is not None

    def _claim(self) -> bool:
        """Say that this cache is being pushed there; whether nobody had said so before."""
        note = Transfer("push", self.id).note()
        for _ in range(_TRIES):
            if self.store.create(UNFINISHED, note):
                return True
            found = self.store.read(UNFINISHED, limit=NOTE_BYTES)
            # The same cache: an earlier push that broke off, or one that goes on beside this one. They write the same.
            if found == note:
                return False
            if found is not None:
                other = Transfer.of(found)
                what = f"push of the cache {other.cache_id[:12]}" if other and other.kind == "push" else "other work"
                raise ResumeMismatch(
                    f"{self.store.name} holds an unfinished {what}, and this cache is {self.id[:12]}: push to another "
                    f"place; or, if that work was given up, delete {UNFINISHED} there"
                )
        raise ResumeMismatch(f"{self.store.name} is claimed and released by others all the time: try again later")

    def _send(self) -> int:
        """Send all files but the manifest; the number of shards that were there."""
        records = [record_file(number) for number in range(self.manifest.geometry.shards)]
        self.progress.begin("push", sum(upload.entry.bytes for upload in self.uploads.values()), "bytes")
        found = self.store.compare([self.uploads[name] for name in records], check=self.progress.check)
        shards = []
        for name, shard in zip(records, self.manifest.shards, strict=True):
            unit = [*(self.uploads[file] for file in sorted(shard.files)), self.uploads[name]]
            if found.get(name):
                self.progress.advance(sum(upload.entry.bytes for upload in unit))
                continue
            if name in found:
                # It stands for files that are about to be replaced.
                self.store.delete(name)
            shards.append(unit)
        self._put(shards)
        rest = sorted(self.manifest.files.keys() - {*records, CARD})
        self._put([[self.uploads[name]] for name in rest])
        self._put([[self.uploads[CARD]]])
        return len(records) - len(shards)

    def _put(self, units: Sequence[Sequence[Upload]]) -> None:
        def done(unit: Sequence[Upload]) -> None:
            size = sum(upload.entry.bytes for upload in unit)
            self.files += len(unit)
            self.bytes += size
            self.progress.advance(size)

        self.store.put(units, check=self.progress.check, done=done)
