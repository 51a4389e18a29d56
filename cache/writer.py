"""Writing a cache, shard by shard, so that at every moment what is named is whole.

How a shard gets there, see `shard_writer`. The manifest is written when all shards have their records.
"""

import json
import shutil
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa
from pydantic import JsonValue

from ..errors import CacheIncomplete, ConfigError, ResumeMismatch
from .card import card
from .encoding import (
    metadata,
)
from .extraction import Extraction
from .files import disk_full_names, fsync_folder, make_folder, only_writer, sha256_of, write_file
from .layout import (
    ARRAYS,
    CARD,
    CONVERGENCE,
    LOGITS,
    MANIFEST,
    RECORDS,
    SALT,
    SELECTION,
    STAGING,
    TEXTS,
    UNFINISHED,
    UNSEALED,
    Convergence,
    FileEntry,
    Manifest,
    ShardEntry,
    SiteEntry,
    SplitEntry,
    array_file,
    common_files,
    differences,
    read_manifest,
    record_file,
    sealed_json,
    to_json,
)
from .shard_file import read_record
from .shard_writer import ShardWriter
from .statistics import EncodingLoss, SiteStatistics
from .texts_file import texts_parquet
from .unfinished import Transfer, unfinished

_OWN_NAMES = {MANIFEST, CARD, TEXTS, RECORDS, ARRAYS, UNFINISHED, STAGING, SELECTION, SALT}


class CacheWriter(ShardWriter):
    """Writes the shards of one extraction, in any order, and finishes the cache.

    Parameters
    ----------
    path
        The cache's folder; created where missing, continued where it holds the same extraction.
    extraction
        What is to be written.
    force
        Delete a cache or extraction with other settings that stands there.
    shared
        Others may write other shards of the same extraction at the same time; nothing is deleted.

    Raises
    ------
    ResumeMismatch
        Where the folder holds an extraction with other settings; the message names each difference.
    ConfigError
        Where the folder holds something that is not a cache.
    FolderInUse
        Where another process is writing there.
    """

    def __init__(self, path: Path, extraction: Extraction, *, force: bool = False, shared: bool = False) -> None:
        super().__init__(path, extraction)
        self._shared = shared
        try:
            self._hold = self._stack.enter_context(only_writer(path, shared=shared))
            with disk_full_names(path):
                self._take_over(force=force and not shared, shared=shared)
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> "CacheWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._shared:
            shutil.rmtree(self.path / STAGING, ignore_errors=True)
        super().__exit__(kind, error, trace)

    def become_only_writer(self) -> bool:
        """Whether no other writer is left, so that `finish` may be called; one that shared the folder asks this last.

        Of several that end at the same time at least one is told so.
        """
        if self._shared and self._hold.become_only():
            self._shared = False
        return not self._shared

    def _take_over(self, *, force: bool, shared: bool) -> None:
        plain = self.extraction.to_plain()
        found = self._found(shared=shared)
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
        if not shared:
            shutil.rmtree(self.path / STAGING, ignore_errors=True)
            for left_by_a_kill in self.path.rglob(".*.aside"):
                left_by_a_kill.unlink()
        if self.finished:
            # Killed between the manifest and this, the file that says 'unfinished' is still there.
            (self.path / UNFINISHED).unlink(missing_ok=True)
            return
        if not (self.path / UNFINISHED).is_file():
            write_file(self.path / UNFINISHED, to_json(plain))
        self._write_metadata()
        for number in range(self.extraction.geometry.shards):
            if self.written(number) is not None:
                self.done.add(number)
            elif (self.path / record_file(number)).is_file():
                # One that lost a file, or its record's seal, is made again. Asked twice: others may be writing it.
                with self._placing(number):
                    if self.written(number) is None:
                        (self.path / record_file(number)).unlink()

    def _found(self, *, shared: bool) -> dict[str, JsonValue] | None:
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
            for name in names if not shared else ():
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

    def missing(self) -> list[int]:
        """Shards that have no record yet."""
        shards = range(self.extraction.geometry.shards)
        return [number for number in shards if not (self.path / record_file(number)).is_file()]

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
        missing, shards = self.missing(), self.extraction.geometry.shards
        if missing:
            raise CacheIncomplete(
                f"{self.path} lacks {len(missing)} of {shards} shards (the first is {missing[0]}): "
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
            convergence=self._convergence(),
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

    def _convergence(self) -> Convergence | None:
        if CONVERGENCE not in self.layouts:
            return None
        places = np.arange(self.extraction.geometry.text_places)
        deltas = np.abs(self._read(CONVERGENCE, places))
        known = deltas[np.isfinite(deltas)]
        if len(known) == 0:
            return None
        # Values that occur, so that they are the same on every machine.
        median, quantile = np.quantile(known, [0.5, 0.95], method="inverted_cdf")
        return Convergence(texts=len(known), median=float(median), quantile_95=float(quantile))

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


def _splits(texts: pa.Table) -> dict[str, SplitEntry]:
    splits = np.asarray(texts["split"].to_pylist(), dtype=object)
    counts = np.asarray(texts["row_count"])
    return {
        name: SplitEntry(texts=int((splits == name).sum()), rows=int(counts[splits == name].sum()))
        for name in sorted(set(splits))
    }
