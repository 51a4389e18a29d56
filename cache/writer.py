"""Writing a cache, shard by shard, so that at every moment what is named is whole.

A shard's files are written to `staging/`, fsynced and renamed into place; then its record is created exclusively. A
shard without a record does not exist. The manifest is written when all shards have their records.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float32, Shaped
from pydantic import JsonValue, ValidationError

from ..errors import ConfigError, DataError, ResumeMismatch
from .card import card
from .encoding import LOGITS, array_layouts, from_bits, group_metadata, to_bits, write_shard
from .files import disk_full_names, fsync_folder, make_folder, only_writer, sha256_of, write_file
from .layout import (
    ARRAYS,
    CARD,
    FORMAT,
    MANIFEST,
    RECORDS,
    STAGING,
    TEXTS,
    UNFINISHED,
    VERSION,
    FileEntry,
    Geometry,
    Manifest,
    ShardEntry,
    ShardRecord,
    SiteEntry,
    SiteLayout,
    SplitEntry,
    array_file,
    differences,
    read_manifest,
    record_file,
    to_json,
)
from .reader import Cache
from .statistics import SiteStatistics

_OWN_NAMES = {MANIFEST, CARD, TEXTS, RECORDS, ARRAYS, UNFINISHED, STAGING}


@dataclass(frozen=True)
class Shard:
    """The contents of one shard: its rows in use, from the first place on, and its texts in use."""

    number: int
    sites: Mapping[str, Float32[np.ndarray, "row d"]]
    rows: Mapping[str, Shaped[np.ndarray, " row"]]
    texts: int
    logits: Float32[np.ndarray, "text class"] | None = None


@dataclass(frozen=True)
class Extraction:
    """What is to be written: everything that must be equal for work to go on in the same folder."""

    # JSON; pydantic's recursive type for it cannot be checked at run time from another module.
    identity: dict[str, Any]
    geometry: Geometry
    sites: dict[str, SiteLayout]
    classes: int | None

    def to_plain(self) -> dict[str, JsonValue]:
        """As it stands in `unfinished.json`."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "identity": self.identity,
            "geometry": self.geometry.model_dump(mode="json"),
            "sites": {name: site.model_dump(mode="json") for name, site in self.sites.items()},
            "classes": self.classes,
        }


class CacheWriter:
    """Writes the shards of one extraction, in any order, and finishes the cache.

    Parameters
    ----------
    path
        The cache's folder; created where missing, continued where it holds the same extraction.
    extraction
        What is to be written.
    force
        Delete a cache or extraction with other settings that stands there.

    Raises
    ------
    ResumeMismatch
        Where the folder holds an extraction with other settings; the message names each difference.
    ConfigError
        Where the folder holds something that is not a cache.
    FolderInUse
        Where another process is writing there.
    """

    def __init__(self, path: Path, extraction: Extraction, *, force: bool = False) -> None:
        self.path = path
        self.extraction = extraction
        self.layouts = array_layouts(extraction.geometry, extraction.sites, classes=extraction.classes)
        self._stack = ExitStack()
        self._stack.enter_context(only_writer(path))
        try:
            with disk_full_names(path):
                self._take_over(force=force)
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> "CacheWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.path / STAGING, ignore_errors=True)
        self._stack.close()

    def _take_over(self, *, force: bool) -> None:
        plain = self.extraction.to_plain()
        found = self._found()
        if found is not None:
            lines = differences(found, plain)
            if lines and not force:
                raise ResumeMismatch(
                    f"{self.path} holds an extraction with other settings ({'; '.join(lines[:8])}"
                    f"{'; …' if len(lines) > 8 else ''}): give another --out, or --force to delete it"
                )
            if lines:
                self._delete(found)
        self.finished = (self.path / MANIFEST).is_file()
        shutil.rmtree(self.path / STAGING, ignore_errors=True)
        for left_by_a_kill in self.path.rglob(".*.aside"):
            left_by_a_kill.unlink()
        self.done: set[int] = set()
        if self.finished:
            # Killed between the manifest and this, the file that says 'unfinished' is still there.
            (self.path / UNFINISHED).unlink(missing_ok=True)
            return
        if not (self.path / UNFINISHED).is_file():
            write_file(self.path / UNFINISHED, to_json(plain))
        self._write_metadata()
        self.done = {number for number in range(self.extraction.geometry.shards) if self._is_whole(number)}

    def _found(self) -> dict[str, JsonValue] | None:
        """What the folder holds, in the terms of `Extraction.to_plain`; `None` where it is empty."""
        names = {entry.name for entry in self.path.iterdir()}
        if not names:
            return None
        if MANIFEST in names:
            manifest, _ = read_manifest(self.path)
            sites = {name: SiteLayout(width=s.width, encoding=s.encoding) for name, s in manifest.sites.items()}
            return Extraction(manifest.identity, manifest.geometry, sites, manifest.classes).to_plain()
        if UNFINISHED in names:
            with suppress(ValueError, RecursionError):
                found: JsonValue = json.loads((self.path / UNFINISHED).read_bytes())
                if isinstance(found, dict) and found.keys() == self.extraction.to_plain().keys():
                    return found
            raise ConfigError(
                f"{self.path / UNFINISHED} cannot be read: another version of clvq may have begun this extraction; "
                "delete the folder, or give another --out"
            )
        # A kill before the first rename leaves nothing but a file written aside.
        if all(name.startswith(f".{UNFINISHED}.") for name in names):
            for name in names:
                (self.path / name).unlink()
            return None
        raise ConfigError(
            f"{self.path} is not empty and is not a clvq cache (it holds {sorted(names)[0]!r}): give another --out"
        )

    def _delete(self, found: dict[str, JsonValue]) -> None:
        # Killed half-way, the folder says that it is unfinished, never that it is whole or not a cache.
        write_file(self.path / UNFINISHED, to_json(found))
        for name in [MANIFEST, *sorted(_OWN_NAMES - {MANIFEST, UNFINISHED}), UNFINISHED]:
            target = self.path / name
            if target.is_dir() and not target.is_symlink():
                shutil.rmtree(target)
            else:
                target.unlink(missing_ok=True)

    def _metadata_files(self) -> Iterator[tuple[str, bytes]]:
        groups = {"", "sites", "rows"} | ({"texts"} if LOGITS in self.layouts else set())
        for group in sorted(groups):
            yield f"{ARRAYS}/{group}/zarr.json".replace("//", "/"), to_json(group_metadata())
        for name, layout in self.layouts.items():
            yield f"{ARRAYS}/{name}/zarr.json", to_json(layout.metadata())

    def _write_metadata(self) -> None:
        make_folder(self.path / RECORDS)
        make_folder(self.path / STAGING)
        for name, layout in self.layouts.items():
            make_folder(self.path / ARRAYS / name / "c")
            for shard in range(self.extraction.geometry.shards) if len(layout.shape) > 1 else ():
                (self.path / array_file(name, shard, len(layout.shape))).parent.mkdir(exist_ok=True)
            fsync_folder(self.path / ARRAYS / name / "c")
        for name, data in self._metadata_files():
            file = self.path / name
            if not file.is_file() or file.read_bytes() != data:
                write_file(file, data)

    def _is_whole(self, number: int) -> bool:
        """Whether the shard has a record and the files it names; one that lost either is made again."""
        file = self.path / record_file(number)
        if not file.is_file():
            return False
        try:
            files = ShardRecord.model_validate_json(file.read_bytes()).files
        except ValidationError:
            files = None
        if files is not None and all(_has_size(self.path / name, entry.bytes) for name, entry in files.items()):
            return True
        file.unlink()
        return False

    def commit(self, shard: Shard) -> None:
        """Write one shard and its record. Safe to repeat.

        Raises
        ------
        DataError
            Where the encoding cannot hold a value, or the shard does not fit the extraction.
        DiskFull
            Where there is no room; shards committed before are kept.
        ResumeMismatch
            Where the shard was committed before with other bytes; what stands there is kept.
        """
        stored: dict[str, Shaped[np.ndarray, "place ..."]] = {}
        statistics = {}
        for site, values in shard.sites.items():
            encoding = self.extraction.sites[site].encoding
            bits = to_bits(values, encoding, site=site)
            stored[f"sites/{site}"] = bits
            statistics[site] = SiteStatistics.of(from_bits(bits, encoding))
        for column, places in shard.rows.items():
            stored[f"rows/{column}"] = places
        if shard.logits is not None:
            stored[LOGITS] = shard.logits
        self._check_fits(shard, stored)
        aside = self.path / STAGING
        entries = {}
        with disk_full_names(self.path), _emptied(aside):
            for name, part in stored.items():
                layout = self.layouts[name]
                file = array_file(name, shard.number, len(layout.shape))
                entries[file] = _write_durably(
                    aside / file.replace("/", "+"),
                    partial(write_shard, values=part, layout=layout),
                )
            record = ShardRecord(
                shard=shard.number,
                rows=len(shard.rows["text"]),
                texts=shard.texts,
                files=entries,
                statistics=statistics,
            )
            if not self._is_recorded(record):
                for file in entries:
                    os.replace(aside / file.replace("/", "+"), self.path / file)
                    fsync_folder((self.path / file).parent)
                self._create_record(aside, record)
        self.done.add(shard.number)

    def _check_fits(self, shard: Shard, stored: Mapping[str, Shaped[np.ndarray, "place ..."]]) -> None:
        geometry = self.extraction.geometry
        if not 0 <= shard.number < geometry.shards or stored.keys() != self.layouts.keys():
            wrong = ", ".join(sorted(stored.keys() ^ self.layouts.keys())) or "its number"
            raise DataError(f"shard {shard.number} is not of this extraction ({geometry.shards} shards): see {wrong}")
        rows = len(shard.rows["text"])
        for name, part in stored.items():
            layout, places = self.layouts[name], shard.texts if name == LOGITS else rows
            found, wanted = (part.dtype.name, *part.shape), (layout.dtype, places, *layout.shape[1:])
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
        if file.read_bytes() != to_json(record):
            raise ResumeMismatch(
                f"shard {record.shard} of {self.path} was already written with other bytes: "
                "run `clvq cache verify`, and extract into another --out"
            )
        return True

    def _create_record(self, aside: Path, record: ShardRecord) -> None:
        data, target = to_json(record), self.path / record_file(record.shard)
        _write_durably(aside / "record", lambda sink: sink.write(data))
        # Linking fails where the record exists: whoever was first has said what the shard is.
        try:
            os.link(aside / "record", target)
        except FileExistsError:
            self._is_recorded(record)
        fsync_folder(target.parent)

    def finish(
        self,
        texts: pa.Table,
        *,
        class_names: list[str] | None,
        counts: dict[str, int],
    ) -> Manifest:
        """Write `texts.parquet`, the card and, last, the manifest.

        Parameters
        ----------
        texts
            One row per text, sorted by `text_id`, without `prediction`.
        class_names
            Names of the labels.
        counts
            What happened to the texts.
        """
        geometry = self.extraction.geometry
        records = [
            ShardRecord.model_validate_json((self.path / record_file(number)).read_bytes())
            for number in range(geometry.shards)
        ]
        files: dict[str, FileEntry] = {}

        def put(name: str, data: bytes) -> None:
            write_file(self.path / name, data)
            files[name] = FileEntry(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())

        for name, data in self._metadata_files():
            files[name] = FileEntry(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        for number in range(geometry.shards):
            file = self.path / record_file(number)
            files[record_file(number)] = FileEntry(bytes=file.stat().st_size, sha256=sha256_of(file))
        put(TEXTS, _parquet(self._with_predictions(texts)))
        manifest = Manifest(
            format="clvq-cache",
            version=1,
            identity=self.extraction.identity,
            geometry=geometry,
            sites={
                name: SiteEntry(
                    width=site.width,
                    encoding=site.encoding,
                    statistics=SiteStatistics.merged((r.statistics[name] for r in records), width=site.width),
                )
                for name, site in self.extraction.sites.items()
            },
            splits=_splits(texts),
            class_names=class_names,
            classes=self.extraction.classes,
            counts=counts,
            files={},
            shards=[ShardEntry(rows=r.rows, texts=r.texts, files=r.files) for r in records],
        )
        put(CARD, card(manifest))
        manifest = manifest.model_copy(update={"files": files})
        shutil.rmtree(self.path / STAGING, ignore_errors=True)
        write_file(self.path / MANIFEST, to_json(manifest))
        (self.path / UNFINISHED).unlink(missing_ok=True)
        with disk_full_names(self.path):
            fsync_folder(self.path)
        self.finished = True
        return manifest

    def _with_predictions(self, texts: pa.Table) -> pa.Table:
        where = texts.schema.get_field_index("label") + 1
        if LOGITS not in self.layouts:
            return texts.add_column(where, "prediction", pa.nulls(len(texts), pa.int32()))
        logits = Cache.read_array(self.path, LOGITS, self.layouts[LOGITS], np.asarray(texts["text_id"]))
        known = np.isfinite(logits).all(axis=1)
        predicted = np.where(known, np.nan_to_num(logits).argmax(axis=1), -1)
        return texts.add_column(where, "prediction", pa.array(predicted, pa.int32(), mask=~known))


def _has_size(file: Path, size: int) -> bool:
    return file.is_file() and file.stat().st_size == size


@contextmanager
def _emptied(folder: Path) -> Iterator[None]:
    """Leave nothing in `folder` behind, whatever happens: a full disk must not stay full of half a shard."""
    folder.mkdir(exist_ok=True)
    try:
        yield
    finally:
        for file in folder.iterdir():
            file.unlink()


class _HashingSink:
    def __init__(self, file: Any) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._bytes = 0

    def write(self, data: bytes, /) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._bytes += len(data)

    def entry(self) -> FileEntry:
        return FileEntry(bytes=self._bytes, sha256=self._digest.hexdigest())


def _write_durably(path: Path, write: Callable[[_HashingSink], object]) -> FileEntry:
    with open(path, "wb") as file:
        sink = _HashingSink(file)
        write(sink)
        file.flush()
        os.fsync(file.fileno())
    return sink.entry()


def _parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", store_schema=False)
    return bytes(sink.getvalue())


def _splits(texts: pa.Table) -> dict[str, SplitEntry]:
    splits = np.asarray(texts["split"].to_pylist(), dtype=object)
    counts = np.asarray(texts["row_count"])
    return {
        name: SplitEntry(texts=int((splits == name).sum()), rows=int(counts[splits == name].sum()))
        for name in sorted(set(splits))
    }
