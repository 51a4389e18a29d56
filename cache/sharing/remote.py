"""A cache that lies elsewhere: its files are fetched whole when they are needed, checked, and kept for a while."""

import hashlib
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import Int64, Shaped

from ...errors import CacheCorrupt, ClvqError, ConfigError
from ..encoding import ArrayLayout
from ..files import disk_full_names, make_folder, write_file
from ..layout import MANIFEST, Manifest, array_file, read_manifest
from ..reader import Cache
from ..shards import ShardFiles
from .pull import get_checked, remote_manifest
from .spool import SPOOL_BYTES, Spool, spool_folder
from .stores import FolderStore, Store, open_store
from .transfer import THREADS

# An open file takes room on the disk even after it was taken away.
_FILES_OPEN = 32


def open_cache(place: Path | str, *, spool: Path | None = None, spool_bytes: int = SPOOL_BYTES) -> Cache:
    """A cache in a folder, or one in `s3://bucket/prefix` or `hf://user/name` that is read as if it lay in one.

    Of a remote cache, each file is fetched when it is first read and checked against the manifest.

    Parameters
    ----------
    place
        The folder or URL. A revision of the Hub is resolved to its commit once, here.
    spool
        Where to keep fetched files; see `spool_folder`.
    spool_bytes
        How many bytes to keep there, for all caches together.

    Raises
    ------
    CacheNotFound, CacheIncomplete, FormatVersion, CacheCorrupt, ConfigError
    RemoteNotFound, RemoteDenied, RemoteUnreachable, MissingExtra
    """
    if isinstance(place, Path):
        return Cache(place)
    store = open_store(place)
    if isinstance(store, FolderStore):
        return Cache(store.path)
    data, _ = remote_manifest(store)
    root = spool or spool_folder()
    folder = root / hashlib.sha256(data).hexdigest()
    try:
        with disk_full_names(folder):
            make_folder(folder)
            if not (folder / MANIFEST).is_file() or (folder / MANIFEST).read_bytes() != data:
                write_file(folder / MANIFEST, data)
        kept = Spool(root, limit=spool_bytes)
    except (PermissionError, ConfigError) as error:
        raise ConfigError(f"fetched files cannot be kept in {root}: set CLVQ_HOME to a folder for them") from error
    return RemoteCache(store, folder, kept)


def manifest_of(place: Path | str) -> tuple[Manifest, str]:
    """The manifest and the id of a cache in a folder or elsewhere; raises what `open_cache` raises."""
    store = None if isinstance(place, Path) else open_store(place)
    if store is None or isinstance(store, FolderStore):
        return read_manifest(Path(place) if store is None else store.path)
    data, manifest = remote_manifest(store)
    return manifest, hashlib.sha256(data).hexdigest()


class RemoteCache(Cache):
    """A cache whose files come from a store; see `open_cache`."""

    def __init__(self, store: Store, folder: Path, spool: Spool) -> None:
        super().__init__(folder)
        self._store = store
        self._spool = spool
        # Weak, as in `Cache`.
        me = weakref.proxy(self)
        self.files = _FetchedFiles(lambda name: me.local(name))

    def local(self, name: str) -> Path:
        """See `Cache`."""
        entry = self._entries.get(name)
        if entry is None:
            raise CacheCorrupt(f"{self._store.name}/{name} is not part of the cache")
        return self._spool.have(
            f"{self.id}/{name}", entry, lambda target: get_checked(self._store, name, entry, target)
        )

    def column(self, name: str) -> Shaped[np.ndarray, " row_place"]:
        """See `Cache`. All of its files are fetched at once."""
        if name in self.manifest.columns and name not in self._columns:
            layout = self.layouts[f"rows/{name}"]
            self.files.soon(f"rows/{name}", layout, np.arange(0, layout.shape[0], layout.shard))
        return super().column(name)

    def _require_bytes(self) -> None:
        # What the files hold is known when they are fetched.
        pass

    def close(self) -> None:
        """See `Cache`."""
        super().close()
        self._spool.close()


class _FetchedFiles(ShardFiles):
    """Shard files that are fetched several at a time."""

    def __init__(self, locate: Callable[[str], Path]) -> None:
        super().__init__(locate, limit=_FILES_OPEN)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="clvq-fetch")

    def soon(self, name: str, layout: ArrayLayout, places: Int64[np.ndarray, " place"]) -> None:
        """See `ShardFiles`."""
        files = {array_file(name, shard, len(layout.shape)) for shard in np.unique(places // layout.shard).tolist()}
        with self._lock:
            files -= self._open.keys()
        for file in sorted(files):
            self._threads.submit(self._have, file)

    def read(
        self,
        name: str,
        layout: ArrayLayout,
        places: Int64[np.ndarray, " place"],
        *,
        out: Shaped[np.ndarray, "place *rest"] | None = None,
    ) -> Shaped[np.ndarray, "place *rest"]:
        """See `ShardFiles`."""
        if len(places) and places.min() // layout.shard != places.max() // layout.shard:
            self.soon(name, layout, places)
        return super().read(name, layout, places, out=out)

    def _have(self, file: str) -> None:
        # When the program ends, what is still queued is of no use to anybody.
        if not threading.main_thread().is_alive():
            return
        try:
            self._locate(file)
        except (ClvqError, OSError, ReferenceError):
            # Whoever reads the file meets the same error, and can tell of it.
            return
