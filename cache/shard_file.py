"""The files of one shard on their way to disk: rounded, measured, compressed, hashed, fsynced.

Chunks are worked on by a few threads and written in their order as they come: a file's bytes depend neither on the
number of threads nor on chance, and memory holds its values once.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32
from pydantic import ValidationError

from ..errors import CacheCorrupt, ConfigError
from .encoding import ArrayLayout, dequantise, from_bits, pack, quantise, to_bits, write_chunks
from .layout import FileEntry, ShardRecord, SiteLayout, is_sealed, record_file
from .statistics import EncodingLoss, SiteStatistics


class HashingSink:
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


def write_durably(path: Path, write: Callable[[HashingSink], object]) -> FileEntry:
    with open(path, "wb") as file:
        sink = HashingSink(file)
        write(sink)
        file.flush()
        os.fsync(file.fileno())
    return sink.entry()


class SiteFile:
    """The chunks of one site of a shard on their way to disk, and what is learnt of them there."""

    def __init__(
        self,
        values: Float32[np.ndarray, "row d"],
        name: str,
        site: SiteLayout,
        scale: Float32[np.ndarray, " d"] | None,
    ) -> None:
        self._values, self._name, self._site, self._scale = values, name, site, scale
        self.row_scales = np.empty(len(values), dtype=np.float32) if site.encoding == "int8" else None
        self._measured: list[tuple[SiteStatistics, EncodingLoss]] = []

    def write(self, sink: HashingSink, *, layout: ArrayLayout, threads: ThreadPoolExecutor) -> None:
        """Write the shard file; encoding runs on the threads."""

        def chunks() -> Iterator[bytes | None]:
            for packed, *measured in threads.map(partial(self._encode, layout), range(0, layout.shard, layout.chunk)):
                self._measured += measured
                yield packed

        write_chunks(sink, chunks())

    def _encode(self, layout: ArrayLayout, start: int) -> tuple[Any, ...]:
        part = slice(start, start + layout.chunk)
        values = self._values[part]
        if len(values) == 0:
            return (None,)
        if self.row_scales is not None:
            if self._scale is None:
                raise ConfigError(f"{self._name} is stored as int8: its channel scales are to be fixed first")
            bits, self.row_scales[part] = quantise(values, self._scale, site=self._name)
            stored = dequantise(bits, self.row_scales[part], self._scale)
        else:
            bits = to_bits(values, self._site.encoding, site=self._name)
            stored = from_bits(bits, self._site.encoding)
        return pack(bits, layout), (SiteStatistics.of(stored), EncodingLoss.of(values, stored))

    def measured(self) -> tuple[SiteStatistics, EncodingLoss]:
        """Statistics of the values as stored, and what storing did to them."""
        statistics = SiteStatistics.merged((part for part, _ in self._measured), width=self._site.width)
        return statistics, EncodingLoss.merged(loss for _, loss in self._measured)


def read_record(path: Path, number: int) -> ShardRecord:
    """The record of a shard.

    Raises
    ------
    CacheCorrupt
        Where it is damaged.
    """
    file = path / record_file(number)
    data = file.read_bytes()
    try:
        if not is_sealed(data):
            raise CacheCorrupt(f"{file} is damaged: its bytes do not have the checksum that it holds")
        return ShardRecord.model_validate_json(data)
    except ValidationError as error:
        raise CacheCorrupt(f"{file} is damaged: {error.error_count()} things are wrong in it") from error
