"""Checking every byte of a cache against its manifest."""

import os
from dataclasses import dataclass
from pathlib import Path

from ..progress import SILENT, Progress
from .files import sha256_of
from .layout import MANIFEST, read_manifest


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
    bytes: int
    problems: list[Problem]


def verify(path: Path, *, progress: Progress = SILENT) -> Verification:
    """Compare every file of the cache with the manifest: missing, resized, changed and foreign ones are named.

    Raises
    ------
    CacheNotFound, CacheIncomplete, FormatVersion, CacheCorrupt
        Where there is no manifest to compare with.
    """
    manifest, cache_id = read_manifest(path)
    expected = dict(manifest.files)
    for shard in manifest.shards:
        expected.update(shard.files)
    problems, checked = [], 0
    progress.begin("verify", len(expected), "files")
    for name, entry in sorted(expected.items()):
        file = path / name
        if file.is_symlink():
            problems.append(Problem(name, "is a symbolic link"))
        elif not file.is_file():
            problems.append(Problem(name, "is missing"))
        elif (size := file.stat().st_size) != entry.bytes:
            problems.append(Problem(name, f"has {size:,} bytes instead of {entry.bytes:,}"))
        else:
            checked += size
            if sha256_of(file) != entry.sha256:
                problems.append(Problem(name, "has other bytes than were written (SHA-256 differs)"))
        progress.advance()
    for folder, folders, names in os.walk(path):
        here = Path(folder).relative_to(path)
        # What lies behind a link may be missing in a copy, though every byte is right today.
        linked = [(here / name).as_posix() for name in folders if (path / here / name).is_symlink()]
        problems += [Problem(relative, "is a symbolic link") for relative in linked]
        for name in names:
            relative = (here / name).as_posix()
            if relative != MANIFEST and relative not in expected:
                problems.append(Problem(relative, "does not belong to the cache"))
    return Verification(cache_id=cache_id, files=len(expected), bytes=checked, problems=problems)
