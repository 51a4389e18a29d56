"""Writing the shards of an extraction that was begun: by one process, or by many at once.

A shard's files are written to `staging/`, fsynced and renamed into place; then its record is created exclusively. A
shard without a record does not exist. Whoever places a shard's files holds a lock for that moment, so that of two that
made the same shard one places it and the other finds it there.
"""

import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from types import TracebackType

import numpy as np
from jaxtyping import Float32, Int64, Shaped

from ..errors import CacheCorrupt, DataError, FolderInUse, ResumeMismatch
from .encoding import array_layouts, write_shard
from .extraction import Extraction, Shard
from .files import disk_full_names, fsync_folder
from .layout import (
    CONVERGENCE,
    LOGITS,
    MANIFEST,
    STAGING,
    UNFINISHED,
    FileEntry,
    ShardRecord,
    array_file,
    differences,
    read_manifest,
    record_file,
    sealed_json,
    to_json,
)
from .shard_file import HashingSink, SiteFile, read_record, write_durably
from .shards import ShardFiles

# More would wait for each other's memory: every step of a chunk streams through it.
_THREADS = min(4, os.cpu_count() or 1)
# Placing takes milliseconds; one that holds its lock longer was stopped in the middle.
_PATIENCE_SECONDS = 60.0


class ShardWriter:
    """Writes shards into the folder of an extraction that `CacheWriter` has begun, in any order.

    Parameters
    ----------
    path
        The cache's folder.
    extraction
        What was begun there.
    """

    def __init__(self, path: Path, extraction: Extraction) -> None:
        self.path = path
        self.extraction = extraction
        self.layouts = array_layouts(
            extraction.geometry, extraction.sites, classes=extraction.classes, columns=extraction.columns
        )
        self.done: set[int] = set()
        """Shards known to stand in the folder."""
        self._scales: dict[str, Float32[np.ndarray, " d"]] = {}
        # Nobody else's: two writers may be at work on the same shard.
        self._staging = path / STAGING / secrets.token_hex(8)
        self._stack = ExitStack()
        self._threads = self._stack.enter_context(ThreadPoolExecutor(_THREADS, thread_name_prefix="clvq-encode"))

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def fix_scales(self, compute: Callable[[], Mapping[str, Float32[np.ndarray, " _d"]]]) -> None:
        """Fix the channel scales of all int8 sites, before the first shard; does nothing where there are none.

        Whoever is first writes them, once, and everyone reads what is there: shards made by several workers, or by a
        later run on another machine, agree.

        Parameters
        ----------
        compute
            Gives site → scales; called only where they are not fixed yet.

        Raises
        ------
        CacheCorrupt
            Where a file of scales is damaged.
        """
        sites = [name for name, site in self.extraction.sites.items() if site.encoding == "int8"]
        if any(not self._scale_file(site).is_file() for site in sites):
            scales = compute()
            with disk_full_names(self.path), self._own_staging():
                for site in sites:
                    aside = self._staging / site
                    layout = self.layouts[f"channel_scale/{site}"]
                    write_durably(aside, partial(write_shard, values=scales[site], layout=layout))
                    with suppress(FileExistsError):
                        os.link(aside, self._scale_file(site))
                    fsync_folder(self._scale_file(site).parent)
        for site in sites:
            name = f"channel_scale/{site}"
            width = np.arange(self.layouts[name].shape[0])
            self._scales[site] = self._read(name, width)

    def _read(self, array: str, places: Int64[np.ndarray, " place"]) -> Shaped[np.ndarray, "place *rest"]:
        return ShardFiles(lambda name: self.path / name).read(array, self.layouts[array], places)

    def _scale_file(self, site: str) -> Path:
        return self.path / array_file(f"channel_scale/{site}", 0, 1)

    def commit(self, shard: Shard) -> int:
        """Write one shard and its record. Safe to repeat, also by several at once.

        Returns
        -------
        int
            Bytes of its files.

        Raises
        ------
        DataError
            Where the encoding cannot hold a value, or the shard does not fit the extraction.
        DiskFull
            Where there is no room; shards committed before are kept.
        ResumeMismatch
            Where the shard was committed before with other bytes, or the folder holds another extraction by now; what
            stands there is kept.
        FolderInUse
            Where another process stopped while it was placing the same shard.
        """
        with self.encoded(shard) as record, self._placing(shard.number):
            if not self._is_recorded(record):
                self.place(record.files)
                self._create_record(record)
        self.done.add(shard.number)
        return sum(entry.bytes for entry in record.files.values())

    @contextmanager
    def _placing(self, number: int) -> Iterator[None]:
        """Keep others from placing the same shard."""
        # POSIX only; imported here so that caches can be read elsewhere too.
        import fcntl

        # Locks a folder that stays, not a file of its own: one that is deleted and made again would be two locks.
        folder = self.path / array_file(f"sites/{next(iter(self.extraction.sites))}", number, 2)
        try:
            descriptor = os.open(folder.parent, os.O_RDONLY)
        except FileNotFoundError as error:
            raise ResumeMismatch(f"{self.path} no longer holds this extraction: it was deleted meanwhile") from error
        try:
            deadline = time.monotonic() + _PATIENCE_SECONDS
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError as error:
                    if time.monotonic() > deadline:
                        raise FolderInUse(
                            f"shard {number} of {self.path} is being placed by another process, which does not go on: "
                            "end that process, and run the same command again"
                        ) from error
                    time.sleep(0.02)
            self._require_same()
            yield
        finally:
            os.close(descriptor)

    def _require_same(self) -> None:
        """Make sure that the folder still holds this extraction: `--force` may have begun another one there."""
        wanted, note = self.extraction.to_plain(), self.path / UNFINISHED
        with suppress(FileNotFoundError):
            if note.read_bytes() == to_json(wanted):
                return
        with suppress(FileNotFoundError, CacheCorrupt):
            if (self.path / MANIFEST).is_file() and not differences(
                Extraction.of(read_manifest(self.path)[0]).to_plain(), wanted
            ):
                return
        raise ResumeMismatch(f"{self.path} no longer holds this extraction: another one was begun there")

    @contextmanager
    def encoded(self, shard: Shard) -> Iterator[ShardRecord]:
        """The record of a shard whose files lie in `staging/` while the block lasts; raises what `commit` raises."""
        self._check_fits(shard)
        entries: dict[str, FileEntry] = {}
        statistics, losses = {}, {}
        parts = {f"rows/{column}": places for column, places in shard.rows.items()} | _of_texts(shard)

        def put(name: str, write: Callable[[HashingSink], object]) -> None:
            file = array_file(name, shard.number, len(self.layouts[name].shape))
            entries[file] = write_durably(self._staged(file), write)

        with disk_full_names(self.path, missing=self._bytes_left), self._own_staging():
            for site, values in shard.sites.items():
                chunks = SiteFile(values, site, self.extraction.sites[site], self._scales.get(site))
                put(f"sites/{site}", partial(chunks.write, layout=self.layouts[f"sites/{site}"], threads=self._threads))
                if chunks.row_scales is not None:
                    parts[f"scales/{site}"] = chunks.row_scales
                statistics[site], losses[site] = chunks.measured()
            for name, part in parts.items():
                put(name, partial(write_shard, values=part, layout=self.layouts[name]))
            yield ShardRecord(
                shard=shard.number,
                rows=len(shard.rows["text"]),
                texts=shard.texts,
                files=entries,
                statistics=statistics,
                losses=losses,
            )

    def place(self, files: Iterable[str]) -> None:
        """Move files of a shard from `staging/` to where they belong."""
        for file in files:
            os.replace(self._staged(file), self.path / file)
            fsync_folder((self.path / file).parent)

    def _staged(self, file: str) -> Path:
        return self._staging / file.replace("/", "+")

    def _bytes_left(self) -> int:
        """What the shards that are not written yet take at most."""
        shard = sum(layout.file_bytes_at_most for layout in self.layouts.values())
        return shard * (self.extraction.geometry.shards - len(self.done))

    def _check_fits(self, shard: Shard) -> None:
        geometry, rows = self.extraction.geometry, len(shard.rows["text"])
        given: dict[str, Shaped[np.ndarray, "place ..."]] = {f"sites/{site}": v for site, v in shard.sites.items()}
        given |= {f"rows/{column}": places for column, places in shard.rows.items()} | _of_texts(shard)
        wanted_names = {name for name in self.layouts if not name.startswith(("scales/", "channel_scale/"))}
        if not 0 <= shard.number < geometry.shards or given.keys() != wanted_names:
            wrong = ", ".join(sorted(given.keys() ^ wanted_names)) or "its number"
            raise DataError(f"shard {shard.number} is not of this extraction ({geometry.shards} shards): see {wrong}")
        for name, part in given.items():
            layout, places = self.layouts[name], shard.texts if name.startswith("texts/") else rows
            dtype = "float32" if name.startswith("sites/") else layout.dtype
            found, wanted = (part.dtype.name, *part.shape), (dtype, places, *layout.shape[1:])
            if found != wanted or places > layout.shard:
                raise DataError(
                    f"{name} of shard {shard.number} is {found}: {wanted} belongs there, "
                    f"and at most {layout.shard} places"
                )

    def _is_recorded(self, record: ShardRecord) -> bool:
        """Whether the same shard was committed before; its files then stay as they are."""
        file = self.path / record_file(record.shard)
        if not file.is_file():
            return False
        if file.read_bytes() != sealed_json(record):
            raise ResumeMismatch(
                f"shard {record.shard} of {self.path} was already written with other bytes: "
                "run `clvq cache verify`, and extract into another --out"
            )
        return True

    def _create_record(self, record: ShardRecord) -> None:
        aside, target = self._staging / "record", self.path / record_file(record.shard)
        data = sealed_json(record)
        write_durably(aside, lambda sink: sink.write(data))
        # Linking fails where the record exists: whoever was first has said what the shard is.
        try:
            os.link(aside, target)
        except FileExistsError:
            self._is_recorded(record)
        fsync_folder(target.parent)

    def written(self, number: int) -> int | None:
        """Bytes of a shard's files; `None` where it has no record, or lost one of the files that this names."""
        try:
            files = read_record(self.path, number).files
        except (FileNotFoundError, CacheCorrupt):
            return None
        if not all(_has_size(self.path / name, entry.bytes) for name, entry in files.items()):
            return None
        return sum(entry.bytes for entry in files.values())

    @contextmanager
    def _own_staging(self) -> Iterator[None]:
        """Leave nothing behind, whatever happens: a full disk must not stay full of half a shard."""
        self._staging.mkdir(parents=True, exist_ok=True)
        try:
            yield
        finally:
            shutil.rmtree(self._staging, ignore_errors=True)


def _of_texts(shard: Shard) -> dict[str, Shaped[np.ndarray, "_text ..."]]:
    """The arrays of a shard that have one entry per text."""
    parts = {LOGITS: shard.logits, CONVERGENCE: shard.convergence}
    return {name: part for name, part in parts.items() if part is not None}


def _has_size(file: Path, size: int) -> bool:
    return file.is_file() and file.stat().st_size == size
