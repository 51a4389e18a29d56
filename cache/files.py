"""Files that are whole or absent: durable writes, hashes, one writer per folder, room on the disk."""

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
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


def write_file(path: Path, data: bytes) -> None:
    """Write `data` aside, fsync, rename over `path`, fsync the folder: a reader sees the old file or the new one.

    Raises
    ------
    DiskFull
        Where the disk has no room; `path` is as it was.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.aside")
    with disk_full_names(path):
        try:
            with open(aside, "wb") as file:
                file.write(data)
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


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold `folder` (created where missing) against other writers of this machine; released even by `kill -9`.

    Raises
    ------
    FolderInUse
        Where another process holds it.
    """
    # POSIX only; imported here so that caches can be read elsewhere too.
    import fcntl

    with disk_full_names(folder):
        make_folder(folder)
    # The folder itself is locked: a lock file would be one more file in what people share.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FolderInUse(
                f"{folder} is being written by another process; wait until it ends, or give another --out"
            ) from error
        yield
    finally:
        os.close(descriptor)


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
