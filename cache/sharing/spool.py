"""Files of remote caches kept on this machine, up to a number of bytes; the least recently used ones go first.

Any number of threads and processes may share a spool. A file appears whole, by a rename. Whoever has just been given
one holds a shared lock on it, so that nobody takes it away before it is opened; a process that dies holds nothing.
"""

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from zlib import crc32

from ..files import disk_full_names, make_folder, sha256_of
from ..layout import FileEntry

SPOOL_BYTES = 20_000_000_000
# Files given out last, which stay. Threads that open them in the meantime are far fewer.
_HELD = 32
_LOCKS = 256
_PART = ".part"
# A part that nobody has written to for so long was left by a kill.
_STALE_SECONDS = 3600
# How full the spool may be after room was made, and how much may come before it is looked at again.
_FILL, _LOOK = 0.9, 1 / 16


def spool_folder() -> Path:
    """Where the spool is unless said otherwise: below `CLVQ_HOME`, `XDG_CACHE_HOME` or `~/.cache`."""
    home = os.environ.get("CLVQ_HOME")
    if home:
        return Path(home).expanduser() / "spool"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "clvq" / "spool"


class Spool:
    """A folder of files that can be fetched again.

    Parameters
    ----------
    root
        The folder; created where missing.
    limit
        Bytes that it may hold. Files in use stay, so that very small limits are exceeded.
    """

    def __init__(self, root: Path, *, limit: int = SPOOL_BYTES) -> None:
        self.root = root
        self.limit = limit
        self._locks = root / "locks"
        with disk_full_names(root):
            make_folder(self._locks)
        self._mutex = threading.Lock()
        self._held: OrderedDict[Path, _Held] = OrderedDict()
        self._checked: set[Path] = set()
        self._unseen = limit

    def close(self) -> None:
        """Let go of the files; they may be taken away then."""
        with self._mutex:
            self._held.clear()

    def have(self, name: str, entry: FileEntry, fetch: Callable[[Path], None]) -> Path:
        """A file of the spool, fetched where it is not there.

        Parameters
        ----------
        name
            Its path in the spool.
        entry
            What it has to be; checked when this process first sees it.
        fetch
            Writes it to the path given, and checks it.
        """
        file = self.root / name
        if self._hold(file, entry):
            return file
        with self._only_one(name):
            # Somebody else may have fetched it while we waited.
            while not self._hold(file, entry):
                self._make_room(entry.bytes)
                with disk_full_names(file):
                    make_folder(file.parent)
                    part = file.with_name(file.name + _PART)
                    fetch(part)
                    os.replace(part, file)
                with self._mutex:
                    self._checked.add(file)
        return file

    def _hold(self, file: Path, entry: FileEntry) -> bool:
        """Lock a file that is there, and note that it was used."""
        with self._mutex:
            held, checked = self._held.get(file), file in self._checked
        if held is None or not held.stands(file):
            held = _Held.of(file)
            if held is None:
                return False
        if not checked and (held.size != entry.bytes or sha256_of(file) != entry.sha256):
            file.unlink(missing_ok=True)
            return False
        with suppress(OSError):
            os.utime(file)
        with self._mutex:
            self._checked.add(file)
            self._held[file] = held
            self._held.move_to_end(file)
            while len(self._held) > _HELD:
                self._held.popitem(last=False)
        return True

    @contextmanager
    def _only_one(self, name: str) -> Iterator[None]:
        """Let one thread of one process at a time fetch a file; now and then another one waits along."""
        import fcntl

        descriptor = os.open(self._locks / f"{crc32(name.encode()) % _LOCKS:03d}", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _make_room(self, size: int) -> None:
        """Take away what was not used for longest, where the limit would be passed."""
        with self._mutex:
            self._unseen += size
            if self._unseen < self.limit * _LOOK:
                return
            self._unseen = size
            files = sorted(self._files())
            used = size + sum(length for _, length, _ in files)
            if used <= self.limit:
                return
            for _, length, file in files:
                if used <= self.limit * _FILL:
                    return
                if _taken_away(file):
                    used -= length
                    self._checked.discard(file)

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """Time of last use, bytes and path of every file that was fetched."""
        for folder, folders, names in os.walk(self.root):
            here = Path(folder)
            # Those lie in one folder for each cache. Beside them are the locks, and in them the manifests, which stay.
            if here == self.root:
                folders[:] = [name for name in folders if name != self._locks.name]
            if here == self.root or here.parent == self.root:
                continue
            for name in names:
                with suppress(FileNotFoundError):
                    found = (here / name).stat()
                    yield found.st_mtime, found.st_size, here / name


class _Held:
    """A shared lock on a file, from its making to its end."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        found = os.fstat(descriptor)
        self.size = found.st_size
        self._number = found.st_ino

    @classmethod
    def of(cls, file: Path) -> "_Held | None":
        """Lock a file; `None` where it is not there, or no longer."""
        import fcntl

        try:
            held = cls(os.open(file, os.O_RDONLY))
        except FileNotFoundError:
            return None
        fcntl.flock(held._descriptor, fcntl.LOCK_SH)
        return held if held.stands(file) else None

    def stands(self, file: Path) -> bool:
        """Whether the file that is locked is still the one of that name."""
        with suppress(FileNotFoundError):
            return file.stat().st_ino == self._number
        return False

    def __del__(self) -> None:
        os.close(self._descriptor)


def _taken_away(file: Path) -> bool:
    """Remove a file unless somebody holds it, or is writing it."""
    import fcntl

    try:
        descriptor = os.open(file, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        # Also what a client writes beside it, below a name that begins so.
        if _PART in str(file) and time.time() - os.fstat(descriptor).st_mtime < _STALE_SECONDS:
            return False
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.unlink(missing_ok=True)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
