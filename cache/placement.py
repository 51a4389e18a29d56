"""Which shard each text lies in. A function of the row counts and widths alone, never of workers or machines."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from .layout import Geometry

# Chosen by the measurements that docs/format.md names.
SHARD_BYTES = 100_000_000
CHUNK_BYTES = 1 << 20
SHARDS_WANTED = 16
# Chunks of fewer rows cost more in headers than they save in reading.
SMALLEST_CHUNK_ROWS = 64


@dataclass(frozen=True)
class Placement:
    """The places of all texts, in the order in which they were laid out."""

    geometry: Geometry
    text_id: Int64[np.ndarray, " text"]
    first_row: Int64[np.ndarray, " text"]
    shard_starts: Int64[np.ndarray, " shard_end"]
    """Texts `shard_starts[s]` up to `shard_starts[s + 1]`, in order, lie in shard `s`."""


def place(row_counts: Int64[np.ndarray, " text"], *, row_bytes: int) -> Placement:
    """Lay whole texts into shards of equal capacity, in order.

    Parameters
    ----------
    row_counts
        Rows of each text, in the order in which the texts are to lie.
    row_bytes
        Raw bytes of one row of the widest site.
    """
    total, longest = int(row_counts.sum()), int(row_counts.max(initial=0))
    largest_chunk = max(SMALLEST_CHUNK_ROWS, CHUNK_BYTES // row_bytes // SMALLEST_CHUNK_ROWS * SMALLEST_CHUNK_ROWS)
    wanted = max(longest, min(-(-total // SHARDS_WANTED), SHARD_BYTES // row_bytes), 1)
    chunks = -(-wanted // largest_chunk)
    chunk_rows = _up(-(-wanted // chunks), SMALLEST_CHUNK_ROWS)
    shard_rows = chunks * chunk_rows

    starts, shard, room = [0], np.zeros(len(row_counts), dtype=np.int64), shard_rows
    first_row = np.zeros(len(row_counts), dtype=np.int64)
    for index, count in enumerate(row_counts.tolist()):
        if count > room:
            starts.append(index)
            room = shard_rows
        shard[index] = len(starts) - 1
        first_row[index] = len(starts) * shard_rows - room
        room -= count
    starts.append(len(row_counts))
    shard_starts = np.array(starts, dtype=np.int64)
    shard_texts = max(1, int(np.diff(shard_starts).max()))
    text_id = shard * shard_texts + np.arange(len(row_counts)) - shard_starts[shard]
    geometry = Geometry(
        shards=len(starts) - 1,
        shard_rows=shard_rows,
        chunk_rows=chunk_rows,
        shard_texts=shard_texts,
        rows=total,
        texts=len(row_counts),
    )
    return Placement(geometry=geometry, text_id=text_id, first_row=first_row, shard_starts=shard_starts)


def _up(number: int, step: int) -> int:
    return -(-number // step) * step
