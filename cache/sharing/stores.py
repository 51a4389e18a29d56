"""Places to which caches are pushed and from which they are pulled: folders, S3-compatible storage, the Hub.

Credentials come from the environment alone. They are never part of a URL, a message or a file.
"""

import hashlib
import os
import re
import shutil
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable
from urllib.parse import unquote, urlsplit

from ...errors import CacheCorrupt, ConfigError
from ..files import disk_full_names, fsync_folder, make_folder, only_writer, write_file
from ..layout import ARRAYS, MANIFEST, UNFINISHED, FileEntry
from .transfer import Room, in_parallel

_BLOCK = 1 << 20
_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+)://")
_PLACES = "give a folder, s3://bucket/prefix or hf://user/name"


@dataclass(frozen=True)
class Upload:
    """A file that is to go into a store."""

    name: str
    """Its path inside the cache."""
    source: Path
    entry: FileEntry
    """What it was when it was written."""

    def require_size(self) -> None:
        """Make sure, without reading it, that the file can be the one that was written.

        Raises
        ------
        CacheCorrupt
        """
        found = self.source.lstat() if os.path.lexists(self.source) else None
        if found is None or not stat.S_ISREG(found.st_mode):
            raise CacheCorrupt(f"{self.source} {'is missing' if found is None else 'is no plain file'}: {_REPAIR}")
        if found.st_size != self.entry.bytes:
            raise CacheCorrupt(f"{self.source} has {found.st_size:,} bytes instead of {self.entry.bytes:,}: {_REPAIR}")

    def read(self) -> bytes:
        """The file's bytes, checked.

        Raises
        ------
        CacheCorrupt
            Where they are not those that were written.
        """
        self.require_size()
        data = self.source.read_bytes()
        self.require(hashlib.sha256(data).hexdigest())
        return data

    def require(self, sha256: str) -> None:
        """Raise `CacheCorrupt` where the file's SHA-256 is not the one that was recorded."""
        if sha256 != self.entry.sha256:
            raise CacheCorrupt(f"{self.source} has other bytes than were written (SHA-256 differs): {_REPAIR}")


_REPAIR = "run `clvq cache verify` and `clvq cache repair`, then push again; what was sent so far is kept"


@runtime_checkable
class Store(Protocol):
    """A place that holds one cache."""

    name: str
    """For messages."""

    def read(self, file: str, *, limit: int) -> bytes | None:
        """A small file; `None` where there is none. One of more than `limit` bytes is `CacheCorrupt`."""

    def fetch(self, file: str, target: Path, *, size: int) -> None:
        """Download a file of `size` bytes to `target`; one that is missing or of another size is `CacheCorrupt`."""

    def compare(self, uploads: Sequence[Upload], *, check: Callable[[], None]) -> dict[str, bool]:
        """Of these small files, those that stand there, and whether with exactly these bytes."""

    def writing(self, *, public: bool) -> AbstractContextManager[None]:
        """Make the place ready and make sure that several may write there without harm."""

    def create(self, file: str, data: bytes) -> bool:
        """Write a small file unless there is one; of several who try at once, one succeeds."""

    def put(
        self,
        units: Sequence[Sequence[Upload]],
        *,
        check: Callable[[], None],
        done: Callable[[Sequence[Upload]], None],
    ) -> None:
        """Write files; those of a unit in their order, so that the last of them stands for all."""

    def publish(self, manifest: bytes, *, tag: str) -> None:
        """Create the manifest unless there is one, then take the claim away and name the version `tag`."""

    def delete(self, file: str) -> None:
        """Take a file away, where there is one."""


def open_store(url: str) -> Store:
    """The store that a URL names: a folder, `s3://bucket/prefix` or `hf://user/name`, with `@revision` if wanted.

    Raises
    ------
    ConfigError
        Where the URL names none, or holds credentials.
    RemoteDenied, RemoteUnreachable, MissingExtra
    """
    scheme = _SCHEME.match(url)
    if scheme is None:
        return FolderStore(Path(url).expanduser())
    kind, rest = scheme[1].lower(), url[scheme.end() :]
    place = rest.split("/")[0]
    # In hf://user/name@revision the sign stands behind the first slash.
    if "@" in place:
        raise ConfigError(
            f"the {kind}:// URL names a user or password before '@': leave them out; credentials are taken from the "
            f"environment ({'HF_TOKEN' if kind == 'hf' else 'AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY'})"
        )
    if kind not in ("file", "s3", "hf"):
        raise ConfigError(f"{kind}:// is no place for a cache: {_PLACES}")
    if "?" in rest or "#" in rest:
        raise ConfigError(f"the {kind}:// URL has a part behind '?' or '#', where nothing is expected: {_PLACES}")
    if kind == "file":
        if place not in ("", "localhost"):
            raise ConfigError(f"{url} names the machine {place!r}; a file:// URL has three slashes: file:///folder")
        return FolderStore(Path(unquote(urlsplit(url).path)))
    parts = rest.rstrip("/").split("/")
    if not all(parts) or any(part in (".", "..") for part in parts):
        raise ConfigError(f"{url} has an empty part, '.' or '..': {_PLACES}")
    if kind == "s3":
        from .s3 import S3Store

        return S3Store(parts[0], "/".join(parts[1:]))
    from .hub import HubStore, repository_of

    return HubStore(*repository_of(rest.rstrip("/")))


class PlainStore(ABC):
    """What stores have in common that write file by file."""

    name: str

    def __init__(self, name: str) -> None:
        self.name = name
        self._room = Room()

    @abstractmethod
    def read(self, file: str, *, limit: int) -> bytes | None:
        """See `Store`."""

    @abstractmethod
    def create(self, file: str, data: bytes) -> bool:
        """See `Store`."""

    @abstractmethod
    def delete(self, file: str) -> None:
        """See `Store`."""

    @abstractmethod
    def write(self, file: str, data: bytes) -> None:
        """Write a file over the one that may be there."""

    def compare(self, uploads: Sequence[Upload], *, check: Callable[[], None]) -> dict[str, bool]:
        """See `Store`."""
        found: dict[str, bool] = {}

        def compare(upload: Upload, stopped: Callable[[], bool]) -> None:
            try:
                there = self.read(upload.name, limit=upload.entry.bytes)
            except CacheCorrupt:
                # Larger than ours.
                there = b""
            if there is not None:
                found[upload.name] = hashlib.sha256(there).hexdigest() == upload.entry.sha256

        in_parallel(compare, uploads, check=check, done=lambda upload: None)
        return found

    def put(
        self,
        units: Sequence[Sequence[Upload]],
        *,
        check: Callable[[], None],
        done: Callable[[Sequence[Upload]], None],
    ) -> None:
        """See `Store`."""

        def write(unit: Sequence[Upload], stopped: Callable[[], bool]) -> None:
            for upload in unit:
                if stopped():
                    return
                with self._room.of(upload.entry.bytes):
                    self.write(upload.name, upload.read())

        in_parallel(write, units, check=check, done=done)

    def publish(self, manifest: bytes, *, tag: str) -> None:
        """See `Store`."""
        self.create(MANIFEST, manifest)
        self.delete(UNFINISHED)


class FolderStore(PlainStore):
    """A folder, on this machine or mounted."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.path = path

    def read(self, file: str, *, limit: int) -> bytes | None:
        """See `Store`."""
        descriptor = self._open(file)
        if descriptor is None:
            return None
        with open(descriptor, "rb") as source:
            require_limit(f"{self.name}/{file}", os.fstat(descriptor).st_size, limit)
            return source.read(limit)

    def fetch(self, file: str, target: Path, *, size: int) -> None:
        """See `Store`."""
        descriptor = self._open(file)
        if descriptor is None:
            raise missing(self, file)
        with open(descriptor, "rb") as source:
            require_size(f"{self.name}/{file}", os.fstat(descriptor).st_size, size)
            with open(target, "wb") as sink:
                shutil.copyfileobj(source, sink, _BLOCK)

    def _open(self, file: str) -> int | None:
        """A descriptor of a plain file; `None` where there is none. A stranger's link or pipe is not followed."""
        try:
            descriptor = os.open(self.path / file, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise CacheCorrupt(f"{self.name}/{file} cannot be read ({error.strerror})") from error
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise CacheCorrupt(f"{self.name}/{file} is no plain file")
        return descriptor

    @contextmanager
    def writing(self, *, public: bool) -> Iterator[None]:
        """See `Store`."""
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"{self.name} is a file, and a folder is needed there: give another place to push to")
        names = {entry.name for entry in self.path.iterdir()} if self.path.is_dir() else set()
        if names and not names & {MANIFEST, UNFINISHED, ARRAYS} and not all(name.endswith(".aside") for name in names):
            raise ConfigError(
                f"{self.name} is not empty and holds no clvq cache (it holds {min(names)!r}): push to another folder"
            )
        with only_writer(self.path):
            for left_by_a_kill in self.path.rglob(".*.aside"):
                left_by_a_kill.unlink()
            yield

    def write(self, file: str, data: bytes) -> None:
        """See `PlainStore`."""
        target = self.path / file
        with disk_full_names(target):
            make_folder(target.parent)
        write_file(target, data)

    def create(self, file: str, data: bytes) -> bool:
        """See `Store`."""
        target = self.path / file
        # The folder is locked, so the name is ours.
        aside = target.with_name(f".{target.name}.new.aside")
        write_file(aside, data)
        try:
            os.link(aside, target)
        except FileExistsError:
            return False
        finally:
            aside.unlink()
        fsync_folder(target.parent)
        return True

    def delete(self, file: str) -> None:
        """See `Store`."""
        (self.path / file).unlink(missing_ok=True)
        fsync_folder(self.path)


def require_limit(what: str, found: int, limit: int) -> None:
    """Raise `CacheCorrupt` where a file is larger than any that belongs there."""
    if found > limit:
        raise CacheCorrupt(f"{what} has {found:,} bytes, more than the {limit:,} that it may have; nothing was read")


def require_size(what: str, found: int, wanted: int) -> None:
    """Raise `CacheCorrupt` where a file has another size than its manifest says."""
    if found != wanted:
        raise CacheCorrupt(f"{what} has {found:,} bytes instead of {wanted:,}: {_ASK}")


def missing(store: Store, file: str) -> CacheCorrupt:
    """The error for a file that a manifest lists and that is not there."""
    return CacheCorrupt(f"{store.name}/{file} is missing, though the manifest lists it: {_ASK}")


_ASK = "ask whoever shared it to push it again"
