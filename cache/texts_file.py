"""`texts.parquet`: how it is written, and what it must be to be read."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..errors import CacheCorrupt
from .layout import Geometry
from .parquet_pages import memory

# What every file of texts has, and of which types: pipelines count rows in 32 bits, other writers in 64.
_COLUMNS = {
    "text_id": (pa.int64(),),
    "split": (pa.string(),),
    "label": (pa.int32(),),
    "prediction": (pa.int32(),),
    "first_row": (pa.int64(),),
    "row_count": (pa.int32(), pa.int64()),
}
_NEVER_NULL = ("text_id", "split", "first_row", "row_count")
# A table may take this much, and this much more for each byte of its file.
_FREE_BYTES, _BYTES_PER_BYTE = 256 << 20, 16


def texts_parquet(table: pa.Table) -> bytes:
    """The table as Parquet.

    Strings but for the splits are not made a dictionary of: how much memory they take then shows without decoding them.
    """
    sink = pa.BufferOutputStream()
    pq.write_table(
        table, sink, compression="zstd", store_schema=False, use_dictionary=["split"], write_statistics=False
    )
    return bytes(sink.getvalue())


def read_texts_table(data: bytes, geometry: Geometry, *, name: str) -> pa.Table:
    """The table in a file that may come from a stranger; `name` is named in errors.

    Raises
    ------
    CacheCorrupt
        Where it is not what `texts_parquet` writes, contradicts the geometry, or would take far more memory than a file
        of its size does.
    """
    try:
        takes, most = memory(data), _FREE_BYTES + _BYTES_PER_BYTE * len(data)
        if takes > most:
            raise ValueError(f"its {len(data):,} bytes would take {takes:,} in memory")
        file = pq.ParquetFile(pa.BufferReader(data))
        if file.metadata.num_rows != geometry.texts:
            raise ValueError(f"it has {file.metadata.num_rows} texts, and the manifest counts {geometry.texts}")
        names = file.schema_arrow.names
        if len(set(names)) < len(names):
            raise ValueError("it has two columns of one name")
        for column, types in _COLUMNS.items():
            found = file.schema_arrow.field(column).type if column in names else "missing"
            if found not in types:
                raise ValueError(f"its column {column} is {found} instead of {types[0]}")
        # Arrow's threads would still hold a Python buffer when a short command ends, and abort the process.
        table = file.read(use_threads=False)
        table.validate(full=True)
        _check_places(table, geometry)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise CacheCorrupt(f"{name} cannot be read ({error}); get a whole copy of it") from error
    return table


def _check_places(table: pa.Table, geometry: Geometry) -> None:
    for column in _NEVER_NULL:
        if table[column].null_count:
            raise ValueError(f"its column {column} has gaps")
    text, first, count = (
        np.asarray(pc.cast(table[column], pa.int64())) for column in ("text_id", "first_row", "row_count")
    )
    if len(text) and (text[0] < 0 or text[-1] >= geometry.text_places or (np.diff(text) <= 0).any()):
        raise ValueError("its text ids do not ascend within the text axis")
    if (first < 0).any() or (count < 0).any() or (count > geometry.shard_rows).any():
        raise ValueError("a text has no place on the row axis")
    shard, filled = text // geometry.shard_texts, count > 0
    if (first[filled] // geometry.shard_rows != shard[filled]).any() or (
        (first + count)[filled] > (shard[filled] + 1) * geometry.shard_rows
    ).any():
        raise ValueError("the rows of a text lie outside its shard")
    if (first[filled][1:] < (first + count)[filled][:-1]).any():
        raise ValueError("the rows of two texts overlap")
    if count.sum() != geometry.rows:
        raise ValueError(f"its texts have {count.sum()} rows, and the manifest counts {geometry.rows}")
