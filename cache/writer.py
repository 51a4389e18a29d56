"""Writing a cache, shard by shard, so that at every moment what is named is whole.

A shard's files are written to `staging/`, fsynced and renamed into place; then its record is created exclusively. A
shard without a record does not exist. The manifest is written when all shards have their records.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Int64, Shaped
from pydantic import JsonValue

from ..errors import CacheCorrupt, CacheIncomplete, ConfigError, DataError, ResumeMismatch
from .card import card
from .encoding import (
    array_layouts,
    metadata,
    write_shard,
)
from .files import disk_full_names, fsync_folder, make_folder, only_writer, sha256_of, write_file
from .layout import (
    ARRAYS,
    CARD,
    FORMAT,
    LOGITS,
    MANIFEST,
    RECORDS,
    ROW_COLUMNS,
    SALT,
    SELECTION,
    STAGING,
    TEXTS,
    UNFINISHED,
    UNSEALED,
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
    common_files,
    differences,
    read_manifest,
    record_file,
    sealed_json,
    to_json,
)
from .shard_file import HashingSink, SiteFile, read_record, write_durably
from .shards import ShardFiles
from .statistics import EncodingLoss, SiteStatistics
from .texts_file import texts_parquet
from .unfinished import Transfer, unfinished

_OWN_NAMES = {MANIFEST, CARD, TEXTS, RECORDS, ARRAYS, UNFINISHED, STAGING, SELECTION, SALT}
# More would wait for each other's memory: every step of a chunk streams through it.
_THREADS = min(4, os.cpu_count() or 1)


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
    columns: tuple[str, ...] = tuple(ROW_COLUMNS)
    parent: str | None = None
    """Id of the cache that this one is made from, where it is not extracted."""

    @classmethod
    def of(cls, manifest: Manifest) -> "Extraction":
        """What a finished cache was made as."""
        sites = {name: SiteLayout(width=site.width, encoding=site.encoding) for name, site in manifest.sites.items()}
        return cls(
            manifest.identity, manifest.geometry, sites, manifest.classes, manifest.columns, parent=manifest.parent
        )

    def to_plain(self) -> dict[str, JsonValue]:
        """As it stands in `unfinished.json`."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "identity": self.identity,
            "geometry": self.geometry.model_dump(mode="json"),
            "sites": {name: site.model_dump(mode="json") for name, site in self.sites.items()},
            "classes": self.classes,
            "columns": list(self.columns),
            "parent": self.parent,
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
        self.layouts = array_layouts(
            extraction.geometry, extraction.sites, classes=extraction.classes, columns=extraction.columns
        )
        self._scales: dict[str, Float32[np.ndarray, " d"]] = {}
        self._stack = ExitStack()
        self._stack.enter_context(only_writer(path))
        try:
            with disk_full_names(path):
                self._take_over(force=force)
            self._threads = self._stack.enter_context(ThreadPoolExecutor(_THREADS, thread_name_prefix="clvq-encode"))
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
            return Extraction.of(read_manifest(self.path)[0]).to_plain()
        if UNFINISHED in names:
            note = (self.path / UNFINISHED).read_bytes()
            if Transfer.of(note):
                raise ResumeMismatch(f"{unfinished(self.path, note)}; or give another --out")
            with suppress(ValueError, RecursionError):
                found: JsonValue = json.loads(note)
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

    def _write_metadata(self) -> None:
        make_folder(self.path / RECORDS)
        make_folder(self.path / STAGING)
        for name, layout in self.layouts.items():
            make_folder(self.path / ARRAYS / name / "c")
            for shard in range(self.extraction.geometry.shards if len(layout.shape) > 1 else 0):
                (self.path / array_file(name, shard, len(layout.shape))).parent.mkdir(exist_ok=True)
            fsync_folder(self.path / ARRAYS / name / "c")
        for name, data in metadata(self.layouts).items():
            file = self.path / name
            if not file.is_file() or file.read_bytes() != data:
                write_file(file, data)

    def _is_whole(self, number: int) -> bool:
        """Whether the shard has a record and the files it names; one that lost either is made again."""
        file = self.path / record_file(number)
        if not file.is_file():
            return False
        files = None
        with suppress(CacheCorrupt):
            files = read_record(self.path, number).files
        if files is not None and all(_has_size(self.path / name, entry.bytes) for name, entry in files.items()):
            return True
        file.unlink()
        return False

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
            with disk_full_names(self.path), _emptied(self.path / STAGING):
                for site in sites:
                    aside = self.path / STAGING / site
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
        with self.encoded(shard) as record:
            if not self._is_recorded(record):
                self.place(record.files)
                self._create_record(record)
        self.done.add(shard.number)

    @contextmanager
    def encoded(self, shard: Shard) -> Iterator[ShardRecord]:
        """The record of a shard whose files lie in `staging/` while the block lasts; raises what `commit` raises."""
        self._check_fits(shard)
        entries: dict[str, FileEntry] = {}
        statistics, losses = {}, {}
        parts = {f"rows/{column}": places for column, places in shard.rows.items()}
        if shard.logits is not None:
            parts[LOGITS] = shard.logits

        def put(name: str, write: Callable[[HashingSink], object]) -> None:
            file = array_file(name, shard.number, len(self.layouts[name].shape))
            entries[file] = write_durably(self._staged(file), write)

        with disk_full_names(self.path, missing=self._bytes_left), _emptied(self.path / STAGING):
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
        return self.path / STAGING / file.replace("/", "+")

    def _bytes_left(self) -> int:
        """What the shards that are not written yet take at most."""
        shard = sum(layout.file_bytes_at_most for layout in self.layouts.values())
        return shard * (self.extraction.geometry.shards - len(self.done))

    def _check_fits(self, shard: Shard) -> None:
        geometry, rows = self.extraction.geometry, len(shard.rows["text"])
        given: dict[str, Shaped[np.ndarray, "place ..."]] = {f"sites/{site}": v for site, v in shard.sites.items()}
        given |= {f"rows/{column}": places for column, places in shard.rows.items()}
        if shard.logits is not None:
            given[LOGITS] = shard.logits
        wanted_names = {name for name in self.layouts if not name.startswith(("scales/", "channel_scale/"))}
        if not 0 <= shard.number < geometry.shards or given.keys() != wanted_names:
            wrong = ", ".join(sorted(given.keys() ^ wanted_names)) or "its number"
            raise DataError(f"shard {shard.number} is not of this extraction ({geometry.shards} shards): see {wrong}")
        for name, part in given.items():
            layout, places = self.layouts[name], shard.texts if name == LOGITS else rows
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
        aside = self.path / STAGING
        data, target = sealed_json(record), self.path / record_file(record.shard)
        write_durably(aside / "record", lambda sink: sink.write(data))
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

        Raises
        ------
        CacheIncomplete
            Where a shard is missing.
        """
        geometry = self.extraction.geometry
        missing = [number for number in range(geometry.shards) if not (self.path / record_file(number)).is_file()]
        if missing:
            raise CacheIncomplete(
                f"{self.path} lacks {len(missing)} of {geometry.shards} shards (the first is {missing[0]}): "
                "run the command that began it again"
            )
        write_file(self.path / TEXTS, self.texts_file(texts))
        manifest = self.seal(
            splits=_splits(texts), class_names=class_names, counts=counts, parent=self.extraction.parent
        )
        (self.path / UNFINISHED).unlink(missing_ok=True)
        with disk_full_names(self.path):
            fsync_folder(self.path)
        self.finished = True
        return manifest

    def seal(
        self,
        *,
        splits: dict[str, SplitEntry],
        class_names: list[str] | None,
        counts: dict[str, int],
        parent: str | None,
    ) -> Manifest:
        """Write the card and, last, the manifest of what lies in the folder."""
        shards = range(self.extraction.geometry.shards)
        records = [read_record(self.path, number) for number in shards]
        axes = {name: len(layout.shape) for name, layout in self.layouts.items()}
        common = list(common_files(axes, len(shards)))
        manifest = Manifest(
            format="clvq-cache",
            version=1,
            parent=parent,
            identity=self.extraction.identity,
            geometry=self.extraction.geometry,
            sites={
                name: SiteEntry(
                    width=site.width,
                    encoding=site.encoding,
                    statistics=SiteStatistics.merged((r.statistics[name] for r in records), width=site.width),
                    loss=EncodingLoss.merged(r.losses[name] for r in records),
                )
                for name, site in self.extraction.sites.items()
            },
            columns=self.extraction.columns,
            splits=splits,
            class_names=class_names,
            classes=self.extraction.classes,
            counts=counts,
            files=dict.fromkeys(common, FileEntry(bytes=0, sha256=UNSEALED)),
            shards=[ShardEntry(rows=r.rows, texts=r.texts, files=r.files) for r in records],
        )
        write_file(self.path / CARD, card(manifest))
        files = {
            name: FileEntry(bytes=(self.path / name).stat().st_size, sha256=sha256_of(self.path / name))
            for name in common
        }
        manifest = manifest.model_copy(update={"files": files})
        shutil.rmtree(self.path / STAGING, ignore_errors=True)
        write_file(self.path / MANIFEST, sealed_json(manifest))
        return manifest

    def texts_file(self, texts: pa.Table) -> bytes:
        """`texts.parquet`, from a table without predictions and the logits that lie in the folder."""
        where = texts.schema.get_field_index("label") + 1
        predicted = pa.nulls(len(texts), pa.int32())
        if LOGITS in self.layouts:
            logits = self._read(LOGITS, np.asarray(texts["text_id"]))
            known = np.isfinite(logits).all(axis=1)
            best = np.where(known, np.nan_to_num(logits).argmax(axis=1), -1)
            predicted = pa.array(best, pa.int32(), mask=~known)
        return texts_parquet(texts.add_column(where, "prediction", predicted))


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


def _splits(texts: pa.Table) -> dict[str, SplitEntry]:
    splits = np.asarray(texts["split"].to_pylist(), dtype=object)
    counts = np.asarray(texts["row_count"])
    return {
        name: SplitEntry(texts=int((splits == name).sum()), rows=int(counts[splits == name].sum()))
        for name in sorted(set(splits))
    }
