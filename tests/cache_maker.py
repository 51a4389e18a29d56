"""Small caches with known contents, for the tests of `clvq.cache`; a script may use this file too."""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from clvq.cache.encoding import channel_scale
from clvq.cache.extraction import Extraction, Shard
from clvq.cache.layout import (
    ALL_COLUMNS,
    MANIFEST,
    ROW_COLUMNS,
    SALIENCY_COLUMNS,
    TEXTUAL_COLUMNS,
    UNFINISHED,
    Encoding,
    Geometry,
    Manifest,
    ShardRecord,
    SiteLayout,
)
from clvq.cache.placement import Placement, place
from clvq.cache.verify import verify
from clvq.cache.writer import CacheWriter
from clvq.errors import CacheIncomplete

CLASSES = ["bad", "good", "none"]
EVERY_ENCODING: dict[str, tuple[int, Encoding]] = {
    "hidden.1": (6, "bf16"),
    "hidden.2": (5, "fp32"),
    "hidden.3": (4, "fp16"),
    "hidden.4": (7, "int8"),
}
# Of a copy without its texts: fewer files, where a test is to try every step of writing them.
FEW_COLUMNS = tuple(column for column in ROW_COLUMNS if column not in TEXTUAL_COLUMNS)


@dataclass(frozen=True)
class Known:
    """Everything that a cache should hold; texts and rows are numbered in the order of the plan."""

    extraction: Extraction
    placement: Placement
    counts: np.ndarray
    vectors: dict[str, np.ndarray]
    columns: dict[str, np.ndarray]
    logits: np.ndarray | None
    splits: list[str]
    convergence: np.ndarray | None = None

    @property
    def geometry(self) -> Geometry:
        return self.extraction.geometry

    @property
    def scales(self) -> dict[str, np.ndarray]:
        """The channel scales of the int8 sites."""
        return {
            name: channel_scale(self.vectors[name])
            for name, site in self.extraction.sites.items()
            if site.encoding == "int8"
        }

    @property
    def places(self) -> np.ndarray:
        """Where each row lies on the row axis."""
        starts = np.repeat(self.placement.first_row - (np.cumsum(self.counts) - self.counts), self.counts)
        return starts + np.arange(self.counts.sum())

    def shard(self, number: int) -> Shard:
        first, last = self.placement.shard_starts[number : number + 2]
        ends = np.r_[0, np.cumsum(self.counts)]
        part = slice(ends[first], ends[last])
        return Shard(
            number=number,
            sites={name: values[part] for name, values in self.vectors.items()},
            rows={name: values[part] for name, values in self.columns.items()},
            texts=int(last - first),
            logits=None if self.logits is None else self.logits[first:last],
            convergence=None if self.convergence is None else self.convergence[first:last],
        )

    def texts(self) -> pa.Table:
        count = len(self.counts)
        return pa.table(
            {
                "text_id": pa.array(self.placement.text_id, pa.int64()),
                "split": self.splits,
                "text": [f"text {number}" for number in range(count)],
                "label": pa.array(np.arange(count) % 3, pa.int32()),
                "first_row": pa.array(self.placement.first_row, pa.int64()),
                "row_count": pa.array(self.counts, pa.int64()),
            }
        )

    def write(self, path: Path, *, force: bool = False) -> Manifest | None:
        """Write what is missing; `None` where the cache was finished before."""
        with CacheWriter(path, self.extraction, force=force) as writer:
            if writer.finished:
                return None
            writer.fix_scales(lambda: self.scales)
            for number in range(self.geometry.shards):
                if number not in writer.done:
                    writer.commit(self.shard(number))
            return writer.finish(self.texts(), class_names=CLASSES, counts={"texts": len(self.counts)})

    def with_identity(self, **changes: object) -> "Known":
        identity = {**self.extraction.identity, **changes}
        return replace(self, extraction=replace(self.extraction, identity=identity))


def known(
    *,
    texts: int = 40,
    longest: int = 40,
    widths: dict[str, tuple[int, Encoding]] | None = None,
    chunk_rows: int = 32,
    columns: tuple[str, ...] = tuple(ROW_COLUMNS),
    predictions: bool = True,
    saliency: bool = False,
    seed: int = 0,
) -> Known:
    """Contents of a cache whose shards have several chunks and unused places on both axes."""
    widths = widths or {"hidden.1": (6, "bf16"), "hidden.2": (5, "fp32")}
    generator = np.random.default_rng(seed)
    counts = generator.integers(1, longest + 1, texts)
    placement = place(counts, row_bytes=24)
    rows = int(counts.sum())
    within = np.arange(rows) - np.repeat(np.cumsum(counts) - counts, counts)
    last = within == np.repeat(counts, counts) - 1
    contents = {
        "text": np.repeat(placement.text_id, counts),
        "position": within * 2 + 1,
        "subwords": generator.integers(1, 3, rows),
        "token": generator.integers(0, 1000, rows),
        "word": within,
        "char_start": within * 5,
        "char_end": within * 5 + 4,
        "special": np.where(within == 0, 1, np.where(last, 2, 0)),
    }
    vectors = {
        name: (generator.normal(size=(rows, width)) * np.exp(generator.normal(size=width))).astype(np.float32)
        for name, (width, _) in widths.items()
    }
    logits = generator.normal(size=(texts, len(CLASSES))).astype(np.float32) if predictions else None
    splits = generator.choice(["train", "dev"], texts).tolist()
    # Drawn last, so that nothing else depends on whether they are there.
    contents |= {name: generator.normal(size=rows) for name in SALIENCY_COLUMNS}
    if saliency:
        columns = (*columns, *SALIENCY_COLUMNS)
    return Known(
        extraction=Extraction(
            identity={"model": {"name": "tiny", "commit": None}, "sites": list(widths), "length": 128},
            geometry=placement.geometry.model_copy(update={"chunk_rows": chunk_rows}),
            sites={name: SiteLayout(width=width, encoding=encoding) for name, (width, encoding) in widths.items()},
            classes=len(CLASSES) if predictions else None,
            columns=columns,
        ),
        placement=placement,
        counts=counts,
        vectors=vectors,
        columns={name: contents[name].astype(ALL_COLUMNS[name][0]) for name in columns},
        logits=logits,
        splits=splits,
        convergence=generator.normal(size=texts).astype(np.float32) if saliency else None,
    )


def seal(manifest: bytes | Mapping[str, Any]) -> bytes:
    """A manifest or record with a checksum that is right, where it has any: who has read the format can make it."""
    data = manifest if isinstance(manifest, bytes) else json.dumps(manifest, sort_keys=True).encode()
    place = re.search(rb'"checksum": "([0-9a-f]{64})"', data)
    if place is None:
        return data
    start, end = place.span(1)
    unsealed = data[:start] + b"0" * 64 + data[end:]
    return data[:start] + hashlib.sha256(unsealed).hexdigest().encode() + data[end:]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def recorded(folder: Path) -> set[int]:
    """The shards with a record, each of whose files has been compared with it."""
    numbers = set()
    for file in folder.glob("records/[0-9]*.json"):
        record = ShardRecord.model_validate_json(file.read_bytes())
        for name, entry in record.files.items():
            data = (folder / name).read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (entry.bytes, entry.sha256), name
        numbers.add(record.shard)
    return numbers


def check_what_is_named_is_whole(folder: Path) -> None:
    """Whatever happened to its writer, a folder never claims more than it holds."""
    recorded(folder)
    if (folder / MANIFEST).exists():
        assert {problem.file for problem in verify(folder).problems} <= {UNFINISHED}
    elif (folder / UNFINISHED).exists():
        try:
            verify(folder)
        except CacheIncomplete:
            return
        raise AssertionError(f"{folder} is not finished, and passes for whole")


def without_waiting() -> Iterator[None]:
    """A fixture's body for tests of other things than durability: waiting for the disk would be most of their time."""
    real, os.fsync = os.fsync, lambda descriptor: None
    try:
        yield
    finally:
        os.fsync = real
