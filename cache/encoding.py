"""Values to bits, bits to the bytes of a Zarr v3 shard, and back.

A shard file is what Zarr's `sharding_indexed` codec defines: inner chunks one after the other, then an index of
(offset, bytes) pairs as little-endian uint64, then the index's CRC-32C. Each inner chunk is `bytes → blosc → crc32c`.

bf16 is stored as its bits in uint16, for want of a Zarr data type that every reader knows; the array's attribute
`encoding` says so. One Blosc block per chunk instead of automatic ones makes bf16 hidden states 13 % smaller and
decoding 2.7 × faster; and only so are a chunk's bytes the same on every machine, for Blosc's threads write the blocks
of one chunk in the order in which they finish.

int8 stores `round(value / (row scale × channel scale))`. The channel scale is robust, fixed before the first shard and
takes the outlier channels of language models; the row scale, the largest magnitude left in a row / 127, takes the rest.
"""

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from google_crc32c import value as crc32c
from jaxtyping import Float32, Int8, Int64, Shaped
from numcodecs import blosc

from ..errors import DataError
from .layout import (
    ALL_COLUMNS,
    CONVERGENCE,
    LOGITS,
    ROW_COLUMNS,
    Encoding,
    Geometry,
    SiteLayout,
    array_axes,
    group_names,
    metadata_file,
    to_json,
)

_MISSING = 2**64 - 1
_CRC = struct.Struct("<I")
_BLOSC_HEADER_BYTES = 16
# Magnitudes from here on round to infinity, ties to even.
# For int8 a little less than float32 holds: decoding rounds twice, and may come out above the original.
_OVERFLOW: dict[Encoding, float] = {"bf16": 2.0**128 - 2.0**119, "fp16": 65520.0, "fp32": np.inf, "int8": 3.4e38}
_LARGEST: dict[Encoding, str] = {"bf16": "3.38953e+38", "fp16": "65,504", "int8": "3.4e+38"}

# A little less than the largest float32 / 127, for the same reason.
_LARGEST_ROW_SCALE = 2.677e36

STORED_AS: dict[Encoding, str] = {"bf16": "uint16", "fp16": "float16", "fp32": "float32", "int8": "int8"}
# What sites take on disk against the raw size of their values. Measured on layers 8 and 12 of a 12 × 384 BERT-type
# encoder: 0.67, 0.85, 0.83, 0.93; with bf16 also 0.71 on all-MiniLM-L6-v2 (benchmarks/encodings.py).
EXPECTED_SHARE: dict[Encoding, float] = {"bf16": 0.69, "fp16": 0.85, "fp32": 0.83, "int8": 0.94}

# The share of a channel's magnitudes that may lie above its scale: massive activations sit in a few rows, and neither
# those rows nor a mean square that they dominate may set the scale of all others (docs/log.md).
_SCALE_QUANTILE = 0.75
# Scales come from the first texts in the cache's order, a seeded shuffle, and from so many rows of them at most.
_SCALE_TEXTS = 256
SCALE_ROWS = 16_384
# Rows that values are rounded in at a time, so that they stay in the processor's cache.
_BLOCK = 64


def to_bits(values: Float32[np.ndarray, "row d"], encoding: Encoding, *, site: str) -> Shaped[np.ndarray, "row d"]:
    """Round values (to nearest, ties to even) to what is stored; for int8 see `quantise`.

    Raises
    ------
    DataError
        Where the encoding cannot hold a value, or a value is not finite; nothing is clipped silently.
    """
    out = np.empty(values.shape, dtype=STORED_AS[encoding])
    for start in range(0, len(values), _BLOCK):
        block = np.ascontiguousarray(values[start : start + _BLOCK])
        _check_range(block, encoding, site=site)
        if encoding != "bf16":
            out[start : start + _BLOCK] = block
            continue
        bits = block.view(np.uint32)
        # Adding half of the last kept bit, less one where that bit is 0, rounds to even.
        rounded = bits >> np.uint32(16)
        rounded &= np.uint32(1)
        rounded += np.uint32(0x7FFF)
        rounded += bits
        rounded >>= np.uint32(16)
        out[start : start + _BLOCK] = rounded
    return out


def _check_range(values: Float32[np.ndarray, "row d"], encoding: Encoding, *, site: str) -> None:
    # NaN is passed on by both, and is not finite.
    largest = float(np.maximum(values.max(initial=0.0), -values.min(initial=0.0)))
    if not np.isfinite(largest):
        raise DataError(f"{site} has a value that is not finite: the model itself overflowed; try --dtype float32")
    if largest >= _OVERFLOW[encoding]:
        others = "bf16 or fp32" if encoding == "fp16" else "fp32"
        raise DataError(
            f"{site} has a value of magnitude {largest:.6g}, and {encoding} holds at most {_LARGEST[encoding]}: "
            f"use --encoding {others}"
        )


def from_bits(bits: Shaped[np.ndarray, "*shape"], encoding: Encoding) -> Float32[np.ndarray, "*shape"]:
    """Stored bits as float32, exactly; for int8 see `dequantise`."""
    if encoding == "bf16":
        wide = bits.astype(np.uint32)
        wide <<= np.uint32(16)
        return wide.view(np.float32)
    return bits.astype(np.float32)


def scale_texts(row_counts: Int64[np.ndarray, " text"]) -> Int64[np.ndarray, " first"]:
    """The first texts of a cache whose rows decide the channel scales: 256, or as many as give `SCALE_ROWS` rows."""
    enough = int(np.searchsorted(np.cumsum(row_counts), SCALE_ROWS)) + 1
    return np.arange(min(enough, _SCALE_TEXTS, len(row_counts)))


def channel_scale(values: Float32[np.ndarray, "row d"]) -> Float32[np.ndarray, " d"]:
    """The scale of each channel for int8: a quantile of its magnitudes, 1 where that is zero.

    The quantile is one of the values, so that it is the same on every machine.
    """
    if len(values) == 0:
        return np.ones(values.shape[1], dtype=np.float32)
    rank = min(int(_SCALE_QUANTILE * len(values)), len(values) - 1)
    scale = np.partition(np.abs(values), rank, axis=0)[rank]
    # Dividing by a subnormal scale could overflow.
    return np.where(scale >= np.finfo(np.float32).tiny, scale, np.float32(1))


def quantise(
    values: Float32[np.ndarray, "row d"], scale: Float32[np.ndarray, " d"], *, site: str
) -> tuple[Int8[np.ndarray, "row d"], Float32[np.ndarray, " row"]]:
    """Values as int8 and one scale per row, given one scale per channel.

    Raises
    ------
    DataError
        Where a value is not finite, or so far outside its channel's scale that float32 cannot hold their ratio.
    """
    out, rows = np.empty(values.shape, dtype=np.int8), np.empty(len(values), dtype=np.float32)
    for start in range(0, len(values), _BLOCK):
        block = values[start : start + _BLOCK]
        _check_range(block, "int8", site=site)
        with np.errstate(over="ignore"):
            ratio = block / scale
        # Of two zeros, the maximum may be either: the sign would depend on the machine.
        row = np.abs(np.maximum(ratio.max(axis=1), -ratio.min(axis=1))) / np.float32(127)
        if row.max() >= _LARGEST_ROW_SCALE:
            raise DataError(f"{site} has a value too far from its channel's scale for int8: use --encoding fp32")
        # A row of zeros, or of values that vanish beside the scale, is stored as zeros.
        ratio /= np.where(row > 0, row, np.float32(1))[:, None]
        np.clip(np.rint(ratio, out=ratio), -127, 127, out=ratio)
        out[start : start + _BLOCK] = ratio
        rows[start : start + _BLOCK] = row
    return out, rows


def dequantise(
    bits: Int8[np.ndarray, "row d"], rows: Float32[np.ndarray, " row"], scale: Float32[np.ndarray, " d"]
) -> Float32[np.ndarray, "row d"]:
    """int8 as float32: (bits × row scale) × channel scale, in that order."""
    values = bits.astype(np.float32)
    values *= rows[:, None]
    values *= scale
    return values


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

    @property
    def file_bytes_at_most(self) -> int:
        """Bytes of a shard file whose chunks cannot be compressed at all."""
        return self.chunks_per_shard * (self.chunk_bytes + _BLOSC_HEADER_BYTES + 48) + self.index_bytes

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
            # JSON has no NaN of its own; this is Zarr's name for it.
            "fill_value": "NaN" if np.isnan(self.fill) else self.fill,
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


def pack(part: Shaped[np.ndarray, "used *rest"], layout: ArrayLayout) -> bytes | None:
    """One inner chunk as it stands in a shard file; `None` where no place of it is in use."""
    if len(part) == 0:
        return None
    if len(part) < layout.chunk:
        whole = np.full((layout.chunk, *layout.shape[1:]), layout.fill, dtype=layout.dtype)
        whole[: len(part)] = part
        part = whole
    packed: bytes = blosc.compress(np.ascontiguousarray(part), b"zstd", 1, blosc.SHUFFLE, layout.chunk_bytes)
    return packed + _CRC.pack(crc32c(packed))


def write_chunks(sink: _Sink, chunks: Iterable[bytes | None]) -> None:
    """Write one shard file from its inner chunks, in order, all of them."""
    index, offset = [], 0
    for chunk in chunks:
        if chunk is None:
            index.append((_MISSING, _MISSING))
            continue
        sink.write(chunk)
        index.append((offset, len(chunk)))
        offset += len(chunk)
    table = np.array(index, dtype="<u8").tobytes()
    sink.write(table)
    sink.write(_CRC.pack(crc32c(table)))


def write_shard(sink: _Sink, values: Shaped[np.ndarray, "used *rest"], layout: ArrayLayout) -> None:
    """Write one shard file; `values` are its places in use, from the first on."""
    starts = range(0, layout.shard, layout.chunk)
    write_chunks(sink, (pack(values[start : start + layout.chunk], layout) for start in starts))


def array_layouts(
    geometry: Geometry,
    sites: Mapping[str, SiteLayout],
    *,
    classes: int | None,
    columns: Iterable[str] = tuple(ROW_COLUMNS),
) -> dict[str, ArrayLayout]:
    """All arrays of a cache, by name.

    Parameters
    ----------
    classes
        Width of `texts/logits`, where there is one.
    columns
        The columns of the row axis that are there.
    """
    rows, shard, places = geometry.row_places, geometry.shard_rows, geometry.shard_texts
    layouts = {}
    for name in array_axes(sites, columns, predictions=classes is not None):
        kind, own = name.split("/")
        if kind == "sites":
            site = sites[own]
            layouts[name] = ArrayLayout(
                dtype=STORED_AS[site.encoding],
                shape=(rows, site.width),
                shard=shard,
                chunk=geometry.chunk_rows,
                fill=0 if site.encoding in ("bf16", "int8") else 0.0,
                dimensions=("row", "d"),
                attributes={"encoding": site.encoding},
            )
        elif kind == "scales":
            layouts[name] = ArrayLayout("float32", (rows,), shard, shard, 0.0, ("row",), {})
        elif kind == "channel_scale":
            width = sites[own].width
            layouts[name] = ArrayLayout("float32", (width,), width, width, 0.0, ("d",), {})
        elif kind == "rows":
            dtype, fill = ALL_COLUMNS[own]
            layouts[name] = ArrayLayout(dtype, (rows,), shard, shard, fill, ("row",), {})
        elif name == LOGITS:
            shape = (geometry.text_places, classes or 0)
            layouts[name] = ArrayLayout("float32", shape, places, places, 0.0, ("text", "class"), {})
        elif name == CONVERGENCE:
            layouts[name] = ArrayLayout("float32", (geometry.text_places,), places, places, np.nan, ("text",), {})
    return layouts


def metadata(layouts: Mapping[str, ArrayLayout]) -> dict[str, bytes]:
    """The `zarr.json` of every group and array: path inside the cache → bytes."""
    group = to_json({"zarr_format": 3, "node_type": "group", "attributes": {}})
    files = {metadata_file(name): group for name in group_names(layouts)}
    return files | {metadata_file(name): to_json(layout.metadata()) for name, layout in layouts.items()}
