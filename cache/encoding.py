"""Values to bits, bits to the bytes of a Zarr v3 shard, and back.

A shard file is what Zarr's `sharding_indexed` codec defines: inner chunks one after the other, then an index of
(offset, bytes) pairs as little-endian uint64, then the index's CRC-32C. Each inner chunk is `bytes → blosc → crc32c`.

bf16 is stored as its bits in uint16, for want of a Zarr data type that every reader knows; the array's attribute
`encoding` says so. One Blosc block per chunk instead of automatic ones makes bf16 hidden states 13 % smaller and
decoding 2.7 × faster; and only so are a chunk's bytes the same on every machine, for Blosc's threads write the blocks
of one chunk in the order in which they finish.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from google_crc32c import value as crc32c
from jaxtyping import Float32, Shaped
from numcodecs import blosc

from ..errors import CacheCorrupt, DataError
from .layout import ROW_COLUMNS, Encoding, Geometry, SiteLayout

_MISSING = 2**64 - 1
_CRC = struct.Struct("<I")
_BLOSC_HEADER_BYTES = 16
# Magnitudes from here on round to infinity, ties to even.
_OVERFLOW: dict[Encoding, float] = {"bf16": 2.0**128 - 2.0**119, "fp16": 65520.0, "fp32": np.inf}
_LARGEST: dict[Encoding, str] = {"bf16": "3.38953e+38", "fp16": "65,504"}

LOGITS = "texts/logits"

STORED_AS: dict[Encoding, str] = {"bf16": "uint16", "fp16": "float16", "fp32": "float32"}
# What sites take on disk against the raw size of their values. Measured on layers 8 and 12 of a 12 × 384 BERT-type
# encoder: 0.67, 0.85, 0.83; with bf16 also 0.71 on all-MiniLM-L6-v2 (benchmarks/extraction.py).
EXPECTED_SHARE: dict[Encoding, float] = {"bf16": 0.69, "fp16": 0.85, "fp32": 0.83}


def to_bits(values: Float32[np.ndarray, "row d"], encoding: Encoding, *, site: str) -> Shaped[np.ndarray, "row d"]:
    """Round values (to nearest, ties to even) to what is stored.

    Raises
    ------
    DataError
        Where the encoding cannot hold a value, or a value is not finite; nothing is clipped silently.
    """
    largest = float(np.maximum(values.max(initial=0.0), -values.min(initial=0.0)))
    if not np.isfinite(largest):
        raise DataError(f"{site} has a value that is not finite: the model itself overflowed; try --dtype float32")
    if largest >= _OVERFLOW[encoding]:
        others = "bf16 or fp32" if encoding == "fp16" else "fp32"
        raise DataError(
            f"{site} has a value of magnitude {largest:.6g}, and {encoding} holds at most {_LARGEST[encoding]}: "
            f"use --encoding {others}"
        )
    if encoding == "fp32":
        return values
    if encoding == "fp16":
        return values.astype(np.float16)
    bits = np.ascontiguousarray(values).view(np.uint32)
    # Adding half of the last kept bit, less one where that bit is 0, rounds to even.
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return rounded.astype(np.uint16)


def from_bits(bits: Shaped[np.ndarray, "*shape"], encoding: Encoding) -> Float32[np.ndarray, "*shape"]:
    """Stored bits as float32, exactly."""
    if encoding == "bf16":
        wide = bits.astype(np.uint32)
        wide <<= np.uint32(16)
        return wide.view(np.float32)
    return bits.astype(np.float32)


@dataclass(frozen=True, slots=True)
class ArrayLayout:
    """One array of a cache: its type, its shape and how it is cut."""

    dtype: str
    shape: tuple[int, ...]
    shard: int
    """Places of the first axis in one shard file; the other axes are never cut."""
    chunk: int
    """Places of the first axis in one inner chunk."""
    fill: int | float
    dimensions: tuple[str, ...]
    attributes: dict[str, Any]

    @property
    def chunks_per_shard(self) -> int:
        """Inner chunks in a shard file."""
        return self.shard // self.chunk

    @property
    def chunk_bytes(self) -> int:
        """Raw bytes of one inner chunk."""
        return self.chunk * int(np.prod(self.shape[1:], dtype=int)) * np.dtype(self.dtype).itemsize

    @property
    def index_bytes(self) -> int:
        """Bytes of the index at the end of a shard file."""
        return 16 * self.chunks_per_shard + _CRC.size

    def metadata(self) -> dict[str, Any]:
        """The array's `zarr.json`."""
        rest = list(self.shape[1:])
        little = {"name": "bytes", "configuration": {"endian": "little"}}
        if np.dtype(self.dtype).itemsize == 1:
            little = {"name": "bytes"}
        compressor = {
            "name": "blosc",
            "configuration": {
                "typesize": np.dtype(self.dtype).itemsize,
                "cname": "zstd",
                "clevel": 1,
                "shuffle": "shuffle",
                "blocksize": self.chunk_bytes,
            },
        }
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.shape),
            "data_type": self.dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [self.shard, *rest]}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": self.fill,
            "codecs": [
                {
                    "name": "sharding_indexed",
                    "configuration": {
                        "chunk_shape": [self.chunk, *rest],
                        "codecs": [little, compressor, {"name": "crc32c"}],
                        "index_codecs": [
                            {"name": "bytes", "configuration": {"endian": "little"}},
                            {"name": "crc32c"},
                        ],
                        "index_location": "end",
                    },
                }
            ],
            "attributes": self.attributes,
            "dimension_names": list(self.dimensions),
        }


@runtime_checkable
class _Sink(Protocol):
    def write(self, data: bytes, /) -> object: ...


@runtime_checkable
class _Source(Protocol):
    def seek(self, offset: int, whence: int = 0, /) -> int: ...

    def read(self, size: int = -1, /) -> bytes: ...


def write_shard(sink: _Sink, values: Shaped[np.ndarray, "used *rest"], layout: ArrayLayout) -> None:
    """Write one shard file; `values` are its places in use, from the first on."""
    index, offset = [], 0
    for start in range(0, layout.shard, layout.chunk):
        part = values[start : start + layout.chunk]
        if len(part) == 0:
            index.append((_MISSING, _MISSING))
            continue
        if len(part) < layout.chunk:
            whole = np.full((layout.chunk, *layout.shape[1:]), layout.fill, dtype=layout.dtype)
            whole[: len(part)] = part
            part = whole
        packed: bytes = blosc.compress(np.ascontiguousarray(part), b"zstd", 1, blosc.SHUFFLE, layout.chunk_bytes)
        sink.write(packed)
        sink.write(_CRC.pack(crc32c(packed)))
        size = len(packed) + _CRC.size
        index.append((offset, size))
        offset += size
    table = np.array(index, dtype="<u8").tobytes()
    sink.write(table)
    sink.write(_CRC.pack(crc32c(table)))


def read_index(file: _Source, layout: ArrayLayout, *, name: str) -> Shaped[np.ndarray, "chunk 2"]:
    """Where each inner chunk of a shard file lies: (offset, bytes), both 2⁶⁴ − 1 where it was never written.

    Raises
    ------
    CacheCorrupt
        Where the index fails its checksum or points outside the file.
    """
    size = file.seek(0, 2)
    if size < layout.index_bytes:
        raise CacheCorrupt(f"{name} is cut short: {size} bytes, fewer than its index takes ({layout.index_bytes})")
    file.seek(size - layout.index_bytes)
    table = file.read(layout.index_bytes)
    if crc32c(table[: -_CRC.size]) != _CRC.unpack(table[-_CRC.size :])[0]:
        raise CacheCorrupt(f"{name} is damaged: its index fails its checksum; `clvq cache verify` names what is whole")
    index = np.frombuffer(table[: -_CRC.size], dtype="<u8").reshape(-1, 2)
    used = index[index[:, 0] != _MISSING]
    limit = size - layout.index_bytes
    if len(used) and (used.max() > limit or int((used[:, 0] + used[:, 1]).max()) > limit):
        raise CacheCorrupt(f"{name} is damaged: its index points outside the file")
    return index


def read_chunk(
    file: _Source, entry: Shaped[np.ndarray, "2"], layout: ArrayLayout, *, name: str
) -> Shaped[np.ndarray, "place *rest"]:
    """One inner chunk of a shard file, decoded.

    Raises
    ------
    CacheCorrupt
        Where the chunk fails its checksum or would decode to another size than the array's.
    """
    shape = (layout.chunk, *layout.shape[1:])
    if entry[0] == _MISSING:
        return np.full(shape, layout.fill, dtype=layout.dtype)
    file.seek(int(entry[0]))
    data = file.read(int(entry[1]))
    packed = data[: -_CRC.size]
    if len(packed) < _BLOSC_HEADER_BYTES or crc32c(packed) != _CRC.unpack(data[-_CRC.size :])[0]:
        raise CacheCorrupt(f"{name} is damaged: a chunk fails its checksum; `clvq cache verify` names what is whole")
    # Blosc's header names the sizes that it will write and read: checked before it does either.
    if int.from_bytes(packed[4:8], "little") != layout.chunk_bytes:
        raise CacheCorrupt(f"{name} is damaged: a chunk decodes to another size than {layout.chunk_bytes} bytes")
    out = np.empty(shape, dtype=layout.dtype)
    try:
        if int.from_bytes(packed[12:16], "little") != len(packed):
            raise RuntimeError("its header gives another length")
        blosc.decompress(packed, out)
    except RuntimeError as error:
        raise CacheCorrupt(f"{name} is damaged: a chunk cannot be decompressed ({error})") from error
    return out


def array_layouts(
    geometry: Geometry, sites: Mapping[str, SiteLayout], *, classes: int | None
) -> dict[str, ArrayLayout]:
    """All arrays of a cache, by name. `classes` is the width of `texts/logits`, where there is one."""
    rows, shard = geometry.row_places, geometry.shard_rows
    layouts = {
        f"sites/{name}": ArrayLayout(
            dtype=STORED_AS[site.encoding],
            shape=(rows, site.width),
            shard=shard,
            chunk=geometry.chunk_rows,
            fill=0 if site.encoding == "bf16" else 0.0,
            dimensions=("row", "d"),
            attributes={"encoding": site.encoding},
        )
        for name, site in sites.items()
    }
    for column, (dtype, fill) in ROW_COLUMNS.items():
        layouts[f"rows/{column}"] = ArrayLayout(dtype, (rows,), shard, shard, fill, ("row",), {})
    if classes is not None:
        places = geometry.shard_texts
        shape = (geometry.text_places, classes)
        layouts[LOGITS] = ArrayLayout("float32", shape, places, places, 0.0, ("text", "class"), {})
    return layouts


def group_metadata() -> dict[str, Any]:
    """The `zarr.json` of a group."""
    return {"zarr_format": 3, "node_type": "group", "attributes": {}}
