"""Checking every byte of a cache against its manifest."""

import hashlib
import os
from collections.abc import Callable, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ..progress import SILENT, Progress
from .encoding import array_layouts, metadata
from .files import sha256_of
from .layout import MANIFEST, SALT, SELECTION, UNFINISHED, FileEntry, Manifest, read_manifest
from .selection import expected_files, read_selection

# More would wait for the disk.
_THREADS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class Problem:
    """One file that is not as the manifest says."""

    file: str
    found: str


@dataclass(frozen=True)
class Verification:
    """What `verify` saw."""

    cache_id: str
    files: int
    """Files that were checked."""
    bytes: int
    """Bytes that were read and hashed."""
    absent: int
    """Files that a partial copy was not asked to hold."""
    problems: list[Problem]


@dataclass(frozen=True)
class _Owner:
    """Whose bytes a file may hold: names by SHA-256, and all sizes."""

    names: Mapping[str, str]
    sizes: Set[int]


def verify(path: Path, *, progress: Progress = SILENT) -> Verification:
    """Compare every file of the cache with the manifest, on several threads.

    Missing, cut, changed, swapped and foreign files are named, and links. Of a partial copy, what it was asked to hold
    is checked.

    Raises
    ------
    CacheNotFound, CacheIncomplete, FormatVersion, CacheCorrupt
        Where there is no whole manifest to compare with.
    Interrupted
        Where a stop was asked for.
    """
    manifest, cache_id = read_manifest(path)
    selection = read_selection(path, cache_id)
    expected, absent = expected_files(manifest, selection)
    named = manifest.entries
    owner = _Owner(
        names={entry.sha256: name for name, entry in named.items()}, sizes={entry.bytes for entry in named.values()}
    )
    problems: list[Problem] = []
    checked = 0
    progress.begin("verify", sum(entry.bytes for entry in expected.values()), "bytes")
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="clvq-verify") as threads:
        looked = {name: threads.submit(_look, path / name, entry, owner) for name, entry in sorted(expected.items())}
        try:
            for name, result in looked.items():
                found, size = result.result()
                if found:
                    problems.append(Problem(name, found))
                checked += size
                progress.advance(expected[name].bytes)
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise
    problems += _metadata_problems(manifest)
    problems += _foreign(path, lambda name: name in named)
    return Verification(
        cache_id=cache_id, files=len(expected), bytes=checked, absent=len(absent), problems=sorted(problems, key=_order)
    )


def _order(problem: Problem) -> tuple[str, str]:
    return problem.file, problem.found


def _look(file: Path, entry: FileEntry, owner: _Owner) -> tuple[str, int]:
    """What is wrong with a file, nothing where it is whole; and the bytes hashed."""
    if file.is_symlink():
        return "is a symbolic link", 0
    if not file.is_file():
        return "is missing", 0
    try:
        size = file.stat().st_size
        # A size that no file has tells enough, and a stranger's file may be of any.
        if size not in owner.sizes:
            return f"has {size:,} bytes instead of {entry.bytes:,}", 0
        digest = sha256_of(file)
    except OSError as error:
        return f"cannot be read ({error.strerror})", 0
    if digest == entry.sha256:
        return "", size
    if digest in owner.names:
        return f"holds the bytes of {owner.names[digest]}", size
    if size != entry.bytes:
        return f"has {size:,} bytes instead of {entry.bytes:,}", size
    return "has other bytes than were written (SHA-256 differs)", size


def _metadata_problems(manifest: Manifest) -> list[Problem]:
    """Metadata that a manifest vouches for, but that says another thing than the manifest does.

    Our own reader does not look at `zarr.json`; other libraries follow it, to whatever codec it names.
    """
    layouts = array_layouts(manifest.geometry, manifest.sites, classes=manifest.classes, columns=manifest.columns)
    return [
        Problem(name, "describes another array than the manifest does")
        for name, data in metadata(layouts).items()
        if manifest.files[name].sha256 != hashlib.sha256(data).hexdigest()
    ]


def _foreign(path: Path, belongs: Callable[[str], bool]) -> list[Problem]:
    problems = []
    for folder, folders, names in os.walk(path):
        here = Path(folder).relative_to(path)
        # What lies behind a link may be missing in a copy, though every byte is right today.
        linked = [(here / name).as_posix() for name in folders if (path / here / name).is_symlink()]
        problems += [Problem(relative, "is a symbolic link") for relative in linked]
        for name in names:
            relative = (here / name).as_posix()
            # The last is left where a kill came between the manifest and its removal.
            if relative in (MANIFEST, SELECTION, SALT, UNFINISHED):
                if (path / relative).is_symlink():
                    problems.append(Problem(relative, "is a symbolic link"))
            elif not belongs(relative):
                problems.append(Problem(relative, "does not belong to the cache"))
    return problems
