"""Files that are whole or absent: durable writes, hashes, one writer per folder, room on the disk."""

import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import ConfigError, DiskFull, FolderInUse

_HASH_BLOCK = 1 << 20


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, data: bytes | Iterable[bytes | memoryview]) -> None:
    """Write `data` aside, fsync, rename over `path`, fsync the folder: a reader sees the old file or the new one.

    Data may come in parts, of which only one is held at a time.

    Raises
    ------
    DiskFull
        Where the disk has no room; `path` is as it was.
    """
    # Not named by the process alone: several machines may write the same file at once.
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.aside")
    with disk_full_names(path):
        try:
            with open(aside, "wb") as file:
                file.writelines([data] if isinstance(data, bytes) else data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
            fsync_folder(path.parent)
        except BaseException:
            with suppress(OSError):
                aside.unlink(missing_ok=True)
            raise


def make_folder(folder: Path) -> None:
    """Create `folder` and its parents, each name made durable.

    Raises
    ------
    ConfigError
        Where a file stands in the way.
    """
    missing = []
    while not folder.is_dir():
        # Asked again: another thread may have made it just now.
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"{folder} is a file, and a folder is needed there: give another --out")
        missing.append(folder)
        folder = folder.parent
    for new in reversed(missing):
        new.mkdir(exist_ok=True)
        fsync_folder(new.parent)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


class Hold:
    """A folder held against other writers, alone or together with others; released even by `kill -9`."""

    def __init__(self, folder: Path, *, shared: bool) -> None:
        # The folder itself is locked: a lock file would be one more file in what people share.
        self._descriptor = os.open(folder, os.O_RDONLY)
        if not self._lock(shared=shared):
            self.release()
            raise FolderInUse(
                f"{folder} is being written by another process; wait until it ends, or give another --out"
            )

    def _lock(self, *, shared: bool) -> bool:
        # POSIX only; imported here so that caches can be read elsewhere too.
        import fcntl

        try:
            fcntl.flock(self._descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def become_only(self) -> bool:
        """Hold the folder alone from now on; where others still hold it, not at all.

        Of several that ask one after the other, the last one gets it.
        """
        return self._lock(shared=False)

    def release(self) -> None:
        """Let go."""
        os.close(self._descriptor)


@contextmanager
def only_writer(folder: Path, *, shared: bool = False) -> Iterator[Hold]:
    """Hold `folder` (created where missing) against other writers of this machine.

    Parameters
    ----------
    shared
        Together with others that hold it so.

    Raises
    ------
    FolderInUse
        Where another process holds it.
    """
    with disk_full_names(folder):
        make_folder(folder)
    hold = Hold(folder, shared=shared)
    try:
        yield hold
    finally:
        hold.release()


def free_bytes(path: Path) -> int:
    """Bytes free on the disk that holds `path`, or will hold it once it is created."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


@contextmanager
def disk_full_names(path: Path, *, missing: Callable[[], int] | None = None) -> Iterator[None]:
    """Turn the system's 'no space left' into `DiskFull`, with the path and what to do.

    `missing` says how many bytes are still to be written, at most, where that is known.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            more = f" and up to {missing():,} more are to be written" if missing else ""
            raise DiskFull(
                f"no room left on the disk while writing {path}: {free_bytes(path.parent):,} bytes are free{more}; "
                "everything finished before is kept; free some room and run the same command again"
            ) from error
        raise
